"""The configuration of ErrorHandler, read and checked once."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFAULTS", "Config", "read_config"]

DEFAULTS: Mapping[str, Any] = {
    "ERROR_HANDLER_ENABLED": True,
    "ERROR_HANDLER_CATALOGUE": "/errors",
    "ERROR_HANDLER_KEEP": 100,
    "ERROR_HANDLER_REPEAT_WINDOW": 60.0,
    "ERROR_HANDLER_REDACT_KEYS": (),
    "ERROR_HANDLER_WWW_AUTHENTICATE": "Bearer",
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
    """

    enabled: bool
    catalogue: str | None
    keep: int
    repeat_window_s: float
    redact_keys: frozenset[str]
    www_authenticate: str


def _is_path(value: Any) -> bool:
    return value is None or (
        isinstance(value, str) and value.startswith("/") and len(value) > 1 and value[-1] != "/"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in value
    )


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "ERROR_HANDLER_ENABLED": (lambda v: isinstance(v, bool), "True or False"),
    "ERROR_HANDLER_CATALOGUE": (_is_path, "a path such as '/errors', or None for no catalogue"),
    "ERROR_HANDLER_KEEP": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 10_000,
        "a whole number from 0 to 10000",
    ),
    "ERROR_HANDLER_REPEAT_WINDOW": (
        lambda v: _is_number(v) and 0 < v <= 86_400,
        "seconds above 0 and at most 86400",
    ),
    "ERROR_HANDLER_REDACT_KEYS": (_is_names, "a list of names"),
    "ERROR_HANDLER_WWW_AUTHENTICATE": (
        lambda v: isinstance(v, str) and v.isprintable() and v != "",
        "a challenge such as 'Bearer'",
    ),
}


def read_config(config: MutableMapping[str, Any]) -> Config:
    """Set the defaults in an app's configuration and return the checked values.

    Raises:
        ValueError: A key is unknown or its value is not allowed; the text names both and the cure.
    """
    for key in config:
        if key.startswith("ERROR_HANDLER_") and key not in DEFAULTS:
            raise ValueError(
                f"{key} is not a setting of ErrorHandler; use one of {list(DEFAULTS)}."
            )
    for key, default in DEFAULTS.items():
        value = config.setdefault(key, default)
        allowed, expected = _CHECKS[key]
        if not allowed(value):
            raise ValueError(f"{key} must be {expected}, got {value!r}.")
    return Config(
        enabled=config["ERROR_HANDLER_ENABLED"],
        catalogue=config["ERROR_HANDLER_CATALOGUE"],
        keep=config["ERROR_HANDLER_KEEP"],
        repeat_window_s=float(config["ERROR_HANDLER_REPEAT_WINDOW"]),
        redact_keys=frozenset(name.lower() for name in config["ERROR_HANDLER_REDACT_KEYS"]),
        www_authenticate=config["ERROR_HANDLER_WWW_AUTHENTICATE"],
    )
