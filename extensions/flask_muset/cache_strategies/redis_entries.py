"""Entries in Redis, beside the locks and tags that keep loads and writes apart.

Below the deployment's prefix and the format's version:

    c1:<key>   the entry, an envelope
    l1:<key>   who may put it in: L<token> loads it, B waits after a failure, W<n>:<token> writes
    t1         a sorted set: when each tag was made invalid, d<tag> for good, e<tag> to stale;
               d alone stands for all entries, and is made anew if Redis has lost the set
    i1         a channel: what was made invalid

The scripts decide, so that all processes decide alike, and by the clock of Redis.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flask_muset.cache_strategies.codec import Unreadable
from flask_muset.cache_strategies.entry import NEVER, Busy, Entry, Lease, Write
from flask_muset.cache_strategies.envelope import BEGAN, began_bytes, pack, unpack
from flask_muset.cache_strategies.patterns import escape_glob, redis_glob
from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.redis import GuardedRedis, Script

__all__ = ["RedisEntries"]

#: Keys of one command at most, so that none holds Redis up.
_AT_ONCE = 500
_SCAN_COUNT = 1000
#: Tags that are remembered; what is forgotten makes all that is older invalid.
_MOST_TAGS = 100_000
#: A tagged entry of this age is dead, so that tags need not be remembered for ever.
_HORIZON_US = 365 * 86_400 * 1_000_000
#: A write of the source that takes longer leaves no value behind.
_WRITE_LEASE_S = 30.0
#: How long this process's clock and that of Redis are taken to go alike.
_SHIFT_HOLDS_S = 60.0
#: Budgets of a call after which nobody waits for it, with what the two clocks may differ by.
_GIVEN_UP = 4
#: Ten years, in milliseconds: nothing is kept for longer.
_LONGEST_MS = 10 * 365 * 86_400_000
_UNSEEN = bytes(8)
_BUSY = {
    b"load": Busy(),
    b"backoff": Busy(is_backoff=True),
    b"write": Busy(is_write=True),
}


def _script(name: str) -> Script:
    return Script(Path(__file__).with_name(f"{name}.lua").read_text("utf-8"))


_LEASE, _SETTLE, _RENEW = _script("lease"), _script("settle"), _script("renew")
_CHANGE, _BEGIN_WRITE, _END_WRITE = _script("change"), _script("begin_write"), _script("end_write")
_RELEASE, _TAG, _READ_TAGS = _script("release"), _script("tag"), _script("tags")


class RedisEntries:
    """The part of a store that is in Redis. Every method may raise what `GuardedRedis` raises.

    Args:
        redis: Whose prefix all keys have.
        sender: Tells this process from others in messages, 8 bytes.
        dead_since: When tags were made invalid: the microseconds for good and the microseconds to
            stale, of the latest among the given ones and of all entries.
        on_unreadable: Is told of bytes that are no entry.
        lease_s: Seconds after which a holder that does not renew its lease loses it.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        *,
        sender: bytes,
        dead_since: Callable[[tuple[str, ...]], tuple[int, int]],
        on_unreadable: Callable[[], None],
        lease_s: float,
    ) -> None:
        self._redis = redis
        self._sender = sender
        self._dead_since = dead_since
        self._on_unreadable = on_unreadable
        self._lease_ms = round(lease_s * 1000)
        self._values = redis.key("c1:")
        self._locks = redis.key("l1:")
        self._tags = redis.key("t1")
        self.channel = redis.key("i1")
        #: What turns a moment of this process into microseconds of Redis, once it is known.
        self._shift_us = 0
        self._shift_until = -NEVER
        self._latest_us = 0

    # --- Reading

    def read(self, key: str) -> Entry | None:
        """One entry, None if there is none that may be served."""
        data = self._redis.execute("GET", self._values + key)
        return None if data is None else self._open(data)

    def read_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Those that there are."""
        found = {}
        for some in _pieces(keys):
            values = self._redis.execute("MGET", *(self._values + key for key in some))
            for key, data in zip(some, values, strict=True):
                entry = None if data is None else self._open(data)
                if entry is not None:
                    found[key] = entry
        return found

    def _open(self, data: bytes) -> Entry | None:
        shift_us = self.shift_us
        try:
            entry = unpack(data, shift_us)
        except Unreadable:
            self._on_unreadable()
            return None
        began = entry.began_us
        dead, stale = self._dead_since(entry.tags)
        if began <= dead or (entry.tags and began < self.now_us() - _HORIZON_US):
            return None
        if began <= stale:
            entry.fresh_until = min(entry.fresh_until, (stale - shift_us) / 1e6)
        return entry

    # --- Loads

    def lease(
        self, key: str, known: Entry | None, token: bytes, *, anyway: bool
    ) -> Entry | Lease | Busy:
        """Ask for the right to load; asked again with the same token, it is the same lease."""
        seen = _UNSEEN if known is None else began_bytes(known)
        while True:
            what, *more = self._redis.script(
                _LEASE,
                [self._values + key, self._locks + key, self._tags],
                [token, self._lease_ms, seen, BEGAN.start + 1, BEGAN.stop, int(anyway)],
            )
            if what == b"lease":
                self._noted(more[0])
                return Lease(key, token, int(more[0]))
            if what != b"entry":
                return _BUSY[what]
            entry = self._open(more[0])
            if entry is not None:
                return entry
            # What is there serves nobody: ask for what is other than that.
            seen = more[0][BEGAN]

    def settle(self, lease: Lease, entry: Entry | None, backoff_s: float) -> bool:
        """End a lease; whether it was still held."""
        data, lifetime = self._packed(entry)
        return bool(
            self._redis.script(
                _SETTLE,
                [self._values + lease.key, self._locks + lease.key],
                [lease.token, data, lifetime, round(backoff_s * 1000)],
            )
        )

    def renew(self, leases: Sequence[Lease]) -> None:
        """Let them last longer."""
        self._redis.script(
            _RENEW,
            [self._locks + lease.key for lease in leases],
            [self._lease_ms, *(lease.token for lease in leases)],
        )

    # --- Writes

    def change(self, entries: Mapping[str, Entry | None]) -> None:
        """Write or, for None, delete."""
        for some in _pieces(list(entries)):
            words: list[Any] = [self.channel, self._sender]
            for key in some:
                words += (*self._packed(entries[key]), key)
            words.append(self.now_us() + round(_GIVEN_UP * self._redis.budget_s * 1e6))
            keys = [prefix + key for prefix in (self._values, self._locks) for key in some]
            self._noted(self._redis.script(_CHANGE, keys, words))

    def change_with(
        self, script: Script, key: str, entry: Entry | None, words: Sequence[Any]
    ) -> list[Any]:
        """Write or delete one entry by a script that does more than that.

        Args:
            script: KEYS: value, lock.  ARGV: channel, sender, value or nothing to delete it, its
                milliseconds or 0 for no end, name, the microseconds from which on it must do
                nothing as its sender has given up; then `words`.
            key: Of the entry.
            entry: None to delete it.
            words: What else the script is told.

        Returns:
            Its reply, a list, without the first word: the microseconds of now.
        """
        parts = [self.channel, self._sender, *self._packed(entry), key]
        budget_s, left_s = self._redis.budget_s, deadline.remaining()
        wait_s = budget_s if left_s is None else min(budget_s, left_s)
        parts.append(self.now_us() + round(wait_s * 1e6))
        keys = [self._values + key, self._locks + key]
        reply: list[Any] = self._redis.script(script, keys, [*parts, *words])
        self._noted(reply[0])
        return reply[1:]

    def begin_write(self, key: str, token: bytes) -> Write:
        """Count a write of the source in; asked again with the same token, it is the same one."""
        self.now_us()  # makes sure that there are tags before anything is written
        words = [token, round(_WRITE_LEASE_S * 1000), self.channel, self._sender, key]
        keys = [self._values + key, self._locks + key]
        began = self._redis.script(_BEGIN_WRITE, keys, words)
        self._noted(began)
        return Write(key, token, int(began))

    def end_write(self, write: Write, entry: Entry | None) -> bool:
        """Count it out; whether it was the only one."""
        words = [self.channel, self._sender, write.token, *self._packed(entry), write.key]
        keys = [self._values + write.key, self._locks + write.key]
        return bool(self._redis.script(_END_WRITE, keys, words))

    # --- Invalidation

    def forget(self, pattern: str) -> int:
        """Delete what matches; how many entries there were.

        SCAN may name a key twice; UNLINK counts it once. First all leases are taken, so that no
        load that has begun puts anything in where the second look has been already.
        """
        for locks in self._found("l1:", pattern):
            for some in _pieces(locks):
                self._redis.script(_RELEASE, some)
        count = 0
        for values in self._found("c1:", pattern):
            for some in _pieces(values):
                count += self._redis.execute("UNLINK", *some)
        self._redis.execute("PUBLISH", self.channel, self._sender + b"p" + pattern.encode())
        return count

    def _found(self, kind: str, pattern: str) -> Iterator[list[bytes]]:
        """The keys of a kind that match, in parts."""
        glob, cursor = escape_glob(self._redis.prefix + kind) + redis_glob(pattern), b"0"
        while True:
            cursor, found = self._redis.execute("SCAN", cursor, "MATCH", glob, "COUNT", _SCAN_COUNT)
            yield found
            if cursor == b"0":
                return

    def unlink(self, key: str) -> None:
        """Delete an entry and whatever its lock is."""
        self._redis.execute("UNLINK", self._values + key, self._locks + key)
        self._redis.execute("PUBLISH", self.channel, self._sender + b"k" + key.encode())

    def invalidate_tag(self, tag: str, *, keep_stale: bool) -> tuple[str, int]:
        """Make a tag's entries invalid: the member, and the microseconds of when."""
        member = ("e" if keep_stale else "d") + tag
        words = [member, self.channel, self._sender, _HORIZON_US, _MOST_TAGS]
        at = self._redis.script(_TAG, [self._tags], words)
        self._noted(at)
        return member, int(at)

    def read_tags(self, members: Sequence[str]) -> dict[str, int]:
        """When they were made invalid, microseconds, 0 for never."""
        now, *found = self._redis.script(_READ_TAGS, [self._tags], members)
        self._noted(now)
        return dict(zip(members, map(int, found), strict=True))

    # --- Time

    @property
    def shift_us(self) -> int:
        """Microseconds of Redis when this process's clock is at 0."""
        if self._shift_until == -NEVER:
            # Which also makes sure that there are tags before anything is written.
            self.read_tags([])
        return self._shift_us

    def now_us(self) -> int:
        """Microseconds of Redis now, later than anything that it has told."""
        shift_us = self.shift_us  # first: it may have to ask
        return max(self._latest_us + 1, round(SYSTEM.now() * 1e6) + shift_us)

    def noted(self, us: int) -> None:
        """Redis was told of an event at this moment."""
        self._latest_us = max(self._latest_us, us)

    def _noted(self, us: bytes | int) -> None:
        self.noted(int(us))
        now = SYSTEM.now()
        shift = int(us) - round(now * 1e6)
        # Too low by as much as the reply was under way: the highest is the best, for a while.
        if now > self._shift_until or shift > self._shift_us:
            self._shift_us, self._shift_until = shift, now + _SHIFT_HOLDS_S

    def explain(self, key: str) -> dict[str, Any]:
        """What Redis has about a key."""
        data, lifetime, lock, lock_ms = self._redis.pipeline(
            [("GET", self._values + key), ("PTTL", self._values + key),
             ("GET", self._locks + key), ("PTTL", self._locks + key)]
        )  # fmt: skip
        holds = {"L": "load", "B": "backoff", "W": "write"}
        return {
            "stored_bytes": None if data is None else len(data),
            "expires_in_s": lifetime / 1000 if lifetime >= 0 else None,
            "lease": "none" if lock is None else holds.get(lock[:1].decode(), "none"),
            "lease_ends_in_s": lock_ms / 1000 if lock_ms >= 0 else None,
        }

    def _packed(self, entry: Entry | None) -> tuple[bytes, int]:
        """Its bytes and its milliseconds, 0 for no end; nothing for None."""
        if entry is None:
            return b"", 0
        data = pack(entry, self.shift_us)
        if entry.gone_at == NEVER:
            return data, 0
        return data, min(max(1, round((entry.gone_at - SYSTEM.now()) * 1000)), _LONGEST_MS)


def _pieces(keys: Sequence[Any]) -> list[Sequence[Any]]:
    return [keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE)]
