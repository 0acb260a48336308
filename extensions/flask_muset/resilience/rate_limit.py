"""A limit on how often something happens, exact and with little to remember: GCRA."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from flask_muset.clock import SYSTEM, Clock
from flask_muset.configuration import ABOVE_ZERO, COUNT, check
from flask_muset.errors import RateLimitError
from flask_muset.locks import give_lock
from flask_muset.resilience.guards import Call, Part
from flask_muset.signals import Decision

if TYPE_CHECKING:
    from flask_muset.redis import GuardedRedis
    from flask_muset.resilience.shared_limits import SharedLimit

__all__ = ["Hit", "RateLimit"]

_NS = 1_000_000_000
#: Keys that are remembered, some 20 MB; with more, the least recently hit one is forgotten.
_MAX_KEYS = 100_000
#: Longer keys are kept as a digest.
_MAX_KEY_LENGTH = 64


class Hit(NamedTuple):
    """What came of one hit.

    Attributes:
        allowed: Whether it is within the limit.
        remaining: Hits that would be allowed right now.
        reset_after: Seconds until the whole limit is there again.
        retry_after: Seconds after which a hit is allowed if nobody else hits, 0 when allowed.
            Waiting exactly so long is always enough.
    """

    allowed: bool
    remaining: int
    reset_after: float
    retry_after: float


class RateLimit(Part):
    """Allow `limit` hits per `period`, with a burst of the whole limit.

    In any t seconds at most `limit * (1 + t / period)` hits of one key pass. Only the time at which
    each key is free again is kept; it is counted in whole nanoseconds, so nothing is lost to
    rounding. Each process counts for itself until the limit is shared.

    In a policy it limits the calls of the policy; a refused call gets `RateLimitError`.

    Args:
        limit: Hits in a period, at least 1.
        period: Seconds, above 0.
        clock: Time; None takes the system's.

    Source: the generic cell rate algorithm of ITU-T I.371, in its virtual scheduling form.
    """

    kind = "rate_limit"

    def __init__(self, limit: int, period: float, *, clock: Clock | None = None) -> None:
        self._options = {"limit": limit, "period": period, "clock": clock}
        check("RateLimit", self._options, {"limit": COUNT, "period": ABOVE_ZERO})
        self.limit = limit
        self.period = period
        self._clock = clock or SYSTEM
        self._interval = math.ceil(period * _NS / limit)
        self._burst = self._interval * limit
        #: By key the time in nanoseconds at which the whole limit is there again, oldest hit first.
        self._free_at: OrderedDict[str, int] = OrderedDict()
        self._shared: SharedLimit | None = None
        give_lock(self)
        super().__init__()

    _lock: Any

    def share(self, redis: "GuardedRedis", name: str) -> None:
        """Count in Redis from now on, together with all processes that do so by the same name.

        While Redis is away each process counts for itself, the whole limit. Sharing again with the
        same two changes nothing; one made by `like` is shared when it is told so itself.

        Args:
            redis: Where it is counted, under `limit:<name>:<key>`: a key should be no secret.
            name: Of the limit; the processes give it the same `limit` and `period`.
        """
        # Here, because it needs the extra `redis`.
        from flask_muset.resilience.shared_limits import SharedLimit

        shared = self._shared
        if shared is None or shared.redis is not redis or shared.name != name:
            self._shared = SharedLimit(redis, name, self.limit, self.period, self._clock)

    def hit(self, key: str = "") -> Hit:
        """Count one hit if it is within the limit; one that is not counts nothing.

        Args:
            key: Whose limit it is.
        """
        if len(key) > _MAX_KEY_LENGTH:
            key = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        if self._shared is not None:
            hit = self._shared.hit(key)
            if hit is not None:
                return hit
        now = self._clock.now_ns()
        after, over = self._take(key, now)
        if over > 0:
            wait_s = math.ceil(over / 1_000_000) / 1_000
            return Hit(False, 0, (after - self._interval - now) / _NS, wait_s)
        return Hit(True, -over // self._interval, (after - now) / _NS, 0.0)

    def _take(self, key: str, now: int) -> tuple[int, int]:
        """Count one hit if it is within the limit.

        Returns:
            When the whole limit is there again after it, and by how much that is too late, both in
            nanoseconds; it was counted if the latter is not above 0.
        """
        with self._lock:
            free_at = self._free_at
            base = free_at.get(key, 0)
            after = (base if base > now else now) + self._interval
            over = after - now - self._burst
            if over <= 0:
                free_at[key] = after
                free_at.move_to_end(key)
                while len(free_at) > _MAX_KEYS:
                    free_at.popitem(last=False)
        return after, over

    def layer(self, inner: Call) -> Call:
        """Put it round plain calls; nothing is to be done when they end."""
        clock, take, enter = self._clock, self._take, self.enter

        def limited(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._shared is not None or take("", clock.now_ns())[1] > 0:
                enter()
            return inner(fn, args, kwargs)

        return limited

    def enter(self, key: str = "") -> None:
        """Let a call begin.

        Args:
            key: Whose limit it is.

        Raises:
            RateLimitError: The limit is reached.
        """
        self._admit(self.hit(key))

    async def aenter(self) -> None:
        """`enter` where asyncio runs: Redis is asked beside the loop."""
        shared = self._shared
        if shared is None:
            self.enter()
            return
        import asyncio  # only where it runs already

        hit = shared.lent("")
        self._admit(await asyncio.to_thread(self.hit) if hit is None else hit)

    def _admit(self, hit: Hit) -> None:
        if not hit.allowed:
            self.tell(Decision.REJECTED)
            raise refused(f"{self.name or 'a limit'}: {self.limit} in {self.period:g} s", hit)


def refused(message: str, hit: Hit) -> RateLimitError:
    """The error of a limit of our own: waiting for it is the caller's business."""
    error = RateLimitError(message, retry_after=hit.retry_after)
    error.refusal = True
    return error
