"""The configuration of CacheStrategies, read and checked once."""

import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from flask_muset.configuration import Key, flag, number, read, whole

__all__ = ["KEYS", "PREFIX", "Config", "read_config"]

PREFIX = "CACHE_STRATEGIES_"
_MIB = 1 << 20


def _is_url(value: Any) -> bool:
    return value is None or (isinstance(value, str) and "://" in value)


_is_name = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch


KEYS = {
    "ENABLED": flag(True),
    "REDIS_URL": Key(None, _is_url, "the URL of a Redis such as redis://127.0.0.1:6379/0, or None"),
    "REDIS_MAX_CONNECTIONS": whole(10, 1, 10_000),
    "REDIS_BUDGET": number(0.05, 0, 60),
    "NAMESPACE": Key(
        "default",
        lambda value: isinstance(value, str) and _is_name(value) is not None,
        "1 to 64 letters, digits, dots, underscores or hyphens",
    ),
    "L1_MAX_BYTES": whole(32 * _MIB, 0, 1 << 40),
    "L1_UNLINKED": number(5.0, 0, 3600),
    "DEFAULT_EXPIRE": number(300.0, 0, 10 * 365 * 86_400, zero="no end"),
    "RESPONSE_HEADERS": flag(True),
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one app is set to.

    Attributes:
        enabled: False keeps nothing: every load is one.
        redis_url: Where the second level is; None for a memory alone.
        redis_max_connections: Calls of one process to it at once.
        redis_budget_s: Seconds that one call may take.
        namespace: Tells apps apart that share a Redis.
        l1_max_bytes: Of the memory of one process; 0 for none.
        l1_unlinked_s: Seconds for which an entry of the memory is served while nobody can tell that
            it is invalid.
        default_expire_s: Of entries that are kept without a time of their own; None for no end.
        response_headers: Whether responses say what the cache did.
    """

    enabled: bool
    redis_url: str | None
    redis_max_connections: int
    redis_budget_s: float
    namespace: str
    l1_max_bytes: int
    l1_unlinked_s: float
    default_expire_s: float | None
    response_headers: bool


def read_config(config: MutableMapping[str, Any]) -> Config:
    """Set the defaults in an app's configuration and check it.

    Raises:
        ValueError: A key is unknown or its value is not allowed.
    """
    values = read(config, "CacheStrategies", PREFIX, KEYS)
    if values["L1_MAX_BYTES"] == 0 and values["REDIS_URL"] is None and values["ENABLED"]:
        raise ValueError(
            f"{PREFIX}L1_MAX_BYTES is 0 and {PREFIX}REDIS_URL is not set, nothing can be kept; "
            f"set one of them, or {PREFIX}ENABLED to False."
        )
    return Config(
        enabled=values["ENABLED"],
        redis_url=values["REDIS_URL"],
        redis_max_connections=values["REDIS_MAX_CONNECTIONS"],
        redis_budget_s=values["REDIS_BUDGET"],
        namespace=values["NAMESPACE"],
        l1_max_bytes=values["L1_MAX_BYTES"],
        l1_unlinked_s=values["L1_UNLINKED"],
        default_expire_s=values["DEFAULT_EXPIRE"] or None,
        response_headers=values["RESPONSE_HEADERS"],
    )
