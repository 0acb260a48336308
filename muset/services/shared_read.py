"""One reading of a value for all who ask for it at the same time."""

import threading
from collections.abc import Callable, Hashable
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


class _Line(Generic[T]):
    """Readings of one value: the one that goes on, and the one that comes after it."""

    def __init__(self) -> None:
        self.running: _Reading[T] | None = None
        self.next: _Reading[T] | None = None


class SharedRead(Generic[T]):
    """Reads what changes seldom and is asked for often.

    Nobody gets what was read before he asked: whoever comes during a reading waits for the next
    one, together with all who come till it begins.

    Args:
        read: Reads it. Those who give it equal arguments share a reading.
    """

    def __init__(self, read: Callable[..., T]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._lines: dict[tuple[Hashable, ...], _Line[T]] = {}

    def __call__(self, *args: Hashable) -> T:
        """The value as it is now.

        Args:
            *args: Of `read`.

        Raises:
            OperationTimeoutError: The caller can wait no longer.
            Exception: What reading it has raised.
        """
        while True:
            with self._lock:
                line = self._lines.setdefault(args, _Line())
                reading, is_mine = line.next, line.next is None
                if reading is None:
                    reading = line.next = _Reading()
                before = line.running
            if is_mine:
                return self._lead(args, line, reading, before)
            reading.over.wait(deadline.remaining())
            deadline.check()
            if reading.error is not None:
                raise reading.error.with_traceback(reading.traceback)
            if reading.found:
                return reading.found[0]

    def _lead(
        self,
        args: tuple[Hashable, ...],
        line: _Line[T],
        reading: _Reading[T],
        before: _Reading[T] | None,
    ) -> T:
        """Read for all who wait, when the one that goes on is over."""
        try:
            if before is not None:
                before.over.wait(deadline.remaining())
            with self._lock:
                line.next, line.running = None, reading
            reading.found.append(self._read(*args))
            return reading.found[0]
        except Exception as error:
            reading.error, reading.traceback = error, error.__traceback__
            raise
        finally:
            with self._lock:
                if line.next is reading:
                    line.next = None
                if line.running is reading:
                    line.running = None
                if line.next is None and line.running is None and self._lines.get(args) is line:
                    del self._lines[args]
            reading.over.set()
