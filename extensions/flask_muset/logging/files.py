"""Where lines go: standard error, and one file that many processes write and rotate."""

import contextlib
import fcntl
import os
import select
import sys
import threading
import time
from collections import deque
from typing import Any

from flask_muset.locks import give_lock

__all__ = ["LogFile", "StandardError", "say"]

_MODE, _CLOSED = 0o640, os.O_CLOEXEC
#: How long a rotation that failed is not tried again.
_ROTATION_PAUSE_S = 1.0
#: How long another process may have to make room in a pipe, where it was set not to wait.
_PATIENCE_S = 1.0


_said: set[str] = set()


def say(what: str, failure: BaseException) -> None:
    """Say on standard error, once, that logging itself failed; it never raises."""
    # Without the exception's text, which may be what must not be shown.
    reason = f" {failure.strerror}" if isinstance(failure, OSError) else ""
    text = f"flask_muset.logging: {what}: {type(failure).__name__}{reason}\n"
    if text in _said or len(_said) >= 100:
        return
    _said.add(text)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)


def _write_all(fd: int, data: bytes) -> None:
    """Write one line, in one call unless the system takes only a part of it."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, data[written:])


class StandardError:
    """Standard error, whatever it is at the moment.

    Lines are written to its descriptor, past the stream's buffer, so that each is one call and none
    is in the buffer when a process forks.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._fd: int | None = None
        self.is_terminal = False
        self._look(sys.stderr)

    def _look(self, stream: Any) -> None:
        self._stream, self._fd, self.is_terminal = stream, None, False
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # Some streams only look like one, such as those with which tests capture.
            self._fd = stream.fileno()
            self.is_terminal = stream.isatty()

    def write(self, line: str) -> None:
        """Write a line.

        Raises:
            OSError: It cannot be written.
        """
        stream = sys.stderr
        if stream is not self._stream:
            self._look(stream)
        if self._fd is None:
            if stream is not None:
                stream.write(line)
            return
        data = line.encode("utf-8", "backslashreplace")
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                _write_all(self._fd, data[written:])
        except BlockingIOError:
            select.select([], [self._fd], [], _PATIENCE_S)
            _write_all(self._fd, data)


class LogFile:
    """A file to which many processes append whole lines, and which one of them rotates when full.

    Each line is one `write` to a descriptor in append mode, which the system does not interleave
    with another. While it writes, a process has a shared lock on its file, and it writes only if
    the path still names that file, else it opens the path anew. So `logrotate` with rename and
    create works, and whoever gets an exclusive lock on a renamed file knows that nobody writes to
    it any more: no file is deleted before.

    Args:
        path: Of the file; the rotated ones are `path.1`, the newest, to `path.<backups>`.
        max_bytes: Size that it does not pass, unless one line does; 0 for any.
        backups: How many rotated files are kept, at least 1.

    Raises:
        OSError: It cannot be opened.
        ValueError: A number is too small.
    """

    _lock: Any

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int = 0, backups: int = 5
    ) -> None:
        if max_bytes < 0 or backups < 1:
            raise ValueError(
                f"a log file needs max_bytes of at least 0 and backups of at least 1, "
                f"got {max_bytes!r} and {backups!r}."
            )
        self.path = os.path.abspath(os.fspath(path))
        self._max_bytes = max_bytes
        self._backups = backups
        self._next_rotation = 0.0
        self._is_torn = False
        self._writer = 0
        self._later: deque[bytes] = deque()
        give_lock(self)
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CLOSED, _MODE)
        found = os.fstat(self._fd)
        self._file = found.st_ino, found.st_dev
        self._pid = os.getpid()

    def _reopen(self) -> None:
        old = self._fd
        self._open()  # the old one stays where this raises
        os.close(old)

    def write(self, line: str) -> None:
        """Append a line.

        Raises:
            OSError: The line, or a part of it, cannot be written. The next one begins a new line.
        """
        data = line.encode("utf-8", "backslashreplace")
        thread = threading.get_ident()
        if not self._lock.acquire(False):
            if self._writer == thread:
                # A finalizer or a signal's handler logs in the middle of a line.
                self._later.append(data)
                return
            self._lock.acquire()
        self._writer = thread
        try:
            self._append(data)
            while self._later:
                self._append(self._later.popleft())
        finally:
            self._writer = 0
            self._lock.release()

    def close(self) -> None:
        """Close it; it is not written again."""
        os.close(self._fd)

    def _append(self, data: bytes) -> None:
        if self._pid != os.getpid():
            self._reopen()  # a lock would be shared with the parent
        if self._is_torn:
            data = b"\n" + data
        try:
            self._share(len(data))
            self._is_torn = True
            _write_all(self._fd, data)
            self._is_torn = False
        finally:
            _flock(self._fd, fcntl.LOCK_UN)

    def _share(self, size: int) -> None:
        """Get a shared lock on the path's own file, with room for a line."""
        may_rotate = bool(self._max_bytes)
        while True:
            _flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = self._found()
            if found is None:
                self._reopen()
            elif may_rotate and found.st_size and found.st_size + size > self._max_bytes:
                _flock(self._fd, fcntl.LOCK_UN)
                may_rotate = False
                self._rotate(size)
            else:
                return

    def _found(self) -> os.stat_result | None:
        """The state of the path's file, None if it is not ours."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found if (found.st_ino, found.st_dev) == self._file else None

    def _rotate(self, size: int) -> None:
        """Rename the full file, unless another process does it now or has done it.

        Where that is not possible the file grows on, and it is tried again later.
        """
        if time.monotonic() < self._next_rotation:
            return
        try:
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | _CLOSED)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = self._found()
                if found is not None and found.st_size + size > self._max_bytes:
                    self._shift()
            finally:
                os.close(folder)
        except BlockingIOError:
            pass
        except OSError as failure:
            self._next_rotation = time.monotonic() + _ROTATION_PAUSE_S
            say(f"{self.path} cannot be rotated", failure)

    def _shift(self) -> None:
        oldest = f"{self.path}.{self._backups}"
        if not _is_final(oldest):
            self._next_rotation = time.monotonic() + _ROTATION_PAUSE_S
            return
        for number in range(self._backups - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}.{number}", f"{self.path}.{number + 1}")
        os.rename(self.path, f"{self.path}.1")


def _flock(fd: int, how: int) -> None:
    """Lock a file that is written, if possible.

    Where it is not, the file was renamed and is looked at, which is seen next, or a stranger has
    locked the current one, or its file system knows no locks; a request waits for none of them.
    """
    try:  # noqa: SIM105 - twice a line, and contextlib.suppress costs as much as the rest
        fcntl.flock(fd, how)
    except OSError:
        pass


def _is_final(path: str) -> bool:
    """Whether nobody writes to a rotated file any more: who did has let its lock go."""
    try:
        fd = os.open(path, os.O_RDONLY | _CLOSED)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
