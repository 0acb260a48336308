"""What differs between threads and greenlets, and after a fork: locks, events, work beside others.

The locks are for a few counters. They are the operating system's, patched or not: what they protect
never waits, so under gevent nobody ever contends for one, and a lock that was made before gevent
patched can neither let two greenlets in nor stop the process. Nothing may be called under one that
could switch greenlets.
"""

import _thread  # noqa: F401 - `original` looks it up
import contextvars
import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = [
    "give_lock",
    "has_lasting_hub",
    "is_patched",
    "make_event",
    "original",
    "refuse_asyncio_under_gevent",
    "run_beside",
]

_owners: "weakref.WeakSet[Any]" = weakref.WeakSet()


def is_patched(module: str = "threading") -> bool:
    """Whether gevent has patched a module of the standard library in this process."""
    # A module that another thread is importing lacks names, and has not patched anything yet.
    asked = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", None)
    return asked is not None and bool(asked(module))


def make_event(module: str = "threading") -> Any:
    """Something to wait for: `set`, `is_set` and `wait`.

    Args:
        module: It is for greenlets where gevent has patched this, else for threads.
    """
    if is_patched(module):
        # Far cheaper than the patched threading.Event, which is built of locks.
        from gevent.event import Event

        return Event()
    return threading.Event()


def run_beside(
    run: Callable[[], object],
    *,
    name: str | None = None,
    variables: contextvars.Context | None = None,
    module: str = "threading",
) -> Any:
    """Run something beside the current work.

    Args:
        run: What is run.
        name: Of the thread.
        variables: The context that it runs in; None for a new one, with neither a deadline nor an
            app of the caller.
        module: It is a greenlet where gevent has patched this, else a daemon thread.

    Returns:
        The greenlet or the thread, started.
    """
    context = contextvars.Context() if variables is None else variables
    target = partial(context.run, run)
    if is_patched(module):
        import gevent

        return gevent.spawn(target)
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def has_lasting_hub() -> bool:
    """Whether what is begun here goes on: a native thread of gevent's has a hub for one call."""
    if not is_patched():
        return True
    from gevent._hub_local import get_hub_if_exists

    hub = get_hub_if_exists()
    # Of the main thread before it has waited for anything: its number is the process's on Linux.
    return threading.get_native_id() == os.getpid() if hub is None else bool(hub.main_hub)


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
    get = getattr(sys.modules.get("gevent.monkey"), "get_original", None)
    return getattr(sys.modules[module], name) if get is None else get(module, name)


def _allocate() -> Any:
    return original("_thread", "allocate_lock")()


def give_lock(owner: Any) -> None:
    """Set `owner._lock`, and set it anew in a forked child, whose parent may have held it.

    There, once all locks are new, `owner._forked()` is called where there is such a method. It runs
    before gevent has its hub ready.
    """
    owner._lock = _allocate()
    _owners.add(owner)


def _begin_anew() -> None:
    owners = list(_owners)
    for owner in owners:
        owner._lock = _allocate()
    for owner in owners:
        forked = getattr(owner, "_forked", None)
        if forked is not None:
            forked()


os.register_at_fork(after_in_child=_begin_anew)
