"""The file of a journal: how it is opened, and who works at it when.

All that is asked for at the same time goes into one transaction. Where gevent runs, one native
thread works at the file, which is its own: those of the hub's pool may all be taken. Else it is one
of the calling threads, for all that wait.
"""

import contextlib
import os
import re
import sqlite3
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from flask_muset.clock import SYSTEM
from flask_muset.errors import DatabaseError
from flask_muset.locks import give_lock, is_patched, make_event, original, run_beside

__all__ = ["GROUP", "Layout", "SqliteFile", "Task", "find_risks", "run_native"]

T = TypeVar("T")

_BUSY_TIMEOUT_S: Final = 5.0
#: How long another process is let make the file before it is looked at again, while it is new.
_NEW_AGAIN_S: Final = 0.01
#: What one transaction takes at most: SQLite allows 32,766 parameters, and who came first waits.
GROUP: Final = 256
#: What the log is cut to after it had to be larger. SQLite begins it anew at about 4 MiB.
_LOG_BYTES: Final = 16 << 20
#: How many pages of 4 KiB may be free in the file, how many others it gives back to the disk at a
#: time, and how often, in seconds.
_FREE_PAGES: Final = 1024
_SHRINK_PAGES: Final = 256
_SHRINK_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """What is in a file.

    Attributes:
        application: In the header of the file, so that another program's file is told from it.
        version: In the header as well.
        statements: They make the tables.
    """

    application: int
    version: int
    statements: tuple[str, ...]


class Task(Generic[T]):
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
        """What came of it, or raise what went wrong."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[no-any-return]

    def take_back(self) -> None:
        """Undo it, where there is something to undo."""
        if self.undo is not None and self.result:
            self.undo(self.result)


_Work = Callable[[sqlite3.Connection, Sequence[Task[Any]]], None]

_files: "weakref.WeakSet[SqliteFile]" = weakref.WeakSet()
#: Connections of a parent, which are neither used nor closed in its child.
_left_alone: list[sqlite3.Connection] = []


class _Refused(Exception):  # noqa: N818 - it becomes a DatabaseError, for each who waits his own
    """The file is none that can be used."""


class SqliteFile:
    """An SQLite file that one thread of this process works at, for all.

    Args:
        path: Absolute.
        layout: What is in it.
        work: Does the tasks of one transaction.
    """

    _lock: Any

    def __init__(self, path: Path, layout: Layout, work: _Work) -> None:
        self._path = path
        self._layout = layout
        self._work = work
        self._connection: sqlite3.Connection | None = None
        #: Device and inode of the file that the connection has open.
        self._identity: tuple[int, int] = (0, 0)
        #: What is being committed.
        self._committing: Sequence[Task[Any]] = ()
        self._next_shrink = 0.0
        self._begin_anew()
        # It is held for as long as a thread works at the file.
        give_lock(self)
        _files.add(self)

    def _begin_anew(self) -> None:
        self._queue: deque[Task[Any]] = deque()
        #: The greenlet that has it done, where there is a hub.
        self._flusher: Any = None
        #: Its native thread, of the kind that hubs have: a pool of one.
        self._thread: Any = None
        #: Else whoever works for all who wait for their turn.
        self._leader: Task[Any] | None = None
        self._turn = threading.Condition()

    # --- Waiting

    def run(self, task: Task[T]) -> T:
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

    def _wait(self, task: Task[Any]) -> None:
        """Let a greenlet of its own have it done, so that who is cut off takes nobody with him."""
        task.event = make_event()
        self._queue.append(task)
        if self._flusher is None:
            self._flusher = run_beside(self._flush_all)
        task.event.wait()

    def _flush_all(self) -> None:
        try:
            while self._queue:
                job = self._spawn(self._flush)
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

    def _spawn(self, work: Callable[[], Any]) -> Any:
        """Begin something in the native thread of this file; its value is as of `_outcome`."""
        from gevent import get_hub
        from gevent.threadpool import ThreadPool

        hub = get_hub()
        if self._thread is None or self._thread.hub is not hub:
            self._thread = ThreadPool(1, hub)
        return self._thread.spawn(_outcome, work)

    def _take_turn(self, task: Task[Any]) -> None:
        """Let the first of those who wait do it for all."""
        done: list[Task[Any]] = []
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

    def _is_led(self, task: Task[Any]) -> bool:
        """Wait until somebody has done it, or for nobody to be at work."""
        with self._turn:
            self._queue.append(task)
            while self._leader is not None and not task.is_done:
                self._turn.wait()
            if not task.is_done:
                self._leader = task
            return task.is_done

    def _work_alone(self, task: Task[Any]) -> None:
        """In a native thread of gevent's, which can wake no greenlet."""
        with self._lock:
            self._do([task])

    def _abandon(self, task: Task[Any]) -> None:
        task.is_abandoned = True
        try:
            self._queue.remove(task)
        except ValueError:
            # It was taken: what has not ended is taken back when it has.
            if task.is_done:
                task.take_back()

    # --- In the thread that works

    def _flush(self) -> list[Task[Any]]:
        with self._lock:
            return self._do(self._take())

    def _take(self) -> list[Task[Any]]:
        queue = self._queue
        return [queue.popleft() for _ in range(min(len(queue), GROUP))]

    def _do(self, tasks: list[Task[Any]]) -> list[Task[Any]]:
        """Do what is asked for; return what has ended."""
        try:
            self._transact(tasks)
        except BaseException:
            self._put_back(tasks)
            raise
        return tasks

    def _transact(self, tasks: Sequence[Task[Any]]) -> None:
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

    def _commit(self, connection: sqlite3.Connection, tasks: Sequence[Task[Any]]) -> None:
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
        if any(task.writes for task in tasks) and SYSTEM.now() >= self._next_shrink:
            self._shrink(connection)

    def _shrink(self, connection: sqlite3.Connection) -> None:
        """Give room back to the disk, little by little; most of what is free is used again."""
        self._next_shrink = SYSTEM.now() + _SHRINK_EVERY_S
        try:
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            if free > _FREE_PAGES:
                # The statement has a row for each page; a script does not come back for them.
                connection.executescript(f"PRAGMA incremental_vacuum({_SHRINK_PAGES})")
        except sqlite3.Error:
            self._drop()  # what was asked for is done; whoever comes next meets the same

    def _begin(self, writes: bool) -> sqlite3.Connection:
        connection = self._connected()
        # A transaction that turned into a writing one later might fail at once.
        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        return connection

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self._path):
            self._drop()  # somebody has taken the file away: what is written to it is lost
        if self._connection is None:
            self._connection = _open(self._path, self._layout)
            self._identity = _identity(self._path)
        return self._connection

    def _fail(self, tasks: Sequence[Task[Any]], error: Exception) -> None:
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

    def _put_back(self, tasks: Sequence[Task[Any]]) -> None:
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
        """Close the connection and end the thread; the next use begins anew."""
        if not _has_hub():
            self._close()
            return
        job = self._spawn(self._close)
        thread, self._thread = self._thread, None
        # It ends after its work, beside: who is cut off here leaves none behind.
        ending = run_beside(thread.kill)
        _value(job)
        ending.join()

    def _close(self) -> None:
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
        self._stopped: list[SqliteFile] = []
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
    """Whether this thread has a hub that lasts; a native one of gevent's has one for one call."""
    if not is_patched():
        return False
    from gevent._hub_local import get_hub_if_exists

    hub = get_hub_if_exists()
    return hub is not None and bool(hub.main_hub)


def run_native(work: Callable[[], T]) -> T:
    """Run what may block, where it blocks no hub."""
    if not _has_hub():
        return work()
    from gevent import get_hub

    return _value(get_hub().threadpool.spawn(_outcome, work))  # type: ignore[no-any-return]


def _outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Catch in the thread, so that the hub prints no traceback of an error that is handled."""
    try:
        return True, work()
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        return False, error


def _value(job: Any) -> Any:
    is_well, result = job.get()
    if not is_well:
        raise result
    return result


def _wait_for_end(job: Any) -> BaseException | None:
    """Wait without an end of our own; what has cut the waiting off meanwhile."""
    cut = None
    while not job.ready():
        try:
            job.wait()
        except BaseException as error:  # noqa: BLE001 - raised when those who wait have theirs
            cut = error
    return cut


def _hand_out(tasks: Sequence[Task[Any]]) -> None:
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


def _open(path: Path, layout: Layout) -> sqlite3.Connection:
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
        _prepare(connection, path, layout)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, layout: Layout) -> None:
    if _header(connection) == (0, 0):
        _make(connection, layout)
    application, version = _header(connection)
    if application != layout.application:
        raise _Refused(f"{path} is no journal but something else; give another path.")
    if version != layout.version:
        raise _Refused(
            f"the journal {path} is of version {version}, this is version {layout.version}; "
            "update flask_muset, or give another path."
        )
    _log_ahead(connection, path)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    run = connection.execute
    application = run("PRAGMA application_id").fetchone()[0]
    return application, run("PRAGMA user_version").fetchone()[0]


def _make(connection: sqlite3.Connection, layout: Layout) -> None:
    """Make the tables, unless the file has others or another process was faster."""
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only before there is anything
    connection.execute("BEGIN IMMEDIATE")
    if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        for statement in layout.statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {layout.application}")
        connection.execute(f"PRAGMA user_version = {layout.version}")
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


def find_risks(path: Path) -> list[str]:
    """What could lose a file, each in a sentence with its cure: where its file system is."""
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
