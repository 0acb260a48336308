"""A journal in Redis, beside the entries of a `TieredStore`.

Below the deployment's prefix and the format's version, `w1:`:

    s:<key>   a stream, the records of a key: its ids are `<sequence>-0`, so that Redis itself
              refuses what is out of order; w writer, c coalesces, h home, a the sequence of what it
              has taken the place of, d data
    m:<key>   a stream that is moved, within a script
    k:<key>   a hash, what else is known of a key: token, ends, lease and ids of its claim, and
              gone, those of them that were superseded since; f<sequence> the attempts of a record,
              its first failure and its error; x<writer> the sequence that supersedes older dead
              letters, y<writer> and y what supersedes only those that coalesce; dead the number of
              dead letters
    due       a sorted set: when each key is due; one that is claimed, when the claim ends
    age       a sorted set: the sequence of what waits longest of each key that was claimed once; of
              the others `due` and n tell it
    bound     a hash: the home of each key whose oldest record has one
    homes     a sorted set: until when each home is alive
    n         a hash: the last sequence, how many records wait, the bytes of their data, and wait,
              the delay of the last one
    dead      a stream, the dead letters: k key, q sequence, w, c, h, d, n attempts, f and l moments
              of the first and last failure, e error; what could not be read has no d

All moments are microseconds of the clock of Redis. Nothing of a key is left when it has no record,
no claim and no dead letter. Nothing has a time to live, so that only `allkeys-*` may evict it.

The scripts decide. They make the names of what they touch from `w1:`, which a Redis Cluster would
not take. What others have put there is set aside among the dead letters where it stands in the way.
"""

import contextlib
import logging
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.journal import Claim, DeadLetter, Failure, Record, State
from flask_muset.cache_strategies.redis_entries import RedisEntries
from flask_muset.cache_strategies.tiered_store import TieredStore
from flask_muset.clock import SYSTEM
from flask_muset.errors import CacheUnavailable, ConflictError, ExternalServiceError, MusetError
from flask_muset.locks import give_lock, run_beside
from flask_muset.redis import GuardedRedis, Script

__all__ = ["RedisJournal"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at whether the journal is in use.
_LOOK_S = 0.1
#: How often a write is sent again after Redis has said that nothing was done.
_TRIES = 3
_ERROR_CHARACTERS = 1000
#: Keys of one command at most, so that none holds Redis up.
_AT_ONCE = 1000
#: Beyond it the numbers of Lua are not exact; it is a moment of the year 2255.
_LAST_SEQ = 2**53 - 1
#: Keys whose superseding is remembered while Redis is away.
_MOST_OWED = 10_000
_id = re.compile(r"[0-9]{1,19}-[0-9]{1,19}", re.ASCII)


def _text_of(name: str) -> str:
    return Path(__file__).with_name(f"journal_{name}.lua").read_text("utf-8")


_PARTS = _text_of("parts")


def _script(name: str) -> Script:
    return Script(_PARTS + _text_of(name))


_APPEND = Script(_text_of("append"))
_BEAT, _CLAIM, _DROP, _HOLD = _script("beat"), _script("claim"), _script("drop"), _script("hold")
_LETTERS, _MEND, _RELEASE = _script("letters"), _script("mend"), _script("release")
_RENEW, _REQUEUE, _SETTLE = _script("renew"), _script("requeue"), _script("settle")
_STATE, _SUPERSEDE = _script("state"), _script("supersede")


class RedisJournal:
    """A `Journal` whose records are in the Redis of a store, and survive what that survives.

    The budget of the client holds for each method. Nothing is accepted, claimed or read within half
    a second after an outage, so that each process can send first what it has missed. An answer that
    was lost is a MusetError, and nothing is sent twice.

    Args:
        store: Whose entries `append` changes; it takes one journal.
        redis: Its Redis.
        max_pending: Records that may wait, at least 1.
        max_pending_bytes: Of their data, at least 1.
        lease_s: Seconds that a claim lasts, and a sign of life; above 0.

    Raises:
        ValueError: A number is not allowed, or the store has a journal.
    """

    def __init__(
        self,
        store: TieredStore,
        redis: GuardedRedis,
        *,
        max_pending: int = 10_000,
        max_pending_bytes: int = 256 << 20,
        lease_s: float = 10.0,
    ) -> None:
        for name, number in (
            ("max_pending", max_pending),
            ("max_pending_bytes", max_pending_bytes),
        ):
            if not (isinstance(number, int) and number >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
        if not 0 < lease_s < math.inf:
            raise ValueError(f"lease_s must be seconds above 0, got {lease_s!r}.")
        if store.owed is not None:
            raise ValueError("this store has a journal already; make a store for each of them.")
        #: What `append` writes.
        self.store = store
        self._redis = redis
        self._place = redis.key("w1:")
        self._limits = max_pending, max_pending_bytes
        self._lease_us = round(lease_s * 1e6)
        self._is_used = False
        self._look_at = -math.inf
        self._owed = store.owed = _Owed(redis, self._place)

    # --- Accepting

    def append(
        self,
        key: str,
        entry: Entry | None,
        /,
        *,
        writer: str | None,
        coalesces: bool = True,
        home: str = "",
        delay_s: float = 0.0,
    ) -> int | None:
        """Accept a write; see `Journal`. It takes one round trip.

        Raises:
            CacheUnavailable: Redis is away, or had no time before the budget was over; nothing was
                accepted.
            MusetError: It was not accepted, or the answer was lost: see `GuardedRedis`. The cache
                has no value then.
            ValueError: The delay is negative, or the entry cannot be packed.
        """
        if not 0 <= delay_s < math.inf:
            raise ValueError(f"delay_s must be seconds of at least 0, got {delay_s!r}.")
        joins = "?" if writer is None else int(coalesces)
        words = [self._place, writer or "", joins, home, round(delay_s * 1e6), *self._limits]
        return self.store.change_once(key, entry, partial(self._accept, key, entry, words))

    def _accept(
        self, key: str, entry: Entry | None, words: list[Any], entries: RedisEntries
    ) -> int | None:
        for _ in range(_TRIES):
            (told,) = entries.change_with(_APPEND, key, entry, words)
            if told == b"garbled":
                self._run(_MEND, key)
            # It was not late, as its answer is here: the clocks differ, and now it is known how.
            elif told != b"late":
                return None if told == b"full" else int(told)
        raise CacheUnavailable(
            f"Redis has not accepted the write ({told.decode()}), nothing changed"
        )

    def newest(self, key: str, /) -> Record | None:
        """The last record of a key, claimed or not; None if its source has all."""
        self.store.reach()
        for count in (1, 100):  # behind what others have put in there may be one
            entries, facts = self._all(
                ("XREVRANGE", self._name("s:", key), "+", "-", "COUNT", count),
                ("HGETALL", self._name("k:", key)),
            )
            for entry_id, fields in entries:
                record = _record(key, entry_id, fields, _named(facts))
                if record is not None:
                    return record
            if len(entries) < count:
                return None
        return None

    # --- Claims

    def waiting(self, keys: Sequence[str], /) -> set[str]:
        """Those of some keys that have records; each thousand of them takes a round trip."""
        self.store.reach()
        found: set[str] = set()
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            counts = self._all(*(("EXISTS", self._name("s:", key)) for key in some))
            found.update(key for key, count in zip(some, counts, strict=True) if count)
        return found

    def claim(
        self, limit: int, /, *, home: str, early: bool = False
    ) -> tuple[list[Claim], float | None]:
        """Claim keys that are due; see `Journal`.

        A claim has at most 100 records, and all of one call have at most 1 MiB of data, one large
        record aside. The 1,000 keys that are due first are looked at: where all of these are left
        to homes that are alive, the others are claimed when they are gone.
        """
        self.store.reach()
        token = secrets.token_hex(8)
        words = [token, self._lease_us, home, limit, int(early)]
        claims, wait_us = self._or_release(_CLAIM, token, words)
        return [_claim(told) for told in claims], None if wait_us < 0 else wait_us / 1e6

    def hold(self, key: str, /) -> Claim | None:
        """Claim one key, due or not, even if it has no record; None if somebody else has it."""
        self.store.reach()
        token = secrets.token_hex(8)
        told = self._or_release(_HOLD, token, [f"{token}:", self._lease_us, _raw(key)])
        return None if told is None else _claim(told)

    def _or_release(self, script: Script, token: str, words: list[Any]) -> Any:
        """Ask for claims; where the answer does not come, what was claimed is let go."""
        is_known = False
        try:
            answer = self._run(script, *words)
            is_known = True
        finally:
            if not is_known:
                run_beside(partial(self._release, token), name="journal-claims")
        return answer

    def _release(self, token: str) -> None:
        try:
            self._run(_RELEASE, token, self._lease_us)
        except MusetError as error:
            _log.debug("claims are left until they end by themselves: %s", error)

    def renew(self, claims: Sequence[Claim], /) -> None:
        """Let claims that are still held last as long again as they did at first."""
        if claims:
            words = [word for claim in claims for word in (_raw(claim.key), claim.token)]
            self._run(_RENEW, self._lease_us, *words)

    def settle(
        self,
        claim: Claim,
        /,
        *,
        written: int = 0,
        failure: Failure | None = None,
        supersedes: str | None = None,
    ) -> bool:
        """End a claim; see `Journal`."""
        newer = (0, "") if supersedes is None else (claim.seq, _raw(supersedes))
        words: list[Any] = [_raw(claim.key), claim.token, written, *newer]
        if failure is not None:
            error = failure.error[:_ERROR_CHARACTERS].encode("utf-8", "backslashreplace")
            pause_us = round(failure.pause_s * 1e6)
            words += [failure.seq, error, int(failure.is_final), pause_us, int(failure.counts)]
        return bool(self._run(_SETTLE, *words))

    def supersede(self, key: str, before: float, /) -> None:
        """Forget the records of a key that coalesce and were accepted before; see `Journal`.

        Each MiB of older records, or a thousand of them, takes a round trip.

        Raises:
            MusetError: Redis could not be told. It will be when it is back, before this process
                asks it for anything, and in time before others claim the key.
        """
        self._owed.tell(key, round(before * 1e6))

    # --- Dead letters

    def dead_letters(self, limit: int = 1000, /, *, after: str = "") -> list[DeadLetter]:
        """Those that were given up, in the order of when.

        Args:
            limit: How many at most.
            after: Id of the one behind which they begin.

        Raises:
            ValueError: `after` is no id.
        """
        if after and not _id.fullmatch(after):
            raise ValueError(f"after must be the id of a dead letter, got {after!r}.")
        letters: list[DeadLetter] = []
        while len(letters) < limit:
            found = self._run(_LETTERS, after, limit - len(letters))
            if not found:
                break
            letters += [_letter(*told) for told in found]
            after = letters[-1].id
        return letters

    def key_of(self, id: str, /) -> str | None:  # noqa: A002 - the field's name
        """The key of a dead letter; None if there is no such."""
        if not _id.fullmatch(id):
            return None
        found = self._redis.execute("XRANGE", self._name("dead"), id, id)
        return _letter(found[0][0], found[0][1], 0).record.key if found else None

    def requeue(self, id: str, /) -> bool:  # noqa: A002 - the field's name
        """Let a dead letter be written again; whether there was one.

        Raises:
            ConflictError: It is superseded, or it is none of the journal's making and has no data.
        """
        if not _id.fullmatch(id):
            return False
        self.store.reach()
        told = self._run(_REQUEUE, id)
        if told == b"superseded":
            raise ConflictError(f"the dead letter {id} is superseded by a newer write; drop it")
        if told == b"unreadable":
            raise ConflictError(f"the dead letter {id} cannot be read; drop it")
        return bool(told == b"done")

    def drop(self, id: str, /) -> bool:  # noqa: A002
        """Forget a dead letter; whether there was one."""
        return bool(_id.fullmatch(id) and self._run(_DROP, id))

    # --- Beside

    def is_used(self) -> bool:
        """Whether anything was ever accepted; Redis is asked at most ten times a second."""
        now = SYSTEM.now()
        if not self._is_used and now >= self._look_at:
            self._look_at = now + _LOOK_S
            try:
                self._is_used = bool(self._redis.execute("EXISTS", self._name("n")))
            except MusetError as error:
                _log.debug("whether anything waits is not known: %s", error)
        return self._is_used

    def now(self) -> float:
        """The clock of Redis, later than all that was accepted; it takes a round trip.

        While Redis is away it is this process's own clock, shifted by what both were apart, if that
        is known.
        """
        try:
            time, seq = self._all(("TIME",), ("HGET", self._name("n"), "seq"))
        except MusetError:
            with contextlib.suppress(MusetError):
                return self.store.now_us() / 1e6
            return SYSTEM.wall()
        return max(_us(time), int(seq or 0) + 1) / 1e6

    def beat(self, home: str, /) -> None:
        """Say that a process is alive, for a lease's time."""
        self._run(_BEAT, self._lease_us, home)

    def state(self) -> State:
        """How much there is."""
        pending, size, since, dead, now = self._run(_STATE)
        oldest_s = max(0.0, (int(now) - _whole(since or now)) / 1e6)
        return State(_whole(pending), _whole(size), oldest_s, dead)

    def explain(self, key: str, /) -> dict[str, Any]:
        """What waits of a key, for people."""
        pending, time, first, facts = self._all(
            ("XLEN", self._name("s:", key)),
            ("TIME",),
            ("XRANGE", self._name("s:", key), "-", "+", "COUNT", 1),
            ("HGETALL", self._name("k:", key)),
        )
        seq = first[0][0].partition(b"-")[0] if first else b""
        attempts, _, error = _failures(_named(facts).get(b"f" + seq, b""))
        since = _whole(_named(first[0][1]).get(b"a", b"")) or _whole(seq) if first else 0
        oldest_s = max(0.0, (_us(time) - since) / 1e6) if since else 0.0
        return {"pending": pending, "oldest_s": oldest_s, "attempts": attempts, "error": error}

    def risks(self) -> list[str]:
        """What could lose a record that was accepted, each in a sentence with its cure.

        It reads the configuration of Redis, or INFO where CONFIG is refused.

        Raises:
            MusetError: Redis is away.
        """
        settings = self._settings()
        return [_UNKNOWN] if settings is None else _risks_of(settings)

    def _settings(self) -> dict[str, str] | None:
        """Those of Redis, by their names in CONFIG; None if it refuses to tell."""
        names = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync")
        found = self._unless_refused(*(("CONFIG", "GET", name) for name in names))
        if found is not None:
            return {pair[0].decode(): pair[1].decode() for pair in found if pair}
        sections = self._unless_refused(("INFO", "memory"), ("INFO", "persistence"))
        return None if sections is None else _settings_of_info(sections)

    def _unless_refused(self, *commands: tuple[Any, ...]) -> list[Any] | None:
        try:
            return self._all(*commands)
        except ExternalServiceError as error:
            if error.unavailable:
                raise
            return None

    def close(self) -> None:
        """Nothing is held: the connections are the client's, which its owner closes."""

    # --- Asking

    def _name(self, what: str, key: str = "") -> bytes:
        return _raw(self._place + what + key)

    def _run(self, script: Script, *words: Any) -> Any:
        return self._redis.script(script, [], [self._place, *words])

    def _all(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The replies of several commands; raises where one is an error."""
        replies = self._redis.pipeline(commands)
        for reply in replies:
            if isinstance(reply, MusetError):
                raise reply
        return replies


class _Owed:
    """The records to be forgotten that Redis could not be told of, kept until it can.

    Args:
        redis: Which.
        place: Before all names of the journal.
    """

    def __init__(self, redis: GuardedRedis, place: str) -> None:
        self._redis = redis
        self._place = place
        self._before: dict[str, int] = {}
        give_lock(self)

    _lock: Any

    def __len__(self) -> int:
        return len(self._before)

    def tell(self, key: str, before_us: int) -> None:
        """Tell Redis; remember it where that fails, also where the caller is cut off."""
        is_told = False
        try:
            after: Any = b""
            while not is_told:
                words = [self._place, _raw(key), before_us, after]
                after = self._redis.script(_SUPERSEDE, [], words)
                is_told = not after
        finally:
            if not is_told:
                self._remember(key, before_us)

    def _remember(self, key: str, before_us: int) -> None:
        with self._lock:
            self._before[key] = max(before_us, self._before.pop(key, 0))
            forgotten = next(iter(self._before)) if len(self._before) > _MOST_OWED else None
            if forgotten is not None:
                del self._before[forgotten]
        if forgotten is not None:
            _log.warning("old writes of %r may be written again: Redis is away too long", forgotten)

    def send(self) -> None:
        """Tell what is remembered; raises a MusetError if Redis is away again."""
        for key, before_us in list(self._before.items()):
            self.tell(key, before_us)
            with self._lock:
                if self._before.get(key) == before_us:
                    del self._before[key]

    def _forked(self) -> None:
        """The parent will tell."""
        self._before = {}


# --- What Redis says ------------------------------------------------------------------------------


def _raw(text: str) -> bytes:
    """Bytes of a name; what was no UTF-8 in Redis is the same again."""
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _named(words: Sequence[bytes]) -> dict[bytes, bytes]:
    """A flat list of names and values."""
    return dict(zip(words[::2], words[1::2], strict=True))


def _us(time: Sequence[bytes]) -> int:
    """The reply to TIME in microseconds."""
    return int(time[0]) * 1_000_000 + int(time[1])


def _whole(word: bytes) -> int:
    """A number that others may have written: 0 if it is none."""
    return int(word) if word.isdigit() and len(word) < 20 else 0


def _failures(noted: bytes) -> tuple[int, float | None, str | None]:
    """What is noted of a record: attempts, first failure, error."""
    if not noted:
        return 0, None, None
    attempts, first, error = (*noted.split(b" ", 2), b"", b"")[:3]
    first_failed = None if first == b"-" else _whole(first) / 1e6
    return _whole(attempts), first_failed, error.decode("utf-8", "replace")


def _record(
    key: str, entry_id: bytes, words: Sequence[bytes], facts: Mapping[bytes, bytes]
) -> Record | None:
    """The record of a stream's entry; None if it cannot be one."""
    fields, (seq, _, tail) = _named(words), entry_id.partition(b"-")
    if tail != b"0" or int(seq) > _LAST_SEQ or not {b"w", b"d"} <= fields.keys():
        return None
    some = [fields.get(name, b"") for name in (b"w", b"c", b"h", b"d")]
    return _told(key, [seq, *some, facts.get(b"f" + seq, b"")])


def _told(key: str, words: Sequence[bytes]) -> Record:
    seq, writer, coalesces, home, data, noted = words
    attempts, first_failed, _ = _failures(noted)
    is_joining, name = coalesces == b"1", _text(home)
    return Record(key, int(seq), _text(writer), data, is_joining, name, attempts, first_failed)


def _claim(told: Sequence[Any]) -> Claim:
    key, token, is_whole, records, *seq = told
    name = _text(key)
    waiting = tuple(_told(name, one) for one in records)
    return Claim(name, token.decode(), waiting, bool(is_whole), int(seq[0]) if seq else 0)


def _letter(letter_id: bytes, words: Sequence[bytes], is_superseded: int) -> DeadLetter:
    fields = _named(words)

    def field(name: bytes) -> bytes:
        return fields.get(name, b"")

    first_failed, last_failed = _whole(field(b"f")) / 1e6, _whole(field(b"l")) / 1e6
    record = Record(
        _text(field(b"k")),
        _whole(field(b"q")),
        _text(field(b"w")),
        field(b"d"),
        field(b"c") == b"1",
        _text(field(b"h")),
        _whole(field(b"n")),
        first_failed,
    )
    error = field(b"e").decode("utf-8", "replace")[:_ERROR_CHARACTERS]
    return DeadLetter(
        letter_id.decode(), record, error, first_failed, last_failed, bool(is_superseded)
    )


# --- What could be lost ---------------------------------------------------------------------------


def _settings_of_info(sections: Sequence[bytes]) -> dict[str, str]:
    """The settings that INFO tells, by their names in CONFIG."""
    lines = (line.partition(":") for part in sections for line in part.decode().splitlines())
    info = {name: value for name, _, value in lines}
    found = {
        "maxmemory": info.get("maxmemory"),
        "maxmemory-policy": info.get("maxmemory_policy"),
        "appendonly": {"0": "no", "1": "yes"}.get(info.get("aof_enabled", "")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _risks_of(settings: Mapping[str, str]) -> list[str]:
    risks = [check(settings) for check in (_eviction, _persistence)]
    return [risk for risk in risks if risk]


def _eviction(settings: Mapping[str, str]) -> str | None:
    policy, limit = settings.get("maxmemory-policy"), settings.get("maxmemory")
    if policy is None or limit is None:
        return (
            "Whether Redis may evict what waits is not known, maxmemory-policy cannot be read; "
            "allow CONFIG GET to the user of this application."
        )
    if limit == "0" or not policy.startswith("allkeys-"):
        return None
    return (
        f"Redis may evict what waits, as maxmemory is set and maxmemory-policy is {policy}; "
        "CONFIG SET maxmemory-policy volatile-lru, which evicts only what has a time to live."
    )


def _persistence(settings: Mapping[str, str]) -> str | None:
    if settings.get("appendonly") == "no":
        return (
            "A restart of Redis loses all that waits, or what came after its last snapshot, as "
            "appendonly is no; CONFIG SET appendonly yes."
        )
    fsync = settings.get("appendfsync") if "appendonly" in settings else None
    return _FSYNC.get(fsync or "", _FSYNC[""]) if fsync != "always" else None


_UNKNOWN = (
    "Whether Redis keeps what it has accepted is not known, its configuration cannot be read; "
    "allow CONFIG GET or INFO to the user of this application."
)
_FSYNC = {
    "everysec": (
        "If Redis or its machine fails, up to two seconds of what was accepted are lost, more if "
        "its disk takes longer to sync, as appendfsync is everysec; CONFIG SET appendfsync always."
    ),
    "no": (
        "If the machine of Redis fails, what its kernel has not written is lost, half a minute or "
        "so, as appendfsync is no; CONFIG SET appendfsync always, or everysec for two seconds."
    ),
    "": (
        "How often Redis writes to its disk is not known, appendfsync cannot be read; allow "
        "CONFIG GET to the user of this application, and CONFIG SET appendfsync always."
    ),
}
