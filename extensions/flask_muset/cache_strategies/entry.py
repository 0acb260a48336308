"""What stores keep, and the words in which they answer."""

import math
from typing import Any, Final

__all__ = ["ABSENT", "NEVER", "Busy", "Entry", "Lease", "Write"]


#: A moment that does not come.
NEVER = math.inf


class _Absent:
    """Tells a value that is not there from None."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()


class Entry:
    """One value in a cache.

    Moments are of this process's clock, `SYSTEM.now()`; a store that is shared translates them.

    Attributes:
        payload: The value, encoded and not compressed.
        created_at: When the value was there.
        fresh_until: Until when it is served without a thought.
        gone_at: When nobody may have it any more, at least `fresh_until`.
        tags: By which it may be made invalid.
        is_negative: Whether it stands for something that was not found.
        began_us: Microseconds of the store's clock when its load began, or when it was written:
            what was made invalid at that moment or later is not to be served.
        shared: The decoded value, where callers have said that they will not change it.
    """

    __slots__ = (
        "began_us",
        "created_at",
        "fresh_until",
        "gone_at",
        "is_negative",
        "payload",
        "shared",
        "tags",
    )

    def __init__(
        self,
        payload: bytes,
        *,
        created_at: float,
        fresh_until: float = NEVER,
        gone_at: float = NEVER,
        tags: tuple[str, ...] = (),
        is_negative: bool = False,
        began_us: int = 0,
    ) -> None:
        self.payload = payload
        self.created_at = created_at
        self.fresh_until = fresh_until
        self.gone_at = gone_at
        self.tags = tags
        self.is_negative = is_negative
        self.began_us = began_us
        self.shared: Any = ABSENT

    def describe(self, now: float) -> dict[str, Any]:
        """What there is to say of it, for people.

        Args:
            now: `SYSTEM.now()`, from which its age and what is left of it are counted, in seconds.
        """
        return {
            "age_s": now - self.created_at,
            "fresh_for_s": self.fresh_until - now,
            "gone_in_s": self.gone_at - now,
            "bytes": len(self.payload),
            "tags": list(self.tags),
            "is_negative": self.is_negative,
        }

    def __repr__(self) -> str:
        return f"<Entry of {len(self.payload)} bytes, created at {self.created_at:.3f}>"


class Lease:
    """The right to load one key, and to put in what was loaded.

    It ends by itself if its holder is gone, and at once where the key is written or deleted: what
    was read before that is not put in.

    Attributes:
        key: Of the entry.
        token: Tells it from all others; empty for one that holds in this process alone.
        began_us: Microseconds of the store's clock when it was given.
        mark: What this process knew of invalidations then.
    """

    __slots__ = ("began_us", "key", "mark", "token")

    def __init__(self, key: str, token: bytes, began_us: int, mark: int = 0) -> None:
        self.key = key
        self.token = token
        self.began_us = began_us
        self.mark = mark


class Write(Lease):
    """A write of the source in progress: until it ends, no load of its key may be put in."""

    __slots__ = ()


class Busy:
    """Why no lease was given.

    Attributes:
        is_backoff: Whether the last refresh has failed a short while ago: serve what is stale
            instead of waiting.
        is_write: Whether the source is being written: load without putting in instead of waiting.
    """

    __slots__ = ("is_backoff", "is_write")

    def __init__(self, *, is_backoff: bool = False, is_write: bool = False) -> None:
        self.is_backoff = is_backoff
        self.is_write = is_write
