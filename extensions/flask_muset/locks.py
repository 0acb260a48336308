"""Locks for a few counters, the same under threads, under gevent and after a fork.

They are the operating system's, patched or not: what they protect never waits, so under gevent
nobody ever contends for one, and a lock that was made before gevent patched can neither let two
greenlets in nor stop the process. Nothing may be called under one that could switch greenlets.
"""

import _thread
import os
import sys
import weakref
from typing import Any

__all__ = ["give_lock"]

_owners: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _allocate() -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return _thread.allocate_lock()
    return monkey.get_original("_thread", "allocate_lock")()


def give_lock(owner: Any) -> None:
    """Set `owner._lock`, and set it anew in a forked child, whose parent may have held it."""
    owner._lock = _allocate()
    _owners.add(owner)


def _renew() -> None:
    for owner in list(_owners):
        owner._lock = _allocate()


os.register_at_fork(after_in_child=_renew)
