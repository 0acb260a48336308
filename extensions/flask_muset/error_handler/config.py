"""The configuration of ErrorHandler, read and checked once."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from flask_muset.configuration import REDIS_KEYS, Key, flag, number, read, whole

__all__ = ["KEYS", "PREFIX", "Config", "read_config"]

PREFIX = "ERROR_HANDLER_"


def _is_path(value: Any) -> bool:
    return value is None or (
        isinstance(value, str) and value.startswith("/") and len(value) > 1 and value[-1] != "/"
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in value
    )


def _is_challenge(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


KEYS = {
    "ENABLED": flag(True),
    "CATALOGUE": Key("/errors", _is_path, "a path such as '/errors', or None for no catalogue"),
    "KEEP": whole(100, 0, 10_000),
    "REPEAT_WINDOW": number(60.0, 0, 86_400),
    "REDACT_KEYS": Key((), _is_names, "a list of names"),
    "WWW_AUTHENTICATE": Key("Bearer", _is_challenge, "a challenge such as 'Bearer'"),
    **REDIS_KEYS,
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one app is set to.

    Attributes:
        enabled: False leaves the app as it is.
        catalogue: Path of the error catalogue, None for no such page.
        keep: How many different errors are kept for operators, at least 0.
        repeat_window_s: Repeats within these seconds are summed up in one log line.
        redact_keys: More names whose values are secrets, in lower case.
        www_authenticate: The challenge of a 401 that brings none of its own.
        redis_url: Where the kept errors of all processes are; None for each process by itself.
        redis_max_connections: Calls of one process to it at once.
        redis_budget_s: Seconds that one call may take.
        namespace: Tells apps apart that share a Redis.
    """

    enabled: bool
    catalogue: str | None
    keep: int
    repeat_window_s: float
    redact_keys: frozenset[str]
    www_authenticate: str
    redis_url: str | None
    redis_max_connections: int
    redis_budget_s: float
    namespace: str


def read_config(config: MutableMapping[str, Any]) -> Config:
    """Set the defaults in an app's configuration and return the checked values.

    Raises:
        ValueError: A key is unknown or its value is not allowed; the text names both and the cure.
    """
    values = read(config, "ErrorHandler", PREFIX, KEYS)
    return Config(
        enabled=values["ENABLED"],
        catalogue=values["CATALOGUE"],
        keep=values["KEEP"],
        repeat_window_s=float(values["REPEAT_WINDOW"]),
        redact_keys=frozenset(name.lower() for name in values["REDACT_KEYS"]),
        www_authenticate=values["WWW_AUTHENTICATE"],
        redis_url=values["REDIS_URL"],
        redis_max_connections=values["REDIS_MAX_CONNECTIONS"],
        redis_budget_s=values["REDIS_BUDGET"],
        namespace=values["NAMESPACE"],
    )
