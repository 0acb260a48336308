"""What is asked of gevent, which may not be there yet."""

import sys
import time
import types

from flask_muset.locks import is_patched, original


def test_gevent_that_is_being_imported_has_patched_nothing(monkeypatch):
    """Another thread may import gevent at this moment: its module is there and has no names."""
    monkeypatch.setitem(sys.modules, "gevent.monkey", types.ModuleType("gevent.monkey"))
    assert not is_patched()
    assert original("time", "sleep") is time.sleep
