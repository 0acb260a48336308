"""Rate limits that processes share: counted in Redis, one script for a hit or for many.

In Redis a caller has the time at which its whole limit L is there again, as GCRA counts it. Below
10 hits a second each hit is one script. Above, a process that asks is lent some hits on top of the
one it asks for, which it then spends without asking. All that is lent at a moment is at most the
reserve R, what is charged at once at most L - R, a lease lasts T, and `R <= L * T / (20 * period)`.
Each lease is an eighth of what is free of the reserve: no process has to know how many there are,
and none finds nothing left because another one was first.

Never exceeded, by Redis's clock. What is lent is charged when it is lent. What is spent in any t
seconds was lent when they began, at most R, or was charged within them, at most
`L - R + L * t / period`. Together that is `L * (1 + t / period)`. A process takes its lease to be
over no later than Redis does, since it counts from before it asked, and spends nothing of it when
it has said that it is over.

Never refused at 0.9 of the limit. What is lent and never spent, by a process that died too, stood
in Redis for T, so in any t seconds it is at most `R * (t / T + 1)`, a twentieth of the limit and R.
With another R that is lent now, such a caller is charged at most `0.95 * L * t / period + 2 * R`
and what it comes with at once: there is room for 0.84 of the limit at once. So nothing has to be
given back, and no number of a process is believed.
"""

import math
from collections import OrderedDict
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

from flask_muset.clock import Clock
from flask_muset.errors import MusetError
from flask_muset.locks import give_lock, make_event
from flask_muset.redis import GuardedRedis, Script
from flask_muset.resilience.rate_limit import Hit

__all__ = ["SharedLimit"]

_NS = 1_000_000_000
_US = 1_000_000
_NS_PER_US = 1_000
_NS_PER_MS = 1_000_000

#: Callers that are remembered, some 35 MB; with more, the least recently hit one is forgotten.
_MAX_CALLERS = 100_000
#: Hits a second from which on processes are lent some.
_LENT_FROM = 10.0
#: The longest lease, in seconds: so long what a killed process was lent is missed.
_LEASE_S = 60.0
#: The part of a lease's time that the reserve is.
_RESERVE = 1 / 20
#: The part of the reserve that must be there for a hit to count, at most 0.1 s of the limit: what
#: trickles in is lent in pieces, so that a caller above the limit costs a few questions a second.
_LEAST = 1 / 30
#: How long a refusal holds where hits are lent, in seconds, and as a part of a short period. It is
#: longer than Redis ever says, so that what one process has told holds for what others have seen.
_PAUSE_S = 0.2
_PAUSE = 1 / 10

_HIT = Script(Path(__file__).with_name("rate_limit_hit.lua").read_text("utf-8"))


class _Caller:
    """What this process knows of one caller; times are the local clock's, in nanoseconds.

    Attributes:
        lease: Its name, empty if there is none.
        left: What is left of it.
        ends_at: When it is over.
        whole_at: When the whole limit is there again, as far as Redis has said.
        refused_until: Until when nobody asks.
        free_at: When a hit is allowed again, at the latest.
        asked: Is set when the question that goes on now is answered; None if there is none.
    """

    __slots__ = ("asked", "ends_at", "free_at", "lease", "left", "refused_until", "whole_at")

    def __init__(self) -> None:
        self.lease = ""
        self.left = self.ends_at = self.whole_at = self.refused_until = self.free_at = 0
        self.asked: Any = None


class SharedLimit:
    """A limit that all processes with the same Redis and name share.

    A forked child is lent nothing that its parent was.

    Args:
        redis: Where it is counted.
        name: Of the limit.
        limit: Hits in a period, at least 1.
        period: Seconds, above 0.
        clock: Time in this process.

    Source: the generic cell rate algorithm of ITU-T I.371, in its virtual scheduling form.
    """

    def __init__(
        self, redis: GuardedRedis, name: str, limit: int, period: float, clock: Clock
    ) -> None:
        self.redis = redis
        self.name = name
        self._clock = clock
        is_lent = limit / period >= _LENT_FROM
        lease_s = min(period, _LEASE_S)
        self._reserve = int(limit * lease_s / period * _RESERVE) if is_lent else 0
        interval_us = math.ceil(period * _US / limit)
        burst_us = (limit - self._reserve) * interval_us
        lease_us = math.floor(lease_s * _US)
        least = max(1, int(self._reserve * _LEAST))
        self._numbers = (interval_us, burst_us, self._reserve, lease_us, least)
        self._interval_ns = interval_us * _NS_PER_US
        #: When so much is missing, the next hit is refused.
        self._full_ns = burst_us * _NS_PER_US - (least - 1) * self._interval_ns
        self._lease_ns = lease_us * _NS_PER_US
        self._pause_ns = int(min(_PAUSE_S, period * _PAUSE) * _NS) if self._reserve else 0
        # What comes after it is a question, which has a budget of its own.
        self._patience_ns = int(redis.budget_s * _NS / 2)
        self._prefix = redis.key(f"limit:{name}:")
        self._names = count()
        give_lock(self)
        self._forked()

    _lock: Any

    def _forked(self) -> None:
        self._process = token_hex(6)
        #: The least recently hit one first.
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    def hit(self, key: str) -> Hit | None:
        """Count one hit if it is within the limit.

        While somebody asks for a lease the others wait for the answer, half as long as a question
        may take; then each asks for itself, so that slow is not taken for away.

        Args:
            key: Whose limit it is.

        Returns:
            What came of it; None if Redis cannot be asked: it is away, no connection was free in
            time, or gevent has it for another thread. `remaining` and `reset_after` of a hit
            that was lent are an estimate: what Redis said when it was asked last, less what was
            spent here since; what others are lent is not in it.
        """
        now = self._clock.now_ns()
        return self.lent(key, now) or self._find_out(key, now)

    def lent(self, key: str, now: int | None = None) -> Hit | None:
        """Count one hit without asking, if it was lent, or refuse it if that is known.

        Args:
            key: Whose limit it is.
            now: Of the clock, in nanoseconds.

        Returns:
            What came of it; None if Redis has to be asked.
        """
        with self._lock:
            caller = self._callers.get(key)
            if caller is None:
                return None
            hit = self._known(caller, self._clock.now_ns() if now is None else now)
            if hit is not None:
                self._callers.move_to_end(key)
        return hit

    def _known(self, caller: _Caller, now: int) -> Hit | None:
        """What can be said without asking."""
        left = caller.left
        if left and now < caller.ends_at:
            caller.left = left = left - 1
            return self._allowed(left, caller.whole_at - now)
        if now < caller.refused_until:
            return self._refused(caller, now)
        return None

    def _allowed(self, left: int, whole_ns: int) -> Hit:
        if whole_ns < 0:
            whole_ns = 0
        room = (self._full_ns - whole_ns) // self._interval_ns
        return Hit(True, left + room if room > 0 else left, whole_ns / _NS, 0.0)

    def _refused(self, caller: _Caller, now: int) -> Hit:
        # Where hits are lent, other processes may refuse for the whole pause from now on.
        wait_s = math.ceil(max(caller.free_at - now, self._pause_ns) / _NS_PER_MS) / 1_000
        return Hit(False, 0, max(0, caller.whole_at - now) / _NS, wait_s)

    def _find_out(self, key: str, now: int) -> Hit | None:
        """Wait for the answer to somebody's question, or ask."""
        if not self.redis.is_usable_here:
            return None
        give_up = now + self._patience_ns
        while True:
            with self._lock:
                caller = self._remembered(key)
                hit = self._known(caller, now)
                if hit is not None:
                    return hit
                mine, asked = None, caller.asked
                if asked is None and self._reserve:
                    mine = asked = caller.asked = make_event()
            if asked is mine or now >= give_up:
                return self._ask(key, caller, mine)
            asked.wait((give_up - now) / _NS)
            now = self._clock.now_ns()

    def _remembered(self, key: str) -> _Caller:
        callers = self._callers
        caller = callers.get(key)
        if caller is None:
            caller = callers[key] = _Caller()
            while len(callers) > _MAX_CALLERS:
                callers.popitem(last=False)
        else:
            callers.move_to_end(key)
        return caller

    def _ask(self, key: str, caller: _Caller, mine: Any) -> Hit | None:
        """Ask Redis for one hit, and for a lease too if the question is `mine`."""
        over, lease = "", ""
        if mine is not None:
            over, lease = caller.lease, f"{self._process}-{next(self._names):x}"
            caller.lease, caller.left = "", 0
        name = f"{self._prefix}{key}".encode("utf-8", "surrogatepass")
        before = self._clock.now_ns()
        try:
            reply = self.redis.script(_HIT, [name], [*self._numbers, over, lease])
            return self._note(caller, lease, before, reply)
        except MusetError:
            return None  # GuardedRedis has told it
        finally:
            if mine is not None:
                caller.asked = None
                mine.set()

    def _note(self, caller: _Caller, lease: str, before: int, reply: list[int]) -> Hit:
        """Remember what was answered; `before` is the moment before it was asked."""
        wait_us, lent, whole_us = reply
        now = self._clock.now_ns()
        whole_at = now + whole_us * _NS_PER_US
        with self._lock:
            if wait_us:
                wait_ns = max(wait_us * _NS_PER_US, self._pause_ns)
                caller.refused_until, caller.free_at = before + wait_ns, now + wait_ns
                caller.whole_at = whole_at
                return self._refused(caller, now)
            if lent:
                caller.lease, caller.left = lease, lent
                caller.ends_at = before + self._lease_ns
                caller.whole_at = whole_at
        return self._allowed(lent, whole_us * _NS_PER_US)
