"""The embedded database.

SQLite waits and works inside C, which blocks gevent's hub and with it every request of the worker.
So each unit of work runs in a native thread where the process is patched, on that thread's own
connection: SQLAlchemy's pool locks are gevent's there, and those are not made for native threads.
"""

import _thread  # noqa: F401 - `original` looks it up
import os
import queue  # noqa: F401 - the same
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.pool import NullPool, QueuePool

from flask_muset.deadline import Expired, deadline
from flask_muset.errors import OverloadedError
from flask_muset.locks import has_lasting_hub, is_patched, original
from muset.adapters.database import SharedProbe, compute, finish, outcome, places
from muset.ports import CallPolicy

__all__ = ["Database"]

T = TypeVar("T")

_CONNECTIONS = 8
#: How long SQLite itself waits for a lock. It waits in a native thread, of which there are few, so
#: the longer waits are the policy's, where waiting takes nothing from anybody.
_BUSY_TIMEOUT_MS = 250
#: How a unit of work begins. A write locks then: a read that turns into one later may fail at once.
_READ, _WRITE = "BEGIN", "BEGIN IMMEDIATE"
#: Of a connection's `info`: the unit of work that it is used for.
_UNIT = "muset.unit"


class _Unit:
    """A unit of work that may be cancelled: at its next statement, and before it is kept."""

    def __init__(self) -> None:
        # Held while the connection is interrupted: a moment later it may be somebody else's.
        self._lock = original("_thread", "allocate_lock")()
        self._raw: sqlite3.Connection | None = None
        self._is_cancelled = False
        #: Whether it has had its turn.
        self.has_begun = False

    def begin(self, raw: sqlite3.Connection) -> None:
        """Use a connection, till `end`."""
        with self._lock:
            self._raw = raw
            self.has_begun = not self._is_cancelled
        self.check()

    def end(self) -> None:
        """Use it no more."""
        with self._lock:
            self._raw = None

    def cancel(self) -> None:
        """End it; called by whoever waits for it."""
        with self._lock:
            self._is_cancelled = True
            if self._raw is not None:
                self._raw.interrupt()

    def check(self) -> None:
        """Raise if it is cancelled; nothing of it is kept then."""
        if self._is_cancelled:
            raise sqlite3.OperationalError("interrupted")


def _check_unit(connection: Connection, *_: object) -> None:
    unit: _Unit = connection.info[_UNIT]
    unit.check()


def _transact(
    work: Callable[[Connection], T], begin: str, unit: _Unit, connection: Connection
) -> T:
    """Do a unit of work on a connection that nobody else uses."""
    raw: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
    connection.info[_UNIT] = unit
    try:
        unit.begin(raw)
        connection.begin()  # so that `work` begins and ends none of its own
        raw.execute(begin)
        result = work(connection)
        unit.check()
        if begin == _WRITE:
            connection.exec_driver_sql("COMMIT")
        return result
    finally:
        unit.end()
        # SQLite may have rolled back by itself; that must not hide the reason.
        if raw.in_transaction:
            raw.rollback()
        connection.rollback()


class _Threads:
    """Native threads that do units of work for the greenlets of one hub, in the order of asking.

    gevent's own pool takes one task for each of its threads, and the next when the hub has seen the
    end of one. A hub that serves a thousand streams has other things to do, so most threads would
    wait for it most of the time.

    Args:
        engine: Gives each thread its connection.
    """

    def __init__(self, engine: Engine) -> None:
        from gevent import get_hub

        # The first one sets the dialect up, under a lock that is gevent's.
        engine.connect().close()
        self._engine = engine
        self._tasks: Any = original("queue", "SimpleQueue")()
        self._done: deque[tuple[Any, Any]] = deque()
        #: Wakes the hub; it runs while somebody waits, since a loop that has nothing to do ends.
        self._wake = get_hub().loop.async_()
        self._wake_lock = original("_thread", "allocate_lock")()
        self._waiting = self._threads = 0

    def run(self, work: Callable[[Connection], T], unit: _Unit) -> T:
        """Wait until it is done; the unit is cancelled if whoever waits is cut off."""
        result = self._spawn(work)

        def cancel() -> None:
            unit.cancel()
            if not unit.has_begun:
                result.set((False, None))  # nobody waits for a turn at which nothing is done

        done: T = finish(result, cancel)
        return done

    def close(self) -> None:
        """Close the connections, and end the threads."""
        for ending in [self._spawn(None) for _ in range(self._threads)]:
            ending.wait()
        with self._wake_lock:  # the last of them may be about to use it
            self._wake.close()

    def _spawn(self, work: Callable[[Connection], Any] | None) -> Any:
        from gevent.event import AsyncResult

        if work is not None and self._threads < min(self._waiting + 1, _CONNECTIONS):
            original("_thread", "start_new_thread")(self._serve, ())
            self._threads += 1
        result = AsyncResult()
        if not self._waiting:
            self._wake.start(self._hand_out)
        self._waiting += 1
        self._tasks.put((result, work))
        return result

    def _hand_out(self) -> None:
        """Runs in the hub."""
        while self._done:
            result, value = self._done.popleft()
            self._waiting -= 1
            result.set(value)
        if not self._waiting:
            self._wake.stop()

    def _serve(self) -> None:
        """Runs in a native thread."""
        connection: Connection | None = None

        def do(work: Callable[[Connection], Any] | None) -> Any:
            nonlocal connection
            if work is None:
                return None if connection is None else connection.close()
            if connection is None:
                connection = self._engine.connect()
            return work(connection)

        work: Any = True
        while work is not None:
            result, work = self._tasks.get()
            value = outcome(partial(do, work))
            with self._wake_lock:
                self._done.append((result, value))
                self._wake.send()
            del result, value  # while it waits for the next one


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
        self._threads: _Threads | None = None
        self._places = places(_CONNECTIONS)
        self._write_lock = threading.Lock()
        self._shared = SharedProbe(self._look)
        self._version: _Version | None = None

    def _open(self) -> Engine:
        if self._engine is None or self._pid != os.getpid():
            self._threads = None
            pool: dict[str, Any] = {"poolclass": NullPool}
            if not is_patched():
                pool = {"poolclass": QueuePool, "pool_size": _CONNECTIONS, "max_overflow": 0}
            engine = create_engine(
                self._url,
                **pool,
                connect_args={"check_same_thread": False},
                # Texts of users have no place in errors, which go to the log and to dead letters.
                hide_parameters=True,
            )
            event.listen(engine, "connect", _prepare)
            event.listen(engine, "before_cursor_execute", _check_unit)
            if self._instrument is not None:
                self._instrument(engine)
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
        unit = _Unit()
        do = partial(_transact, work, begin, unit)
        if not (is_patched() and has_lasting_hub()):
            with self._places, engine.connect() as connection:
                return do(connection)
        if self._threads is None:
            self._threads = _Threads(engine)
        try:
            return self._threads.run(do, unit)
        except Expired:
            if unit.has_begun:
                raise
            # To the breaker a time in line must not look like the database's.
            raise OverloadedError("the database's line is too long for the time left") from None

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
        compute(self._probe)

    def _probe(self) -> None:
        path = make_url(self._url).database
        # A file that is gone must not come back empty.
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            if self._threads is not None:
                self._threads.close()
            self._engine.dispose()
            self._engine = self._threads = None
            if self._version is not None:
                self._version.close()
                self._version = None
