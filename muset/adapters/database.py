"""What both databases are to their stores, and what both need: outages, threads, one probe."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from flask_muset.clock import SYSTEM
from flask_muset.errors import DatabaseError
from flask_muset.locks import is_patched
from flask_muset.resilience import Bulkhead, Policy
from flask_muset.translate import DISK_REFUSES, translate
from muset.models import Base

__all__ = [
    "Database",
    "OutcomeUnknownError",
    "SharedProbe",
    "compute",
    "finish",
    "insert_if_new",
    "is_outage",
    "may_repeat",
    "outcome",
    "places",
]

T = TypeVar("T")

_PROBE_HOLDS_S = 1.0
#: Seconds that a place in the pool is waited for, within the deadline.
_PLACE_WAIT_S = 5.0
#: A cancel may come between two statements, where it does nothing, so it is repeated.
_CANCEL_AGAIN_S = 0.02


class Database(Protocol):
    """Units of work on one database, each kept whole or not at all.

    The connections are made at the first use in each process, so a preloaded app that is forked
    shares none with its master.
    """

    name: str
    is_needed: bool

    def read(self, work: Callable[[Connection], T], *, guarded: bool = True) -> T:
        """Run `work` on one consistent view of the data.

        Args:
            work: Is given the connection.
            guarded: False passes the policy by.
        """
        ...

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own, kept whole or not at all."""
        ...

    def version(self) -> object | None:
        """A value that is another one after each commit, whoever made it; asked at no cost.

        None where there is none, so that nothing may be kept.
        """
        ...

    def check(self, timeout_s: float) -> None:
        """Return if the database answers in time, else raise.

        It asks on a connection of its own, and past the policy: a pool that is in use and a breaker
        that is open say nothing of the database.
        """
        ...

    def close(self) -> None:
        """Close the connections of this process."""
        ...


class OutcomeUnknownError(DatabaseError):
    """The connection broke while a unit of work was being kept: it may be there or not."""


def is_outage(error: BaseException) -> bool:
    """Whether the database could not be used just now, locked, full of work or away.

    One whose disk is full is not away: it is read as ever, and what it refuses once it refuses
    again.
    """
    known = translate(error, {})
    return isinstance(known, DatabaseError) and known.unavailable and known.code != DISK_REFUSES


def may_repeat(error: BaseException) -> bool:
    """Whether a unit of work that ended so has changed nothing and may succeed the next time."""
    return is_outage(error) and not isinstance(error, OutcomeUnknownError)


def places(limit: int) -> Policy:
    """The places in a pool of connections, which is never waited for itself.

    Whoever waits there until his deadline is cut off, as by a database that does not answer. Here
    he is told before that that the service is busy, which says nothing about the database.

    Args:
        limit: Connections of the pool.
    """
    return Policy("database_connections", [Bulkhead(limit, max_wait=_PLACE_WAIT_S)])


def insert_if_new(
    connection: Connection, table: type[Base], values: Mapping[str, Any]
) -> int | None:
    """Insert a row and return its id; None if a unique value of it is taken.

    On PostgreSQL this waits for whoever is inserting the same at this moment.
    """
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(values).on_conflict_do_nothing()
    columns = table.__table__.c
    inserted: int | None = connection.execute(statement.returning(columns.id)).scalar_one_or_none()
    return inserted


def outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether work returned, and what; else what it raised, of which no hub prints a traceback."""
    try:
        return True, work()
    except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for it
        return False, error


def finish(task: Any, cancel: Callable[[], None]) -> Any:
    """What a greenlet or a task of gevent's threads that runs `outcome` comes to.

    Whoever is cut off meanwhile cancels it and still waits for its end, as it uses a connection
    that somebody else may have afterwards. What was done all the same was done: that is returned,
    because a request that is told of a time-out must have changed nothing. Nor is it told so where
    nobody knows.

    Args:
        task: Is running.
        cancel: Ends it; called until it has ended.
    """
    import gevent

    cut: BaseException | None = None
    while not task.ready():
        try:
            if cut is not None:
                cancel()
            gevent.wait([task], timeout=None if cut is None else _CANCEL_AGAIN_S)
        except BaseException as error:  # noqa: BLE001 - raised below, the first one wins
            cut = cut or error
    is_done, value = task.value
    if is_done:
        return value
    raise value if cut is None or isinstance(value, OutcomeUnknownError) else cut


def compute(work: Callable[[], T]) -> T:
    """Run what computes for long: where gevent runs in a native thread, so that others go on."""
    if not is_patched():
        return work()
    from gevent import get_hub

    task = get_hub().threadpool.spawn(outcome, work)
    is_done, value = task.get()
    if is_done:
        return value  # type: ignore[no-any-return]
    raise value


class SharedProbe:
    """One look at the database for all that ask at once; what it found holds for a second.

    Args:
        look: Raises if the database does not answer. It may take as long as it likes.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._running: Any = None
        self._ended_at = 0.0

    def check(self, timeout_s: float) -> None:
        """Return if it answers in time.

        Raises:
            TimeoutError: It did not; the look may still go on.
            Exception: It answered with an error.
        """
        if not is_patched():
            self._look()
            return
        import gevent

        running = self._running
        if running is None or (running.ready() and SYSTEM.now() >= self._ended_at + _PROBE_HOLDS_S):
            running = self._running = gevent.spawn(outcome, self._timed)
        if not running.ready() and not gevent.wait([running], timeout=timeout_s):
            raise TimeoutError(f"the database did not answer within {timeout_s} s")
        is_well, found = running.value
        if not is_well:
            raise found

    def _timed(self) -> None:
        try:
            self._look()
        finally:
            self._ended_at = SYSTEM.now()
