"""What the extensions tell: signals and their payloads.

Listeners such as the Metrics extension meet the others here and nowhere else.
The sender is the Flask application, None where there is none. Every label comes from a bounded set.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from blinker import Namespace

from flask_muset.errors import ErrorCategory, Severity

__all__ = [
    "BREAKERS",
    "BreakerEvent",
    "BreakerState",
    "CacheEvent",
    "Count",
    "Decision",
    "ErrorEvent",
    "LinkEvent",
    "PolicyEvent",
    "SharingEvent",
    "WriteBehindEvent",
    "breaker_changed",
    "cache_counters",
    "cache_operated",
    "error_handled",
    "policy_decided",
    "redis_link_changed",
    "sharing_changed",
    "write_behind_measured",
]

_signals = Namespace()


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """One error that was handled, sent once for each, repeats too.

    Attributes:
        category: Label.
        severity: Label.
        error: Name of the class in the error tree.
        status: HTTP status that the client gets; for a stream the one it got.
        retryable: Whether the client may try again.
        refusal: Whether this process refused on purpose.
        streaming: Whether the response had begun.
        fingerprint: The same for the same fault, 12 hexadecimal digits.
        request_id: Of the request.
        exception: As it was raised, before it was translated.
    """

    category: ErrorCategory
    severity: Severity
    error: str
    status: int
    retryable: bool
    refusal: bool
    streaming: bool
    fingerprint: str
    request_id: str
    exception: BaseException


#: Sent with `event`, an ErrorEvent, for every error of a request.
error_handled = _signals.signal("error-handled")


class Decision(StrEnum):
    """What a part of a policy did, beside letting a call through that succeeded."""

    RETRIED = "retried"
    NOT_RETRYABLE = "not_retryable"
    RETRIES_EXHAUSTED = "retries_exhausted"
    RETRY_BUDGET_EXHAUSTED = "retry_budget_exhausted"
    RETRY_TOO_LATE = "retry_too_late"
    REJECTED = "rejected"
    WOULD_REJECT = "would_reject"
    TIMED_OUT = "timed_out"
    OVERRUN = "overrun"
    FELL_BACK = "fell_back"


@dataclass(frozen=True, slots=True)
class PolicyEvent:
    """One decision.

    Attributes:
        policy: Name of the policy, or of the breaker that is used alone; "request" for what holds
            for a whole request; empty for a part that is used alone and has no name. A label: names
            are given in code and configuration.
        part: Label: `fallback`, `retry`, `circuit_breaker`, `rate_limit`, `bulkhead`, `timeout`,
            and for a request `deadline` and `concurrency`.
        decision: Label.
        wait_s: Seconds before the next attempt, where there is one.
        exception: What it was decided on, None for a refusal before the call.
    """

    policy: str
    part: str
    decision: Decision
    wait_s: float = 0.0
    exception: BaseException | None = None


class BreakerState(StrEnum):
    """Whether a circuit breaker lets calls through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


@dataclass(frozen=True, slots=True)
class BreakerEvent:
    """A circuit breaker that changed its state.

    Attributes:
        name: Label: of the breaker.
        old: Label: the state before.
        new: Label: the state now.
    """

    name: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link to Redis that went up or down.

    Attributes:
        name: Label: what the link is for.
        state: Label: `up`, `doubt` or `down`.
    """

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class SharingEvent:
    """Whether the processes of an app agree on its circuit breakers, as this one knows.

    Attributes:
        state: Label: `shared`; `doubt`, it is not known; `local`, each decides by itself.
    """

    state: str


#: Sent with `event`, a PolicyEvent, for every decision of a policy's part.
policy_decided = _signals.signal("policy-decided")
#: Sent with `event`, a BreakerEvent.
breaker_changed = _signals.signal("breaker-changed")
#: Where an app has, in `app.extensions`, what gives the name and the state of each of its circuit
#: breakers, as this process knows them: a function that does not wait.
BREAKERS = "flask_muset.breakers"
#: Sent with `event`, a LinkEvent.
redis_link_changed = _signals.signal("redis-link-changed")
#: Sent with `event`, a SharingEvent, when the state has changed.
sharing_changed = _signals.signal("sharing-changed")


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One operation on a cache.

    Attributes:
        operation: Label: `get`, `set`, `delete`, `delete_pattern`, `load`, `refresh` and the like.
        status: Label: `hit`, `miss`, `stale`, `bypass`, `ok`, `error`, `unavailable`, `unreadable`
            and the like.
        duration_s: Seconds that it took, a `get` without its load; None where it is not timed.
    """

    operation: str
    status: str
    duration_s: float | None = None


#: Sent with `event`, a CacheEvent.
cache_operated = _signals.signal("cache-operated")

#: Counts an operation: as CacheEvent has them its name, how it went and its seconds. It must be
#: quick, and it must not raise.
Count = Callable[[str, str, float | None], None]


def cache_counters(extensions: MutableMapping[str, Any]) -> list[Count]:
    """Who counts what an app's cache does, beside the listeners of `cache_operated`.

    Most requests do something with the cache, and a signal costs more than the counting.

    Args:
        extensions: Of the app.
    """
    counters: list[Count] = extensions.setdefault("flask_muset.cache_counters", [])
    return counters


@dataclass(frozen=True, slots=True)
class WriteBehindEvent:
    """How much waits to be written behind, of all processes; told about once a second.

    Attributes:
        pending: Writes that wait.
        oldest_s: Seconds that the oldest has waited.
        dead_letters: Writes that were given up.
    """

    pending: int
    oldest_s: float
    dead_letters: int


#: Sent with `event`, a WriteBehindEvent.
write_behind_measured = _signals.signal("write-behind-measured")
