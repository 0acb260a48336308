"""Redis, where it is set."""

from flask_muset.redis import GuardedRedis

__all__ = ["RedisProbe"]


class RedisProbe:
    """Implements `muset.ports.Probe`: without Redis the service is degraded, not gone."""

    name = "redis"
    is_needed = False

    def __init__(self, client: GuardedRedis) -> None:
        self._client = client

    def check(self, timeout_s: float) -> None:
        """Return if Redis answers in time, else raise."""
        self._client.check(timeout_s)
