"""A journal in one SQLite file, for the processes of one machine.

Each write is synced before it is said to be accepted. A sync takes as long for many records as for
one, so all that is asked for at the same time goes into one transaction. In the thread that works
at the file each statement lets go of Python's lock and waits to have it again, up to 5 ms where
gevent's hub computes: hence few statements that do much.
"""

# ruff: noqa: S608 - statements are put together of what stands here, never of what a caller gives

import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

from flask_muset.cache_strategies.entry import Entry
from flask_muset.cache_strategies.envelope import pack
from flask_muset.cache_strategies.journal import Claim, DeadLetter, Failure, Record, State
from flask_muset.cache_strategies.sqlite_file import (
    GROUP,
    Layout,
    SqliteFile,
    Task,
    find_risks,
    run_native,
)
from flask_muset.cache_strategies.stores import Store
from flask_muset.clock import SYSTEM
from flask_muset.errors import ConflictError, MusetError
from flask_muset.locks import give_lock

__all__ = ["SqliteJournal"]

T = TypeVar("T")

#: What one claim takes of a key: records, and bytes after which there is no further one.
_CLAIM_RECORDS: Final = 256
_CLAIM_BYTES: Final = 2**20
_ERROR_CHARACTERS: Final = 1000

#: By how much the clock may be set back before nobody believes in claims and homes that last longer
#: than a lease.
_SET_BACK_S: Final = 1.0
#: A sequence that is later than all, where nobody knows which one was accepted.
_UNKNOWN: Final = 2**63

# `totals` has one row, which the triggers keep exact. A key has a row in `keys` while it has
# records, then `due` says when it is due and `home` is the oldest one's, or while it is held. Its
# claim holds until `until` and has its records up to `claimed_to`, but for those that came back
# from the dead since then: their `apart` is the claim's token. Those of the claim that coalesce and
# are older than `gone` are forgotten when it ends, unless they were written. `since` is when what a
# record took the place of was accepted, in microseconds; `data` stands last so that the rest is
# read without it.
_TABLES: Final = (
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
        key TEXT PRIMARY KEY, home TEXT NOT NULL DEFAULT '', due REAL, token TEXT,
        until REAL NOT NULL DEFAULT 0, claimed_to INTEGER NOT NULL DEFAULT 0,
        gone REAL NOT NULL DEFAULT 0
    ) WITHOUT ROWID
    """,
    "CREATE INDEX keys_due ON keys (home, due)",
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
)
#: The number is "MUJ1".
_LAYOUT: Final = Layout(application=0x4D554A31, version=1, statements=_TABLES)

_RECORD: Final = "key, seq, writer, data, coalesces, home, attempts, first_failed"

_LAST: Final = """
SELECT last_seq, pending, bytes, dead, k.key, k.until, k.claimed_to,
    r.seq, r.writer, r.coalesces, r.home, r.since, LENGTH(r.data)
FROM totals LEFT JOIN keys k ON k.key IN ({}) LEFT JOIN records r
    ON r.seq = (SELECT MAX(seq) FROM records WHERE key = k.key)
"""
_ADD: Final = "INSERT INTO records (seq, key, writer, coalesces, home, since, data) VALUES "
_LET_BE_DUE: Final = "INSERT INTO keys (key, due, home) VALUES "
#: A key that is only held has a row as well.
_IF_IT_IS_HELD: Final = " ON CONFLICT (key) DO UPDATE SET due = excluded.due, home = excluded.home"

#: What ends later than any lease was written before the clock was set back.
_LASTS: Final = "until > :now AND until <= :latest"
_OLDEST_HOME: Final = "(SELECT home FROM records WHERE key = :key ORDER BY seq LIMIT 1)"
_FIND_HOME: Final = f"UPDATE keys SET home = {_OLDEST_HOME} WHERE key = :key"
#: The homes that keys have, each found by one step in the index; keys of one home may be many.
_PLACES: Final = """
WITH RECURSIVE places (home) AS (
    SELECT MIN(home) FROM keys
    UNION ALL
    SELECT (SELECT MIN(home) FROM keys WHERE home > p.home) FROM places p WHERE p.home IS NOT NULL
)
"""
_OTHERS: Final = f"SELECT home FROM homes WHERE home NOT IN (:home, '') AND {_LASTS}"
_CLAIMABLE: Final = f"""
{_PLACES}
SELECT k.key, k.due, k.gone FROM places p CROSS JOIN keys k ON k.key IN (
    SELECT key FROM keys WHERE home = p.home AND due <= :due AND NOT ({_LASTS})
    ORDER BY due LIMIT :limit
)
WHERE p.home NOT IN ({_OTHERS})
ORDER BY k.due LIMIT :limit
"""
#: The moment at which a key that others have, that is at home or that is not due yet will be due.
_NEXT: Final = f"""
{_PLACES}
SELECT MIN(at) FROM (
    SELECT (
        SELECT due FROM keys WHERE home = p.home AND due > :now AND token IS NULL
        ORDER BY due LIMIT 1
    ) AS at FROM places p
    UNION ALL SELECT MIN(MAX(due, until)) FROM keys
        WHERE token IS NOT NULL AND +due IS NOT NULL AND (until > :now OR due > :now)
        AND SUBSTR(token, 1, LENGTH(:call)) <> :call
    UNION ALL SELECT h.until FROM places p JOIN homes h ON h.home = p.home
        WHERE h.home IN ({_OTHERS}) AND EXISTS (
            SELECT 1 FROM keys WHERE home = p.home AND due <= :now AND NOT ({_LASTS})
        )
)
"""
_TAKE: Final = """
INSERT INTO keys (key, token, until, claimed_to) VALUES (?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET token = excluded.token, until = excluded.until,
    claimed_to = excluded.claimed_to, gone = 0
"""
#: An attempt that does not count may have no error of its own.
_ERROR: Final = "CASE WHEN :counts OR :error <> '' THEN :error ELSE error END"
_GIVE_UP: Final = f"""
INSERT INTO dead (seq, key, writer, coalesces, home, since, attempts, error, first_failed,
    last_failed, is_superseded, data)
SELECT seq, key, writer, coalesces, home, since, attempts + :counts, {_ERROR},
    COALESCE(first_failed, :now), :now, EXISTS (
        SELECT 1 FROM records n
        WHERE n.key = r.key AND n.writer = r.writer AND n.coalesces AND n.seq > r.seq
    ), data
FROM records r WHERE seq = :seq
"""
_TRY_AGAIN: Final = f"""
UPDATE records SET attempts = attempts + :counts, error = {_ERROR},
    first_failed = CASE WHEN :counts THEN COALESCE(first_failed, :now) ELSE first_failed END
WHERE seq = :seq
"""
_SUPERSEDE_DEAD: Final = """
UPDATE dead SET is_superseded = 1
WHERE key = :key AND :writer IN (writer, '') AND coalesces AND seq < :seq
"""
#: It is no record of the key's last claim, not even where that has ended by itself.
_BRING_BACK: Final = """
INSERT INTO records (seq, key, writer, coalesces, home, since, apart, data)
SELECT seq, key, writer, coalesces, home, since,
    (SELECT token FROM keys k WHERE k.key = d.key), data
FROM dead d WHERE id = :id
"""
_AGE_OUT: Final = f"""
DELETE FROM records WHERE key = :key AND coalesces AND seq < :before AND NOT EXISTS (
    SELECT 1 FROM keys k WHERE k.key = :key AND {_LASTS}
        AND seq <= k.claimed_to AND apart IS NOT k.token
)
"""
#: The same for those that are claimed, later.
_LET_AGE_OUT: Final = f"UPDATE keys SET gone = MAX(gone, :before) WHERE key = :key AND {_LASTS}"
_AGE_OUT_OF_CLAIM: Final = """
DELETE FROM records WHERE key = :key AND coalesces AND EXISTS (
    SELECT 1 FROM keys k WHERE k.key = :key
        AND seq < k.gone AND seq <= k.claimed_to AND apart IS NOT k.token
)
"""


class SqliteJournal:
    """A `Journal` in an SQLite file, which the processes of one machine may share.

    Nothing is opened before its first use in each process, so it may be made before a fork.

    Args:
        path: Of the file, on a disk of this machine. Its folder is made if it is missing; nobody
            but this user may read the file. A symbolic link is followed now, once.
        store: What `append` writes.
        max_pending: How many records may wait.
        max_pending_bytes: And how many bytes of data. What takes the place of an older record is
            accepted, whatever its size.
        lease_s: Seconds that a claim, and the sign of life of a home, lasts.

    Attributes:
        path: Of the file, absolute and without symbolic links.
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
        # SQLite follows links as well, but makes what a link leads to for everybody to read.
        self.path = Path(os.path.realpath(path))
        self.store = store
        self._max_pending = max_pending
        self._max_bytes = max_pending_bytes
        self._lease_s = lease_s
        self._turns = _Turns()
        self._file = SqliteFile(self.path, _LAYOUT, self._work)

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
        turn = self._turns.enter(key)
        task.forget = partial(self._forget, key, turn)
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
            if turn.seq == _UNKNOWN:
                self.store.delete(key)
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

    def _forget(self, key: str, turn: "_Turn", seq: int) -> None:
        """Let the cache have nothing that is older than what was accepted for nobody."""
        self._turns.reach(turn, seq)
        self.store.delete(key)

    def _work(self, connection: sqlite3.Connection, tasks: Sequence[Task[Any]]) -> None:
        """Do all that is asked for; which of them comes first nobody can tell, as all wait."""
        appends = [task for task in tasks if isinstance(task, _Append)]
        if appends:
            _Appending(connection, appends, self._moments()).accept(
                self._max_pending, self._max_bytes
            )
        for task in tasks:
            if task.work is not None:
                task.result = task.work(connection)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return self._file.run(Task(work, writes=False))

    def _write(
        self, work: Callable[[sqlite3.Connection], T], undo: Callable[[T], object] | None = None
    ) -> T:
        task = Task(work, writes=True)
        task.undo = undo
        return self._file.run(task)

    def _moments(self) -> dict[str, Any]:
        """Now, and the latest at which a claim of now can end."""
        now = SYSTEM.wall()
        return {"now": now, "latest": now + self._lease_s + _SET_BACK_S}

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
            for start in range(0, len(keys), GROUP):
                some = keys[start : start + GROUP]
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
            call, names = secrets.token_hex(8), self._moments()
            now = names["now"]
            names |= {"home": home, "call": call, "limit": limit + 1}
            names["due"] = 9e999 if early else now
            found = connection.execute(_CLAIMABLE, names).fetchall()
            claims = [
                _claim_of(connection, key, f"{call}-{number}")
                for number, (key, _due, gone) in enumerate(found[:limit])
                if not gone or _age_out(connection, {**names, "key": key})
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
            names = self._moments() | {"key": key}
            now = names["now"]
            # What was held without a record by somebody who is gone.
            sql = f"DELETE FROM keys WHERE home = '' AND due IS NULL AND NOT ({_LASTS})"
            connection.execute(sql, names)
            sql = f"SELECT gone, {_LASTS} FROM keys WHERE key = :key"
            gone, is_held = connection.execute(sql, names).fetchone() or (0, False)
            if is_held:
                return None
            if gone:
                _age_out(connection, names)
            claim = _claim_of(connection, key, secrets.token_hex(8))
            self._take(connection, [claim], now)
            sql = "UPDATE totals SET last_seq = MAX(last_seq + 1, ?)"
            connection.execute(sql, (round(now * 1e6),))
            (seq,) = connection.execute("SELECT last_seq FROM totals").fetchone()
            return replace(claim, seq=seq)

        return self._write(work, lambda claim: claim and self.settle(claim))

    def _take(self, connection: sqlite3.Connection, claims: Sequence[Claim], now: float) -> None:
        until = now + self._lease_s
        rows = [(claim.key, claim.token, until, _last_seq(claim)) for claim in claims]
        connection.executemany(_TAKE, rows)

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

    def settle(
        self,
        claim: Claim,
        /,
        *,
        written: int = 0,
        failure: Failure | None = None,
        supersedes: str | None = None,
    ) -> bool:
        """End a claim."""

        def work(connection: sqlite3.Connection) -> bool:
            now = due = SYSTEM.wall()
            names = {"key": claim.key, "writer": supersedes, "seq": claim.seq}
            sql = "SELECT claimed_to, gone FROM keys WHERE key = ? AND token = ? AND until > ?"
            row = connection.execute(sql, (claim.key, claim.token, now)).fetchone()
            if row is None:
                return False
            if written:
                sql = "DELETE FROM records WHERE key = ? AND seq <= ? AND apart IS NOT ?"
                connection.execute(sql, (claim.key, min(written, row[0]), claim.token))
            if row[1]:
                connection.execute(_AGE_OUT_OF_CLAIM, names)
            if failure is not None and failure.seq <= row[0]:
                due = _fail(connection, failure, now)
            if supersedes is not None:
                connection.execute(_SUPERSEDE_DEAD, names)
            _let_go(connection, claim.key, due)
            return True

        return self._write(work)

    def supersede(self, key: str, before: float, /) -> None:
        """Forget the records of a key that coalesce and were accepted before a moment."""

        def work(connection: sqlite3.Connection) -> None:
            names = {"key": key, "before": before * 1e6, **self._moments()}
            connection.execute(_LET_AGE_OUT, names)
            if connection.execute(_AGE_OUT, names).rowcount:
                _tidy(connection, names)

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

    def key_of(self, id: str, /) -> str | None:  # noqa: A002 - the field's name
        """The key of a dead letter."""
        number = _number(id)

        def work(connection: sqlite3.Connection) -> str | None:
            row = connection.execute("SELECT key FROM dead WHERE id = ?", (number,)).fetchone()
            return None if row is None else str(row[0])

        return None if number is None else self._read(work)

    def requeue(self, id: str, /) -> bool:  # noqa: A002 - the field's name
        """Let a dead letter be written again; its key is due at once."""
        number = _number(id)

        def work(connection: sqlite3.Connection) -> bool | None:
            sql = "SELECT key, is_superseded FROM dead WHERE id = ?"
            row = connection.execute(sql, (number,)).fetchone()
            if row is None or row[1]:
                return None if row else False
            names = self._moments() | {"key": row[0], "id": number}
            connection.execute(_BRING_BACK, names)
            sql = "UPDATE SET due = MIN(COALESCE(due, excluded.due), excluded.due)"
            sql = f"{_LET_BE_DUE} (:key, :now, '') ON CONFLICT (key) DO {sql}"
            connection.execute(sql, names)
            _tidy(connection, names)
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
            names = self._moments()
            connection.execute(f"DELETE FROM homes WHERE NOT ({_LASTS})", names)
            sql = "INSERT OR REPLACE INTO homes (home, until) VALUES (?, ?)"
            connection.execute(sql, (home, names["now"] + self._lease_s))

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
        return run_native(partial(find_risks, self.path))

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
        """Let go of the connection and the thread."""
        self._file.close()


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


def _fail(connection: sqlite3.Connection, failure: Failure, now: float) -> float:
    """Note what became of a record; when its key is due."""
    names = {
        "seq": failure.seq,
        "error": failure.error[:_ERROR_CHARACTERS],
        "counts": failure.counts,
        "now": now,
    }
    if failure.is_final:
        connection.execute(_GIVE_UP, names)
        connection.execute("DELETE FROM records WHERE seq = ?", (failure.seq,))
        return now
    is_left = connection.execute(_TRY_AGAIN, names).rowcount
    return now + failure.pause_s if is_left else now


def _let_go(connection: sqlite3.Connection, key: str, due: float) -> None:
    """End the claim of a key; what is left of it is due then."""
    names = {"key": key, "due": due}
    (home,) = connection.execute(f"SELECT {_OLDEST_HOME}", names).fetchone()
    if home is None:
        connection.execute("DELETE FROM keys WHERE key = :key", names)
        return
    sql = "UPDATE keys SET token = NULL, until = 0, claimed_to = 0, gone = 0, due = :due,"
    connection.execute(f"{sql} home = :home WHERE key = :key", {**names, "home": home})


def _tidy(connection: sqlite3.Connection, names: dict[str, Any]) -> bool:
    """Note what is now the oldest record of a key; whether there is one."""
    if _has_records(connection, names["key"]):
        connection.execute(_FIND_HOME, names)
        return True
    # Whoever holds the key goes on to do so; nothing of it is due.
    connection.execute("UPDATE keys SET due = NULL, home = '' WHERE key = :key", names)
    connection.execute(f"DELETE FROM keys WHERE key = :key AND NOT ({_LASTS})", names)
    return False


def _age_out(connection: sqlite3.Connection, names: dict[str, Any]) -> bool:
    """Forget what was superseded during a claim that has ended; whether anything is left."""
    connection.execute(_AGE_OUT_OF_CLAIM, names)
    return _tidy(connection, names)


class _Append(Task["int | None"]):
    """A write to be accepted.

    Attributes:
        forget: Is given the sequence that was accepted; deletes what the cache has.
    """

    forget: Callable[[int], object]

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
            self.forget(self.result or _UNKNOWN)


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
        moments: Now, and the latest at which a claim can end.
    """

    def __init__(
        self, connection: sqlite3.Connection, tasks: Sequence[_Append], moments: dict[str, Any]
    ) -> None:
        self._connection = connection
        self._tasks = tasks
        self._now: float = moments["now"]
        self._latest: float = moments["latest"]
        self._last: dict[str, _Last] = {}
        #: By sequence: the rows that come, and the sequences that go.
        self._rows: dict[int, tuple[Any, ...]] = {}
        self._replaced: list[tuple[int]] = []
        #: Keys whose first records these are: when they are due, and their homes.
        self._due: dict[str, tuple[float, str]] = {}
        #: Keys whose last record has got another home, which may be their oldest one.
        self._moved: set[str] = set()
        self._superseding: set[tuple[str, str]] = set()

    def accept(self, max_pending: int, max_bytes: int) -> None:
        """Decide on each in its turn, then write all that is accepted."""
        self._look()
        self._next_seq = max(self._last_seq + 1, int(self._now * 1e6))
        for task in self._tasks:
            task.result = self._decide(task, max_pending, max_bytes)
        self._write()

    def _look(self) -> None:
        """See what the keys have."""
        keys = list({task.key for task in self._tasks})
        # One key several times makes no difference; this way there are few statements to prepare.
        keys += keys[-1:] * ((1 << (len(keys) - 1).bit_length()) - len(keys))
        rows = self._connection.execute(_LAST.format(_marks(len(keys))), keys).fetchall()
        self._last_seq, self._pending, self._bytes, self._dead = rows[0][:4]
        for row in rows:
            key, until, claimed_to, seq, *kept = row[4:]
            if seq is not None:
                last = self._last[key] = _Last(seq, *kept)
                last.is_stored = True
                last.is_claimed = self._now < until <= self._latest and seq <= claimed_to

    def _decide(self, task: _Append, max_pending: int, max_bytes: int) -> int | None:
        last = self._last.get(task.key)
        if task.writer is None and last is None:
            return 0
        new = _new(task, last, self._next_seq)
        if last is not None and _takes_place(new, last):
            self._replace(task.key, last, new)
        elif self._pending >= max_pending or self._bytes + new.size > max_bytes:
            return None
        self._add(task, new)
        return new.seq

    def _replace(self, key: str, last: _Last, new: _Last) -> None:
        new.since = last.since
        if new.home != last.home:
            self._moved.add(key)
        self._pending -= 1
        self._bytes -= last.size
        if last.is_stored:
            self._replaced.append((last.seq,))
        else:
            del self._rows[last.seq]

    def _add(self, task: _Append, new: _Last) -> None:
        key = task.key
        self._next_seq += 1
        self._pending += 1
        self._bytes += new.size
        row = (new.seq, key, new.writer, new.coalesces, new.home, new.since, task.data)
        self._rows[new.seq] = row
        if key not in self._last:
            self._due[key] = self._now + task.delay_s, new.home
        self._last[key] = new
        if new.coalesces and self._dead:
            self._superseding.add((key, new.writer))

    def _write(self) -> None:
        self._run("DELETE FROM records WHERE seq IN (", "?", self._replaced, ")")
        self._run(_ADD, "(?, ?, ?, ?, ?, ?, ?)", list(self._rows.values()))
        due = [(key, *of_key) for key, of_key in self._due.items()]
        self._run(_LET_BE_DUE, "(?, ?, ?)", due, _IF_IT_IS_HELD)
        self._connection.executemany(_FIND_HOME, [{"key": key} for key in self._moved])
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


def _new(task: _Append, last: _Last | None, seq: int) -> _Last:
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
