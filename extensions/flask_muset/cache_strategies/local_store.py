"""The store of a process that shares nothing: a memory, and who may load or write what.

Whatever is decided about a key is decided under one lock, and nobody waits while he holds it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flask_muset.cache_strategies.entry import Busy, Entry, Lease, Write
from flask_muset.cache_strategies.memory import Memory
from flask_muset.cache_strategies.patterns import compile_pattern
from flask_muset.clock import SYSTEM
from flask_muset.locks import give_lock

__all__ = ["LocalStore"]

#: Keys whose loads failed, and keys that are loaded or written, that are remembered before those
#: that have ended are looked for.
_MANY = 10_000


class _Writes:
    """The writes of one key's source that go on, by `began_us`: until when they are waited for."""

    __slots__ = ("is_mixed", "until")

    def __init__(self) -> None:
        self.until: dict[int, float] = {}
        #: Whether nobody knows which change of the key was the last.
        self.is_mixed = False

    def go_on(self, now: float) -> bool:
        """Whether one of them does; those whose writers are gone are forgotten."""
        for began_us, until in list(self.until.items()):
            if now >= until:
                del self.until[began_us]
        return bool(self.until)


class LocalStore:
    """Entries and leases in this process alone: a `Store` that is never away.

    Args:
        max_bytes: Of the memory; 0 keeps nothing, but still has one load at a time.
        lease_s: Seconds after which somebody else may load for a holder that is gone, and after
            which a write that has not ended is not waited for any more.

    Attributes:
        memory: Where the entries are.

    Raises:
        ValueError: A bound is out of range.
    """

    _lock: Any

    def __init__(self, max_bytes: int, *, lease_s: float = 10.0) -> None:
        if not lease_s > 0:
            raise ValueError(f"lease_s must be above 0 seconds, got {lease_s!r}.")
        self.memory = Memory(max_bytes)
        #: The entry, None if there is none. The memory's own: a call more would show in each hit.
        self.read = self.peek = self.memory.get
        self._lease_s = lease_s
        self._now_us = 0
        self._let_all_go()
        give_lock(self)

    def _let_all_go(self) -> None:
        #: By key: `began_us` of its load, and until when others wait for it.
        self._loads: dict[str, tuple[int, float]] = {}
        self._writes: dict[str, _Writes] = {}
        #: By key: until when it is not loaded.
        self._backoffs: dict[str, float] = {}
        self._look_at = _MANY

    # --- Entries

    def read_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Those that there are."""
        found = ((key, self.memory.get(key)) for key in keys)
        return {key: entry for key, entry in found if entry is not None}

    def write(self, key: str, entry: Entry, /) -> bool:
        """Keep an entry; always True."""
        with self._lock:
            self._void(key)
            self._put(key, entry, self.memory.mark)
        return True

    def write_many(self, entries: Mapping[str, Entry], /) -> bool:
        """Keep several; always True."""
        for key, entry in entries.items():
            self.write(key, entry)
        return True

    def delete(self, key: str, /) -> bool:
        """Forget an entry; always True."""
        with self._lock:
            self._void(key)
            self.memory.drop(key)
        return True

    def delete_many(self, keys: Sequence[str], /) -> bool:
        """Forget several; always True."""
        for key in keys:
            self.delete(key)
        return True

    # --- With the lock held

    def _void(self, key: str) -> None:
        """The key has changed: whoever is at it does not know what it is now."""
        self._loads.pop(key, None)
        self._backoffs.pop(key, None)
        writes = self._writes.get(key)
        if writes is not None:
            writes.is_mixed = True

    def _put(self, key: str, entry: Entry, mark: int) -> None:
        entry.began_us = self._tick()
        self.memory.replace(key, entry, mark, tags_only=True)

    def _tick(self) -> int:
        """Microseconds, another number at each call."""
        self._now_us = max(self._now_us + 1, SYSTEM.now_ns() // 1000)
        return self._now_us

    def _busy(self, key: str, now: float, *, anyway: bool) -> Busy | None:
        writes = self._writes.get(key)
        if writes is not None:
            if writes.go_on(now):
                return Busy(is_write=True)
            del self._writes[key]
        if key in self._loads and now < self._loads[key][1]:
            return Busy()
        if not anyway and now < self._backoffs.get(key, now):
            return Busy(is_backoff=True)
        return None

    def _make_room(self, now: float) -> None:
        """Forget what has ended by itself, when there is much to forget."""
        if len(self._loads) + len(self._writes) + len(self._backoffs) < self._look_at:
            return
        self._loads = {key: load for key, load in self._loads.items() if now < load[1]}
        self._writes = {key: some for key, some in self._writes.items() if some.go_on(now)}
        waiting = {key: until for key, until in self._backoffs.items() if now < until}
        # Those of the newest failures: a source that fails for more keys is asked for the others.
        self._backoffs = dict(list(waiting.items())[-_MANY // 2 :])
        left = len(self._loads) + len(self._writes) + len(self._backoffs)
        self._look_at = max(_MANY, 2 * left)

    # --- Loads

    def lease(
        self, key: str, known: Entry | None, /, *, anyway: bool = False
    ) -> Entry | Lease | Busy:
        """Ask for the right to load a key."""
        with self._lock:
            entry = self.memory.get(key)
            if entry is not None and (known is None or entry.began_us != known.began_us):
                return entry
            now = SYSTEM.now()
            busy = self._busy(key, now, anyway=anyway)
            if busy is not None:
                return busy
            self._make_room(now)
            lease = Lease(key, b"", self._tick(), self.memory.mark)
            self._loads[key] = lease.began_us, now + self._lease_s
            self._backoffs.pop(key, None)
            return lease

    def settle(self, lease: Lease, entry: Entry | None, /, *, backoff_s: float = 0.0) -> bool:
        """End a lease; it holds as long as nobody else has got one for the key."""
        key = lease.key
        with self._lock:
            if self._loads.get(key, (0,))[0] != lease.began_us:
                return False
            del self._loads[key]
            if backoff_s > 0:
                self._backoffs[key] = SYSTEM.now() + backoff_s
            if entry is None:
                return False
            entry.began_us = lease.began_us
            return self.memory.put(key, entry, lease.mark, tags_only=True)

    # --- Writes of the source

    def begin_write(self, key: str, /) -> Write:
        """Say that the source will be written; the value goes now, should the writer vanish."""
        with self._lock:
            now = SYSTEM.now()
            self._make_room(now)
            self._void(key)
            self.memory.drop(key)
            writes = self._writes.setdefault(key, _Writes())
            writes.go_on(now)
            write = Write(key, b"", self._tick(), self.memory.mark)
            writes.until[write.began_us] = now + self._lease_s
            return write

    def end_write(self, write: Write, entry: Entry | None, /) -> bool:
        """Say that the source was written; always True."""
        key = write.key
        with self._lock:
            is_alone = self._end_alone(write)
            self._void(key)
            if is_alone and entry is not None:
                self._put(key, entry, write.mark)
            else:
                self.memory.drop(key)
        return True

    def _end_alone(self, write: Write) -> bool:
        """Take a write out; whether nothing else has changed the key since it began."""
        writes = self._writes.get(write.key)
        if writes is None:
            return False
        is_known = writes.until.pop(write.began_us, None) is not None
        if not writes.until:
            del self._writes[write.key]
        return is_known and not writes.is_mixed

    # --- Invalidation

    def forget(self, pattern: str, /) -> int:
        """Delete the keys that match; all of them can be reached."""
        with self._lock:
            self._void_all(compile_pattern(pattern))
        return self.memory.drop_matching(pattern)

    def _void_all(self, matches: Callable[[str], bool]) -> None:
        for table in (self._loads, self._backoffs, self._writes):
            for key in [key for key in table if matches(key)]:
                self._void(key)

    def invalidate_tag(self, tag: str, /, *, keep_stale: bool) -> bool:
        """Make all entries of a tag invalid; always True."""
        with self._lock:
            if not tag and not keep_stale:
                self._void_all(lambda _key: True)
            self.memory.invalidate_tag(tag, keep_stale=keep_stale)
        return True

    # --- Beside

    def explain(self, key: str, /) -> dict[str, Any]:
        """What there is about a key.

        Returns:
            `level` is `memory` or None; `lease` is `none`, `load`, `write` or `backoff`. With an
            entry also its age and what is left of it in seconds, its bytes, tags and whether it
            stands for something that was not found.
        """
        with self._lock:
            entry, now = self.memory.get(key), SYSTEM.now()
            lease = _name(self._busy(key, now, anyway=False))
        if entry is None:
            return {"level": None, "lease": lease}
        return {
            "level": "memory",
            **entry.describe(now),
            "lease": lease,
        }

    def close(self) -> None:
        """There is nothing to let go of; the entries stay."""

    def _forked(self) -> None:
        """Who loads or writes in the parent does not in the child."""
        self._let_all_go()


def _name(busy: Busy | None) -> str:
    if busy is None:
        return "none"
    return "write" if busy.is_write else "backoff" if busy.is_backoff else "load"
