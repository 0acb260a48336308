"""What callers of the loader ask for, and what they may be given in its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from flask_muset import context
from flask_muset.cache_strategies.codec import Unreadable, UnsupportedType
from flask_muset.cache_strategies.entry import ABSENT, Entry
from flask_muset.clock import SYSTEM
from flask_muset.configuration import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    Key,
    check,
    flag,
    optional,
)
from flask_muset.deadline import deadline
from flask_muset.errors import ErrorCategory, MusetError, NotFoundError, OperationTimeoutError
from flask_muset.translate import translate

__all__ = [
    "Answer",
    "Ask",
    "LoadOptions",
    "Outcome",
    "age_of",
    "describe",
    "error_of",
    "is_of_use",
    "not_found",
]

#: How much longer than a caller's deadline an event is waited for, so that the deadline ends it.
_SLACK_S = 0.001

#: Errors that are about the request or the thing itself: an old value would hide the truth.
_FINAL = frozenset({
    ErrorCategory.VALIDATION, ErrorCategory.AUTHENTICATION, ErrorCategory.AUTHORIZATION,
    ErrorCategory.NOT_FOUND, ErrorCategory.CONFLICT,
})  # fmt: skip


class Outcome(StrEnum):
    """How a value was come by.

    Attributes:
        HIT: It was fresh in the cache.
        MISS: It was loaded, by the caller or by somebody for whom he waited.
        STALE: It was in the cache and not fresh.
        BYPASS: It was loaded without the cache: the load asked for its own key, or the source is
            being written.
    """

    HIT = "HIT"
    MISS = "MISS"
    STALE = "STALE"
    BYPASS = "BYPASS"


class Answer(NamedTuple):
    """What a caller gets.

    Attributes:
        value: The value.
        outcome: How it was come by.
        age_s: Seconds since it was loaded.
    """

    value: Any
    outcome: Outcome
    age_s: float


def _are_tags(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(tag, str) and tag for tag in value)


_OPTIONS = {
    "expire": optional(Key(None, ABOVE_ZERO.allows, "seconds above 0")),
    "tags": Key((), _are_tags, "a tuple of texts that are not empty"),
    "stale_while_revalidate": Key(0, AT_LEAST_ZERO.allows, "seconds, at least 0"),
    "stale_if_error": Key(0, AT_LEAST_ZERO.allows, "seconds, at least 0"),
    "refresh_backoff": optional(Key(None, AT_LEAST_ZERO.allows, "seconds, at least 0")),
    "soft_timeout": optional(Key(None, AT_LEAST_ZERO.allows, "seconds, at least 0")),
    "hard_timeout": optional(Key(None, ABOVE_ZERO.allows, "seconds above 0")),
    "negative_expire": optional(Key(None, ABOVE_ZERO.allows, "seconds above 0")),
    "immutable": flag(False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How one kind of value is kept and loaded. All times are seconds.

    Attributes:
        expire: How long it is fresh; None for no end.
        tags: By which it may be made invalid.
        stale_while_revalidate: For how long after that it is served at once, while it is loaded
            beside the caller.
        stale_if_error: For how long after that it is served where a load fails.
        refresh_backoff: For how long after a load that failed the stale value is served without
            another try; None for a tenth of `expire`, at least 1 and at most 30.
        soft_timeout: How long a caller who may have a stale value waits for a fresh one; the load
            goes on without him. None: not at all within `stale_while_revalidate`, else as long as
            it takes.
        hard_timeout: How long a load may take, and how long anybody waits for somebody else's.
        negative_expire: How long None, or that there is nothing (NotFoundError), is kept. None:
            None is kept like any other value, and NotFoundError is not kept.
        immutable: Whether no caller changes the value, so that all may share one.

    Raises:
        ValueError: One of them is not allowed.
    """

    expire: float | None = None
    tags: tuple[str, ...] = ()
    stale_while_revalidate: float = 0
    stale_if_error: float = 0
    refresh_backoff: float | None = None
    soft_timeout: float | None = None
    hard_timeout: float | None = None
    negative_expire: float | None = None
    immutable: bool = False

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _OPTIONS}
        check("the options of a cached value", values, _OPTIONS)

    @property
    def stale_s(self) -> float:
        """For how long a value that is not fresh is of use."""
        return max(self.stale_while_revalidate, self.stale_if_error)

    @property
    def backoff_s(self) -> float:
        """For how long no other refresh is tried after one that failed."""
        if self.refresh_backoff is not None:
            return self.refresh_backoff
        return 30.0 if self.expire is None else min(max(self.expire / 10, 1.0), 30.0)


class Ask:
    """One caller who has not found a fresh value.

    Attributes:
        key: Of the entry.
        fetch: Loads the value.
        options: How it is kept and loaded.
        known: What the cache has, of use or not.
        stale: Its value, ABSENT if it cannot be read or is too old.
        began: When he asked.
        loading_s: Seconds that loads have taken, his own and those for which he waited.
        gives_way: Whether nothing is to be done if another process is at it.
    """

    __slots__ = ("began", "fetch", "gives_way", "key", "known", "loading_s", "options", "stale")

    def __init__(
        self,
        key: str,
        fetch: Callable[[], Any],
        options: LoadOptions,
        known: Entry | None,
        stale: Any,
        began: float,
    ) -> None:
        self.key = key
        self.fetch = fetch
        self.options = options
        self.known = known
        self.stale = stale
        self.began = began
        self.loading_s = 0.0
        self.gives_way = False

    def may_be_stale(self) -> bool:
        """Whether the stale value may be served now."""
        if self.known is None or self.stale is ABSENT:
            return False
        return is_of_use(self.known, self.options, SYSTEM.now())

    def patience_s(self) -> float | None:
        """How long to wait for a fresh value; None for as long as it takes."""
        if self.known is None or not self.may_be_stale():
            return None
        if self.options.soft_timeout is not None:
            return self.options.soft_timeout
        late_s = SYSTEM.now() - self.known.fresh_until
        return 0.0 if late_s < self.options.stale_while_revalidate else None

    def may_hide(self, error: Exception) -> bool:
        """Whether the stale value may be served in place of an error."""
        return self.may_be_stale() and not _is_final(error)

    def stale_answer(self) -> Answer:
        """Serve what is there."""
        age_s = 0.0 if self.known is None else age_of(self.known, SYSTEM.now())
        return Answer(self.stale, Outcome.STALE, age_s)

    def wait_s(self) -> float | None:
        """How long he may wait for somebody else.

        Returns:
            At least 0; None for as long as it takes.

        Raises:
            OperationTimeoutError: No longer.
        """
        deadline.check()
        limits = []
        if self.options.hard_timeout is not None:
            limits.append(self.began + self.options.hard_timeout - SYSTEM.now())
            if limits[0] <= 0:
                raise OperationTimeoutError(
                    f"nobody has loaded {self.key!r} within {self.options.hard_timeout:g} s"
                )
        left_s = deadline.remaining()
        if left_s is not None:
            limits.append(left_s + _SLACK_S)
        return min(limits, default=None)


# --- Entries and errors ---------------------------------------------------------------------------


def age_of(entry: Entry, now: float) -> float:
    """Seconds since an entry was loaded, at least 0: the clocks of processes differ a little."""
    age_s = now - entry.created_at
    return age_s if age_s > 0 else 0.0


def is_of_use(entry: Entry, options: LoadOptions, now: float) -> bool:
    """Whether an entry that is not fresh may be served."""
    late_s = now - entry.fresh_until
    return late_s < options.stale_s and now < entry.gone_at and not entry.is_negative


def error_of(exception: Exception) -> MusetError:
    """An exception in the words of the error table, the current app's own translations used."""
    return translate(exception, context.translations())


def _is_final(exception: Exception) -> bool:
    """Whether a stale value must not hide an exception."""
    if isinstance(exception, UnsupportedType):
        return True
    error = error_of(exception)
    return error.category in _FINAL and not error.retryable


def describe(error: NotFoundError) -> dict[str, Any]:
    """What a negative entry keeps of an error."""
    return {
        "message": error.message,
        "resource_type": error.resource_type,
        "details": error.details,
        "user_message": error.user_message,
        "code": error.code,
        "status": error.status,
    }


def not_found(described: Mapping[str, Any]) -> NotFoundError:
    """The error again, as NotFoundError whatever its subclass was.

    Raises:
        Unreadable: It is none.
    """
    try:
        options = dict(described)
        status = options.pop("status")
        error = NotFoundError(**options)
    except (KeyError, TypeError, ValueError) as failure:
        raise Unreadable("no description of a NotFoundError") from failure
    error.status = status
    return error
