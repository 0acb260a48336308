"""A journal in one SQLite file, for the processes of one machine.

Each write is synced before it is said to be accepted. A sync takes as long for many records as for
one, so all that is asked for at the same time goes into one transaction. Where gevent runs, one
native thread of its hub works at the file at a time; else it is one of the calling threads, for all
that wait. In that thread each statement lets go of Python's lock and waits to have it again, up to
5 ms where the hub computes: hence few statements that do much.
"""

# ruff: noqa: S608 - statements are put together of what stands here, never of what a caller gives

import contextlib
import os
import re
import secrets
import sqlite3
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.envelope import pack
from flask_muset.cache_strategies.journal import Claim, DeadLetter, Failure, Record, State
from flask_muset.cache_strategies.stores import Store
from flask_muset.clock import SYSTEM
from flask_muset.errors import ConflictError, DatabaseError, MusetError
from flask_muset.locks import give_lock, is_patched, make_event, original, run_beside

__all__ = ["SqliteJournal"]

T = TypeVar("T")

_BUSY_TIMEOUT_S: Final = 5.0
#: How long another process is let make the file before it is looked at again, while it is new.
_NEW_AGAIN_S: Final = 0.01
#: What one transaction takes at most: SQLite allows 32,766 parameters, and who came first waits.
_GROUP: Final = 256
#: What one claim takes of a key: records, and bytes after which there is no further one.
_CLAIM_RECORDS: Final = 256
_CLAIM_BYTES: Final = 2**20
_ERROR_CHARACTERS: Final = 1000

#: In the header of the file, so that another program's file is told from a journal: "MUJ1".
_APPLICATION: Final = 0x4D554A31
_VERSION: Final = 1

# `totals` has one row, which the triggers keep exact. A key has a row in `keys` while it has
# records, then `due` says when it is due, or while it is held. Its claim holds until `until` and
# has its records up to `claimed_to`, but for those that came back from the dead since then: their
# `apart` is the claim's token. `since` is when what a record took the place of was accepted, in
# microseconds; `data` stands last so that the rest is read without it.
_SCHEMA: Final = (
    """
    CREATE TABLE totals (
        last_seq INTEGER NOT NULL, pending INTEGER NOT NULL, bytes INTEGER NOT NULL,
        dead INTEGER NOT NULL
    )
    """,
    "INSERT INTO totals VALUES (0, 0, 0, 0)",
    """
    CREATE TABLE records (
        seq INTEGER PRIMARY KEY, key TEXT NOT NULL, writer TEXT NOT NULL,
        coalesces INTEGER NOT NULL, home TEXT NOT NULL, since INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0, first_failed REAL,
        error TEXT NOT NULL DEFAULT '', apart TEXT, data BLOB NOT NULL
    )
    """,
    "CREATE INDEX records_key ON records (key, seq)",
    "CREATE INDEX records_since ON records (since)",
    """
    CREATE TABLE keys (
        key TEXT PRIMARY KEY, due REAL, token TEXT, until REAL NOT NULL DEFAULT 0,
        claimed_to INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID
    """,
    "CREATE INDEX keys_due ON keys (due)",
    "CREATE INDEX keys_claimed ON keys (until) WHERE token IS NOT NULL",
    """
    CREATE TABLE dead (
        id INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER NOT NULL, key TEXT NOT NULL,
        writer TEXT NOT NULL, coalesces INTEGER NOT NULL, home TEXT NOT NULL,
        since INTEGER NOT NULL, attempts INTEGER NOT NULL, error TEXT NOT NULL,
        first_failed REAL NOT NULL, last_failed REAL NOT NULL,
        is_superseded INTEGER NOT NULL, data BLOB NOT NULL
    )
    """,
    "CREATE INDEX dead_key ON dead (key, writer)",
    "CREATE TABLE homes (home TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    """
    CREATE TRIGGER record_in AFTER INSERT ON records BEGIN
        UPDATE totals SET pending = pending + 1, bytes = bytes + LENGTH(NEW.data),
            last_seq = MAX(last_seq, NEW.seq);
    END;
    """,
    """
    CREATE TRIGGER record_out AFTER DELETE ON records BEGIN
        UPDATE totals SET pending = pending - 1, bytes = bytes - LENGTH(OLD.data);
    END;
    """,
    "CREATE TRIGGER dead_in AFTER INSERT ON dead BEGIN UPDATE totals SET dead = dead + 1; END;",
    "CREATE TRIGGER dead_out AFTER DELETE ON dead BEGIN UPDATE totals SET dead = dead - 1; END;",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)

_RECORD: Final = "key, seq, writer, data, coalesces, home, attempts, first_failed"

_LAST: Final = """
SELECT last_seq, pending, bytes, dead, k.key, k.until, k.claimed_to,
    r.seq, r.writer, r.coalesces, r.home, r.since, LENGTH(r.data)
FROM totals LEFT JOIN keys k ON k.key IN ({}) LEFT JOIN records r
    ON r.seq = (SELECT MAX(seq) FROM records WHERE key = k.key)
"""
_ADD: Final = "INSERT INTO records (seq, key, writer, coalesces, home, since, data) VALUES "
_LET_BE_DUE: Final = "INSERT INTO keys (key, due) VALUES "
#: A key that is only held has a row as well.
_IF_IT_IS_HELD: Final = " ON CONFLICT (key) DO UPDATE SET due = excluded.due"

_OLDEST_HOME: Final = "(SELECT home FROM records WHERE key = k.key ORDER BY seq LIMIT 1)"
_CLAIMABLE: Final = f"""
SELECT k.key, k.due FROM keys k
WHERE k.due <= :due AND k.until <= :now AND NOT EXISTS (
    SELECT 1 FROM homes h
    WHERE h.home = {_OLDEST_HOME} AND h.home NOT IN (:home, '') AND h.until > :now
)
ORDER BY k.due LIMIT :limit
"""
#: The moment at which a key that others have, that is at home or that is not due yet will be due.
_NEXT: Final = f"""
SELECT MIN(at) FROM (
    SELECT MIN(due) AS at FROM keys WHERE due > :now AND token IS NULL
    UNION ALL SELECT MIN(MAX(due, until)) FROM keys
        WHERE token IS NOT NULL AND +due IS NOT NULL AND (until > :now OR due > :now)
        AND SUBSTR(token, 1, LENGTH(:call)) <> :call
    UNION ALL SELECT MIN(h.until) FROM keys k JOIN homes h ON h.home = {_OLDEST_HOME}
        WHERE k.due <= :now AND k.until <= :now AND h.home NOT IN (:home, '') AND h.until > :now
)
"""
_GIVE_UP: Final = """
INSERT INTO dead (seq, key, writer, coalesces, home, since, attempts, error, first_failed,
    last_failed, is_superseded, data)
SELECT seq, key, writer, coalesces, home, since, attempts + :counts, :error,
    COALESCE(first_failed, :now), :now, EXISTS (
        SELECT 1 FROM records n
        WHERE n.key = r.key AND n.writer = r.writer AND n.coalesces AND n.seq > r.seq
    ), data
FROM records r WHERE seq = :seq
"""
_BRING_BACK: Final = """
INSERT INTO records (seq, key, writer, coalesces, home, since, apart, data)
SELECT seq, key, writer, coalesces, home, since,
    (SELECT token FROM keys k WHERE k.key = d.key AND k.until > ?), data
FROM dead d WHERE id = ?
"""
_AGE_OUT: Final = """
DELETE FROM records WHERE key = :key AND coalesces AND seq < :before AND NOT EXISTS (
    SELECT 1 FROM keys k WHERE k.key = :key AND k.until > :now
        AND seq <= k.claimed_to AND apart IS NOT k.token
)
"""


class SqliteJournal:
    """A `Journal` in an SQLite file, which the processes of one machine may share.

    Nothing is opened before its first use in each process, so it may be made before a fork.

    Args:
        path: Of the file, on a disk of this machine. Its folder is made if it is missing; nobody
            but this user may read the file.
        store: What `append` writes.
        max_pending: How many records may wait.
        max_pending_bytes: And how many bytes of data. What takes the place of an older record is
            accepted, whatever its size.
        lease_s: Seconds that a claim, and the sign of life of a home, lasts.

    Attributes:
        path: Of the file, absolute.
        store: What `append` writes.

    Raises:
        ValueError: There is no path, or a number is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        store: Store,
        *,
        max_pending: int = 10_000,
        max_pending_bytes: int = 256 << 20,
        lease_s: float = 10.0,
    ) -> None:
        if not os.fspath(path):
            raise ValueError("path must name a file, got ''.")
        for name, number in (
            ("max_pending", max_pending),
            ("max_pending_bytes", max_pending_bytes),
        ):
            if not number >= 1:
                raise ValueError(f"{name} must be at least 1, got {number!r}.")
        if not lease_s > 0:
            raise ValueError(f"lease_s must be above 0 seconds, got {lease_s!r}.")
        self.path = Path(path).absolute()
        self.store = store
        self._max_pending = max_pending
        self._max_bytes = max_pending_bytes
        self._lease_s = lease_s
        self._turns = _Turns()
        self._file = _File(self.path, self._work)

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
        """Accept a write.

        Raises:
            DatabaseError: The file cannot be used; `unavailable` where it may be later.
        """
        shift_us = round((SYSTEM.wall() - SYSTEM.now()) * 1e6)
        data = b"" if entry is None else pack(entry, shift_us)
        task = _Append(key, data, writer, coalesces, home, delay_s)
        task.forget = partial(self.store.delete, key)
        turn = self._turns.enter(key)
        try:
            seq = self._accept(task)
            if seq:
                self._agree(key, entry, seq, turn)
        finally:
            self._turns.leave(key, turn)
        return seq

    def _accept(self, task: "_Append") -> int | None:
        try:
            return self._file.run(task)
        except MusetError:
            task.take_back()
            raise

    def _agree(self, key: str, entry: Entry | None, seq: int, turn: "_Turn") -> None:
        """Let the cache have it, unless a later one of this process does, or does meanwhile."""
        if not self._turns.reach(turn, seq):
            return
        try:
            if entry is None:
                self.store.delete(key)
            else:
                self.store.write(key, entry)
        except BaseException:
            self.store.delete(key)
            raise
        if not self._turns.reach(turn, seq):
            self.store.delete(key)

    def _work(self, connection: sqlite3.Connection, tasks: Sequence["_Task[Any]"]) -> None:
        """Do all that is asked for; which of them comes first nobody can tell, as all wait."""
        appends = [task for task in tasks if isinstance(task, _Append)]
        if appends:
            _Appending(connection, appends).accept(self._max_pending, self._max_bytes)
        for task in tasks:
            if task.work is not None:
                task.result = task.work(connection)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return self._file.run(_Task(work, writes=False))

    def _write(
        self, work: Callable[[sqlite3.Connection], T], undo: Callable[[T], object] | None = None
    ) -> T:
        task = _Task(work, writes=True)
        task.undo = undo
        return self._file.run(task)

    # --- Claiming

    def newest(self, key: str, /) -> Record | None:
        """The last record of a key."""

        def work(connection: sqlite3.Connection) -> Record | None:
            sql = f"SELECT {_RECORD} FROM records WHERE key = ? ORDER BY seq DESC LIMIT 1"
            row = connection.execute(sql, (key,)).fetchone()
            return None if row is None else _record(row)

        return self._read(work)

    def waiting(self, keys: Sequence[str], /) -> set[str]:
        """Those of some keys that have records."""

        def work(connection: sqlite3.Connection) -> set[str]:
            found: set[str] = set()
            for start in range(0, len(keys), _GROUP):
                some = keys[start : start + _GROUP]
                marks = ", ".join("?" * len(some))
                sql = f"SELECT DISTINCT key FROM records WHERE key IN ({marks})"
                found.update(key for (key,) in connection.execute(sql, some))
            return found

        return self._read(work)

    def claim(
        self, limit: int, /, *, home: str, early: bool = False
    ) -> tuple[list[Claim], float | None]:
        """Claim keys that are due."""

        def work(connection: sqlite3.Connection) -> tuple[list[Claim], float | None]:
            call, now = secrets.token_hex(8), SYSTEM.wall()
            names = {"now": now, "home": home, "call": call, "limit": limit + 1}
            names["due"] = 9e999 if early else now
            found = connection.execute(_CLAIMABLE, names).fetchall()
            claims = [
                _claim_of(connection, key, f"{call}-{number}")
                for number, (key, _due) in enumerate(found[:limit])
            ]
            self._take(connection, claims, now)
            if len(found) > limit and found[limit][1] <= now:
                return claims, 0.0
            at = connection.execute(_NEXT, names).fetchone()[0]
            return claims, None if at is None else max(0.0, at - now)

        return self._write(work, lambda done: [self.settle(claim) for claim in done[0]])

    def hold(self, key: str, /) -> Claim | None:
        """Claim one key, even if it has no record."""

        def work(connection: sqlite3.Connection) -> Claim | None:
            now = SYSTEM.wall()
            # What was held without a record by somebody who is gone.
            connection.execute("DELETE FROM keys WHERE due IS NULL AND until <= ?", (now,))
            sql = "SELECT 1 FROM keys WHERE key = ? AND until > ?"
            if connection.execute(sql, (key, now)).fetchone():
                return None
            claim = _claim_of(connection, key, secrets.token_hex(8))
            self._take(connection, [claim], now)
            sql = "UPDATE totals SET last_seq = MAX(last_seq + 1, ?)"
            connection.execute(sql, (round(now * 1e6),))
            (seq,) = connection.execute("SELECT last_seq FROM totals").fetchone()
            return replace(claim, seq=seq)

        return self._write(work, lambda claim: claim and self.settle(claim))

    def _take(self, connection: sqlite3.Connection, claims: Sequence[Claim], now: float) -> None:
        sql = (
            "INSERT INTO keys (key, token, until, claimed_to) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (key) DO UPDATE SET token = excluded.token, until = excluded.until,"
            " claimed_to = excluded.claimed_to"
        )
        until = now + self._lease_s
        connection.executemany(
            sql, [(claim.key, claim.token, until, _last_seq(claim)) for claim in claims]
        )

    def renew(self, claims: Sequence[Claim], /) -> None:
        """Let claims last as long again as they did at first."""
        pairs = [(claim.key, claim.token) for claim in claims]

        def work(connection: sqlite3.Connection) -> None:
            now = SYSTEM.wall()
            sql = "UPDATE keys SET until = ? WHERE key = ? AND token = ? AND until > ?"
            until = now + self._lease_s
            connection.executemany(sql, [(until, key, token, now) for key, token in pairs])

        if pairs:
            self._write(work)

    # --- Settling

    def settle(self, claim: Claim, /, *, written: int = 0, failure: Failure | None = None) -> bool:
        """End a claim."""

        def work(connection: sqlite3.Connection) -> bool:
            now = SYSTEM.wall()
            sql = "SELECT claimed_to FROM keys WHERE key = ? AND token = ? AND until > ?"
            row = connection.execute(sql, (claim.key, claim.token, now)).fetchone()
            if row is None:
                return False
            if written:
                sql = "DELETE FROM records WHERE key = ? AND seq <= ? AND apart IS NOT ?"
                connection.execute(sql, (claim.key, min(written, row[0]), claim.token))
            if failure is not None and failure.seq <= row[0]:
                _fail(connection, failure, now)
            _let_go(connection, claim.key, now + (failure.pause_s if failure else 0.0))
            return True

        return self._write(work)

    def supersede(self, key: str, before: float, /) -> None:
        """Forget the records of a key that coalesce, are not claimed and were accepted before."""

        def work(connection: sqlite3.Connection) -> None:
            now = SYSTEM.wall()
            names = {"key": key, "before": before * 1e6, "now": now}
            if connection.execute(_AGE_OUT, names).rowcount and not _has_records(connection, key):
                # Whoever holds the key goes on to do so; nothing of it is due.
                connection.execute("UPDATE keys SET due = NULL WHERE key = ?", (key,))
                connection.execute("DELETE FROM keys WHERE key = ? AND until <= ?", (key, now))

        self._write(work)

    # --- Dead letters

    def dead_letters(self, limit: int = 1000, /, *, after: str = "") -> list[DeadLetter]:
        """Those that were given up.

        Raises:
            ValueError: `after` is no `id` of a dead letter.
        """
        start = _number(after) if after else 0
        if start is None:
            raise ValueError(f"after must be the id of a dead letter, got {after!r}.")

        def work(connection: sqlite3.Connection) -> list[DeadLetter]:
            sql = (
                "SELECT key, seq, writer, data, coalesces, home, attempts, first_failed, id, error,"
                " last_failed, is_superseded FROM dead WHERE id > ? ORDER BY id LIMIT ?"
            )
            return [_letter(row) for row in connection.execute(sql, (start, limit)).fetchall()]

        return self._read(work)

    def requeue(self, id: str, /) -> bool:  # noqa: A002 - the field's name
        """Let a dead letter be written again; its key is due at once."""
        number = _number(id)

        def work(connection: sqlite3.Connection) -> bool | None:
            sql = "SELECT key, is_superseded FROM dead WHERE id = ?"
            row = connection.execute(sql, (number,)).fetchone()
            if row is None or row[1]:
                return None if row else False
            now = SYSTEM.wall()
            connection.execute(_BRING_BACK, (now, number))
            sql = "UPDATE SET due = MIN(COALESCE(due, excluded.due), excluded.due)"
            sql = f"{_LET_BE_DUE} (?, ?) ON CONFLICT (key) DO {sql}"
            connection.execute(sql, (row[0], now))
            connection.execute("DELETE FROM dead WHERE id = ?", (number,))
            return True

        done = number is not None and self._write(work)
        if done is None:
            raise ConflictError(
                f"dead letter {id} is superseded by a newer write of its key; drop it."
            )
        return done

    def drop(self, id: str, /) -> bool:  # noqa: A002 - the field's name
        """Forget a dead letter."""
        number = _number(id)

        def work(connection: sqlite3.Connection) -> bool:
            sql = "DELETE FROM dead WHERE id = ?"
            return connection.execute(sql, (number,)).rowcount > 0

        return number is not None and self._write(work)

    # --- Beside

    def is_used(self) -> bool:
        """Whether there is a file."""
        return os.path.exists(self.path)

    def now(self) -> float:
        """Unix time as this machine has it."""
        return SYSTEM.wall()

    def beat(self, home: str, /) -> None:
        """Say that a process is alive."""

        def work(connection: sqlite3.Connection) -> None:
            now = SYSTEM.wall()
            connection.execute("DELETE FROM homes WHERE until <= ?", (now,))
            sql = "INSERT OR REPLACE INTO homes (home, until) VALUES (?, ?)"
            connection.execute(sql, (home, now + self._lease_s))

        self._write(work)

    def state(self) -> State:
        """How much there is."""

        def work(connection: sqlite3.Connection) -> State:
            sql = "SELECT pending, bytes, dead, (SELECT MIN(since) FROM records) FROM totals"
            pending, size, dead, since = connection.execute(sql).fetchone()
            return State(pending, size, _age_s(since), dead)

        return self._read(work)

    def risks(self) -> list[str]:
        """What could lose a record: a file system that keeps nothing, or that others share."""
        return self._file.run_native(partial(_risks, self.path))

    def explain(self, key: str, /) -> dict[str, Any]:
        """What waits of a key: the attempts and the error are those of its oldest record."""

        def work(connection: sqlite3.Connection) -> dict[str, Any]:
            sql = "SELECT COUNT(*), MIN(since) FROM records WHERE key = ?"
            pending, since = connection.execute(sql, (key,)).fetchone()
            sql = "SELECT attempts, error FROM records WHERE key = ? ORDER BY seq LIMIT 1"
            attempts, error = connection.execute(sql, (key,)).fetchone() or (0, "")
            return {
                "pending": pending,
                "oldest_s": _age_s(since),
                "attempts": attempts,
                "error": error or None,
            }

        return self._read(work)

    def close(self) -> None:
        """Let go of the connection."""
        self._file.run_native(self._file.close)


# --- Statements of one transaction ----------------------------------------------------------------


def _record(row: Sequence[Any]) -> Record:
    key, seq, writer, data, coalesces, home, attempts, first_failed = row[:8]
    return Record(key, seq, writer, data, bool(coalesces), home, attempts, first_failed)


def _letter(row: Sequence[Any]) -> DeadLetter:
    number, error, last_failed, is_superseded = row[8:]
    return DeadLetter(str(number), _record(row), error, row[7], last_failed, bool(is_superseded))


def _number(name: str) -> int | None:
    """What the id of a dead letter is in the file."""
    return int(name) if re.fullmatch("[0-9]{1,18}", name) else None


def _age_s(since_us: int | None) -> float:
    return 0.0 if since_us is None else max(0.0, SYSTEM.wall() - since_us / 1e6)


def _last_seq(claim: Claim) -> int:
    return claim.records[-1].seq if claim.records else 0


def _has_records(connection: sqlite3.Connection, key: str) -> bool:
    sql = "SELECT 1 FROM records WHERE key = ? LIMIT 1"
    return connection.execute(sql, (key,)).fetchone() is not None


def _claim_of(connection: sqlite3.Connection, key: str, token: str) -> Claim:
    """A claim of a key's oldest records, not taken yet."""
    sql = f"SELECT {_RECORD} FROM records WHERE key = ? ORDER BY seq LIMIT ?"
    records: list[Record] = []
    size = 0
    for row in connection.execute(sql, (key, _CLAIM_RECORDS + 1)):
        if len(records) == _CLAIM_RECORDS or size >= _CLAIM_BYTES:
            return Claim(key, token, tuple(records), is_whole=False)
        records.append(_record(row))
        size += len(records[-1].data)
    return Claim(key, token, tuple(records))


def _fail(connection: sqlite3.Connection, failure: Failure, now: float) -> None:
    names = {
        "seq": failure.seq,
        "error": failure.error[:_ERROR_CHARACTERS],
        "counts": failure.counts,
        "now": now,
    }
    if failure.is_final:
        connection.execute(_GIVE_UP, names)
        connection.execute("DELETE FROM records WHERE seq = ?", (failure.seq,))
        return
    sql = "UPDATE records SET error = :error, attempts = attempts + :counts"
    if failure.counts:
        sql += ", first_failed = COALESCE(first_failed, :now)"
    connection.execute(f"{sql} WHERE seq = :seq", names)


def _let_go(connection: sqlite3.Connection, key: str, due: float) -> None:
    """End the claim of a key; what is left of it is due then."""
    if _has_records(connection, key):
        sql = "UPDATE keys SET token = NULL, until = 0, claimed_to = 0, due = ? WHERE key = ?"
        connection.execute(sql, (due, key))
    else:
        connection.execute("DELETE FROM keys WHERE key = ?", (key,))


class _Last:
    """The last record of a key, in the file or about to be."""

    __slots__ = ("coalesces", "home", "is_claimed", "is_stored", "seq", "since", "size", "writer")

    def __init__(
        self, seq: int, writer: str, coalesces: bool, home: str, since: int, size: int
    ) -> None:
        self.seq = seq
        self.writer = writer
        self.coalesces = coalesces
        self.home = home
        self.since = since
        self.size = size
        self.is_claimed = False
        self.is_stored = False


class _Appending:
    """Accepts many writes with a few statements.

    Args:
        connection: In a transaction.
        tasks: Get their results.
    """

    def __init__(self, connection: sqlite3.Connection, tasks: Sequence["_Append"]) -> None:
        self._connection = connection
        self._tasks = tasks
        self._last: dict[str, _Last] = {}
        #: By sequence: the rows that come, and the sequences that go.
        self._rows: dict[int, tuple[Any, ...]] = {}
        self._replaced: list[tuple[int]] = []
        self._due: dict[str, float] = {}
        self._superseding: set[tuple[str, str]] = set()

    def accept(self, max_pending: int, max_bytes: int) -> None:
        """Decide on each in its turn, then write all that is accepted."""
        self._look()
        now = SYSTEM.wall()
        self._next_seq = max(self._last_seq + 1, int(now * 1e6))
        for task in self._tasks:
            task.result = self._decide(task, now, max_pending, max_bytes)
        self._write()

    def _look(self) -> None:
        """See what the keys have."""
        keys = list({task.key for task in self._tasks})
        # One key several times makes no difference; this way there are few statements to prepare.
        keys += keys[-1:] * ((1 << (len(keys) - 1).bit_length()) - len(keys))
        rows = self._connection.execute(_LAST.format(_marks(len(keys))), keys).fetchall()
        self._last_seq, self._pending, self._bytes, self._dead = rows[0][:4]
        now = SYSTEM.wall()
        for row in rows:
            key, until, claimed_to, seq, *kept = row[4:]
            if seq is not None:
                last = self._last[key] = _Last(seq, *kept)
                last.is_stored = True
                last.is_claimed = until > now and seq <= claimed_to

    def _decide(self, task: "_Append", now: float, max_pending: int, max_bytes: int) -> int | None:
        last = self._last.get(task.key)
        if task.writer is None and last is None:
            return 0
        new = _new(task, last, self._next_seq)
        if last is not None and _takes_place(new, last):
            self._replace(last, new)
        elif self._pending >= max_pending or self._bytes + new.size > max_bytes:
            return None
        self._add(task, new, now)
        return new.seq

    def _replace(self, last: _Last, new: _Last) -> None:
        new.since = last.since
        self._pending -= 1
        self._bytes -= last.size
        if last.is_stored:
            self._replaced.append((last.seq,))
        else:
            del self._rows[last.seq]

    def _add(self, task: "_Append", new: _Last, now: float) -> None:
        key = task.key
        self._next_seq += 1
        self._pending += 1
        self._bytes += new.size
        row = (new.seq, key, new.writer, new.coalesces, new.home, new.since, task.data)
        self._rows[new.seq] = row
        if key not in self._last:
            self._due[key] = now + task.delay_s
        self._last[key] = new
        if new.coalesces and self._dead:
            self._superseding.add((key, new.writer))

    def _write(self) -> None:
        self._run("DELETE FROM records WHERE seq IN (", "?", self._replaced, ")")
        self._run(_ADD, "(?, ?, ?, ?, ?, ?, ?)", list(self._rows.values()))
        self._run(_LET_BE_DUE, "(?, ?)", list(self._due.items()), _IF_IT_IS_HELD)
        if self._superseding:
            sql = "UPDATE dead SET is_superseded = 1 WHERE key = ? AND writer = ?"
            self._connection.executemany(sql, list(self._superseding))

    def _run(self, start: str, one: str, rows: Sequence[tuple[Any, ...]], end: str = "") -> None:
        """One statement for many rows; their numbers are powers of two, so there are few texts."""
        while rows:
            count = 1 << (len(rows).bit_length() - 1)
            sql = f"{start}{_marks(count, one)}{end}"
            self._connection.execute(sql, list(chain.from_iterable(rows[:count])))
            rows = rows[count:]


def _marks(count: int, one: str = "?") -> str:
    return ",".join([one] * count)


def _new(task: "_Append", last: _Last | None, seq: int) -> _Last:
    """What becomes of a write, in the place of whose writer it may be."""
    size = len(task.data)
    if task.writer is None and last is not None:
        return _Last(seq, last.writer, last.coalesces, last.home, seq, size)
    return _Last(seq, task.writer or "", task.coalesces, task.home, seq, size)


def _takes_place(new: _Last, last: _Last) -> bool:
    same = new.writer == last.writer
    return same and new.coalesces and bool(last.coalesces) and not last.is_claimed


# --- Turns ----------------------------------------------------------------------------------------


class _Turn:
    """The writes of one key that go on in this process: how many, and the latest in the file."""

    __slots__ = ("count", "seq")

    def __init__(self) -> None:
        self.count = 0
        self.seq = 0


class _Turns:
    """Tells who is the last to write a key into the cache, of those who do so at once."""

    _lock: Any

    def __init__(self) -> None:
        self._by_key: dict[str, _Turn] = {}
        give_lock(self)

    def enter(self, key: str) -> _Turn:
        """Before the record is made; `leave` follows, whatever happens."""
        with self._lock:
            turn = self._by_key.setdefault(key, _Turn())
            turn.count += 1
            return turn

    def reach(self, turn: _Turn, seq: int) -> bool:
        """Say that this one is in the file; whether none of those that go on is later."""
        with self._lock:
            turn.seq = max(turn.seq, seq)
            return turn.seq == seq

    def leave(self, key: str, turn: _Turn) -> None:
        """After the cache has the value."""
        with self._lock:
            turn.count -= 1
            if not turn.count and self._by_key.get(key) is turn:
                del self._by_key[key]

    def _forked(self) -> None:
        self._by_key = {}


# --- One file -------------------------------------------------------------------------------------


class _Task(Generic[T]):
    """Something to be done at the file, in a transaction with others.

    Args:
        work: Is given the connection.
        writes: Whether it changes anything.

    Attributes:
        result: What `work` returned.
        undo: Is given a result that is something, where who asked was cut off before he had it.
        is_done: Whether it has ended and is durable, or has failed.
        is_unsure: Whether it may be durable although it has failed.
        is_abandoned: Whether nobody waits for it any more.
        event: What a greenlet waits for.
    """

    work: Callable[[sqlite3.Connection], T] | None

    def __init__(self, work: Callable[[sqlite3.Connection], T] | None, *, writes: bool) -> None:
        self.work = work
        self.writes = writes
        self.result: Any = None
        self.error: Exception | None = None
        self.undo: Callable[[T], object] | None = None
        self.is_done = False
        self.is_unsure = False
        self.is_abandoned = False
        self.event: Any = None

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[no-any-return]

    def take_back(self) -> None:
        """Undo it, where there is something to undo."""
        if self.undo is not None and self.result:
            self.undo(self.result)


class _Append(_Task["int | None"]):
    """A write to be accepted.

    Attributes:
        forget: Deletes what the cache has.
    """

    forget: Callable[[], object]

    def __init__(
        self, key: str, data: bytes, writer: str | None, coalesces: bool, home: str, delay_s: float
    ) -> None:
        super().__init__(None, writes=True)
        self.key = key
        self.data = data
        self.writer = writer
        self.coalesces = coalesces
        self.home = home
        self.delay_s = delay_s

    def take_back(self) -> None:
        """What the cache has may be older than what is accepted."""
        if self.result or self.is_unsure:
            self.forget()


_Work = Callable[[sqlite3.Connection, Sequence[_Task[Any]]], None]

_files: "weakref.WeakSet[_File]" = weakref.WeakSet()
#: Connections of a parent, which are neither used nor closed in its child.
_left_alone: list[sqlite3.Connection] = []


class _Refused(Exception):  # noqa: N818 - it becomes a DatabaseError, for each who waits his own
    """The file is none that can be used."""


class _File:
    """An SQLite file that one thread of this process works at, for all.

    Args:
        path: Absolute.
        work: Does the tasks of one transaction.
    """

    _lock: Any

    def __init__(self, path: Path, work: _Work) -> None:
        self._path = path
        self._work = work
        self._connection: sqlite3.Connection | None = None
        #: Device and inode of the file that the connection has open.
        self._identity: tuple[int, int] = (0, 0)
        #: What is being committed.
        self._committing: Sequence[_Task[Any]] = ()
        self._begin_anew()
        # It is held for as long as a thread works at the file.
        give_lock(self)
        _files.add(self)

    def _begin_anew(self) -> None:
        self._queue: deque[_Task[Any]] = deque()
        #: The greenlet that has it done, where there is a hub.
        self._flusher: Any = None
        #: Else whoever works for all who wait for their turn.
        self._leader: _Task[Any] | None = None
        self._turn = threading.Condition()

    # --- Waiting

    def run(self, task: _Task[T]) -> T:
        """Have something done, and wait until it is durable.

        Raises:
            DatabaseError: The file cannot be used.
        """
        try:
            if _has_hub():
                self._wait(task)
            elif is_patched():
                self._work_alone(task)
            else:
                self._take_turn(task)
        except BaseException:
            self._abandon(task)
            raise
        return task.outcome()

    def run_native(self, work: Callable[[], T]) -> T:
        """Run what may block, where it blocks no hub."""
        if not _has_hub():
            return work()
        is_well, result = _spawn(work).get()
        if not is_well:
            raise result
        return result  # type: ignore[no-any-return]

    def _wait(self, task: _Task[Any]) -> None:
        """Let a greenlet of its own have it done, so that who is cut off takes nobody with him."""
        task.event = make_event()
        self._queue.append(task)
        if self._flusher is None:
            self._flusher = run_beside(self._flush_all)
        task.event.wait()

    def _flush_all(self) -> None:
        try:
            while self._queue:
                job = _spawn(self._flush)
                cut = _wait_for_end(job)
                is_well, done = job.value
                if not is_well:
                    raise done
                _hand_out(done)
                if cut is not None:
                    raise cut
        finally:
            # One that was cut off leaves the rest to the next.
            self._flusher = run_beside(self._flush_all) if self._queue else None

    def _take_turn(self, task: _Task[Any]) -> None:
        """Let the first of those who wait do it for all."""
        done: list[_Task[Any]] = []
        try:
            if self._is_led(task):
                return
            with self._lock:
                while not task.is_done:
                    done += self._do(self._take())
        finally:
            with self._turn:
                if self._leader is task:
                    self._leader = None
                    self._turn.notify_all()
        _hand_out(done)

    def _is_led(self, task: _Task[Any]) -> bool:
        """Wait until somebody has done it, or for nobody to be at work."""
        with self._turn:
            self._queue.append(task)
            while self._leader is not None and not task.is_done:
                self._turn.wait()
            if not task.is_done:
                self._leader = task
            return task.is_done

    def _work_alone(self, task: _Task[Any]) -> None:
        """In a native thread of gevent's, which can wake no greenlet."""
        with self._lock:
            self._do([task])

    def _abandon(self, task: _Task[Any]) -> None:
        task.is_abandoned = True
        try:
            self._queue.remove(task)
        except ValueError:
            # It was taken: what has not ended is taken back when it has.
            if task.is_done:
                task.take_back()

    # --- In the thread that works

    def _flush(self) -> list[_Task[Any]]:
        with self._lock:
            return self._do(self._take())

    def _take(self) -> list[_Task[Any]]:
        queue = self._queue
        return [queue.popleft() for _ in range(min(len(queue), _GROUP))]

    def _do(self, tasks: list[_Task[Any]]) -> list[_Task[Any]]:
        """Do what is asked for; return what has ended."""
        try:
            self._transact(tasks)
        except BaseException:
            self._put_back(tasks)
            raise
        return tasks

    def _transact(self, tasks: Sequence[_Task[Any]]) -> None:
        """Do them in one transaction, or each in its own if one of them fails."""
        try:
            connection = self._begin(any(task.writes for task in tasks))
        except Exception as error:  # noqa: BLE001 - it is raised where each waits
            self._fail(tasks, error)
            return
        try:
            self._work(connection, tasks)
        except Exception as error:  # noqa: BLE001
            self._roll_back(connection)
            if len(tasks) == 1 or _is_of_the_file(error):
                self._fail(tasks, error)
            else:
                for task in tasks:
                    self._transact([task])
            return
        self._commit(connection, tasks)

    def _commit(self, connection: sqlite3.Connection, tasks: Sequence[_Task[Any]]) -> None:
        self._committing = tasks
        try:
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001
            self._committing = ()
            for task in tasks:
                task.is_unsure = task.writes
            self._roll_back(connection)
            self._fail(tasks, error)
            return
        for task in tasks:
            task.is_done = True
        self._committing = ()

    def _begin(self, writes: bool) -> sqlite3.Connection:
        connection = self._connected()
        # A transaction that turned into a writing one later might fail at once.
        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        return connection

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self._path):
            self._drop()  # somebody has taken the file away: what is written to it is lost
        if self._connection is None:
            self._connection = _open(self._path)
            self._identity = _identity(self._path)
        return self._connection

    def _fail(self, tasks: Sequence[_Task[Any]], error: Exception) -> None:
        if _is_of_the_file(error):
            self._drop()
        for task in tasks:
            task.result = None
            task.error = _explained(self._path, error)
            task.is_done = True

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:
            self._drop()  # which rolls back

    def _put_back(self, tasks: Sequence[_Task[Any]]) -> None:
        """The thread was interrupted: leave to the next one what has not ended."""
        if self._connection is not None and self._connection.in_transaction:
            self._roll_back(self._connection)
        else:
            for task in self._committing:
                task.is_done = True
        self._committing = ()
        self._queue.extendleft(task for task in reversed(tasks) if not task.is_done)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # --- Ends

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with self._lock:
            self._drop()

    def stop(self) -> None:
        """Close the connection, and let nobody open another until `go_on`."""
        self._lock.acquire()
        self._drop()

    def go_on(self) -> None:
        """Let it be used again."""
        self._lock.release()

    def _forked(self) -> None:
        if self._connection is not None:
            _left_alone.append(self._connection)
            self._connection = None
        self._committing = ()
        self._begin_anew()


class _Forks:
    """Closes all connections before a fork.

    SQLite keeps in memory which locks its process has. A child would inherit that but not the
    locks: its own connections would believe in them, and its parent would delete the log that the
    child writes to.
    """

    _lock: Any

    def __init__(self) -> None:
        self._stopped: list[_File] = []
        give_lock(self)

    def before(self) -> None:
        """Wait for who works at a file, which is a matter of milliseconds."""
        self._lock.acquire()
        for file in list(_files):
            file.stop()
            self._stopped.append(file)

    def after(self) -> None:
        """In the parent; the child has new locks."""
        stopped, self._stopped = self._stopped, []
        for file in stopped:
            file.go_on()
        self._lock.release()

    def _forked(self) -> None:
        self._stopped = []


_forks = _Forks()
os.register_at_fork(before=_forks.before, after_in_parent=_forks.after)


def _has_hub() -> bool:
    """Whether this thread has a hub of gevent's, which must not be blocked."""
    return is_patched() and sys.modules["gevent._hub_local"].get_hub_if_exists() is not None


def _spawn(work: Callable[[], Any]) -> Any:
    """Begin something in a native thread of the hub; its value is as of `_outcome`."""
    from gevent import get_hub

    return get_hub().threadpool.spawn(_outcome, work)


def _outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Catch in the thread, so that the hub prints no traceback of an error that is handled."""
    try:
        return True, work()
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        return False, error


def _wait_for_end(job: Any) -> BaseException | None:
    """Wait without an end of our own; what has cut the waiting off meanwhile."""
    cut = None
    while not job.ready():
        try:
            job.wait()
        except BaseException as error:  # noqa: BLE001 - raised when those who wait have theirs
            cut = error
    return cut


def _hand_out(tasks: Sequence[_Task[Any]]) -> None:
    for task in tasks:
        if task.event is not None:
            task.event.set()
        if task.is_abandoned:
            run_beside(task.take_back)


def _is_of_the_file(error: Exception) -> bool:
    """Whether everybody would have met it, whatever he asked for."""
    return isinstance(error, sqlite3.OperationalError | OSError | _Refused) or _is_damage(error)


def _is_damage(error: Exception) -> bool:
    return type(error) is sqlite3.DatabaseError


def _explained(path: Path, error: Exception) -> Exception:
    """What somebody who waits gets, one of his own."""
    if isinstance(error, _Refused):
        raised = DatabaseError(str(error))
    elif _is_damage(error):
        raised = DatabaseError(
            f"the journal {path} is damaged: {error}; move it away with its -wal and -shm files, "
            "a new one is made then; `sqlite3 <file> .recover` may save what is in it."
        )
    elif isinstance(error, sqlite3.Error | OSError):
        raised = DatabaseError(
            f"the journal {path} cannot be used now: {error}; see that its folder may be written "
            "to and its disk has room, and that no other program keeps it locked.",
            unavailable=True,
        )
    else:
        return error
    raised.__cause__ = error
    return raised


# --- Opening --------------------------------------------------------------------------------------


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        # Never opened if it is there: to close it would end the locks that this process has on it.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    connection = sqlite3.connect(
        path,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if _header(connection) == (0, 0):
        _make(connection)
    application, version = _header(connection)
    if application != _APPLICATION:
        raise _Refused(f"{path} is no journal but something else; give another path.")
    if version != _VERSION:
        raise _Refused(
            f"the journal {path} is of version {version}, this is version {_VERSION}; "
            "update flask_muset, or give another path."
        )
    _log_ahead(connection, path)
    connection.execute("PRAGMA synchronous = FULL")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    run = connection.execute
    application = run("PRAGMA application_id").fetchone()[0]
    return application, run("PRAGMA user_version").fetchone()[0]


def _make(connection: sqlite3.Connection) -> None:
    """Make the tables, unless the file has others or another process was faster."""
    connection.execute("BEGIN IMMEDIATE")
    if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        for statement in _SCHEMA:
            connection.execute(statement)
    connection.execute("COMMIT")


def _log_ahead(connection: sqlite3.Connection, path: Path) -> None:
    """Turn on write-ahead logging; SQLite does not always wait for others who do the same."""
    until = SYSTEM.now() + _BUSY_TIMEOUT_S
    tries = round(_BUSY_TIMEOUT_S / _NEW_AGAIN_S)
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError:
            tries -= 1
            if tries < 0 or SYSTEM.now() > until:
                raise
            original("time", "sleep")(_NEW_AGAIN_S)
    if mode != "wal":
        raise _Refused(f"the file system of {path} allows no write-ahead log; give another path.")


# --- Risks ----------------------------------------------------------------------------------------

_MOUNTS: Final = Path("/proc/self/mountinfo")
_SHARED: Final = re.compile(
    "nfs|cifs|smb|9p|afs|beegfs|ceph|fuse[.](sshfs|s3fs|gluster|rclone)|gfs2|gluster|lustre|ocfs2"
)
_VOLATILE: Final = frozenset({"ramfs", "tmpfs"})


def _risks(path: Path) -> list[str]:
    if not _MOUNTS.exists():
        return []
    kind = _kind(os.path.realpath(path), _MOUNTS.read_text("utf-8", "surrogateescape"))
    if kind in _VOLATILE:
        return [f"the journal {path} is in memory ({kind}), a restart loses it; use a disk."]
    if _SHARED.match(kind):
        risk = (
            f"the journal {path} is on a network file system ({kind}), where SQLite's log does not "
            "work and records may be lost; use a disk of this machine."
        )
        return [risk]
    return []


def _kind(path: str, mounts: str) -> str:
    """The kind of file system that a path is on, by the kernel's list; empty if it is not there."""
    longest, kind = "", ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", _unescaped, fields.split()[4])
        # Of two at the same place the later one is on top.
        if f"{path}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(longest):
            longest, kind = point, rest.split()[0]
    return kind


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))
