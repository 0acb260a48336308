"""How many retries a process may add to its calls."""

from flask_muset.clock import SYSTEM, Clock
from flask_muset.configuration import ABOVE_ZERO, AT_LEAST_ZERO, check
from flask_muset.locks import give_lock
from flask_muset.resilience.windows import FAILED, OK, TimeWindow

__all__ = ["RetryBudget"]


class RetryBudget:
    """Lets retries be a share of the calls, so that they cannot become a storm.

    In every window at most `floor * window + ratio * calls` retries are made.

    Args:
        ratio: Retries that each call adds, at least 0.
        floor: Retries a second that are always allowed, at least 0.
        window: Seconds that are looked at, above 0.
        clock: Time; None takes the system's.

    Source: Finagle's RetryBudget (20 % of the calls, deposits live for 10 s). Its floor of 10 a
    second is lower here, because a worker process serves tens of requests a second, not thousands.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        floor: float = 1.0,
        window: float = 10.0,
        *,
        clock: Clock | None = None,
    ) -> None:
        check(
            "RetryBudget",
            {"ratio": ratio, "floor": floor, "window": window},
            {"ratio": AT_LEAST_ZERO, "floor": AT_LEAST_ZERO, "window": ABOVE_ZERO},
        )
        self._numbers = ratio, floor, window
        self._ratio = ratio
        self._always = floor * window
        self._clock = clock or SYSTEM
        # One window for both: a call is counted as such, a retry as a failed one beside it.
        self._calls = TimeWindow(window)
        give_lock(self)

    _lock: object

    def like(self) -> "RetryBudget":
        """Another one with the same numbers."""
        return RetryBudget(*self._numbers, clock=self._clock)

    def deposit(self) -> None:
        """Count one call."""
        now = self._clock.now()
        with self._lock:  # type: ignore[attr-defined]
            self._calls.add(OK, now)

    def withdraw(self) -> bool:
        """Take one retry if the budget has it."""
        now = self._clock.now()
        with self._lock:  # type: ignore[attr-defined]
            total, retries, _ = self._calls.totals(now)
            if retries + 1 > self._always + self._ratio * (total - retries):
                return False
            self._calls.add(FAILED, now)
            return True
