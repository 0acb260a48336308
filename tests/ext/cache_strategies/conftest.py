"""What most tests of the cache need: a clock of their own, and a real Redis."""

import pytest
from redis_server import other_redis_server as other_redis_server
from redis_server import redis_server as redis_server

from flask_muset.testing import virtual_clock


@pytest.fixture
def clock():
    """A virtual clock; what expires in another process does so in real time."""
    with virtual_clock() as clock:
        yield clock
