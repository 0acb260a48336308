"""A circuit breaker: what is known to fail is not called for a while."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
from flask_muset.resilience.breaker_state import Busy, Common, Debt, Lease, Sharing
from flask_muset.resilience.guards import (
    Call,
    Part,
    current_outcome,
    error_of,
)
from flask_muset.resilience.windows import FAILED, OK, SLOW, CountWindow, TimeWindow, Window
from flask_muset.signals import (
    BreakerEvent,
    BreakerState,
    Decision,
    breaker_changed,
    policy_decided,
)

if TYPE_CHECKING:
    from asyncio import Future

__all__ = ["CircuitBreaker"]

_MODES = ("enforce", "observe", "off")
#: An open time that follows Retry-After is at most this, in seconds, where nothing else is said:
#: a mistaken header must not take a dependency away for a day.
_RETRY_AFTER_CAP_S = 300.0
_new, _asked = CircuitOpenError.__new__, current_outcome.get
#: Retry-After while probes are under way, in seconds.
_PROBING_S = 1.0
#: How often one call asks for the right to probe where the state changes meanwhile.
_TRIES = 2


#: What counts as nothing: classes, or a function of the exception.
Ignore = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


_CLOSED, _OPEN, _HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
_FORCED_OPEN, _FORCED_CLOSED = BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED
_FORCED = (_FORCED_OPEN, _FORCED_CLOSED)


class _Ticket:
    """A call that began, of a state that may have passed when it ends."""

    __slots__ = ("began", "era", "lease", "probe")

    def __init__(self, era: int, began: float, probe: int = 0) -> None:
        self.era = era
        self.began = began
        #: Number of the round of probes that it belongs to, 0 for a call that is none.
        self.probe = probe
        #: The right to probe that all processes know of.
        self.lease: Lease | None = None


class CircuitBreaker(Part):
    """Refuse calls to what is known to fail, and try now and then whether it is well again.

    Closed: calls are let through and counted. Open: they are refused with `CircuitOpenError` until
    the open time has passed. Half-open: exactly `half_open_calls` calls are let through as probes,
    all others refused; if so many succeed it closes, if one fails it opens again. When the open
    time has passed once more without a verdict, as many others are let through.

    What counts as a failure is in the error table; an error that the table does not count (a 404, a
    422) shows that the dependency answers. Refusals by this process itself, exceptions in `ignore`
    and calls that are cut off from outside count as nothing and give their probe back.

    In an app whose Resilience has a Redis, its state is that of the breakers with its name in all
    processes; what it counts stays its own.

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
        #: Until when it refuses whatever comes, so that refusing needs no lock.
        self._refuses_until = 0.0
        #: Whether it is closed and counts, which needs no look at the time.
        self._is_plain = mode != "off"
        self._sharing: Sharing | None = None
        #: By which others know it.
        self.shared_name = name
        #: Whether it has the state that others had when this process began.
        self.is_synchronised = True
        #: Of the state in common that its own one is based on.
        self._version = 0
        #: Number of the last change that others are to be told, 0 if they know all.
        self._owes = 0
        #: Number of the operator's last change that others are to be told, 0 for none: it holds
        #: whatever they have, and so does what followed it here.
        self._insists = 0
        self._changes = 0
        #: When to ask again for the right to probe.
        self._asks_at = 0.0
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
        self._synchronise()
        ticket, wait_s = self._admit()
        if ticket is not None and ticket.probe and self._sharing is not None:
            ticket, wait_s = self._ask(self._sharing, ticket)
        if wait_s is None:
            return ticket
        if self.mode != "enforce" and self._state is not _FORCED_OPEN:
            self.tell(Decision.WOULD_REJECT)
            return None
        raise self._refusal(wait_s)

    async def aenter(self) -> _Ticket | None:
        """`enter` where asyncio runs: what may wait for Redis does it in a thread."""
        if self._is_plain or not self._may_wait():
            return self.enter()
        import asyncio  # only where it runs already

        entering = asyncio.ensure_future(asyncio.to_thread(self.enter))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            entering.add_done_callback(self._leave_unused)
            raise

    def _may_wait(self) -> bool:
        if self._sharing is None:
            return False
        return not self.is_synchronised or self._seen(self._clock.now()) is _HALF_OPEN

    def _leave_unused(self, entered: "Future[_Ticket | None]") -> None:
        if not entered.cancelled() and entered.exception() is None:
            ticket = entered.result()
            if ticket is not None:
                self._give_back(ticket)

    def _synchronise(self) -> None:
        if not self.is_synchronised and self._sharing is not None:
            self._sharing.synchronise()

    def _admit(self) -> tuple[_Ticket | None, float | None]:
        """Let a call begin, or say for how many seconds it is refused."""
        now = self._clock.now()
        with self._lock:
            changes = self._elapse(now)
            ticket, wait_s = self._decide(now)
        try:
            self._tell(changes)
        except BaseException:
            if ticket is not None:
                self._give_back(ticket)
            raise
        return ticket, wait_s

    def _decide(self, now: float) -> tuple[_Ticket | None, float | None]:
        if self._state is _CLOSED:
            return (None if self.mode == "off" else _Ticket(self._era, now)), None
        if self._state is _FORCED_CLOSED:
            return None, None
        is_probe = self._state is _HALF_OPEN and self._admitted < self._probes
        if is_probe and now >= self._asks_at:
            self._admitted += 1
            return _Ticket(self._era, now, self._round), None
        return None, self._left(now)

    def _ask(self, sharing: Sharing, ticket: _Ticket) -> tuple[_Ticket | None, float | None]:
        """Ask whether a probe may begin, for all processes."""
        for _ in range(_TRIES):
            answer: Lease | Busy | None = None
            try:
                answer = sharing.ask(self)
            finally:
                if isinstance(answer, Lease):
                    self._take_lease(ticket, answer)
                else:
                    self._give_back(ticket)
            if isinstance(answer, Lease):
                return ticket, None
            if answer is not None:
                self._wait_for_others(ticket, answer.wait_s)
                return None, answer.wait_s
            again, wait_s = self._admit()
            if again is None or not again.probe:
                return again, wait_s
            ticket = again
        self._give_back(ticket)
        return None, _PROBING_S

    def _take_lease(self, ticket: _Ticket, lease: Lease) -> None:
        ticket.lease = lease
        with self._lock:
            if ticket.era == self._era and lease.version is not None:
                # The one who asked has told, too, that it is open.
                self._version, self._owes, self._insists = lease.version, 0, 0

    def _wait_for_others(self, ticket: _Ticket, wait_s: float) -> None:
        """Ask no more for a while; refusing sends nothing."""
        until = self._clock.now() + wait_s
        with self._lock:
            if ticket.era == self._era:
                self._asks_at = until
                self._choose_way()

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
        changes: list[BreakerEvent] = []
        with self._lock:
            counts = token.era == self._era
            if counts:
                changes = self._count(token, outcome, now, error)
            goes_on = counts and token.era == self._era
            if counts and not goes_on:
                self._owe()
        # In a round that goes on, a probe that is counted is one that has succeeded.
        self._settle(token, succeeded=True if goes_on else None)
        self._tell(changes)
        if counts and not goes_on:
            self._let_others_know()

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
                goes_on = token.era == self._era
                if goes_on and token.probe == self._round:
                    self._admitted -= 1
            self._settle(token, succeeded=False if goes_on else None)

    def _settle(self, token: _Ticket, *, succeeded: bool | None) -> None:
        if token.lease is not None and self._sharing is not None:
            self._sharing.settle(self, token.lease, succeeded=succeeded)

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
        self._asks_at = 0.0
        self._choose_way()
        self._era += 1
        self._admitted = self._succeeded = self._streak = 0
        return [BreakerEvent(self.name, old.value, new.value)] if new is not old else []

    def _choose_way(self) -> None:
        """How calls begin: in one of the two ways that need no lock, or with care."""
        is_known, state = self.is_synchronised, self._state
        self._is_plain = is_known and state is _CLOSED and self.mode != "off"
        until = {_OPEN: self._until, _HALF_OPEN: self._asks_at}.get(state, 0.0)
        self._refuses_until = until if is_known and self.mode == "enforce" else 0.0

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
        if self._state in _FORCED and now >= self._forced_until:
            if self._insists:
                # It has ended before others were told: what they have holds, whatever it is.
                self._owes = self._insists = self._version = 0
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
        sharing = self._sharing
        for change in changes:
            if sharing is None:
                context.emit(breaker_changed, change)
            else:
                sharing.tell(change)

    def _let_others_know(self) -> None:
        if self._sharing is not None:
            self._sharing.wake()

    # --- what it has in common with others ---

    def share(self, sharing: Sharing, name: str) -> None:
        """Have the state in common with the breakers of this name in other processes."""
        self._sharing, self.shared_name = sharing, name
        self._forked()

    def synchronised(self) -> None:
        """It has the state of the others, as far as that is known."""
        with self._lock:
            self.is_synchronised = True
            self._choose_way()

    def look_again(self) -> None:
        """What others do is not known here any more: the next call asks."""
        with self._lock:
            self.is_synchronised = False
            self._choose_way()

    def _forked(self) -> None:
        """The probes of the parent end there, and what others do meanwhile is not known here."""
        self._admitted = 0
        if self._sharing is not None:
            # What the parent owes it tells itself; whatever is stored holds here.
            self._owes = self._insists = self._version = 0
            self.look_again()

    @property
    def version(self) -> int:
        """Of the state in common that its own one is based on."""
        return self._version

    def common(self) -> Common:
        """Its state, as others are told."""
        now = self._clock.now()
        with self._lock:
            return self._common(now)

    def _common(self, now: float) -> Common:
        state, left_s, age_s = self._seen(now), math.inf, None
        if state in _FORCED:
            left_s = self._forced_until - now
        elif state is not _CLOSED:
            state, left_s = _OPEN, max(0.0, self._until - now) if state is _OPEN else 0.0
        if self._opened_at is not None:
            age_s = max(0.0, self._clock.wall() - self._opened_at)
        return Common(self._version, state, left_s, self._trips, age_s)

    def pass_time(self) -> None:
        """Change what time alone has changed, called or not."""
        now = self._clock.now()
        with self._lock:
            changes = self._elapse(now)
        self._tell(changes)

    def debt(self) -> Debt | None:
        """What others are to be told, None for nothing."""
        now = self._clock.now()
        with self._lock:
            return Debt(self._owes, self._common(now), self._insists > 0) if self._owes else None

    def owe_anew(self, *, is_stale: bool) -> None:
        """Nobody knows its state any more: let it be told again, unless it is closed.

        Args:
            is_stale: Whether others may have ended it so long ago that this is forgotten, too. What
                they have forced is over then.
        """
        changes: list[BreakerEvent] = []
        with self._lock:
            if self._owes or self._state is _CLOSED:
                return
            if is_stale and self._version and self._state in _FORCED:
                self._version, changes = 0, self._close()
            else:
                self._owe()
        self._tell(changes)

    def paid(self, debt: Debt, stored: Common) -> None:
        """Others have been told."""
        now = self._clock.now()
        with self._lock:
            self._version = max(self._version, stored.version)
            if self._insists <= debt.number:
                self._insists = 0
            if self._owes == debt.number:
                self._owes = 0
                if self._state is _OPEN:
                    self._until = now + stored.left_s
                    self._choose_way()

    def adopt(self, stored: Common, seen: int | None = None) -> None:
        """Take the state that others have, unless it is older than what is known.

        Args:
            stored: Their state.
            seen: `version` before it was asked for: if that has not changed, what is stored holds
                even if its version is smaller. None for what nobody has asked for.
        """
        now = self._clock.now()
        changes: list[BreakerEvent] = []
        with self._lock:
            is_asked = self._version == seen and stored.version != seen
            if is_asked or stored.version > self._version:
                changes = self._elapse(now) + self._take(stored, now)
        self._tell(changes)

    def _take(self, stored: Common, now: float) -> list[BreakerEvent]:
        self._version = stored.version
        if self._insists:
            return []
        self._owes = 0
        if stored.state is _CLOSED or (stored.state is _OPEN and self.mode == "off"):
            return self._close()
        if stored.state is _OPEN:
            self._until, self._trips = now + stored.left_s, stored.trips
        else:
            self._forced_until = now + stored.left_s
        wall = self._clock.wall()
        self._opened_at = None if stored.age_s is None else wall - stored.age_s
        return self._change(stored.state)

    def _owe(self, *, insists: bool = False) -> None:
        """Let others be told of the change; under the lock."""
        if self._sharing is not None:
            self._changes += 1
            self._owes = self._changes
            if insists:
                self._insists = self._changes

    # --- for people ---

    @property
    def state(self) -> BreakerState:
        """The state now; an open breaker whose time has passed is half-open, called or not."""
        self._synchronise()
        return self.known_state

    @property
    def known_state(self) -> BreakerState:
        """The same as far as this process knows, without asking others."""
        now = self._clock.now()
        with self._lock:
            return self._seen(now)

    def _seen(self, now: float) -> BreakerState:
        if self._state is _OPEN and now >= self._until:
            return _HALF_OPEN
        is_over = self._state in _FORCED and now >= self._forced_until
        return _CLOSED if is_over else self._state

    def snapshot(self) -> dict[str, Any]:
        """What is known now.

        The keys are `state, calls, failures, slow_calls, failure_rate, slow_call_rate, opened_at,
        retry_after`. The numbers are those of the window, the rates from 0 to 1, `opened_at` in
        seconds since the epoch, `retry_after` in seconds, None where nothing is refused.
        """
        self._synchronise()
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
            self._owe(insists=True)
        self._tell(changes)
        self._let_others_know()

    def reset(self) -> None:
        """Close it and forget all calls."""
        with self._lock:
            changes = self._close()
            self._owe(insists=True)
        self._tell(changes)
        self._let_others_know()

    def set_mode(self, mode: str) -> None:
        """Change `mode` in this process; in `off` nothing is counted, only a forced state refuses.

        It is closed and forgets all calls; where its state is shared, it then takes that.
        """
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}.")
        self.mode = mode
        with self._lock:
            changes = self._close()
            if self._sharing is not None:
                self.is_synchronised, self._version = False, 0
                self._owes = self._insists = 0
                self._choose_way()
        self._tell(changes)


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
