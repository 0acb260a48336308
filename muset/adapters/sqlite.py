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
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import QueuePool

from flask_muset.deadline import deadline
from flask_muset.errors import DatabaseError
from flask_muset.translate import translate
from muset.ports import CallPolicy

__all__ = ["Database", "is_outage"]

T = TypeVar("T")

_CONNECTIONS = 8
_POOL_WAIT_S = 5.0
#: How long SQLite itself waits for a lock. It waits in a native thread, of which there are few, so
#: the longer waits are the policy's, where waiting takes nothing from anybody.
_BUSY_TIMEOUT_MS = 250


def is_outage(error: BaseException) -> bool:
    """Whether the database could not be used just now, locked, full of work or away."""
    known = translate(error, {})
    return isinstance(known, DatabaseError) and known.unavailable


Run = Callable[[Callable[[], Any], Callable[[], None]], Any]


def _run_direct(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    return work()


def _runner() -> Run:
    """How work that blocks is run in this process."""
    try:
        from gevent import get_hub, monkey
    except ImportError:
        return _run_direct
    if not monkey.is_module_patched("threading"):
        return _run_direct

    def run(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
        task = get_hub().threadpool.spawn(_outcome, work)
        try:
            kind, value = task.get()
        except BaseException:
            # Cut off by a timeout: the thread still uses the connection, so end its statement and
            # wait for that before somebody else may have it.
            interrupt()
            _wait_for_end(task)
            raise
        if kind:
            return value  # type: ignore[no-any-return]
        raise value

    return run


def _wait_for_end(task: Any) -> None:
    """Wait without an end of our own; an interrupted statement ends at its next step."""
    while not task.ready():
        try:
            task.wait()
        except BaseException:  # noqa: BLE001, S112 - the first one is raised when the thread ends
            continue


def _outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Catch in the thread, so that gevent's hub prints no traceback of an expected error."""
    try:
        return True, work()
    except BaseException as error:  # noqa: BLE001 - raised again in the greenlet
        return False, error


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


class Database:
    """Units of work on one SQLite file.

    The engine is made at the first use in each process, so a preloaded app that is forked shares no
    connection with its master.

    Args:
        url: `sqlite:///<path>`.
        policy: Guards each unit of work; one that failed has changed nothing and may be repeated.
    """

    name = "database"
    is_needed = True

    def __init__(self, url: str, policy: CallPolicy) -> None:
        self._url = url
        self._policy = policy
        self._pid = 0
        self._engine: Engine | None = None
        self._run: Run = _run_direct
        self._write_lock = threading.Lock()

    def _open(self) -> Engine:
        if self._engine is None or self._pid != os.getpid():
            engine = create_engine(
                self._url,
                poolclass=QueuePool,
                pool_size=_CONNECTIONS,
                max_overflow=0,
                pool_timeout=_POOL_WAIT_S,
                connect_args={"check_same_thread": False},
            )
            event.listen(engine, "connect", _prepare)
            self._run = _runner()
            self._write_lock = threading.Lock()
            self._engine, self._pid = engine, os.getpid()
        return self._engine

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on one consistent view of the data."""
        result: T = self._policy.call(self._transaction, work, "BEGIN")
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
            # Locking at the start: a read that turns into a write later may fail at once.
            return self._transaction(work, "BEGIN IMMEDIATE")

    def _transaction(self, work: Callable[[Connection], T], begin: str) -> T:
        engine = self._open()
        deadline.check()
        with engine.connect() as connection:

            def unit() -> T:
                connection.exec_driver_sql(begin)
                try:
                    result = work(connection)
                except BaseException:
                    connection.exec_driver_sql("ROLLBACK")
                    raise
                connection.exec_driver_sql("COMMIT")
                return result

            raw: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
            result: T = self._run(unit, raw.interrupt)
            return result

    def check(self, timeout_s: float) -> None:
        """Return if the database answers in time.

        Raises:
            TimeoutError: It did not; the query may still be running.
        """
        self._open()
        if self._run is _run_direct:
            self._transaction(lambda c: c.execute(text("SELECT 1")).scalar_one(), "BEGIN")
            return
        import gevent

        # Without the policy: a probe is one attempt, and asks an open breaker's database too.
        probe = gevent.spawn(
            self._transaction, lambda c: c.execute(text("SELECT 1")).scalar_one(), "BEGIN"
        )
        if not probe.ready() and not gevent.wait([probe], timeout=timeout_s):
            raise TimeoutError(f"the database did not answer within {timeout_s} s")
        probe.get()

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
            self._engine = None
