"""A bound on how many calls run at once."""

import threading
from collections import deque
from typing import Any, NoReturn, Protocol

from flask_muset.clock import SYSTEM
from flask_muset.configuration import AT_LEAST_ZERO, COUNT, check
from flask_muset.deadline import Expired, deadline
from flask_muset.errors import OverloadedError
from flask_muset.locks import give_lock
from flask_muset.resilience.guards import Part
from flask_muset.signals import Decision

__all__ = ["Bulkhead"]

#: A wait ends so long before the deadline that whoever waits can be told why.
_SLACK_S = 0.05


class _Waiter(Protocol):
    def wake(self) -> None: ...


class _Parked:
    """A greenlet or thread that waits."""

    def __init__(self) -> None:
        # Made where it is needed: gevent's own where gevent has patched.
        self._event = threading.Event()

    def wake(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)


class _Awaited:
    """A task of asyncio that waits."""

    def __init__(self) -> None:
        import asyncio  # only where it runs already

        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._timeout = asyncio.timeout

    def wake(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float) -> bool:
        try:
            async with self._timeout(seconds):
                return await self._event.wait()
        except TimeoutError:
            return False


class Bulkhead(Part):
    """Let at most `limit` calls run at once; the others wait in line or are refused.

    A permit that is given back goes to whoever waits longest. It is given back whatever ends the
    call, a foreign time-out and a killed greenlet too. A generator holds it until its first item.

    Args:
        limit: Calls at once, at least 1.
        max_wait: Seconds in line at most, within the deadline; 0 refuses at once.
    """

    kind = "bulkhead"

    def __init__(self, limit: int, max_wait: float = 0.0) -> None:
        self._options = {"limit": limit, "max_wait": max_wait}
        check("Bulkhead", self._options, {"limit": COUNT, "max_wait": AT_LEAST_ZERO})
        self.limit = limit
        self.max_wait = max_wait
        self._free = limit
        self._line: deque[_Waiter] = deque()
        give_lock(self)
        super().__init__()

    _lock: Any

    @property
    def in_use(self) -> int:
        """Calls that run now."""
        return self.limit - self._free

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._line)

    def enter(self) -> None:
        """Take a permit.

        Raises:
            OverloadedError: None is free, and none became free in time.
        """
        if self._take_free():
            return
        seconds = self._seconds()
        if seconds > 0:
            waiter = _Parked()
            self._queue(waiter)
            try:
                given = waiter.wait(seconds)
            except Expired:
                # A busy hub was late. To a breaker this must not look like the dependency's time.
                self._give_up(waiter, give_back=True)
                self._refuse()
            except BaseException:
                self._give_up(waiter, give_back=True)
                raise
            if given or self._give_up(waiter):
                return
        self._refuse()

    async def aenter(self) -> None:
        """Take a permit; see `enter`."""
        if self._take_free():
            return
        seconds = self._seconds()
        if seconds > 0:
            waiter = _Awaited()
            self._queue(waiter)
            try:
                given = await waiter.wait(seconds)
            except BaseException:
                self._give_up(waiter, give_back=True)
                raise
            if given or self._give_up(waiter):
                return
        self._refuse()

    def leave(self, token: None, error: BaseException | None) -> None:
        """Give the permit to whoever waits longest, or back."""
        with self._lock:
            waiter = self._line.popleft() if self._line else None
            if waiter is None:
                self._free += 1
        if waiter is not None:
            waiter.wake()

    def _take_free(self) -> bool:
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    def _seconds(self) -> float:
        left = deadline.remaining()
        seconds = self.max_wait if left is None else min(self.max_wait, left - _SLACK_S)
        if seconds > 0 and SYSTEM.is_virtual:
            SYSTEM.sleep(seconds)  # nobody else runs meanwhile, so nothing becomes free
            return 0.0
        return seconds

    def _queue(self, waiter: _Waiter) -> None:
        """Stand in line; if a permit has become free meanwhile, the first in line has it."""
        with self._lock:
            self._line.append(waiter)
            if not self._free:
                return
            self._free -= 1
            first = self._line.popleft()
        first.wake()

    def _give_up(self, waiter: _Waiter, *, give_back: bool = False) -> bool:
        """Leave the line; True if the permit came at the last moment."""
        with self._lock:
            if waiter in self._line:
                self._line.remove(waiter)
                return False
        if give_back:
            self.leave(None, None)
        return True

    def _refuse(self) -> NoReturn:
        self.tell(Decision.REJECTED)
        raise OverloadedError(f"{self.name or 'a bulkhead'}: {self.limit} calls run already")
