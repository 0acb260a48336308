"""PostgreSQL, through psycopg, which waits cooperatively where gevent has patched the process.

Transactions begin and end by statements of ours: BEGIN bears the time that is left, and is at the
same time the test of a connection that has been idle, so neither costs a round trip of its own.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, make_url
from sqlalchemy.exc import DBAPIError

from flask_muset.deadline import deadline
from flask_muset.errors import DatabaseError
from flask_muset.locks import is_patched, run_beside
from muset.adapters.database import OutcomeUnknownError, SharedProbe, finish, outcome, places
from muset.ports import CallPolicy

__all__ = ["Database"]

T = TypeVar("T")

#: A host that is gone answers nothing, not even that it is gone.
_GONE_MS = 10_000
_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
#: Races are settled by constraints and row locks, which this level waits for; see the stores.
_WRITE = "BEGIN ISOLATION LEVEL READ COMMITTED"
#: A COMMIT that is not answered for so long never will be.
_COMMIT_S = 5.0
#: What holds unless the URL says something else.
_CONNECT: dict[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": _GONE_MS,
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "application_name": "muset",
}


class Database:
    """Implements `muset.adapters.database.Database` on PostgreSQL.

    Args:
        url: `postgresql+psycopg://...`; its query may hold any option of libpq.
        policy: Guards each unit of work.
        instrument: Is given each engine, to count its queries.
        pool_size: Connections at most; whoever gets none in time is told that the service is busy.
    """

    name = "database"
    is_needed = True

    def __init__(
        self,
        url: str,
        policy: CallPolicy,
        instrument: Callable[[Engine], None] | None = None,
        *,
        pool_size: int = 8,
    ) -> None:
        self._url = url
        self._policy = policy
        self._instrument = instrument
        self._pool_size = pool_size
        self._places = places(pool_size)
        self._pid = 0
        self._engine: Engine | None = None
        self._probe = SharedProbe(lambda: None)

    def _open(self) -> Engine:
        if self._engine is None or self._pid != os.getpid():
            engine = self._make_engine(
                poolclass=QueuePool, pool_size=self._pool_size, max_overflow=0
            )
            if self._instrument is not None:
                self._instrument(engine)
            self._probe = SharedProbe(partial(_look, self._make_engine(poolclass=NullPool)))
            self._engine, self._pid = engine, os.getpid()
        return self._engine

    def _make_engine(self, **options: Any) -> Engine:
        url = make_url(self._url)
        return create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            connect_args={name: _CONNECT[name] for name in _CONNECT.keys() - url.query.keys()},
            use_native_hstore=False,
            # Texts of users have no place in errors, which go to the log and to dead letters.
            hide_parameters=True,
            **options,
        )

    def read(self, work: Callable[[Connection], T], *, guarded: bool = True) -> T:
        """Run `work` on one consistent view of the data.

        Args:
            work: Is given the connection.
            guarded: False passes the policy by.
        """
        if not guarded:
            return self._read(work)
        result: T = self._policy.call(self._read, work)
        return result

    def _read(self, work: Callable[[Connection], T]) -> T:
        # There is nothing to keep; the transaction ends when the connection is given back.
        with self._places, self._begun(_READ) as connection:
            return work(connection)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own, kept whole or not at all.

        Raises:
            OutcomeUnknownError: The connection broke while it was being kept. It is not repeated
                here; the stores' units may be, by whoever knows what they were for.
        """
        result: T = self._policy.call(self._write, work)
        return result

    def _write(self, work: Callable[[Connection], T]) -> T:
        # What ends without a COMMIT is rolled back when the connection is given back; one that was
        # cut off within a statement is closed.
        with self._places, self._begun(_WRITE) as connection:
            result = work(connection)
            deadline.check()
            _commit(connection)
            return result

    def _begun(self, begin: str) -> Connection:
        """A connection in a transaction.

        One that the server has closed meanwhile fails here, where nothing has been done yet; the
        pool then forgets all that are as old.
        """
        engine = self._open()
        deadline.check()
        try:
            return _begin(engine, begin)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            return _begin(engine, begin)

    def version(self) -> None:
        """Nothing: to ask a server costs as much as to read."""

    def check(self, timeout_s: float) -> None:
        """Return if the database answers in time.

        It asks on a connection of its own, and past the policy: a pool that is in use and a breaker
        that is open say nothing of the database. Those who ask at once share one probe, and what it
        found holds for a second.

        Raises:
            TimeoutError: It did not.
            sqlalchemy.exc.DBAPIError: It refused.
        """
        self._open()
        self._probe.check(timeout_s)

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
            self._engine = None


def _look(engine: Engine) -> None:
    with deadline(_COMMIT_S), engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")


def _begin(engine: Engine, begin: str) -> Connection:
    connection = engine.connect()
    try:
        connection.exec_driver_sql(begin + _limits())
    except BaseException:
        connection.close()
        raise
    return connection


def _limits() -> str:
    """What the server ends by itself.

    That is a transaction of which it hears nothing more, for the locks of a host that is gone would
    stay for hours; and each statement when the time of its request is up.
    """
    limits = f"; SET LOCAL idle_in_transaction_session_timeout = {_GONE_MS}"
    left = deadline.remaining()
    if left is None:
        return limits
    # In steps, so that there are few such texts.
    return f"{limits}; SET LOCAL statement_timeout = {10 * max(1, math.ceil(left * 100))}"


def _commit(connection: Connection) -> None:
    """Keep the work; who is cut off meanwhile waits until it is known whether it is kept.

    Raises:
        OutcomeUnknownError: That will never be known.
    """
    raw: Any = connection.connection.driver_connection
    if raw.info.transaction_status == TransactionStatus.INERROR:
        # PostgreSQL would answer COMMIT with a rollback and no error.
        raise DatabaseError("a unit of work has gone on after a statement of it had failed")
    if not is_patched():
        _send_commit(connection)
        return
    task = run_beside(partial(outcome, partial(_send_commit, connection)))
    # It has a time limit of its own, and to cancel it would change nothing for the better.
    finish(task, lambda: None)


def _send_commit(connection: Connection) -> None:
    try:
        with deadline(_COMMIT_S):
            connection.exec_driver_sql("COMMIT")
    except Exception as error:
        if connection.invalidated:
            raise OutcomeUnknownError(
                f"the connection broke at COMMIT: {error}", unavailable=True
            ) from error
        raise
