"""How the extensions read their part of an app's configuration: once, checked, all by name."""

import math
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from flask_muset.redis import GuardedRedis

__all__ = [
    "ABOVE_ZERO",
    "AT_LEAST_ONE",
    "AT_LEAST_ZERO",
    "COUNT",
    "EXCEPTIONS",
    "REDIS_KEYS",
    "SHARE",
    "Key",
    "RedisSettings",
    "check",
    "flag",
    "number",
    "one_of",
    "optional",
    "read",
    "redis_client",
    "whole",
]


class Key(NamedTuple):
    """One key.

    Attributes:
        default: What holds without it.
        allows: Whether a value is allowed.
        expected: What is allowed, for people.
    """

    default: Any
    allows: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


# --- Arguments of the building blocks -------------------------------------------------------------

ABOVE_ZERO = Key(None, lambda v: _is_number(v) and v > 0, "above 0")
AT_LEAST_ZERO = Key(None, lambda v: _is_number(v) and v >= 0, "at least 0")
AT_LEAST_ONE = Key(None, lambda v: _is_number(v) and v >= 1, "at least 1")
COUNT = Key(
    None,
    lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
    "a whole number of at least 1",
)
EXCEPTIONS = Key(
    None,
    lambda v: (
        (isinstance(v, tuple) and all(map(_is_exception, v)))
        or _is_exception(v)
        or (callable(v) and not isinstance(v, type))
    ),
    "exception classes or a function of the exception",
)
SHARE = Key(None, lambda v: _is_number(v) and 0 < v <= 1, "above 0 and at most 1")


def optional(key: Key) -> Key:
    """The same, or None."""
    return Key(None, lambda v: v is None or key.allows(v), f"{key.expected}, or None")


def check(owner: str, values: Mapping[str, Any], keys: Mapping[str, Key]) -> None:
    """Refuse arguments that are not allowed.

    Args:
        owner: Whose arguments they are.
        values: By name.
        keys: What is allowed, by name.

    Raises:
        ValueError: Names the argument, the value and what is expected.
    """
    for name, key in keys.items():
        if not key.allows(values[name]):
            raise ValueError(f"{owner}: {name} must be {key.expected}, got {values[name]!r}.")


# --- Keys of a configuration ----------------------------------------------------------------------


def flag(default: bool) -> Key:
    """True or False."""
    return Key(default, lambda v: isinstance(v, bool), "True or False")


def whole(default: int, low: int, high: int) -> Key:
    """A whole number in a range."""
    return Key(
        default,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f"a whole number from {low} to {high}",
    )


def number(default: float, above: float, high: float, *, zero: str | None = None) -> Key:
    """Seconds in a range.

    Args:
        default: What holds without the key.
        above: They must be greater than this.
        high: And at most this.
        zero: What 0 means where it is allowed beside the range.
    """
    return Key(
        default,
        lambda v: _is_number(v) and (above < v <= high or (zero is not None and v == 0)),
        f"seconds above {above:g} and at most {high:g}" + (f", or 0 for {zero}" if zero else ""),
    )


def one_of(default: str | None, *allowed: str) -> Key:
    """A word."""
    return Key(
        default,
        lambda v: v in allowed or (v is None and default is None),
        "one of " + ", ".join(repr(word) for word in allowed),
    )


def _is_url(value: Any) -> bool:
    return value is None or (isinstance(value, str) and "://" in value)


_is_name = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch

#: Of an extension that makes a client of Redis.
REDIS_KEYS = {
    "REDIS_URL": Key(None, _is_url, "the URL of a Redis such as redis://127.0.0.1:6379/0, or None"),
    "REDIS_MAX_CONNECTIONS": whole(10, 1, 10_000),
    "REDIS_BUDGET": number(0.05, 0, 60),
    "NAMESPACE": Key(
        "default",
        lambda value: isinstance(value, str) and _is_name(value) is not None,
        "1 to 64 letters, digits, dots, underscores or hyphens",
    ),
}


class RedisSettings(Protocol):
    """What an extension is set to by `REDIS_KEYS`."""

    @property
    def redis_url(self) -> str | None:
        """Where Redis is; None for none."""
        ...

    @property
    def redis_max_connections(self) -> int:
        """Calls at once."""
        ...

    @property
    def redis_budget_s(self) -> float:
        """Seconds that a call may take."""
        ...

    @property
    def namespace(self) -> str:
        """Under which the keys stand."""
        ...


def redis_client(
    given: "GuardedRedis | None", config: RedisSettings, prefix: str, name: str
) -> "GuardedRedis | None":
    """The client of Redis that an extension was given, or one of its configuration, if any.

    Args:
        given: By the app; its keys stand under its own prefix.
        config: Of the extension.
        prefix: Of its keys in the app's configuration.
        name: Of the client that is made.

    Raises:
        ValueError: The URL cannot be read, or a client was given and a namespace too.
    """
    if given is not None:
        if config.namespace != REDIS_KEYS["NAMESPACE"].default:
            raise ValueError(
                f"{prefix}NAMESPACE: the keys of a Redis client that is given stand under its own "
                "prefix; leave the setting out, and make the client with that prefix."
            )
        return given
    if config.redis_url is None:
        return None
    # Only here, because it needs redis-py.
    from flask_muset.redis import GuardedRedis

    try:
        return GuardedRedis(
            config.redis_url,
            name=name,
            max_connections=config.redis_max_connections,
            budget_s=config.redis_budget_s,
            prefix=f"muset:{config.namespace}:",
        )
    except ValueError as error:
        raise ValueError(f"{prefix}REDIS_URL: {error}") from None


def read(
    config: MutableMapping[str, Any], extension: str, prefix: str, keys: Mapping[str, Key]
) -> dict[str, Any]:
    """Set the defaults in an app's configuration and return the checked values.

    Args:
        config: Of the app.
        extension: Name for people.
        prefix: Of the keys, with its underscore.
        keys: By name without the prefix.

    Returns:
        The values by name without the prefix.

    Raises:
        ValueError: A key is unknown or its value is not allowed; the text names both and the cure.
    """
    for name in config:
        if name.startswith(prefix) and name[len(prefix) :] not in keys:
            known = [prefix + key for key in keys]
            raise ValueError(f"{name} is not a setting of {extension}; use one of {known}.")
    values = {}
    for name, key in keys.items():
        value = values[name] = config.setdefault(prefix + name, key.default)
        if not key.allows(value):
            raise ValueError(f"{prefix}{name} must be {key.expected}, got {value!r}.")
    return values
