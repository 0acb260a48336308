"""The files of many workers: read as one, and those of dead workers folded into an archive.

A file that is deleted would make its counters go back, and one that stays costs every scrape from
then on. So the counters of a dead worker are added to an archive, which replaces the one before by
a rename; the lock keeps a reader from seeing both the archive and what is in it already.
"""

import contextlib
import fcntl
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import IO

from flask_muset.metrics.store import pack, read_entries

__all__ = ["ARCHIVE", "archived", "fold", "locked", "paths"]

#: Stands in the names of the archives where others have the process id.
ARCHIVE = "archive"
_LOCK = ".lock"
_PATIENCE_S = 2.0
_name = re.compile(r"(?P<kind>(?:counter|histogram|summary|gauge_[a-z]+))_m?(?P<pid>\d+)\.db")
_summed = ("counter", "histogram", "summary")


@contextlib.contextmanager
def locked(folder: str, *, exclusive: bool) -> Iterator[bool]:
    """Hold the folder's lock; yields False if it could not be had in time.

    A reader that was stopped with the lock in hand must not stop the server for good.
    """
    how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with _opened(folder) as file:
        try:
            yield _acquired(file, how)
        finally:
            # By name: a worker that is forked meanwhile has the open file too, and would keep it.
            fcntl.flock(file, fcntl.LOCK_UN)


def _opened(folder: str) -> IO[bytes]:
    path = os.path.join(folder, _LOCK)
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return open(path, "ab")


def _acquired(file: IO[bytes], how: int) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        else:
            return True


def paths(folder: str) -> list[str]:
    """All files with values."""
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".db"))


def archived(folder: str, kind: str) -> str:
    """Path of the archive of a kind."""
    return os.path.join(folder, f"{kind}_{ARCHIVE}.db")


def fold(folder: str, dead: int | None = None) -> None:
    """Take the files of dead processes into the archive.

    Args:
        folder: Where they are.
        dead: Id of a process that has ended for sure, if its id is in use again or not.
    """
    with locked(folder, exclusive=True) as mine:
        if not mine:
            return  # the next one takes these as well
        by_kind: dict[str, list[str]] = {}
        for path in paths(folder):
            found = _name.fullmatch(os.path.basename(path))
            if found and (int(found["pid"]) == dead or not _is_alive(int(found["pid"]))):
                by_kind.setdefault(found["kind"], []).append(path)
        for kind, files in by_kind.items():
            if kind in _summed:
                _replace(archived(folder, kind), [archived(folder, kind), *files])
            elif not kind.startswith("gauge_live"):
                continue  # of a metric of the app's own that is to outlive the worker
            for path in files:
                os.unlink(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace(path: str, files: Iterable[str]) -> None:
    """Write the sums of the files to a path, all or nothing."""
    sums: dict[bytes, float] = {}
    for file in files:
        for key, value, _ in read_entries(file):
            sums[key] = sums.get(key, 0.0) + value
    body = b"".join(pack(key, value) for key, value in sums.items())
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".new")
    try:
        with open(handle, "wb") as out:
            out.write(struct.pack("=i4x", 8 + len(body)) + body)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
