"""Entries in the memory of each process, over entries that all processes share in Redis.

Reads ask the memory first. What one process writes or deletes, the memories of all others hear of.
While Redis is away the memory and loads go on alone; what could not be made invalid is sent as soon
as Redis is back, before anything is read there again.
"""

import logging
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from flask_muset.cache_strategies.entry import NEVER, Busy, Entry, Lease, Write
from flask_muset.cache_strategies.memory import Memory
from flask_muset.cache_strategies.redis_entries import RedisEntries
from flask_muset.cache_strategies.repairs import Repairs
from flask_muset.cache_strategies.stores import Changing, Tell, tell_nobody
from flask_muset.clock import SYSTEM
from flask_muset.errors import (
    CacheUnavailable,
    ExternalServiceError,
    MusetError,
    OperationTimeoutError,
    OverloadedError,
)
from flask_muset.feed import SENDER_BYTES, Feed
from flask_muset.locks import give_lock, make_event, run_beside
from flask_muset.redis import GuardedRedis

__all__ = ["Owed", "TieredStore"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: After an outage Redis is not read for so long: every process asks at least four times a second
#: whether it is back, and tells it first what it has missed.
_SETTLING_S = 0.5
_MAX_TAGS = 10_000
#: Keys that are remembered; beyond these all entries of the memory are dropped.
_MOST_UNASKED = 10_000
_TRIES = 5
#: Longer than anybody reads: the client has a budget.
_LONG_S = 5.0


def _call(method: Callable[[str], None] | None, state: str) -> None:
    if method is not None:
        method(state)


class Owed(Protocol):
    """What else Redis has to be told after an outage, before it is asked for anything."""

    def __len__(self) -> int:
        """How much there is of it."""
        ...

    def send(self) -> None:
        """Tell it; raises a MusetError if it is away again, and keeps the rest."""
        ...


class _Reading:
    """One reading of one key, for all who wait for it; it may be cut off before it is done."""

    __slots__ = ("entry", "event", "is_done", "is_over", "mark")

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.entry: Entry | None = None
        self.is_done = self.is_over = False
        #: Only there once somebody waits: it costs as much as half of the reading.
        self.event: Any = None

    def end(self) -> None:
        """Let go those who wait."""
        self.is_over = True  # before the look at the event, see `wait`
        if self.event is not None:
            self.event.set()

    def wait(self, lock: Any) -> bool:
        """Wait for the end; whether it is done."""
        with lock:
            event = self.event = self.event or make_event()
        if not self.is_over:
            event.wait(_LONG_S)
        return self.is_done


class TieredStore(Changing):
    """A store of two levels; with a memory of 0 bytes, of Redis alone.

    Args:
        redis: Which Redis; its `on_change` is taken.
        max_bytes: Of the memory.
        unlinked_s: How old entries of the memory may be while nobody tells what is invalid.
        lease_s: Seconds after which somebody else loads for a holder that is gone.
        tell: Is told of operations that could not be carried out: name, status, None.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        *,
        max_bytes: int,
        unlinked_s: float = 5.0,
        lease_s: float = 3.0,
        tell: Tell = tell_nobody,
    ) -> None:
        self.memory = Memory(max_bytes, unlinked_s=unlinked_s)
        self.memory.trusted_until = 0.0
        #: What the memory has, without waiting.
        self.peek = self.memory.get
        self._has_memory = max_bytes > 0
        #: Is told of each key, pattern or tag that another process has made invalid: which it is,
        #: `key`, `pattern` or `all`, and its name.
        self.on_invalid: Callable[[str, str], None] | None = None
        self._redis = redis
        self._unlinked_s = unlinked_s
        self._lease_s = lease_s
        self._tell = tell
        self._feed: Feed | None = None
        self._tags: dict[str, int] = {}
        self._resume_at = 0.0
        self._repairs = Repairs()
        #: Is sent after the repairs, None if there is no such thing.
        self.owed: Owed | None = None
        self._is_repairing = False
        self._held: dict[Lease, float] = {}
        self._is_renewing = False
        self._readings: dict[str, _Reading] = {}
        #: Keys that the memory has from loads before which Redis could not be asked.
        self._unasked: set[str] = set()
        self._entries = self._make_entries()
        give_lock(self)
        changed = weakref.WeakMethod(self._link_changed)
        # Weak: the feed has the client, and must not keep the store.
        redis.on_change = lambda state: _call(changed(), state)

    _lock: Any

    def _make_entries(self) -> RedisEntries:
        self._sender = secrets.token_hex(SENDER_BYTES // 2).encode()
        return RedisEntries(
            self._redis,
            sender=self._sender,
            dead_since=self._dead_since,
            on_unreadable=lambda: self._tell("get", "unreadable", None),
            lease_s=self._lease_s,
        )

    # --- Whether Redis may be asked

    def _reach(self) -> RedisEntries | None:
        """The entries in Redis, None while it is away."""
        if self._feed is None:
            self._start()
        if self._redis.state != "up" or SYSTEM.now() < self._resume_at:
            return None
        if (self._repairs or self.owed) and not self._repair():
            return None
        if self._unasked:
            self._forget_unasked()
        return self._entries

    def _forget_unasked(self) -> None:
        """Drop what was loaded without a look at what waits in Redis to be written."""
        with self._lock:
            unasked, self._unasked = self._unasked, set()
        if len(unasked) >= _MOST_UNASKED:
            self.memory.clear()
            return
        for key in unasked:
            self.memory.drop(key)

    def reach(self) -> RedisEntries:
        """The part of the store in Redis, which every process has told what it had missed.

        Raises:
            CacheUnavailable: Redis is away, or was less than half a second ago.
        """
        entries = self._reach()
        if entries is None:
            raise CacheUnavailable(
                f"Redis cannot be asked, its link is {self._redis.state}; nothing has changed, try "
                "again when it has been up for half a second",
                retry_after=_SETTLING_S,
            )
        return entries

    def now_us(self) -> int:
        """Microseconds of the clock of Redis, as this process knows it.

        Raises:
            MusetError: Redis is away and has never been asked.
        """
        return self._entries.now_us()

    def _start(self) -> None:
        with self._lock:
            if self._feed is None:
                self._feed = Feed(
                    self._redis,
                    self._entries.channel,
                    self._sender,
                    self,
                    name="cache",
                    # Often enough that the memory is trusted as long as the link holds.
                    beat_s=min(1.0, self._unlinked_s / 4),
                )

    def _missed(self, operation: str, error: MusetError | None = None) -> None:
        """Something was done without Redis."""
        if error is not None:
            _log.debug("%s without Redis: %s", operation, error)
        self._tell(operation, "unavailable", None)

    def _ask(self, operation: str, ask: Callable[[RedisEntries], T]) -> T | None:
        """What Redis answers; None if it does not.

        Where the link stays up although there was no answer in time, it was this process that had
        too much to do, and Redis is asked again.
        """
        error: MusetError | None = None
        for _ in range(_TRIES):
            entries = self._reach()
            if entries is None:
                break
            try:
                return ask(entries)
            except MusetError as failure:
                error = failure
                if not isinstance(failure, OverloadedError | OperationTimeoutError):
                    break
        self._missed(operation, error)
        return None

    def _repair(self) -> bool:
        """Tell Redis what it has missed; whether that is done."""
        with self._lock:
            if self._is_repairing:
                return False
            self._is_repairing = True
        try:
            self._repairs.send(self._entries, self._note_tag)
            if self.owed:
                self.owed.send()
        except MusetError as error:
            _log.debug("invalidations could not be sent: %s", error)
            return False
        finally:
            self._is_repairing = False
        return not (self._repairs or self.owed)

    def _link_changed(self, state: str) -> None:
        if state != "up":
            # Until it is known since when it is back.
            self._resume_at = NEVER
            return
        self._resume_at = SYSTEM.now() + _SETTLING_S
        if self._repairs or self.owed:
            self._repair()

    # --- What the feed tells

    def linked(self, *, was_away: bool) -> None:
        """Nothing is known of what was made invalid before."""
        self._tags = {}
        self.memory.clear()
        self._pass_on("all", "")
        if was_away and self._redis.state == "up":
            self._resume_at = SYSTEM.now() + _SETTLING_S

    def confirmed(self, since: float) -> None:
        """All that was made invalid before is known."""
        self.memory.trusted_until = since + self._unlinked_s
        if self._unasked and self._redis.state == "up":
            run_beside(self._reach, name="cache-unasked")
        if (self._repairs or self.owed) and self._redis.state == "up":
            # What Redis has refused, or what this process had no time for.
            run_beside(self._repair, name="cache-repair")

    def heard(self, kind: str, text: str) -> None:
        """Another process has made something invalid."""
        if kind == "k":
            self.memory.drop(text)
            self._pass_on("key", text)
        elif kind == "p":
            self.memory.drop_matching(text)
            self._pass_on("pattern", text)
        elif kind == "t":
            at, _, member = text.partition(" ")
            self._note_tag(member, int(at))
            self.memory.invalidate_tag(member[1:], keep_stale=member[0] == "e")
            self._pass_on("all", "")

    def _pass_on(self, what: str, name: str) -> None:
        if self.on_invalid is not None:
            self.on_invalid(what, name)

    def _note_tag(self, member: str, at: int) -> None:
        self._entries.noted(at)
        with self._lock:
            if len(self._tags) >= _MAX_TAGS:
                self._tags = {}
            self._tags[member] = max(at, self._tags.get(member, 0))

    def _tags_of(self, members: Sequence[str]) -> Mapping[str, int]:
        """When tags were made invalid, as this process knows or as Redis says."""
        feed, tags = self._feed, self._tags
        if feed is None or not feed.is_linked:
            return self._entries.read_tags(members)
        known = {member: tags[member] for member in members if member in tags}
        missing = [member for member in members if member not in known]
        if not missing:
            return known
        read = self._entries.read_tags(missing)
        with self._lock:
            # Not into a table that was begun meanwhile: the answer may be older than that.
            if self._tags is tags and len(tags) < _MAX_TAGS:
                for member, at in read.items():
                    tags[member] = max(at, tags.get(member, 0))
                known.update({member: tags[member] for member in missing})
                return known
        return {**known, **read}

    def _dead_since(self, tags: tuple[str, ...]) -> tuple[int, int]:
        """When the latest of the tags, or all entries, were made invalid: for good, to stale."""
        feed, known = self._feed, self._tags
        if not tags and feed is not None and feed.is_linked and "d" in known and "e" in known:
            return known["d"], known["e"]
        members = ["d", "e"]
        for tag in tags:
            members += ("d" + tag, "e" + tag)
        known = dict(self._tags_of(members))
        return (
            max(known[member] for member in members[::2]),
            max(known[member] for member in members[1::2]),
        )

    # --- Reading

    def read(self, key: str, /) -> Entry | None:
        """The entry, of the memory if it is there."""
        entry = self.memory.get(key)
        return self._read_below(key) if entry is None else entry

    def _read_below(self, key: str) -> Entry | None:
        """The entry of Redis, which is asked once for all who want it at the same time."""
        mark = self.memory.mark
        entries = self._reach()
        if entries is None:
            self._missed("get")
            return None
        reading = self._readings.get(key)
        # One that began before something was made invalid may bring what is invalid.
        if reading is not None and reading.mark == mark and reading.wait(self._lock):
            return reading.entry
        return self._read_for_all(entries, key, mark)

    def _read_for_all(self, entries: RedisEntries, key: str, mark: int) -> Entry | None:
        reading = self._readings[key] = _Reading(mark)
        try:
            entry = reading.entry = entries.read(key)
            reading.is_done = True
        except MusetError as error:
            reading.is_done = True
            self._missed("get", error)
            return None
        finally:
            if self._readings.get(key) is reading:
                del self._readings[key]
            reading.end()
        if entry is not None and self._has_memory:
            self.memory.put(key, entry, mark)
        return entry

    def read_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Those that there are."""
        found = {}
        for key in keys:
            entry = self.memory.get(key)
            if entry is not None:
                found[key] = entry
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        mark = self.memory.mark
        entries = self._reach() if missing else None
        if entries is None:
            if missing:
                self._missed("get")
            return found
        try:
            below = entries.read_many(missing)
        except MusetError as error:
            self._missed("get", error)
            return found
        for key, entry in below.items():
            self.memory.put(key, entry, mark)
        return {**found, **below}

    # --- Loads

    def lease(
        self, key: str, known: Entry | None, /, *, anyway: bool = False
    ) -> Entry | Lease | Busy:
        """Ask for the right to load; while Redis is away everybody has it for his own process."""
        mark, token = self.memory.mark, secrets.token_bytes(8)
        got: Entry | Lease | Busy | None = None
        try:
            got = self._ask(
                "lease", lambda entries: entries.lease(key, known, token, anyway=anyway)
            )
        finally:
            if got is None and self._redis.state == "up" and SYSTEM.now() >= self._resume_at:
                # It may have been given all the same, and nobody would settle it.
                run_beside(partial(self._abandon, Lease(key, token, 0)), name="cache-leases")
        return Lease(key, b"", 0, mark) if got is None else self._leased(key, got, mark)

    def _abandon(self, lease: Lease) -> None:
        self._ask("settle", lambda entries: entries.settle(lease, None, 0.0))

    def _leased(self, key: str, got: Entry | Lease | Busy, mark: int) -> Entry | Lease | Busy:
        if isinstance(got, Entry):
            self.memory.put(key, got, mark)
        elif isinstance(got, Lease):
            got.mark = mark
            self._held[got] = SYSTEM.now()
            self._renew_beside()
        return got

    def settle(self, lease: Lease, entry: Entry | None, /, *, backoff_s: float = 0.0) -> bool:
        """End a lease."""
        self._held.pop(lease, None)
        if entry is not None:
            entry.began_us = lease.began_us
        is_held = None
        if lease.token:
            is_held = self._ask("settle", lambda entries: entries.settle(lease, entry, backoff_s))
        elif entry is not None:
            self._note_unasked(lease.key)
        if is_held is False or entry is None:
            return False
        # Where Redis cannot be asked the memory decides: it knows what was made invalid, or its
        # entries do not last long.
        is_kept = self.memory.put(lease.key, entry, lease.mark)
        return is_kept if is_held is None else is_held

    def _note_unasked(self, key: str) -> None:
        with self._lock:
            if len(self._unasked) < _MOST_UNASKED:
                self._unasked.add(key)

    def _renew_beside(self) -> None:
        with self._lock:
            if self._is_renewing:
                return
            self._is_renewing = True
        run_beside(self._renew, name="cache-leases")

    def _renew(self) -> None:
        """Let the leases of loads that take long last, until there are none."""
        pause_s = self._lease_s / 3
        while True:
            with self._lock:
                if not self._held:
                    self._is_renewing = False
                    return
            # Real time, whatever a test has made of the clock.
            time.sleep(pause_s)
            before = SYSTEM.now() - pause_s / 2
            old = [lease for lease, at in list(self._held.items()) if at < before]
            entries = self._reach() if old else None
            if entries is not None:
                self._renewed(entries, old)

    def _renewed(self, entries: RedisEntries, leases: Sequence[Lease]) -> None:
        try:
            entries.renew(leases)
        except MusetError as error:
            _log.debug("leases could not be renewed: %s", error)

    # --- Writes

    def _change(self, changes: Mapping[str, Entry | None]) -> bool:
        for key in changes:
            self.memory.drop(key)
        mark, is_done, kept = self.memory.mark, False, dict.fromkeys(changes)
        try:
            is_done, kept = self._changed(changes), dict(changes)
        finally:
            # Also where the caller is cut off: then nobody knows what Redis has.
            if not is_done:
                self._repairs.add_keys(changes)
            for key, entry in kept.items():
                self._keep(key, entry, mark)
        return is_done

    def _keep(self, key: str, entry: Entry | None, mark: int) -> None:
        if entry is None:
            self.memory.drop(key)
        else:
            self.memory.replace(key, entry, mark)

    def _changed(self, changes: Mapping[str, Entry | None]) -> bool:
        def change(entries: RedisEntries) -> bool:
            for entry in changes.values():
                if entry is not None:
                    entry.began_us = entries.now_us()
            entries.change(changes)
            return True

        operation = "delete" if None in changes.values() else "set"
        return self._ask(operation, change) or False

    def change_once(
        self, key: str, entry: Entry | None, change: Callable[[RedisEntries], T | None]
    ) -> T | None:
        """Let an entry be changed together with something else in Redis, which is asked once.

        Args:
            key: Of the entry.
            entry: What is kept, None to delete it; its `began_us` is set.
            change: Does it, and returns something true if it has changed anything.

        Returns:
            What `change` returns.

        Raises:
            MusetError: It was not done. Where the answer was lost on the way nobody knows, and the
                entry is gone from both levels as soon as Redis can be told.
        """
        entries = self.reach()
        self.memory.drop(key)
        mark, is_known, done = self.memory.mark, False, None
        try:
            if entry is not None:
                entry.began_us = entries.now_us()
            done = change(entries)
            is_known = True
        except MusetError as error:
            is_known = isinstance(error, ExternalServiceError)  # Redis has refused it
            self._missed("delete" if entry is None else "set", error)
            raise
        finally:
            if not is_known:
                self._repairs.add_keys([key])
            self._keep(key, entry if done else None, mark)
        return done

    def begin_write(self, key: str, /) -> Write:
        """Say that the source will be written; the value goes now."""
        self.memory.drop(key)
        token = secrets.token_bytes(8)
        write = None
        try:
            write = self._ask("set", lambda entries: entries.begin_write(key, token))
        finally:
            if write is None:
                self._repairs.add_keys([key])
        if write is None:
            # It may have been counted in all the same, so it will be counted out.
            write = Write(key, token, 0)
        self.memory.drop(key)
        write.mark = self.memory.mark
        return write

    def end_write(self, write: Write, entry: Entry | None, /) -> bool:
        """Say that the source was written."""

        def end(entries: RedisEntries) -> bool:
            if entry is not None:
                entry.began_us = entries.now_us()
            return entries.end_write(write, entry)

        is_alone, kept = None, None
        try:
            is_alone = self._ask("set", end)
            kept = None if is_alone is False else entry
        finally:
            if is_alone is None:
                self._repairs.add_keys([write.key])
            self._keep(write.key, kept, write.mark)
        return is_alone is not None

    # --- Invalidation

    def forget(self, pattern: str, /) -> int:
        """Delete what matches in both levels; raises CacheUnavailable while Redis is away."""
        entries = self._reach()
        try:
            if entries is None:
                raise self._unavailable()
            return entries.forget(pattern)
        except CacheUnavailable:
            raise
        except MusetError as error:
            raise self._unavailable() from error
        finally:
            self.memory.drop_matching(pattern)

    def _unavailable(self) -> CacheUnavailable:
        self._missed("delete_pattern")
        error: CacheUnavailable = CacheUnavailable(
            "the keys of a pattern cannot be deleted while Redis is away; some may be gone"
        )
        return error

    def invalidate_tag(self, tag: str, /, *, keep_stale: bool) -> bool:
        """Make all entries of a tag invalid in both levels."""
        noted = None
        try:
            noted = self._ask(
                "delete", lambda entries: entries.invalidate_tag(tag, keep_stale=keep_stale)
            )
        finally:
            if noted is None:
                self._repairs.add_tag(tag, keep_stale=keep_stale)
            else:
                self._note_tag(*noted)
            self.memory.invalidate_tag(tag, keep_stale=keep_stale)
        return noted is not None

    # --- Beside

    def explain(self, key: str, /) -> dict[str, Any]:
        """What there is in each level."""
        feed = self._feed
        inside, below, redis = self.memory.get(key), None, None
        entries = self._reach()
        if entries is not None:
            try:
                below, redis = entries.read(key), entries.explain(key)
            except MusetError as error:
                _log.debug("explained without Redis: %s", error)
        entry = inside or below
        return {
            "level": "memory" if inside else "redis" if below else None,
            **(entry.describe(SYSTEM.now()) if entry else {}),
            "redis": {"state": self._redis.state, **(redis or {})},
            "lease": redis["lease"] if redis else "unknown",
            "invalidations": "linked" if feed and feed.is_linked else "not linked",
            "repairs": len(self._repairs),
        }

    def close(self) -> None:
        """Listen no more, and empty the memory."""
        with self._lock:
            feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()
        self._held = {}
        # A link that is made anew is taken to be up, and tells of no change.
        self._resume_at = 0.0
        self.memory.clear()

    def _forked(self) -> None:
        """A child hears nothing of what its parent listens to."""
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.abandon()
        self._held = {}
        self._readings = {}
        self._unasked = set()
        self._is_renewing = self._is_repairing = False
        self._tags = {}
        self.memory.trusted_until = 0.0
        self.memory.clear()
        self._entries = self._make_entries()
