"""A circuit breaker: what is known to fail is not called for a while."""

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from flask_muset import context
from flask_muset.clock import SYSTEM, Clock
from flask_muset.configuration import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    COUNT,
    EXCEPTIONS,
    SHARE,
    Key,
    check,
    one_of,
    optional,
)
from flask_muset.deadline import Expired
from flask_muset.errors import CircuitOpenError
from flask_muset.locks import give_lock
from flask_muset.resilience.guards import (
    Call,
    Part,
    current_outcome,
    error_of,
)
from flask_muset.resilience.windows import FAILED, OK, SLOW, CountWindow, TimeWindow, Window
from flask_muset.signals import BreakerEvent, Decision, breaker_changed, policy_decided

__all__ = ["BreakerState", "CircuitBreaker"]

_MODES = ("enforce", "observe", "off")
#: An open time that follows Retry-After is at most this, in seconds, where nothing else is said:
#: a mistaken header must not take a dependency away for a day.
_RETRY_AFTER_CAP_S = 300.0
_new, _asked = CircuitOpenError.__new__, current_outcome.get
#: Retry-After while probes are under way, in seconds.
_PROBING_S = 1.0


#: What counts as nothing: classes, or a function of the exception.
Ignore = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


class BreakerState(StrEnum):
    """Whether calls are let through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


_CLOSED, _OPEN, _HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
#: The states in which calls are let through and counted, or let through only.
_FORCED_OPEN, _FORCED_CLOSED = BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED


class _Ticket:
    """A call that began, of a state that may have passed when it ends."""

    __slots__ = ("began", "era", "probe")

    def __init__(self, era: int, began: float, probe: int = 0) -> None:
        self.era = era
        self.began = began
        #: Number of the round of probes that it belongs to, 0 for a call that is none.
        self.probe = probe


class CircuitBreaker(Part):
    """Refuse calls to what is known to fail, and try now and then whether it is well again.

    Closed: calls are let through and counted. Open: they are refused with `CircuitOpenError` until
    the open time has passed. Half-open: exactly `half_open_calls` calls are let through as probes,
    all others refused; if so many succeed it closes, if one fails it opens again. When the open
    time has passed once more without a verdict, as many others are let through.

    What counts as a failure is in the error table; an error that the table does not count (a 404, a
    422) shows that the dependency answers. Refusals by this process itself, exceptions in `ignore`
    and calls that are cut off from outside count as nothing and give their probe back.

    Args:
        name: For people, events and metrics.
        failure_threshold: Failures in a row that open it, at least 1.
        recovery_timeout: Seconds that it stays open, above 0. A Retry-After of the failure that
            opened it is followed if it is longer.
        failure_rate: Share of failures that opens it, above 0 and at most 1, in place of the
            threshold.
        slow_call_rate: Share of slow calls that opens it, in place of the threshold.
        slow_call_duration: Seconds from which a call is slow.
        window_calls: The last calls that the rates are taken of, at least 1.
        window_seconds: The last seconds instead; None takes `window_calls`.
        minimum_calls: Calls in the window before a rate opens it, at least 1. A rate is looked at
            when a call has failed or was slow.
        half_open_calls: Number of probes, at least 1.
        recovery_growth: Factor of the open time each time the probes fail, at least 1.
        max_recovery_timeout: Bound of the open time in seconds, grown or told by Retry-After.
        ignore: Exception classes that count as nothing, or a function of the exception.
        mode: `enforce`; `observe` counts what it would refuse and refuses nothing; `off`.
        clock: Time; None takes the system's.

    Source: the states of M. Nygard's "Release It!"; rates, minimum of calls and slow calls as in
    resilience4j.
    """

    kind = "circuit_breaker"

    def __init__(
        self,
        name: str,
        *,
        failure_threshold: int = 5,
        recovery_timeout: float = 60.0,
        failure_rate: float | None = None,
        slow_call_rate: float | None = None,
        slow_call_duration: float | None = None,
        window_calls: int = 100,
        window_seconds: float | None = None,
        minimum_calls: int = 10,
        half_open_calls: int = 1,
        recovery_growth: float = 1.0,
        max_recovery_timeout: float | None = None,
        ignore: Ignore = (),
        mode: str = "enforce",
        clock: Clock | None = None,
    ) -> None:
        self._options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check(self._options)
        self.name = name
        self.mode = mode
        self._threshold = failure_threshold
        self._open_s = recovery_timeout
        self._failure_rate = failure_rate
        self._slow_rate = slow_call_rate
        self._slow_s = slow_call_duration
        self._minimum = minimum_calls
        self._probes = half_open_calls
        self._growth = recovery_growth
        self._max_open_s = max_recovery_timeout
        self._ignore = ignore
        self._clock = clock or SYSTEM
        self._window: Window = (
            CountWindow(window_calls) if window_seconds is None else TimeWindow(window_seconds)
        )
        give_lock(self)
        self._state = _CLOSED
        self._era = (
            0  # grows with each change of state; what began in an earlier one is not counted
        )
        self._streak = 0
        self._trips = 0
        self._until = 0.0
        self._opened_at: float | None = None
        self._admitted = self._succeeded = 0
        self._round = 1
        self._forced_until = math.inf
        #: Until when it is open and refuses, so that refusing needs no lock.
        self._refuses_until = 0.0
        #: Whether it is closed and counts, which needs no look at the time.
        self._is_plain = mode != "off"
        self._message = f"the circuit {name!r} is open"
        super().__init__()

    _lock: Any

    # --- a call's way ---

    def layer(self, inner: Call) -> Call:
        """Put it round plain calls; while it is closed, a call that succeeds needs no lock."""
        carefully = super().layer(inner)
        if self._slow_s is not None or not isinstance(self._window, CountWindow):
            return carefully
        append, clock = self._window.append, self._clock

        def guarded(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._is_plain:
                left = self._refuses_until - clock.now()
                if left > 0:
                    raise self._refusal(left)
                return carefully(fn, args, kwargs)
            era = self._era
            try:
                result = inner(fn, args, kwargs)
            except BaseException as error:
                self.leave(_Ticket(era, 0.0), error)
                raise
            if era == self._era:
                append(OK)
                if self._streak:
                    self._end_streak(era)
            return result

        return guarded

    def _refusal(self, wait_s: float) -> CircuitOpenError:
        if policy_decided.receivers or _asked():
            self.tell(Decision.REJECTED)
        # Without __init__, which only sets what is given: this is half of a refusal's cost.
        error = _new(CircuitOpenError, self._message)
        error._retry_after = wait_s
        return error  # type: ignore[no-any-return]

    def _end_streak(self, era: int) -> None:
        with self._lock:
            if era == self._era:
                self._streak = 0

    def enter(self) -> _Ticket | None:
        """Let a call begin.

        Raises:
            CircuitOpenError: It is open, or its probes are under way.
        """
        if self._is_plain:
            return _Ticket(self._era, self._clock.now() if self._slow_s else 0.0)
        now = self._clock.now()
        with self._lock:
            changes = self._elapse(now)
            ticket, refused = None, False
            if self._state is _CLOSED:
                ticket = _Ticket(self._era, now) if self.mode != "off" else None
            elif self._state is _HALF_OPEN and self._admitted < self._probes:
                self._admitted += 1
                ticket = _Ticket(self._era, now, self._round)
            else:
                refused = self._state is not _FORCED_CLOSED
            wait_s = self._left(now)
        self._tell(changes)
        if not refused:
            return ticket
        if self.mode != "enforce" and self._state is not _FORCED_OPEN:
            self.tell(Decision.WOULD_REJECT)
            return None
        raise self._refusal(wait_s)

    def leave(self, token: _Ticket | None, error: BaseException | None) -> None:
        """Count a call."""
        if token is None:
            return
        failed = None if error is None else self._failed(error)
        if error is not None and failed is None:
            self._give_back(token)
            return
        now = self._clock.now()
        outcome = FAILED if failed else OK
        if self._slow_s is not None and now - token.began >= self._slow_s:
            outcome |= SLOW
        with self._lock:
            if token.era != self._era:
                return
            changes = self._count(token, outcome, now, error)
        self._tell(changes)

    @property
    def _by_rate(self) -> bool:
        return self._failure_rate is not None or self._slow_rate is not None

    def _failed(self, error: BaseException) -> bool | None:
        """Whether an error is the dependency's; None if it says nothing about it."""
        if isinstance(error, Expired):
            return True if error.scope.counts else None
        if not isinstance(error, Exception) or self._ignores(error):
            return None
        known = error_of(error)
        return None if known.refusal else known.row.counts_as_failure

    def _ignores(self, error: Exception) -> bool:
        ignore = self._ignore
        return isinstance(error, ignore) if isinstance(ignore, type | tuple) else ignore(error)

    def _give_back(self, token: _Ticket) -> None:
        if token.probe:
            with self._lock:
                if token.era == self._era and token.probe == self._round:
                    self._admitted -= 1

    def _count(
        self, token: _Ticket, outcome: int, now: float, error: BaseException | None
    ) -> list[BreakerEvent]:
        """What follows from one outcome; under the lock."""
        if token.probe:
            if outcome & FAILED or (outcome and self._slow_rate is not None):
                return self._open(now, error)
            self._succeeded += 1
            return self._close() if self._succeeded >= self._probes else []
        self._window.add(outcome, now)
        self._streak = self._streak + 1 if outcome & FAILED else 0
        if not outcome:
            return []
        if not self._by_rate:
            return self._open(now, error) if self._streak >= self._threshold else []
        calls, failures, slow = self._window.totals(now)
        over = (self._failure_rate is not None and failures >= self._failure_rate * calls) or (
            self._slow_rate is not None and slow >= self._slow_rate * calls
        )
        return self._open(now, error) if over and calls >= self._minimum else []

    # --- states; under the lock ---

    def _change(self, new: BreakerState) -> list[BreakerEvent]:
        old, self._state = self._state, new
        self._is_plain = new is _CLOSED and self.mode != "off"
        self._refuses_until = self._until if new is _OPEN and self.mode == "enforce" else 0.0
        self._era += 1
        self._admitted = self._succeeded = self._streak = 0
        return [BreakerEvent(self.name, old.value, new.value)] if new is not old else []

    def _open(self, now: float, error: BaseException | None) -> list[BreakerEvent]:
        cap = self._max_open_s
        try:
            open_s = self._open_s * self._growth**self._trips
        except OverflowError:
            open_s = math.inf
        told = error_of(error).retry_after_s if isinstance(error, Exception) else None
        if told is not None:
            open_s = max(open_s, min(told, _RETRY_AFTER_CAP_S if cap is None else cap))
        self._trips += 1
        self._until = now + (open_s if cap is None else min(open_s, cap))
        self._opened_at = self._clock.wall()
        return self._change(_OPEN)

    def _close(self) -> list[BreakerEvent]:
        self._trips = 0
        self._opened_at = None
        self._window.clear()
        return self._change(_CLOSED)

    def _elapse(self, now: float) -> list[BreakerEvent]:
        """What time alone has changed."""
        if self._state in (_FORCED_OPEN, _FORCED_CLOSED) and now >= self._forced_until:
            return self._close()
        if self._state in (_OPEN, _HALF_OPEN) and now >= self._until:
            self._until = now + self._open_s
            if self._state is _OPEN:
                return self._change(_HALF_OPEN)
            # The probes that are under way have had their time: others may try. What those come to
            # still counts, or a dependency that takes longer than this would never be well again.
            self._admitted = 0
            self._round += 1
        return []

    def _left(self, now: float) -> float:
        """Seconds until a call may be let through."""
        if self._state is _HALF_OPEN:
            return _PROBING_S  # what the probes say is known soon
        until = self._forced_until if self._state is _FORCED_OPEN else self._until
        return self._open_s if until == math.inf else max(0.0, until - now)

    def _tell(self, changes: list[BreakerEvent]) -> None:
        for change in changes:
            context.emit(breaker_changed, change)

    # --- for people ---

    @property
    def state(self) -> BreakerState:
        """The state now; an open breaker whose time has passed is half-open, called or not."""
        now = self._clock.now()
        with self._lock:
            return self._seen(now)

    def _seen(self, now: float) -> BreakerState:
        if self._state is _OPEN and now >= self._until:
            return _HALF_OPEN
        is_forced = self._state in (_FORCED_OPEN, _FORCED_CLOSED)
        return _CLOSED if is_forced and now >= self._forced_until else self._state

    def snapshot(self) -> dict[str, Any]:
        """What is known now.

        The keys are `state, calls, failures, slow_calls, failure_rate, slow_call_rate, opened_at,
        retry_after`. The numbers are those of the window, the rates from 0 to 1, `opened_at` in
        seconds since the epoch, `retry_after` in seconds, None where nothing is refused.
        """
        now = self._clock.now()
        with self._lock:
            state = self._seen(now)
            calls, failures, slow = self._window.totals(now)
            opened_at, left = self._opened_at, self._left(now)
        refuses = state in (_OPEN, _FORCED_OPEN)
        return {
            "state": state.value,
            "calls": calls,
            "failures": failures,
            "slow_calls": slow,
            "failure_rate": failures / calls if calls else 0.0,
            "slow_call_rate": slow / calls if calls else 0.0,
            "opened_at": opened_at,
            "retry_after": left if refuses else None,
        }

    def force_open(self, expires_s: float | None = None) -> None:
        """Refuse all calls, in every mode.

        Args:
            expires_s: Seconds after which it closes by itself; None for never.
        """
        self._force(_FORCED_OPEN, expires_s)

    def force_closed(self, expires_s: float | None = None) -> None:
        """Let all calls through and count none.

        Args:
            expires_s: Seconds after which it works again by itself; None for never.
        """
        self._force(_FORCED_CLOSED, expires_s)

    def _force(self, state: BreakerState, expires_s: float | None) -> None:
        if expires_s is not None:
            check("CircuitBreaker", {"expires_s": expires_s}, {"expires_s": ABOVE_ZERO})
        with self._lock:
            self._forced_until = math.inf if expires_s is None else self._clock.now() + expires_s
            if state is _FORCED_OPEN:
                self._opened_at = self._clock.wall()
            changes = self._change(state)
        self._tell(changes)

    def reset(self) -> None:
        """Close it and forget all calls."""
        with self._lock:
            changes = self._close()
        self._tell(changes)

    def set_mode(self, mode: str) -> None:
        """Change `mode`; in `off` nothing is counted and only a forced state refuses."""
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}.")
        self.mode = mode
        self.reset()


_ALLOWED = {
    "name": Key(None, lambda v: isinstance(v, str) and v != "", "a text that is not empty"),
    "failure_threshold": COUNT,
    "recovery_timeout": ABOVE_ZERO,
    "failure_rate": optional(SHARE),
    "slow_call_rate": optional(SHARE),
    "slow_call_duration": optional(ABOVE_ZERO),
    "window_calls": COUNT,
    "window_seconds": optional(ABOVE_ZERO),
    "minimum_calls": COUNT,
    "half_open_calls": COUNT,
    "recovery_growth": AT_LEAST_ONE,
    "max_recovery_timeout": optional(ABOVE_ZERO),
    "ignore": EXCEPTIONS,
    "mode": one_of("enforce", *_MODES),
}


def _check(options: dict[str, Any]) -> None:
    """Refuse arguments that are not allowed.

    Raises:
        ValueError: Names the argument, the value and what is expected.
    """
    own = f"CircuitBreaker {options['name']!r}"
    check(own, options, _ALLOWED)
    longest, first = options["max_recovery_timeout"], options["recovery_timeout"]
    if longest is not None and longest < first:
        raise ValueError(
            f"{own}: max_recovery_timeout must be at least recovery_timeout ({first!r}), "
            f"got {longest!r}."
        )
    if (options["slow_call_rate"] is None) != (options["slow_call_duration"] is None):
        raise ValueError(
            f"{own}: slow_call_rate and slow_call_duration belong together; give both or none."
        )
    size = options["window_calls"]
    if options["window_seconds"] is None and options["minimum_calls"] > size:
        raise ValueError(
            f"{own}: minimum_calls must be at most window_calls ({size!r}), "
            f"got {options['minimum_calls']!r}: a rate would never open it."
        )
