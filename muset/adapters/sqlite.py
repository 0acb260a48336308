"""The embedded database.

SQLite waits and works inside C, which blocks gevent's hub and with it every request of the worker.
So each unit of work runs in gevent's native threads where the process is patched. The connection is
taken and given back by the greenlet: SQLAlchemy's pool locks are gevent's there, and those are not
made for native threads.
"""

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.pool import QueuePool

from flask_muset.deadline import deadline
from flask_muset.locks import is_patched
from muset.adapters.database import SharedProbe, finish, outcome
from muset.ports import CallPolicy

__all__ = ["Database"]

T = TypeVar("T")

_CONNECTIONS = 8
_POOL_WAIT_S = 5.0
#: How long SQLite itself waits for a lock. It waits in a native thread, of which there are few, so
#: the longer waits are the policy's, where waiting takes nothing from anybody.
_BUSY_TIMEOUT_MS = 250
#: How a unit of work begins. A write locks then: a read that turns into one later may fail at once.
_READ, _WRITE = "BEGIN", "BEGIN IMMEDIATE"
#: Of a connection's `info`: the unit of work that it is used for.
_UNIT = "muset.unit"


class _Unit:
    """A unit of work that may be cancelled: at its next statement, and before it is kept.

    Args:
        raw: The connection that it runs on.
    """

    def __init__(self, raw: sqlite3.Connection) -> None:
        self._raw = raw
        self._is_cancelled = False

    def cancel(self) -> None:
        """End it; called by whoever waits for it."""
        self._is_cancelled = True
        self._raw.interrupt()

    def check(self) -> None:
        """Raise if it is cancelled; nothing of it is kept then."""
        if self._is_cancelled:
            raise sqlite3.OperationalError("interrupted")


def _check_unit(connection: Connection, *_: object) -> None:
    unit: _Unit = connection.info[_UNIT]
    unit.check()


#: Runs work that blocks; the second is called until the work has ended if it is cut off.
Run = Callable[[Callable[[], Any], Callable[[], None]], Any]


def _run_direct(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    return work()


def _runner() -> Run:
    """How work that blocks is run in this process."""
    if not is_patched():
        return _run_direct
    from gevent import get_hub

    def run(work: Callable[[], T], cancel: Callable[[], None]) -> T:
        done: T = finish(get_hub().threadpool.spawn(outcome, work), cancel)
        return done

    return run


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where `write` says so
    for pragma in (
        f"busy_timeout = {_BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        # An answered upload must survive a power cut, and WAL with NORMAL may lose the newest
        # commits then. Uploads are rare next to questions, so the sync is cheap.
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


class _Version:
    """Tells whether anybody has committed, by a look at the memory that SQLite's processes share.

    In WAL mode that takes microseconds and waits for nobody, so it needs no native thread. The
    value is that of one connection, which changes nothing itself: its own changes do not count.

    Args:
        path: Of the database.
    """

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, timeout=0, check_same_thread=False)
        self._lock = threading.Lock()

    def read(self) -> int | None:
        """The value; None if somebody has the whole file to himself just now."""
        try:
            with self._lock:
                value: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error:
            return None
        return value

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Database:
    """Implements `muset.adapters.database.Database` on one SQLite file.

    Args:
        url: `sqlite:///<path>`.
        policy: Guards each unit of work. One that failed, or was cut off before it was committed,
            has changed nothing and may be repeated.
        instrument: Is given each engine, to count its queries.
    """

    name = "database"
    is_needed = True

    def __init__(
        self,
        url: str,
        policy: CallPolicy,
        instrument: Callable[[Engine], None] | None = None,
    ) -> None:
        self._url = url
        self._policy = policy
        self._instrument = instrument
        self._pid = 0
        self._engine: Engine | None = None
        self._run: Run = _run_direct
        self._write_lock = threading.Lock()
        self._shared = SharedProbe(self._look)
        self._version: _Version | None = None

    def _open(self) -> Engine:
        if self._engine is None or self._pid != os.getpid():
            engine = create_engine(
                self._url,
                poolclass=QueuePool,
                pool_size=_CONNECTIONS,
                max_overflow=0,
                pool_timeout=_POOL_WAIT_S,
                connect_args={"check_same_thread": False},
                # Texts of users have no place in errors, which go to the log and to dead letters.
                hide_parameters=True,
            )
            event.listen(engine, "connect", _prepare)
            event.listen(engine, "before_cursor_execute", _check_unit)
            if self._instrument is not None:
                self._instrument(engine)
            self._run = _runner()
            self._write_lock = threading.Lock()
            self._shared = SharedProbe(self._look)
            self._version = None
            self._engine, self._pid = engine, os.getpid()
        return self._engine

    def read(self, work: Callable[[Connection], T], *, guarded: bool = True) -> T:
        """Run `work` on one consistent view of the data; nothing that it changes is kept.

        Args:
            work: Is given the connection.
            guarded: False passes the policy by.
        """
        if not guarded:
            return self._transaction(work, _READ)
        result: T = self._policy.call(self._transaction, work, _READ)
        return result

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own, kept whole or not at all.

        SQLite has one writer at a time; those of this process wait for each other here, where
        waiting blocks nobody else, those of other processes in its busy time-out.
        """
        result: T = self._policy.call(self._write, work)
        return result

    def _write(self, work: Callable[[Connection], T]) -> T:
        self._open()
        with self._write_lock:
            return self._transaction(work, _WRITE)

    def _transaction(self, work: Callable[[Connection], T], begin: str) -> T:
        engine = self._open()
        deadline.check()
        with engine.connect() as connection:
            raw: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
            unit = connection.info[_UNIT] = _Unit(raw)

            def run() -> T:
                connection.begin()  # so that `work` begins and ends none of its own
                raw.execute(begin)
                try:
                    result = work(connection)
                    unit.check()
                    if begin == _WRITE:
                        connection.exec_driver_sql("COMMIT")
                    return result
                finally:
                    # SQLite may have rolled back by itself; that must not hide the reason.
                    if raw.in_transaction:
                        raw.rollback()

            result: T = self._run(run, unit.cancel)
            return result

    def version(self) -> object | None:
        """A value that is another one after each commit, whoever made it; None if it is not known.

        Values of two processes, or of before and after `close`, are never equal.
        """
        self._open()
        if self._version is None:
            path = make_url(self._url).database
            self._version = _Version(str(path))
        value = self._version.read()
        return None if value is None else (self._version, value)

    def check(self, timeout_s: float) -> None:
        """Return if the database answers in time.

        It asks on a connection of its own, and past the policy: a pool that is in use and a breaker
        that is open say nothing of the database. Those who ask at once share one probe, and what it
        found holds for a second.

        Raises:
            TimeoutError: It did not; the query may still be running.
            sqlite3.Error: It answered with an error.
        """
        self._open()
        self._shared.check(timeout_s)

    def _look(self) -> None:
        self._run(self._probe, lambda: None)

    def _probe(self) -> None:
        path = make_url(self._url).database
        # A file that is gone must not come back empty.
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
            self._engine = None
            if self._version is not None:
                self._version.close()
                self._version = None
