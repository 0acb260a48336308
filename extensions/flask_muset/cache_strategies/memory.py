"""The entries of one process, bounded in bytes.

Which ones stay is decided by S3-FIFO: a new entry stands in a small queue, and only one that was
asked for there, or that comes back soon after it was evicted, gets into the large one. So a scan
passes through without driving out what is in use. A hit only counts up, and takes no lock.

Source: J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from sys import getsizeof
from typing import Any, Final

from flask_muset.cache_strategies.entry import ABSENT, NEVER, Entry
from flask_muset.cache_strategies.patterns import compile_pattern
from flask_muset.clock import SYSTEM
from flask_muset.locks import give_lock, is_patched

__all__ = ["Memory"]

#: What an entry takes beside its key, payload and tags: two objects with their numbers, places in
#: dict, queue and ghosts, and what malloc rounds up. Measured; a test holds the sum against RSS.
_OVERHEAD_BYTES = 540
#: The same for a tag that was made invalid.
_TAG_BYTES = 330
#: A decoded value takes 1 to 12 times its payload, one of records 5 times (measured with msgpack).
_DECODED = 8
#: Parts of the whole: the small queue, the heaviest entry, and the table of tags at most.
_SMALL, _HEAVIEST, _TAGS = 10, 4, 16
#: Hits beyond so many do not make an entry stay longer.
_MOST_HITS = 7
#: Entries of the large queue that get another round until one is evicted, at most: no `put` is to
#: take long.
_ROUNDS = 32
#: Keys that were dropped are told apart by their hash in so many stripes.
_STRIPES = 1024
#: Keys that are looked at without giving way.
_PIECE = 500
_HIGH, _LOW = 0xFFFFFFFF_00000000, 0xFFFFFFFF
_GONE: Final = Entry(b"", created_at=0.0, gone_at=-NEVER)


class _Kept:
    """An entry and its place. It is never given another entry than `_GONE`."""

    __slots__ = ("entry", "hits", "is_main", "key", "mark", "put_at", "weight")

    def __init__(self, key: str, entry: Entry, weight: int, mark: int, put_at: float) -> None:
        self.key = key
        self.entry = entry
        self.weight = weight
        #: By the invalidations up to here it is still good.
        self.mark = mark
        self.put_at = put_at
        self.hits = 0
        self.is_main = False


class Memory:
    """Entries by key. What is put in stays until it is gone, made invalid or evicted.

    Its bytes are estimated so that the process does not grow by more, beside some 10 kB for itself;
    what `Entry.shared` holds is counted if it is there when the entry is put in. All methods may be
    called by threads and greenlets at once, and by a forked child.

    Args:
        max_bytes: Of all entries, with all that is kept about them. An entry that takes more than
            a quarter of it is not put in; 0 keeps nothing.
        unlinked_s: Seconds for which an entry is served after it was put in, where `trusted_until`
            has passed.

    Attributes:
        mark: How many invalidations this process has seen. Who loads, or reads elsewhere, notes it
            before and gives it to `put` with what was read.
        trusted_until: Until when all invalidations are known here, in seconds of `SYSTEM.now()`.
        evictions: How many entries were thrown out for want of room.

    Raises:
        ValueError: A bound is negative.
    """

    _lock: Any

    def __init__(self, max_bytes: int, *, unlinked_s: float = 5.0) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0 (nothing is kept), got {max_bytes!r}.")
        if not unlinked_s >= 0:
            raise ValueError(f"unlinked_s must be at least 0 seconds, got {unlinked_s!r}.")
        self.mark = 0
        self.trusted_until = NEVER
        self.evictions = 0
        self._max_bytes = max_bytes
        self._small_max = max_bytes // _SMALL
        self._unlinked_s = unlinked_s
        #: The mark of the latest drop in each stripe, and of the latest of many keys at once.
        self._dropped = array("Q", bytes(8 * _STRIPES))
        self._many_dropped = 0
        self._empty()
        give_lock(self)
        self._lock_at_fork = self._lock

    def _empty(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._find = self._kept.get
        self._small: deque[_Kept] = deque()
        self._main: deque[_Kept] = deque()
        self._bytes = self._small_bytes = 0
        #: Places in the queues whose entries were removed.
        self._removed = 0
        self._ghosts = _Ghosts()
        self._tags = _TagMarks(self._max_bytes // _TAGS, self.mark)
        #: Of the latest invalidation by tag; who sees it finds that in the table.
        self._tag_mark = self.mark

    def __len__(self) -> int:
        """How many entries are kept; some may be gone already and wait for somebody to notice."""
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What they take, as estimated."""
        return self._bytes + self._tags.bytes

    # --- Reading

    def get(self, key: str) -> Entry | None:
        """The entry, a stale one too; None if there is none, or if it is gone or invalid."""
        kept = self._find(key)
        if kept is None:
            return None
        entry, now = kept.entry, SYSTEM.now()
        if now < entry.gone_at and now < self.trusted_until and kept.mark >= self._tag_mark:
            if kept.hits < _MOST_HITS:
                kept.hits += 1
            return entry
        return self._get_doubtful(kept, now)

    def _get_doubtful(self, kept: _Kept, now: float) -> Entry | None:
        if now >= self.trusted_until and now - kept.put_at > self._unlinked_s:
            return None
        entry, mark = kept.entry, self._tag_mark  # before the table is looked at
        fresh_until = self._tags.fresh_until(entry.tags, kept.mark)
        if now >= entry.gone_at or fresh_until == -NEVER:
            self._discard(kept)
            return None
        entry.fresh_until = min(entry.fresh_until, fresh_until)
        kept.mark = mark
        kept.hits = min(kept.hits + 1, _MOST_HITS)
        return entry

    # --- Putting in

    def put(self, key: str, entry: Entry, mark: int, *, tags_only: bool = False) -> bool:
        """Keep an entry, unless it was made invalid while it was read or loaded.

        If one of its tags was made stale meanwhile, it is kept as stale.

        Args:
            key: Of the entry.
            entry: It may be changed afterwards: `fresh_until` sinks where its tags become stale.
            mark: What `mark` was before the reading or loading began.
            tags_only: Whether only invalidations by tag count, because the caller knows of all
                others.

        Returns:
            Whether it was put in: not if it was made invalid, or is too heavy.
        """
        with self._lock:
            return (tags_only or self._is_current(key, mark)) and self._put(key, entry, mark)

    def replace(self, key: str, entry: Entry, mark: int, *, tags_only: bool = False) -> bool:
        """Keep an entry that was written: `drop` and `put` at once.

        What others have begun to read or load is not put in any more. Where the entry is not put
        in, there is none afterwards.

        Args:
            key: Of the entry.
            entry: As for `put`.
            mark: What `mark` was before the writing began.
            tags_only: As for `put`.

        Returns:
            Whether it was put in.
        """
        with self._lock:
            is_current = tags_only or self._is_current(key, mark)
            self._note_dropped(key)
            if is_current and self._put(key, entry, mark):
                return True
            self._remove_key(key)
            return False

    def _is_current(self, key: str, mark: int) -> bool:
        return mark >= self._many_dropped and mark >= self._dropped[hash(key) % _STRIPES]

    def _put(self, key: str, entry: Entry, mark: int) -> bool:
        now, weight = SYSTEM.now(), _weight(key, entry)
        fresh_until = self._tags.fresh_until(entry.tags, mark)
        if fresh_until == -NEVER:
            return False
        before = self._remove_key(key)
        if weight > self._max_bytes // _HEAVIEST:
            return False
        entry.fresh_until = min(entry.fresh_until, fresh_until)
        kept = _Kept(key, entry, weight, self.mark, now)
        if before is not None:
            kept.is_main, kept.hits = before.is_main, before.hits
        else:
            kept.is_main = self._ghosts.has(key, within=len(self._kept))
        while self.bytes + weight > self._max_bytes:
            self._evict(now, weight)
        self._add(kept)
        return True

    def _add(self, kept: _Kept) -> None:
        self._kept[kept.key] = kept
        self._bytes += kept.weight
        self._ghosts.make_room_for(len(self._kept))
        if kept.is_main:
            self._main.append(kept)
            return
        self._small.append(kept)
        self._small_bytes += kept.weight
        # While there is room all go on: nobody has to be moved in great numbers when there is none.
        while self._small_bytes > self._small_max and self._small[0] is not kept:
            self._pass_on(self._small.popleft())

    # --- Throwing out; the lock is held

    def _evict(self, now: float, weight: int) -> None:
        """Throw one entry out for what comes, or give one that is in use another place."""
        if self._small and (self._small_bytes + weight > self._small_max or not self._main):
            kept = self._small.popleft()
            if _is_in_use(kept, now):
                self._pass_on(kept)
            else:
                self._evicted(kept)
            return
        for _ in range(_ROUNDS):
            kept = self._main[0]
            if not _is_in_use(kept, now):
                break
            kept.hits -= 1
            self._main.rotate(-1)
        self._evicted(self._main.popleft())

    def _pass_on(self, kept: _Kept) -> None:
        """From the small queue to the large one."""
        if kept.entry is _GONE:
            self._removed -= 1
            return
        kept.is_main, kept.hits = True, 0
        self._small_bytes -= kept.weight
        self._main.append(kept)

    def _evicted(self, kept: _Kept) -> None:
        if kept.entry is _GONE:
            self._removed -= 1
            return
        self._take_out(kept)
        self.evictions += 1
        if not kept.is_main:
            self._ghosts.add(kept.key)

    def _take_out(self, kept: _Kept) -> None:
        del self._kept[kept.key]
        self._bytes -= kept.weight
        if not kept.is_main:
            self._small_bytes -= kept.weight
        kept.entry = _GONE

    def _remove_key(self, key: str) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is not None:
            self._remove(kept)
        return kept

    def _remove(self, kept: _Kept) -> None:
        self._take_out(kept)
        # Its place in the queue is given up when there are many of such.
        self._removed += 1
        if self._removed > 64 + len(self._kept) // 8:
            self._small = deque([kept for kept in self._small if kept.entry is not _GONE])
            self._main = deque([kept for kept in self._main if kept.entry is not _GONE])
            self._removed = 0

    def _discard(self, kept: _Kept) -> None:
        with self._lock:
            if self._has(kept):
                self._remove(kept)

    def _has(self, kept: _Kept) -> bool:
        """Whether what was found without the lock is still kept."""
        return self._kept.get(kept.key) is kept

    def discard(self, key: str) -> None:
        """Make room: this is no invalidation."""
        with self._lock:
            self._remove_key(key)

    # --- Invalidation

    def drop(self, key: str) -> bool:
        """Remove an entry, and refuse what was read or loaded before; whether there was one."""
        with self._lock:
            self._note_dropped(key)
            kept = self._kept.get(key)
            return kept is not None and self._drop(kept)

    def _note_dropped(self, key: str) -> None:
        self.mark += 1
        self._dropped[hash(key) % _STRIPES] = self.mark

    def _drop(self, kept: _Kept) -> bool:
        was_there = self._is_there(kept)
        if kept.is_main:
            # If it is loaded anew, it gets its place back.
            self._ghosts.add(kept.key)
        self._remove(kept)
        return was_there

    def _is_there(self, kept: _Kept) -> bool:
        entry = kept.entry
        return (
            SYSTEM.now() < entry.gone_at and self._tags.fresh_until(entry.tags, kept.mark) != -NEVER
        )

    def drop_matching(self, pattern: str) -> int:
        r"""Remove the entries whose keys match, and refuse all that was read or loaded before.

        Where gevent runs, it gives way to others between pieces of the keys.

        Args:
            pattern: `*` stands for any text, `\*` for an asterisk; all else stands for itself.

        Returns:
            How many there were.
        """
        matches = compile_pattern(pattern)
        with self._lock:
            self._note_many_dropped()
            found = list(self._kept.values())
        pieces = (found[start : start + _PIECE] for start in range(0, len(found), _PIECE))
        count = 0
        try:
            for piece in pieces:
                count += self._drop_among(piece, matches)
                if is_patched():
                    SYSTEM.sleep(0)
        finally:
            # If it is cut off while it gives way, nothing that matches may stay.
            self._drop_among(list(chain.from_iterable(pieces)), matches)
        return count

    def _note_many_dropped(self) -> None:
        self.mark += 1
        self._many_dropped = self.mark

    def _drop_among(self, found: Sequence[_Kept], matches: Callable[[str], bool]) -> int:
        matching = [kept for kept in found if matches(kept.key)]
        with self._lock:
            return sum(self._drop(kept) for kept in matching if self._has(kept))

    def invalidate_tag(self, tag: str, *, keep_stale: bool) -> None:
        """Make all entries of a tag invalid, and those too that are being loaded.

        It costs the same for any number of entries; each is looked at when it is asked for.

        Args:
            tag: One of theirs; empty for all entries.
            keep_stale: Whether they become stale instead of being gone.
        """
        if not tag and not keep_stale:
            self.clear()
            return
        with self._lock:
            self.mark += 1
            self._tags.note(tag, self.mark, SYSTEM.now() if keep_stale else -NEVER)
            self._tag_mark = self.mark  # after the table

    def clear(self) -> None:
        """Remove all entries, and refuse what was read or loaded before."""
        old = self._kept, self._small, self._main
        with self._lock:
            self._note_many_dropped()
            self._empty()
        del old  # without the lock: there may be many

    def _forked(self) -> None:
        """In a child: another thread of the parent may have been in the middle of a change."""
        if self._lock_at_fork.locked():
            self._note_many_dropped()
            self._empty()
        self._lock_at_fork = self._lock


def _weight(key: str, entry: Entry) -> int:
    payload = entry.payload
    weight = _OVERHEAD_BYTES + getsizeof(key) + getsizeof(payload)
    for tag in entry.tags:
        weight += 8 + getsizeof(tag)
    if entry.shared is not ABSENT:
        weight += _DECODED * len(payload)
    return weight


def _is_in_use(kept: _Kept, now: float) -> bool:
    return kept.hits > 0 and now < kept.entry.gone_at


class _Ghosts:
    """The keys that were evicted lately: 32 bits of the hash and 32 of a count each."""

    __slots__ = ("_count", "_slots")

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 64))
        self._count = 0

    def add(self, key: str) -> None:
        """Remember a key; one that has the same slot is forgotten."""
        code = hash(key)
        self._count += 1
        self._slots[code & (len(self._slots) - 1)] = (code & _HIGH) | (self._count & _LOW)

    def has(self, key: str, *, within: int) -> bool:
        """Whether a key was among the last so many."""
        code = hash(key)
        slot = self._slots[code & (len(self._slots) - 1)]
        return slot & _HIGH == code & _HIGH and (self._count - slot) & _LOW < within

    def make_room_for(self, count: int) -> None:
        """Have at least so many slots."""
        if count > len(self._slots):
            # What was in a slot is found in both that it becomes.
            self._slots *= 2


class _TagMarks:
    """When tags were made invalid. It may be read while another thread writes.

    Args:
        max_bytes: What it takes at most. What is forgotten to keep it is not lost: all that has a
            tag and is older is taken for invalid.
        floor: The mark of what is older than all this.
    """

    __slots__ = ("_all", "_floor", "_known", "_max_bytes", "bytes")

    def __init__(self, max_bytes: int, floor: int) -> None:
        #: The marks of when a tag's entries were gone and became stale, and the moment of that.
        self._known: dict[str, tuple[int, int, float]] = {}
        self._all = (0, 0, NEVER)
        self._floor = floor
        self._max_bytes = max_bytes
        self.bytes = 0

    def note(self, tag: str, mark: int, stale_at: float) -> None:
        """A tag's entries are stale since some moment, or gone if that is -NEVER."""
        before = self._known.get(tag, (0, 0, NEVER)) if tag else self._all
        gone = stale_at == -NEVER
        marks = (mark, *before[1:]) if gone else (before[0], mark, stale_at)
        if not tag:
            self._all = marks
            return
        if tag not in self._known:
            self.bytes += _TAG_BYTES + getsizeof(tag)
        self._known[tag] = marks
        if self.bytes > self._max_bytes:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        for tag, marks in sorted(self._known.items(), key=_latest):
            if self.bytes <= self._max_bytes // 2:
                break
            self._floor = max(marks[:2])  # before it is forgotten
            del self._known[tag]
            self.bytes -= _TAG_BYTES + getsizeof(tag)

    def fresh_until(self, tags: tuple[str, ...], mark: int) -> float:
        """Until when what was good at a mark is fresh by its tags; -NEVER if it is gone."""
        until = self._all[2] if self._all[1] > mark else NEVER
        for tag in tags:
            gone, stale, stale_at = self._known.get(tag, (0, 0, NEVER))
            if gone > mark:
                return -NEVER
            if stale > mark:
                until = min(until, stale_at)
        # After the table: what it has forgotten is known to be older.
        return -NEVER if tags and mark < self._floor else until


def _latest(item: tuple[str, tuple[int, int, float]]) -> int:
    return max(item[1][:2])
