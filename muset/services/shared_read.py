"""One reading of a value for all who ask for it at the same time."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from flask_muset.deadline import deadline
from flask_muset.locks import make_event

__all__ = ["SharedRead"]

T = TypeVar("T")


class _Reading(Generic[T]):
    """One reading: over with a value, with an error, or with neither if it was cut off."""

    def __init__(self) -> None:
        self.over = make_event()
        self.found: list[T] = []
        self.error: Exception | None = None
        self.traceback: TracebackType | None = None


class SharedRead(Generic[T]):
    """Reads a value that changes seldom and is asked for often.

    Nobody gets what was read before he asked: whoever comes during a reading waits for the next
    one, together with all who come till it begins.

    Args:
        read: Reads it.
    """

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._running: _Reading[T] | None = None
        self._next: _Reading[T] | None = None

    def __call__(self) -> T:
        """The value as it is now.

        Raises:
            OperationTimeoutError: The caller can wait no longer.
            Exception: What reading it has raised.
        """
        while True:
            with self._lock:
                reading, is_mine = self._next, self._next is None
                if reading is None:
                    reading = self._next = _Reading()
                before = self._running
            if is_mine:
                return self._lead(reading, before)
            reading.over.wait(deadline.remaining())
            deadline.check()
            if reading.error is not None:
                raise reading.error.with_traceback(reading.traceback)
            if reading.found:
                return reading.found[0]

    def _lead(self, reading: _Reading[T], before: _Reading[T] | None) -> T:
        """Read for all who wait, when the one that goes on is over."""
        try:
            if before is not None:
                before.over.wait(deadline.remaining())
            with self._lock:
                self._next, self._running = None, reading
            reading.found.append(self._read())
            return reading.found[0]
        except Exception as error:
            reading.error, reading.traceback = error, error.__traceback__
            raise
        finally:
            with self._lock:
                if self._next is reading:
                    self._next = None
                if self._running is reading:
                    self._running = None
            reading.over.set()
