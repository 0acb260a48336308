"""One state of each circuit breaker for all processes, and nobody waits for Redis.

What is counted stays in each process. A change of state is sent beside the calls, by one greenlet
or thread for each process, and published to all others, which listen on a connection of their own.
Below the deployment's prefix:

    breaker:<name>   a hash, see breaker_parts.lua
    breakers         a channel: b<version> <state> <left> <trips> <age> <name>, times in ms

A change names the version that it is based on, and holds only where that is what is stored: one
that comes late changes nothing. Only operators' changes always hold. The scripts decide, by the
clock of Redis. While it is away each process decides by itself; once it is back what is stored
holds, then what could not be sent, and what Redis has lost is sent anew.
"""

import logging
import math
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flask_muset.errors import (
    ExternalServiceError,
    MusetError,
    OperationTimeoutError,
    OverloadedError,
)
from flask_muset.feed import SENDER_BYTES, Feed
from flask_muset.locks import (
    give_lock,
    has_lasting_hub,
    is_patched,
    make_event,
    original,
    run_beside,
)
from flask_muset.redis import GuardedRedis, Script
from flask_muset.resilience.breaker_state import Busy, Common, Lease
from flask_muset.resilience.circuit_breaker import CircuitBreaker
from flask_muset.signals import BreakerEvent, BreakerState

__all__ = ["SharedBreakers"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at what there is to be sent; whatever is sent wakes it at once.
_TICK_S = 0.25
#: Since when it must be known that nothing was missed; the feed asks once a second.
_FRESH_S = 3.0
#: Longest lease of a probe; it is renewed while the probe runs.
_LEASE_S = 3.0
#: Nobody asks more often than that for the right to probe unless a lease ends earlier.
_ASK_S = 1.0
#: Where the link stays up, it was this process that had too much to do: others may be asked.
_TOO_BUSY = OverloadedError, OperationTimeoutError
#: Breakers that are read at once, so that Redis is never held up.
_AT_ONCE = 500
#: How long a change is stored, in seconds; well above any open time.
_KEPT_S = 86_400.0
#: Ten years: what lasts longer is told as lasting so long.
_LONGEST_S = 10 * 365 * 86_400
#: Probes whose end is not sent yet. More are dropped: their leases end by themselves.
_MOST_ENDED = 1000


def _text_of(name: str) -> str:
    return Path(__file__).with_name(f"breaker_{name}.lua").read_text("utf-8")


_PARTS = _text_of("parts")


def _script(name: str) -> Script:
    return Script(f"local KEPT = {_KEPT_S * 1000:.0f}\n{_PARTS}{_text_of(name)}")


_READ, _CHANGE, _PROBE = _script("read"), _script("change"), _script("probe")
_RENEW, _SUCCEEDED = _script("renew"), _script("succeeded")


class _Held(NamedTuple):
    """The right to probe that this process has now; it is renewed until a moment."""

    breaker: CircuitBreaker
    until: float


class _Ended(NamedTuple):
    """A probe of this process that has ended."""

    breaker: CircuitBreaker
    lease: Lease
    succeeded: bool


class SharedBreakers:
    """The circuit breakers of one app, in common with those of the same names elsewhere.

    Args:
        redis: Where the states are.
        tell: Is told of each breaker's change.
        tell_state: Is told of each new `state`.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        *,
        tell: Callable[[BreakerEvent], None],
        tell_state: Callable[[str], None],
    ) -> None:
        self._redis = redis
        self._channel = redis.key("breakers")
        self.tell = tell
        self._tell_state = tell_state
        self._breakers: dict[str, CircuitBreaker] = {}
        self._begin_anew()
        give_lock(self)

    _lock: Any

    def _begin_anew(self) -> None:
        self._sender = secrets.token_hex(SENDER_BYTES // 2).encode()
        self._feed: Feed | None = None
        self._thread: int | None = None
        #: What wakes the loop, None as long as none runs in this process.
        self._wake: Any = None
        #: Until when somebody reads for all who wait.
        self._reading: Any = None
        #: Until when somebody sends what a breaker owes, by its name.
        self._sending: dict[str, Any] = {}
        #: Stands for what was missed and is to be read, None if there is nothing.
        self._must_read: object | None = object()
        self._confirmed_at = -math.inf
        #: Whether Redis answers and refuses what is sent.
        self._is_refused = False
        self._told = ""
        self._held: dict[str, _Held] = {}
        self._renew_at = 0.0
        self._ended: deque[_Ended] = deque(maxlen=_MOST_ENDED)

    def _forked(self) -> None:
        """The feed and the loop are the parent's."""
        feed = self._feed
        self._begin_anew()
        if feed is not None:
            feed.abandon()

    def add(self, name: str, breaker: CircuitBreaker) -> None:
        """Let a breaker have its state in common with those of this name.

        Raises:
            ValueError: Another breaker has the name.
        """
        known = self._breakers.get(name)
        if known is None:
            self._breakers[name] = breaker
            breaker.share(self, name)
        elif known is not breaker:
            raise ValueError(
                f"two circuit breakers are called {name!r}; all workers know a breaker by its "
                "name, so give each one of its own, or use one CircuitBreaker in both places."
            )

    @property
    def state(self) -> str:
        """Whether all processes agree: `shared`, `doubt` or `local`."""
        link = self._redis.state
        if link == "down":
            return "local"
        is_fresh = time.monotonic() - self._confirmed_at < _FRESH_S
        is_sure = link == "up" and is_fresh and not self._is_refused
        return "shared" if is_sure else "doubt"

    # --- What a breaker asks for

    def begin(self) -> None:
        """Begin in this process if that has not happened, and know what others have."""
        if self._thread is None:
            self.synchronise()

    def synchronise(self) -> None:
        """Begin in this process: breakers that are new here get the state that others have."""
        if not self._begin():
            return
        mine = make_event()
        with self._lock:
            reading = self._reading
            if reading is None:
                self._reading = mine
        if reading is not None:
            reading.wait(self._redis.budget_s)
            return
        try:
            self._synchronise()
        finally:
            self._reading = None
            mine.set()

    def _synchronise(self) -> None:
        breakers = [one for one in list(self._breakers.values()) if not one.is_synchronised]
        try:
            if self._confirmed_at == -math.inf:
                self._read_all()
            else:
                self._read(breakers)
        except MusetError as error:
            _log.debug("the states of circuit breakers are not known: %s", error)
        for breaker in breakers:
            breaker.synchronised()

    def ask(self, breaker: CircuitBreaker) -> Lease | Busy | None:
        """Ask for the right to probe; where nobody can be asked, this process decides alone."""
        if not self._begin() or self._redis.state != "up":
            return Lease("", None)
        token = secrets.token_hex(8)
        open_s = breaker.options["recovery_timeout"]
        self._held[token] = _Held(breaker, time.monotonic() + open_s)
        try:
            answer = self._ask(breaker, token, min(_LEASE_S, open_s))
        except BaseException as error:
            # It may have been given.
            self.settle(breaker, Lease(token, None), succeeded=False)
            if not isinstance(error, _TOO_BUSY):
                raise
            return Busy(_ASK_S)
        if not isinstance(answer, Lease):
            self._held.pop(token, None)
        return answer

    def _ask(self, breaker: CircuitBreaker, token: str, lease_s: float) -> Lease | Busy | None:
        common = breaker.common()
        probes = breaker.options["half_open_calls"]
        words = token, _ms(lease_s), probes, common.trips, _ms(common.age_s), _ms(_LEASE_S)
        try:
            kind, answer = self._run(_PROBE, breaker, common.version, *words)
            if kind == b"other":
                breaker.adopt(self._common_of(breaker.shared_name, answer), seen=common.version)
                return None
        except MusetError as error:
            _log.debug("the right to probe is not known: %s", error)
            if self._redis.state == "up" and isinstance(error, _TOO_BUSY):
                raise
            return Lease(token, None)
        if kind == b"lease":
            return Lease(token, int(answer))
        return Busy(min(int(answer) / 1000, _ASK_S))

    def settle(self, breaker: CircuitBreaker, lease: Lease, *, succeeded: bool | None) -> None:
        """A probe has ended; others learn of it beside the calls."""
        self._held.pop(lease.token, None)
        if lease.token and succeeded is not None:
            # One that was not given for sure is not counted by others either.
            counts = succeeded and lease.version is not None
            self._ended.append(_Ended(breaker, lease, counts))
            self.wake()

    def wake(self) -> None:
        """There is something to be sent."""
        # From a native thread under gevent the loop is not woken; it looks by itself soon.
        if self._begin():
            self._wake.set()

    def send(self, breaker: CircuitBreaker) -> bool:
        """Send what a breaker owes, within the budget of a call.

        Returns:
            Whether others know all; else it is sent as soon as they can be told.
        """
        if not self._begin():
            return False
        try:
            self._send(breaker)
        except MusetError as error:
            _log.debug("a change of %r is sent later: %s", breaker.shared_name, error)
        return breaker.debt() is None

    # --- What the feed tells

    def linked(self, *, was_away: bool) -> None:
        """What was published before is not known: all states are read."""
        self._must_read = object()
        self.wake()

    def confirmed(self, since: float) -> None:
        """Nothing was missed."""
        if self._must_read is None:
            self._confirmed_at = time.monotonic()

    def heard(self, kind: str, text: str) -> None:
        """Another process has changed a breaker; one that is not in use here is passed over."""
        *words, name = text.split(" ", 5)
        breaker = self._breakers.get(name)
        if kind == "b" and breaker is not None:
            breaker.adopt(self._common_of(name, words))

    # --- The loop beside the calls

    def _begin(self) -> bool:
        """Begin to listen and to send; whether that goes on, and Redis may be asked from here."""
        if self._thread is None and not self._start():
            return False
        return not is_patched("socket") or self._thread == original("_thread", "get_ident")()

    def _start(self) -> bool:
        if not has_lasting_hub():
            return False
        wake = make_event()
        with self._lock:
            if self._thread is not None:
                return True
            self._wake = wake
            self._thread = original("_thread", "get_ident")()
        try:
            run_beside(partial(_loop, weakref.ref(self), wake), name="breakers")
            self._feed = Feed(
                self._redis,
                self._channel,
                self._sender,
                self,
                name="breakers",
                # The client has told of it when it was Redis that went away.
                lost_level=logging.DEBUG,
            )
        except RuntimeError as error:
            # No thread can be started, now or because the process ends: the next one tries again.
            _log.debug("circuit breakers are not shared now: %s", error)
            self.ended(wake)
            return False
        return True

    def is_run_by(self, wake: Any) -> bool:
        """Whether the loop with this event is the one of this process."""
        return self._wake is wake

    def ended(self, wake: Any) -> None:
        """The loop with this event has ended; if no other one has taken its place, one may begin.

        Nobody listens until then, so the next call of each breaker asks what others have.
        """
        nobody = make_event()
        with self._lock:
            if self._wake is not wake:
                return
            # Whoever has seen the loop running may still wake it.
            self._wake, self._thread = nobody, None
            feed, self._feed = self._feed, None
            self._must_read = object()
        if feed is not None:
            feed.close()
        for breaker in list(self._breakers.values()):
            breaker.look_again()

    def turn(self) -> None:
        """Send and read what there is."""
        for breaker in list(self._breakers.values()):
            breaker.pass_time()
        if self._redis.state == "up":
            self._try_to_exchange()
        else:
            self._must_read = object()
        state = self.state
        if state != self._told:
            self._told = state
            self._tell_state(state)

    def _try_to_exchange(self) -> None:
        try:
            self._do(self._exchange())
            self._is_refused = False
        except MusetError as error:
            # What puts the link in doubt the client tells of, and what was too slow is tried again.
            if not self._is_refusal(error):
                _log.debug("circuit breakers are shared later: %s", error)
            elif not self._is_refused:
                self._is_refused = True
                _log.warning("circuit breakers are not shared: %s", error)

    def _is_refusal(self, error: MusetError) -> bool:
        """Whether Redis is there, and what one asks for or what it has stored is wrong."""
        return self._redis.state == "up" and isinstance(error, ExternalServiceError)

    def _do(self, steps: Iterable[Callable[[], object]]) -> None:
        """Take all steps: what is refused of one breaker is raised only when the others are done.

        Raises:
            MusetError: Redis does not answer, or the last of what was refused.
        """
        refused = None
        for step in steps:
            try:
                step()
            except MusetError as error:
                if not self._is_refusal(error):
                    raise
                refused = error
        if refused is not None:
            raise refused

    def _exchange(self) -> Iterator[Callable[[], object]]:
        feed = self._feed
        if self._must_read is not None or feed is None or not feed.is_linked:
            yield self._read_all
        for breaker in list(self._breakers.values()):
            yield partial(self._send, breaker)
        while self._ended:
            yield self._end_next
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + _LEASE_S / 3
            for token, held in list(self._held.items()):
                yield partial(self._renew, token, held, now)

    def _read_all(self) -> None:
        """Take all states that are stored, so that nothing that was missed matters any more."""
        # A call and the loop may read at the same time: it is done only when it has succeeded.
        began, missed = time.monotonic(), self._must_read
        self._read(list(self._breakers.values()))
        if self._must_read is missed:
            self._must_read = None
        self._confirmed_at = began

    def _read(self, breakers: Sequence[CircuitBreaker]) -> None:
        self._do(self._reading_of(breakers))

    def _reading_of(self, breakers: Sequence[CircuitBreaker]) -> Iterator[Callable[[], object]]:
        for start in range(0, len(breakers), _AT_ONCE):
            some = breakers[start : start + _AT_ONCE]
            known = [breaker.version for breaker in some]
            keys = [self._key(breaker.shared_name) for breaker in some]
            states = self._redis.script(_READ, keys)
            for breaker, seen, stored in zip(some, known, states, strict=True):
                yield partial(self._take, breaker, seen, stored)

    def _take(self, breaker: CircuitBreaker, seen: int, stored: Sequence[bytes] | None) -> None:
        if stored is not None:
            breaker.adopt(self._common_of(breaker.shared_name, stored), seen=seen)
        elif breaker.version == seen:
            breaker.owe_anew(is_stale=-math.inf < self._confirmed_at < time.monotonic() - _KEPT_S)

    def _send(self, breaker: CircuitBreaker) -> None:
        """Send what a breaker owes, the loop or a call alone.

        What an operator insists on, sent twice, would undo what another one has said in between.
        """
        if breaker.debt() is None:
            return
        name, mine = breaker.shared_name, make_event()
        while (other := self._sending.setdefault(name, mine)) is not mine:
            if not other.wait(self._redis.budget_s):
                return
        try:
            self._pay(breaker)
        finally:
            del self._sending[name]
            mine.set()

    def _pay(self, breaker: CircuitBreaker) -> None:
        debt = breaker.debt()
        if debt is None:
            return
        common = debt.common
        is_applied, answer = self._run(
            _CHANGE,
            breaker,
            common.version,
            common.state.value,
            _ms(common.left_s),
            common.trips,
            _ms(common.age_s),
            int(debt.insists),
        )
        stored = self._common_of(breaker.shared_name, answer)
        if is_applied:
            breaker.paid(debt, stored)
        else:
            breaker.adopt(stored, seen=common.version)

    def _end_next(self) -> None:
        ended = self._ended.popleft()
        try:
            self._end(ended)
        except MusetError as error:
            # One that is refused would be again; its lease ends by itself.
            if not self._is_refusal(error):
                self._ended.appendleft(ended)
            raise

    def _end(self, ended: _Ended) -> None:
        breaker, lease = ended.breaker, ended.lease
        if not ended.succeeded:
            self._redis.execute("HDEL", self._key(breaker.shared_name), f"probe:{lease.token}")
            return
        probes = breaker.options["half_open_calls"]
        answer = self._run(_SUCCEEDED, breaker, lease.version, lease.token, probes)
        if answer is not None:
            breaker.adopt(self._common_of(breaker.shared_name, answer))

    def _renew(self, token: str, held: _Held, now: float) -> None:
        lease_s = min(_LEASE_S, held.until - now)
        key = self._key(held.breaker.shared_name)
        if lease_s <= 0 or not self._redis.script(_RENEW, [key], [token, _ms(lease_s)]):
            self._held.pop(token, None)

    def _common_of(self, name: str, words: Sequence[bytes | str]) -> Common:
        """A state as scripts and messages tell it.

        Raises:
            ExternalServiceError: It is none.
        """
        try:
            return _common_of(words)
        except ValueError as error:
            raise ExternalServiceError(
                f"{self._key(name)} has no state of a circuit breaker that this version knows "
                f"({error}); remove the key or update this process"
            ) from error

    def _key(self, name: str) -> str:
        return self._redis.key(f"breaker:{name}")

    def _run(self, script: Script, breaker: CircuitBreaker, version: Any, *words: Any) -> Any:
        name = breaker.shared_name
        head = self._channel, self._sender, name, version
        return self._redis.script(script, [self._key(name)], [*head, *words])


def _loop(shared_of: "weakref.ref[SharedBreakers]", wake: Any) -> None:
    """Runs as long as there are the breakers, which it does not keep."""
    try:
        while _turn(shared_of(), wake):
            wake.wait(_TICK_S)
            wake.clear()
    finally:
        # Killed with all other greenlets, for one.
        shared = shared_of()
        if shared is not None:
            shared.ended(wake)


def _turn(shared: SharedBreakers | None, wake: Any) -> bool:
    """Let the loop with this event do its work; whether there is any left."""
    if shared is None or not shared.is_run_by(wake):
        return False
    try:
        shared.turn()
    except Exception:  # noqa: BLE001 - it is said, and the loop goes on
        _log.exception("sharing circuit breakers goes on in a moment")
    return True


def _ms(seconds: float | None) -> int:
    """Whole milliseconds as scripts take them, -1 for none and for no end."""
    if seconds is None or seconds == math.inf:
        return -1
    return math.ceil(min(seconds, _LONGEST_S) * 1000)


def _common_of(words: Sequence[bytes | str]) -> Common:
    """A state as scripts tell it; ValueError for what is none."""
    version, state, left, trips, age = (
        word.decode() if isinstance(word, bytes) else word for word in words
    )
    if state == BreakerState.HALF_OPEN:
        raise ValueError("half_open is open with no time left")
    return Common(
        int(version),
        BreakerState(state),
        math.inf if left == "-1" else int(left) / 1000,
        int(trips),
        None if age == "-1" else int(age) / 1000,
    )
