"""What the newest calls came to, bounded in memory. The owner locks it where it says so."""

from collections import deque
from typing import Protocol

__all__ = ["FAILED", "OK", "SLOW", "CountWindow", "TimeWindow", "Window"]

#: Outcomes of a call; a call may be both failed and slow.
OK, FAILED, SLOW = 0, 1, 2

_BUCKETS = 10


class Window(Protocol):
    """Counts of the newest calls."""

    def add(self, outcome: int, now: float) -> None:
        """Count one call that ended at `now` seconds."""
        ...

    def totals(self, now: float) -> tuple[int, int, int]:
        """Number of calls, of failed ones and of slow ones."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...


class CountWindow:
    """The last calls.

    A call is one append, which needs no lock; the sums are taken when a call has failed.

    Args:
        size: How many, at least 1.
    """

    __slots__ = ("_outcomes", "append")

    def __init__(self, size: int) -> None:
        self._outcomes: deque[int] = deque(maxlen=size)
        #: Counts one call.
        self.append = self._outcomes.append

    def clear(self) -> None:
        """Forget all."""
        self._outcomes.clear()

    def add(self, outcome: int, now: float) -> None:
        """Count one call in place of the oldest."""
        self.append(outcome)

    def totals(self, now: float) -> tuple[int, int, int]:
        """Number of calls, of failed ones and of slow ones."""
        outcomes = self._outcomes.copy()
        both = outcomes.count(FAILED | SLOW)
        return len(outcomes), outcomes.count(FAILED) + both, outcomes.count(SLOW) + both


class TimeWindow:
    """The calls of the last seconds, to a tenth of the window. Needs the owner's lock.

    Args:
        seconds: Length of the window, above 0.
    """

    __slots__ = ("_counts", "_epochs", "_width")

    def __init__(self, seconds: float) -> None:
        self._width = seconds / _BUCKETS
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._epochs = [-1] * _BUCKETS
        self._counts = [[0, 0, 0] for _ in range(_BUCKETS)]

    def add(self, outcome: int, now: float) -> None:
        """Count one call in the bucket of its time."""
        epoch = int(now / self._width)
        i = epoch % _BUCKETS
        counts = self._counts[i]
        if self._epochs[i] != epoch:
            self._epochs[i] = epoch
            counts[:] = 0, 0, 0
        counts[0] += 1
        counts[1] += outcome & FAILED
        counts[2] += (outcome & SLOW) >> 1

    def totals(self, now: float) -> tuple[int, int, int]:
        """Number of calls, of failed ones and of slow ones."""
        oldest = int(now / self._width) - _BUCKETS
        live = [c for e, c in zip(self._epochs, self._counts, strict=True) if e > oldest]
        return sum(c[0] for c in live), sum(c[1] for c in live), sum(c[2] for c in live)
