"""What every store can do: keep entries, and give leases so that loads and writes do not mix.

A store answers within its own bound of time and never raises because it is away, beside `forget`:
a cache that is away is a miss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flask_muset.cache_strategies.entry import Busy, Entry, Lease, Write

__all__ = ["Changing", "Store", "Tell", "tell_nobody"]

#: Is told of an operation: its name, how it went, and its seconds where it was timed.
Tell = Callable[[str, str, float | None], None]


def tell_nobody(_operation: str, _status: str, _duration_s: float | None) -> None:
    """A `Tell` for those who do not listen."""


class Store(Protocol):
    """Entries by key. Keys are any text.

    Where a method returns whether it was carried out, False means: not yet, the store will make up
    for it by deleting the key as soon as it can, and serves the old value no more in this process.
    """

    def read(self, key: str, /) -> Entry | None:
        """The entry; None if there is none, or if it is gone or made invalid by a tag."""
        ...

    def read_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Those of the entries that there are."""
        ...

    def write(self, key: str, entry: Entry, /) -> bool:
        """Keep an entry, whatever was there; a load that has begun is not put in any more.

        The store sets `began_us`.
        """
        ...

    def write_many(self, entries: Mapping[str, Entry], /) -> bool:
        """Keep several."""
        ...

    def delete(self, key: str, /) -> bool:
        """Forget one entry; a load that has begun is not put in any more."""
        ...

    def delete_many(self, keys: Sequence[str], /) -> bool:
        """Forget several."""
        ...

    def lease(
        self, key: str, known: Entry | None, /, *, anyway: bool = False
    ) -> Entry | Lease | Busy:
        """Ask for the right to load a key.

        Args:
            key: Of the entry.
            known: What the caller has seen there, a stale one for example.
            anyway: Whether a backoff is passed over.

        Returns:
            An Entry that is another one than `known`: somebody has put it in meanwhile. A Lease,
            which the caller has to `settle`, whatever happens. Or Busy, if somebody else has it.
        """
        ...

    def settle(self, lease: Lease, entry: Entry | None, /, *, backoff_s: float = 0.0) -> bool:
        """End a lease.

        Args:
            lease: That `lease` gave.
            entry: What was loaded; its `began_us` is the lease's. None puts nothing in.
            backoff_s: Seconds for which nobody else gets a lease unless it asks for it `anyway`.

        Returns:
            Whether the entry was put in: not if the key was written or deleted meanwhile, or if
            the lease had ended.
        """
        ...

    def begin_write(self, key: str, /) -> Write:
        """Say that the source will be written: loads that have begun are not put in any more.

        Returns:
            What is to be given to `end_write`, whatever happens.
        """
        ...

    def end_write(self, write: Write, entry: Entry | None, /) -> bool:
        """Say that the source was written.

        Args:
            write: That `begin_write` gave.
            entry: What the source has now; the store sets `began_us`. None if it is unknown.

        Returns:
            Whether the cache agrees with the source: it has the entry or, where another write went
            on at the same time and nobody knows which was the last, none.
        """
        ...

    def forget(self, pattern: str, /) -> int:
        r"""Delete the keys that match, and the loads of such keys.

        Args:
            pattern: `*` stands for any text, `\*` for an asterisk; all else stands for itself.

        Returns:
            Exactly how many there were.

        Raises:
            CacheUnavailable: Not all of them can be reached.
        """
        ...

    def invalidate_tag(self, tag: str, /, *, keep_stale: bool) -> bool:
        """Make all entries of a tag invalid, those too whose load has begun.

        It costs the same for any number of them.

        Args:
            tag: One of theirs; empty for all entries of the store.
            keep_stale: Whether they become stale instead of being gone.
        """
        ...

    def explain(self, key: str, /) -> dict[str, Any]:
        """What there is about a key, for people."""
        ...

    def close(self) -> None:
        """Let go of connections and threads; the next use begins anew."""
        ...


class Changing(ABC):
    """The changes of a store to which writing and deleting are one thing."""

    @abstractmethod
    def _change(self, changes: Mapping[str, Entry | None]) -> bool:
        """Keep the entries, and forget the keys that have None."""

    def write(self, key: str, entry: Entry, /) -> bool:
        """Keep an entry, whatever was there."""
        return self._change({key: entry})

    def write_many(self, entries: Mapping[str, Entry], /) -> bool:
        """Keep several."""
        return self._change(entries)

    def delete(self, key: str, /) -> bool:
        """Forget one entry."""
        return self._change({key: None})

    def delete_many(self, keys: Sequence[str], /) -> bool:
        """Forget several."""
        return self._change(dict.fromkeys(keys))
