"""The configuration of Resilience, read and checked once."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from flask_muset.configuration import REDIS_KEYS, Key, flag, number, one_of, read, whole
from flask_muset.load import Paths

__all__ = ["KEYS", "PREFIX", "Config", "read_config"]

PREFIX = "RESILIENCE_"
_MODES = ("enforce", "observe", "off")


def _is_paths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(path, str) and path.startswith("/") for path in value
    )


def _is_policies(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str)
        and isinstance(parts, Mapping)
        and all(isinstance(options, Mapping) for options in parts.values())
        for name, parts in value.items()
    )


KEYS: Mapping[str, Key] = {
    "ENABLED": flag(True),
    "MODE": one_of("enforce", *_MODES),
    "REQUEST_TIMEOUT": number(30.0, 0, 86_400, zero="no deadline"),
    "REQUEST_TIMEOUT_MODE": one_of(None, *_MODES),
    "MAX_CONCURRENT_REQUESTS": whole(100, 0, 1_000_000),
    "MAX_CONCURRENT_REQUESTS_MODE": one_of(None, *_MODES),
    "RATE_LIMIT_REQUESTS_PER_MINUTE": whole(0, 0, 1_000_000),
    "RATE_LIMIT_MODE": one_of(None, *_MODES),
    "EXEMPT_PATHS": Key(("/health",), _is_paths, "a list of paths, such as ['/health']"),
    "ENABLE_CIRCUIT_BREAKER": flag(True),
    "CIRCUIT_BREAKER_THRESHOLD": whole(5, 1, 1_000_000),
    "CIRCUIT_BREAKER_TIMEOUT": number(60.0, 0, 86_400),
    "MAX_RETRIES": whole(3, 0, 100),
    "RETRY_INITIAL_DELAY": number(1.0, 0, 3_600, zero="no wait"),
    "RETRY_MAX_DELAY": number(60.0, 0, 86_400, zero="no wait"),
    **REDIS_KEYS,
    "POLICIES": Key(
        {},
        _is_policies,
        "a mapping of policies, such as {'openai': {'timeout': {'seconds': 5}}}",
    ),
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one app is set to; the modes are `enforce`, `observe` or `off`.

    Attributes:
        enabled: False leaves the app as it is; policies work all the same.
        mode: Of the circuit breakers, and of the three limits that have none of their own.
        request_timeout_s: Deadline of a request.
        request_timeout_mode: Of the deadline; off where there is none.
        max_concurrent_requests: Requests at once in this process.
        max_concurrent_requests_mode: Of the former; off where there is no such limit.
        rate_limit: Requests a minute of one caller.
        rate_limit_mode: Of the former; off where there is no such limit.
        exempt_paths: Paths that nothing of this holds for, with all that is below them.
        enable_circuit_breaker: False lets all calls through all breakers.
        circuit_breaker_threshold: Failures in a row that open a breaker.
        circuit_breaker_timeout_s: How long it stays open.
        max_retries: Retries after the first call.
        retry_initial_delay_s: Bound of the first wait.
        retry_max_delay_s: Bound of every wait.
        redis_url: Where the state of all workers is; None for a state of each.
        redis_max_connections: Calls of one process to it at once.
        redis_budget_s: Seconds that one call may take.
        namespace: Tells apps apart that share a Redis.
        policies: By name of the policy and kind of the part, arguments that win over the code's.
    """

    enabled: bool
    mode: str
    request_timeout_s: float
    request_timeout_mode: str
    max_concurrent_requests: int
    max_concurrent_requests_mode: str
    rate_limit: int
    rate_limit_mode: str
    exempt_paths: Paths
    enable_circuit_breaker: bool
    circuit_breaker_threshold: int
    circuit_breaker_timeout_s: float
    max_retries: int
    retry_initial_delay_s: float
    retry_max_delay_s: float
    redis_url: str | None
    redis_max_connections: int
    redis_budget_s: float
    namespace: str
    policies: Mapping[str, Mapping[str, Mapping[str, Any]]]


def read_config(config: MutableMapping[str, Any]) -> Config:
    """Set the defaults in an app's configuration and return the checked values.

    Raises:
        ValueError: A key is unknown or its value is not allowed; the text names both and the cure.
    """
    values = read(config, "Resilience", PREFIX, KEYS)
    first, longest = values["RETRY_INITIAL_DELAY"], values["RETRY_MAX_DELAY"]
    if longest < first:
        raise ValueError(
            f"{PREFIX}RETRY_MAX_DELAY must be at least {PREFIX}RETRY_INITIAL_DELAY ({first!r}), "
            f"got {longest!r}."
        )

    def mode(name: str, limit: str) -> str:
        return (values[name] or values["MODE"]) if values[limit] else "off"

    return Config(
        enabled=values["ENABLED"],
        mode=values["MODE"],
        request_timeout_s=float(values["REQUEST_TIMEOUT"]),
        request_timeout_mode=mode("REQUEST_TIMEOUT_MODE", "REQUEST_TIMEOUT"),
        max_concurrent_requests=values["MAX_CONCURRENT_REQUESTS"],
        max_concurrent_requests_mode=mode(
            "MAX_CONCURRENT_REQUESTS_MODE", "MAX_CONCURRENT_REQUESTS"
        ),
        rate_limit=values["RATE_LIMIT_REQUESTS_PER_MINUTE"],
        rate_limit_mode=mode("RATE_LIMIT_MODE", "RATE_LIMIT_REQUESTS_PER_MINUTE"),
        exempt_paths=Paths(values["EXEMPT_PATHS"]),
        enable_circuit_breaker=values["ENABLE_CIRCUIT_BREAKER"],
        circuit_breaker_threshold=values["CIRCUIT_BREAKER_THRESHOLD"],
        circuit_breaker_timeout_s=float(values["CIRCUIT_BREAKER_TIMEOUT"]),
        max_retries=values["MAX_RETRIES"],
        retry_initial_delay_s=float(first),
        retry_max_delay_s=float(longest),
        redis_url=values["REDIS_URL"],
        redis_max_connections=values["REDIS_MAX_CONNECTIONS"],
        redis_budget_s=values["REDIS_BUDGET"],
        namespace=values["NAMESPACE"],
        policies=values["POLICIES"],
    )
