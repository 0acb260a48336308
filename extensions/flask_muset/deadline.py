"""How long the current work may still take.

    with deadline(2.0):
        ...
        requests.get(url, timeout=deadline.remaining())

A deadline nests to the smaller one. Where gevent runs, work that waits is cut off when the time is
up: an exception is thrown into its greenlet, and the `with` block raises `OperationTimeoutError`.
Work that computes cannot be cut, nor can a thread; both are told by `deadline.remaining()`, and the
policies count what ended too late as an overrun. No thread and no signal is used.

All deadlines of a hub share one timer: most work ends long before its time is up, so entering and
leaving only touch a heap.
"""

import heapq
import itertools
import math
import os
import sys
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from flask_muset.clock import SYSTEM
from flask_muset.errors import OperationTimeoutError
from flask_muset.locks import is_patched

__all__ = ["Expired", "Scope", "deadline"]

#: A timer of libev may fire a little early.
_TOLERANCE_S = 0.0005


class Expired(BaseException):
    """Cuts work off. Each deadline turns its own into `OperationTimeoutError`.

    Attributes:
        scope: Whose time is up.
    """

    def __init__(self, scope: "Scope") -> None:
        super().__init__("the deadline has passed")
        self.scope = scope


_current: ContextVar["Scope | None"] = ContextVar("flask_muset.deadline", default=None)


class Scope:
    """One deadline, from `enter` to `leave`.

    Args:
        seconds: How long it lasts, at least 0.
        counts: Whether work that it cuts off has failed, as a circuit breaker sees it. False for a
            deadline that a caller chose: it says nothing about the dependency.
    """

    __slots__ = (
        "_greenlet",
        "_outer",
        "_timers",
        "at",
        "counts",
        "expired",
        "is_running",
        "seconds",
    )

    def __init__(self, seconds: float, *, counts: bool = True) -> None:
        self.seconds = seconds
        self.counts = counts
        self.at = math.inf
        #: What was thrown, None while there is time.
        self.expired: Expired | None = None
        #: Whether it was entered, was not covered by an outer one, and has not ended.
        self.is_running = False
        self._outer: Scope | None = None
        self._timers: _Timers | None = None
        self._greenlet: Any = None

    def enter(self) -> None:
        """Begin; the time of an outer deadline that ends earlier holds."""
        at = SYSTEM.now() + self.seconds
        outer = _current.get()
        if outer is not None:
            # One that was left out of order, as in a generator that goes on, no longer holds.
            while outer is not None and not outer.is_running:
                outer = outer._outer
            if outer is not None and outer.at <= at:
                return
        self.at = at
        self.expired = None
        self._outer = outer
        timers = _timers()
        if timers is not None:
            timers.start(self)
            self._timers = timers
        self.is_running = True
        _current.set(self)

    def leave(
        self, error: BaseException | None = None
    ) -> tuple[OperationTimeoutError | None, bool]:
        """End.

        Args:
            error: What ended the work, None if it returned.

        Returns:
            What is to be raised because this deadline has cut the work off, else None; and whether
            the work ended too late without having been cut off.
        """
        if not self.is_running:
            return None, False
        self.is_running = False
        if self._timers is not None:
            self._timers.stop()
            self._timers = None
        if _current.get() is self:
            _current.set(self._outer)
        expired = self.expired
        if expired is not None and (error is expired or isinstance(error, Exception)):
            return self.error(), False
        return None, SYSTEM.now() > self.at + _TOLERANCE_S

    def expire(self) -> Expired:
        """Mark the time as up and return what is thrown."""
        self.expired = Expired(self)
        return self.expired

    def error(self) -> OperationTimeoutError:
        """What a caller gets; for a time that a caller chose it is a refusal, nobody's fault."""
        error = OperationTimeoutError(f"not done within {self.seconds:g} s")
        error.refusal = not self.counts
        return error


def _timers() -> "_Timers | None":
    """The timers of this thread's hub, None where nothing can be cut off."""
    local = sys.modules.get("gevent._hub_local")
    if local is None or SYSTEM.is_virtual:
        return None
    hub = local.get_hub_if_exists()
    if hub is None:
        # gevent's own native threads have no hub and must not get one.
        if not is_patched() or threading.main_thread() is not threading.current_thread():
            return None
        hub = local.get_hub()
    timers: _Timers | None = hub.__dict__.get("_flask_muset_timers")
    if timers is None or timers.pid != os.getpid():
        timers = hub._flask_muset_timers = _Timers(hub)
    return timers


def _running() -> Scope | None:
    """The innermost deadline that holds."""
    scope = _current.get()
    while scope is not None and not scope.is_running:
        scope = scope._outer
    return scope


class _Timers:
    """The deadlines of one hub: a heap, and one timer for the earliest.

    A scope that has ended stays in the heap until it is on top or until more than half are such.
    """

    def __init__(self, hub: Any) -> None:
        self.pid = os.getpid()
        self._loop = hub.loop
        self._getcurrent = sys.modules["greenlet"].getcurrent
        self._heap: list[tuple[float, int, Scope]] = []
        self._count = itertools.count()
        self._running = 0
        self._timer: Any = None
        self._armed_at = math.inf

    def start(self, scope: Scope) -> None:
        """Throw into the current greenlet when the scope's time is up."""
        scope._greenlet = self._getcurrent()
        heap = self._heap
        heapq.heappush(heap, (scope.at, next(self._count), scope))
        self._running += 1
        if scope.at < self._armed_at:
            self._arm(scope.at)
        elif self._running == 1:
            self._timer.ref = True
        if len(heap) > 64 and len(heap) > 2 * self._running:
            self._heap = [entry for entry in heap if entry[2].is_running]
            heapq.heapify(self._heap)

    def stop(self) -> None:
        """One scope less is running; its entry is left where it is."""
        self._running -= 1
        if self._running == 0 and self._timer is not None:
            # The event loop must not live on for a timer that nobody waits for.
            self._timer.ref = False

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.close()
        self._armed_at = at
        self._timer = self._loop.timer(max(0.0, at - SYSTEM.now()), ref=self._running > 0)
        self._timer.start(self._fire, update=True)

    def _fire(self) -> None:
        """Runs in the hub."""
        self._armed_at = -math.inf  # nobody arms while this goes on
        try:
            while self._heap and self._heap[0][0] <= SYSTEM.now() + _TOLERANCE_S:
                scope = heapq.heappop(self._heap)[2]
                if scope.is_running and not scope._greenlet.dead:
                    scope._greenlet.throw(scope.expire())
        finally:
            self._armed_at = math.inf
            while self._heap and not self._heap[0][2].is_running:
                heapq.heappop(self._heap)
            if self._heap:
                self._arm(self._heap[0][0])
            else:
                self._timer.close()
                self._timer = None


class _Block:
    """`with deadline(seconds)`; `async with` where asyncio runs."""

    __slots__ = ("_cut", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._cut: Any = None

    def __enter__(self) -> Scope:
        self._scope.enter()
        return self._scope

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        ours, _ = self._scope.leave(error)
        if ours is not None:
            raise ours from error

    async def __aenter__(self) -> Scope:
        import asyncio  # only where it runs already

        left = deadline.remaining()
        seconds = self._scope.seconds if left is None else min(left, self._scope.seconds)
        self._cut = asyncio.timeout(None if SYSTEM.is_virtual else seconds)
        await self._cut.__aenter__()
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ours, _ = self._scope.leave(error)
        try:
            await self._cut.__aexit__(kind, error, traceback)
        except TimeoutError:
            ours = self._scope.error()
        if ours is not None:
            raise ours from error


class _Deadline:
    """The function `deadline`, with what belongs to it."""

    def __call__(self, seconds: float, *, counts: bool = True) -> _Block:
        """Bound the time of a block.

        Args:
            seconds: At least 0; the smaller of nested ones holds.
            counts: False if work that it cuts off says nothing about what it waited for.

        Raises:
            ValueError: `seconds` is negative or no number.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a deadline must be at least 0 seconds and finite, got {seconds!r}.")
        return _Block(Scope(seconds, counts=counts))

    def anew(self) -> _Block | None:
        """The inherited deadline again, in a greenlet that only one of its own can cut off.

        Returns:
            None where none was inherited.
        """
        scope = _running()
        _current.set(None)
        if scope is None:
            return None
        return self(max(0.0, scope.at - SYSTEM.now()), counts=scope.counts)

    def can_cut(self) -> bool:
        """Whether work that waits can be cut off here."""
        return SYSTEM.is_virtual or _timers() is not None

    def remaining(self) -> float | None:
        """Seconds that are left, at least 0; None without a deadline."""
        scope = _running()
        return None if scope is None else max(0.0, scope.at - SYSTEM.now())

    def check(self) -> None:
        """Return while there is time: for work that computes and cannot be cut off.

        Raises:
            OperationTimeoutError: The time is up.
        """
        scope = _running()
        if scope is not None and SYSTEM.now() >= scope.at:
            raise scope.error()

    def current(self) -> Scope | None:
        """The deadline that ends first, None without one."""
        return _running()


deadline = _Deadline()
