"""Locks for a few counters, the same under threads, under gevent and after a fork.

They are the operating system's, patched or not: what they protect never waits, so under gevent
nobody ever contends for one, and a lock that was made before gevent patched can neither let two
greenlets in nor stop the process. Nothing may be called under one that could switch greenlets.
"""

import _thread  # noqa: F401 - `original` looks it up
import os
import sys
import threading
import weakref
from typing import Any

__all__ = ["give_lock", "is_patched", "make_event", "original", "refuse_asyncio_under_gevent"]

_owners: "weakref.WeakSet[Any]" = weakref.WeakSet()


def is_patched(module: str = "threading") -> bool:
    """Whether gevent has patched a module of the standard library in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched(module))


def make_event() -> Any:
    """Something to wait for: `set`, `is_set` and `wait`, for greenlets or for threads."""
    if is_patched():
        # Far cheaper than the patched threading.Event, which is built of locks.
        from gevent.event import Event

        return Event()
    return threading.Event()


def refuse_asyncio_under_gevent() -> None:
    """Raise where asyncio cannot work.

    Raises:
        RuntimeError: gevent has patched this process: the running loop is kept per thread there,
            so two greenlets would meet in one loop.
    """
    if is_patched():
        raise RuntimeError(
            "asyncio does not work in a process that gevent has patched; write a plain function "
            "(it gives way while it waits) and use the name without flask_muset.aio and await."
        )


def original(module: str, name: str) -> Any:
    """What the operating system gives, patched or not.

    Args:
        module: Name of an imported module of the standard library.
        name: Of its attribute.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(sys.modules[module], name)
    return monkey.get_original(module, name)


def _allocate() -> Any:
    return original("_thread", "allocate_lock")()


def give_lock(owner: Any) -> None:
    """Set `owner._lock`, and set it anew in a forked child, whose parent may have held it."""
    owner._lock = _allocate()
    _owners.add(owner)


def _renew() -> None:
    for owner in list(_owners):
        owner._lock = _allocate()


os.register_at_fork(after_in_child=_renew)
