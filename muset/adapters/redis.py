"""Redis, where it is set."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from muset.ports import NotReadyError

if TYPE_CHECKING:
    from flask_muset.redis import GuardedRedis

__all__ = ["RedisProbe", "StateProbe"]


class RedisProbe:
    """Implements `muset.ports.Probe`: without Redis the service is degraded, not gone."""

    is_needed = False

    def __init__(self, client: "GuardedRedis") -> None:
        self.name = client.name
        self._client = client

    def check(self, timeout_s: float) -> None:
        """Return if Redis answers in time, else raise."""
        self._client.check(timeout_s)


class StateProbe:
    """Implements `muset.ports.Probe`: whether all workers have one state of breakers and limits.

    Args:
        state: Says `shared`, `doubt` or `local`, without waiting.
        has_redis: Whether it should be shared; else it is local, and well.
    """

    name = "state"
    is_needed = False

    def __init__(self, state: Callable[[], str], *, has_redis: bool) -> None:
        self._state = state
        self._has_redis = has_redis

    def check(self, timeout_s: float) -> str:
        """Return whose state it is, raise if it should be shared and is not."""
        state = self._state()
        if self._has_redis and state != "shared":
            what = "is local to each worker" if state == "local" else "may not be the one of all"
            raise NotReadyError(f"the state of circuit breakers and limits {what}", state)
        return state
