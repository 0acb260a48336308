"""Two stores as one: a key is where the patterns of writers say, in every process the same.

What is written behind has its entry and its record put into one Redis by one script, both or
neither. So the keys that writers own are in the Redis of the journal, and all others in one that
may evict them. Each of the two goes on while the other one is away.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flask_muset.cache_strategies.entry import Busy, Entry, Lease, Write
from flask_muset.cache_strategies.patterns import covers, overlap
from flask_muset.cache_strategies.tiered_store import TieredStore
from flask_muset.cache_strategies.writers import Writers

__all__ = ["SplitStore"]


class SplitStore:
    """A `Store` of two.

    Args:
        others: Has the keys that no writer owns.
        owned: Has those that one does.
        writers: Who owns which.
    """

    def __init__(self, others: TieredStore, owned: TieredStore, writers: Writers) -> None:
        #: Where the journal is too.
        self.owned = owned
        self._others = others
        self._writers = writers

    @property
    def on_invalid(self) -> Callable[[str, str], None] | None:
        """Is told of what other processes have made invalid, see `TieredStore`."""
        return self.owned.on_invalid

    @on_invalid.setter
    def on_invalid(self, tell: Callable[[str, str], None] | None) -> None:
        self.owned.on_invalid = self._others.on_invalid = tell

    def of(self, key: str) -> TieredStore:
        """The store that has a key."""
        return self._others if self._writers.owner(key) is None else self.owned

    def _parts(self, keys: Iterable[str]) -> Iterable[tuple[TieredStore, list[str]]]:
        parts: dict[TieredStore, list[str]] = {}
        for key in keys:
            parts.setdefault(self.of(key), []).append(key)
        return parts.items()

    # --- One key

    def peek(self, key: str) -> Entry | None:
        """What the memory has, without waiting."""
        return self.of(key).peek(key)

    def read(self, key: str, /) -> Entry | None:
        """The entry."""
        return self.of(key).read(key)

    def write(self, key: str, entry: Entry, /) -> bool:
        """Keep an entry."""
        return self.of(key).write(key, entry)

    def delete(self, key: str, /) -> bool:
        """Forget one entry."""
        return self.of(key).delete(key)

    def lease(
        self, key: str, known: Entry | None, /, *, anyway: bool = False
    ) -> Entry | Lease | Busy:
        """Ask for the right to load a key."""
        return self.of(key).lease(key, known, anyway=anyway)

    def settle(self, lease: Lease, entry: Entry | None, /, *, backoff_s: float = 0.0) -> bool:
        """End a lease."""
        return self.of(lease.key).settle(lease, entry, backoff_s=backoff_s)

    def begin_write(self, key: str, /) -> Write:
        """Say that the source will be written."""
        return self.of(key).begin_write(key)

    def end_write(self, write: Write, entry: Entry | None, /) -> bool:
        """Say that the source was written."""
        return self.of(write.key).end_write(write, entry)

    def explain(self, key: str, /) -> dict[str, Any]:
        """What there is about a key."""
        return self.of(key).explain(key)

    # --- Several

    def read_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Those that there are."""
        found: dict[str, Entry] = {}
        for store, some in self._parts(keys):
            found |= store.read_many(some)
        return found

    def write_many(self, entries: Mapping[str, Entry], /) -> bool:
        """Keep several."""
        parts = self._parts(entries)
        # Each is asked, whatever the other one says.
        return False not in [s.write_many({key: entries[key] for key in some}) for s, some in parts]

    def delete_many(self, keys: Sequence[str], /) -> bool:
        """Forget several."""
        return False not in [store.delete_many(some) for store, some in self._parts(keys)]

    def forget(self, pattern: str, /) -> int:
        """Delete what matches; a store that can have nothing of it is not asked."""
        patterns, counts = list(self._writers.patterns()), [0, 0]
        try:
            if not any(covers(one, pattern) for one in patterns):
                counts[0] = self._others.forget(pattern)
        finally:
            if any(overlap(one, pattern) for one in patterns):
                counts[1] = self.owned.forget(pattern)
        return sum(counts)

    def invalidate_tag(self, tag: str, /, *, keep_stale: bool) -> bool:
        """Make all entries of a tag invalid: nobody knows in which store there are some."""
        try:
            is_done = self._others.invalidate_tag(tag, keep_stale=keep_stale)
        finally:
            # Also where the caller is cut off: this one has to remember it too.
            is_done_too = self.owned.invalidate_tag(tag, keep_stale=keep_stale)
        return is_done and is_done_too

    def close(self) -> None:
        """Let go of both."""
        self._others.close()
        self.owned.close()
