"""Where values are kept: in memory, or in files that all workers of a server can read.

The files have prometheus_client's own format, so that its collector can read ours and our folding
its. The writer is another one. It touches one double for each update through a view of the mapped
file, under a lock of the operating system that native threads may share with greenlets; the
client's lock is gevent's once gevent has patched, and each of its updates asks for the process id.
"""

import mmap
import os
import struct
import weakref
from array import array
from collections.abc import Iterator
from typing import Any

from flask_muset.locks import give_lock

__all__ = ["UNITS", "Cell", "Store", "entries", "file_for", "in_units", "pack", "read_entries"]

#: What is added is rounded to one part of this many, about a microsecond. Sums of such numbers are
#: exact up to 2**33 and so do not depend on the order in which files are added; else a sum could
#: fall by a rounding error, which Prometheus takes for a restart: all counted anew at once.
UNITS = 1 << 20

_HEAD = 8
_FIRST_SIZE = 1 << 16
_length = struct.Struct("=i")
_values = struct.Struct("=dd")


def in_units(value: float) -> float:
    """A number rounded to what sums are exact in."""
    return round(value * UNITS) / UNITS


class Cell:
    """One number.

    Attributes:
        kind: What its file's name begins with, such as `counter` or `gauge_livesum`.
        key: As prometheus_client writes it.
    """

    __slots__ = ("index", "key", "kind", "view")

    def __init__(self, kind: str, key: bytes) -> None:
        self.kind = kind
        self.key = key
        self.view: Any = None
        self.index = 0


class Store:
    """The numbers of one app, or with a folder those of this process.

    Args:
        folder: Of the files; None keeps the numbers in memory.
    """

    _lock: Any

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._cells: dict[tuple[str, bytes], Cell] = {}
        self._pages: dict[str, _Page] = {}
        give_lock(self)
        if folder is not None:
            os.makedirs(folder, exist_ok=True)

    def cell(self, kind: str, key: bytes) -> Cell:
        """Return the cell of a key, the same one at each call."""
        with self._lock:
            cell = self._cells.get((kind, key))
            if cell is None:
                cell = self._cells[kind, key] = Cell(kind, key)
                self.bind(cell)
            return cell

    def add(self, cell: Cell, amount: float) -> None:
        """Add to a cell."""
        with self._lock:
            if cell.view is None:
                self.bind(cell)
            cell.view[cell.index] += amount

    def add_observed(self, total: Cell, bucket: Cell, value: float) -> None:
        """Add a value to a sum and 1 to a bucket, both under one lock."""
        value = in_units(value)
        with self._lock:
            if total.view is None or bucket.view is None:
                self.bind(total, bucket)
            total.view[total.index] += value
            bucket.view[bucket.index] += 1.0

    def set(self, cell: Cell, value: float) -> None:
        """Set a cell."""
        with self._lock:
            if cell.view is None:
                self.bind(cell)
            cell.view[cell.index] = value

    def value(self, cell: Cell) -> float:
        """Read a cell, as far as this process has written it."""
        with self._lock:
            return 0.0 if cell.view is None else float(cell.view[cell.index])

    def own(self) -> dict[str, dict[bytes, float]]:
        """All numbers of this process, by kind and key."""
        found: dict[str, dict[bytes, float]] = {}
        with self._lock:
            for cell in self._cells.values():
                value = 0.0 if cell.view is None else cell.view[cell.index]
                found.setdefault(cell.kind, {})[cell.key] = value
        return found

    def bind(self, *cells: Cell) -> None:
        """Give cells a place where they have none; the lock must be held."""
        for cell in cells:
            if cell.view is None:
                cell.view, cell.index = self._place(cell)

    def _place(self, cell: Cell) -> tuple[Any, int]:
        if self.folder is None:
            return array("d", [0.0]), 0
        page = self._pages.get(cell.kind)
        if page is None:
            page = self._pages[cell.kind] = _Page(file_for(self.folder, cell.kind, os.getpid()))
        return page.place(cell.key)

    def _forked(self) -> None:
        """In a child: the files are the parent's; make others when they are needed."""
        if self.folder is None:
            return
        self._pages = {}
        for cell in self._cells.values():
            cell.view = None


# --- Files ----------------------------------------------------------------------------------------


def file_for(folder: str, kind: str, pid: int) -> str:
    """Path of a process's file; prometheus_client's own has no `m` before the process id."""
    return os.path.join(folder, f"{kind}_m{pid}.db")


def pack(key: bytes, value: float = 0.0) -> bytes:
    """One entry of a file."""
    padding = b" " * (8 - (len(key) + 4) % 8)
    return _length.pack(len(key)) + key + padding + _values.pack(value, 0.0)


def entries(data: bytes) -> Iterator[tuple[bytes, float, int]]:
    """Key, value and position of the value for each entry; ends before one that is not whole."""
    end = min(_length.unpack_from(data)[0], len(data)) if len(data) >= _HEAD else 0
    position = _HEAD
    while position + 4 <= end:
        length = _length.unpack_from(data, position)[0]
        at = position + 4 + length + 8 - (length + 4) % 8
        if length <= 0 or at + 16 > end:
            return
        yield data[position + 4 : position + 4 + length], _values.unpack_from(data, at)[0], at
        position = at + 16


def read_entries(path: str) -> Iterator[tuple[bytes, float, int]]:
    """The entries of a file; none if it has gone."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read(_FIRST_SIZE)
            used = _length.unpack_from(data)[0] if len(data) >= _HEAD else 0
            while len(data) < used:
                more = file.read(used - len(data))
                if not more:
                    break
                data += more
    except FileNotFoundError:
        return iter(())
    return entries(data)


class _Page:
    """A file of this process, mapped into its memory."""

    def __init__(self, path: str) -> None:
        self._positions: dict[bytes, int] = {}
        self._used = _HEAD
        self._size = _FIRST_SIZE
        if os.path.exists(path):
            self._take_over(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        weakref.finalize(self, os.close, self._fd)
        self._map()
        self._data[: _length.size] = _length.pack(self._used)

    def _take_over(self, path: str) -> None:
        """Go on with the file of a dead process that had the same id; its gauges are void."""
        if os.path.basename(path).startswith("gauge"):
            os.unlink(path)
            return
        for key, _, at in read_entries(path):
            self._positions[key] = at
            self._used = at + 16
        self._size = max(_FIRST_SIZE, os.path.getsize(path))

    def _map(self) -> None:
        os.ftruncate(self._fd, self._size)
        self._data = mmap.mmap(self._fd, self._size)
        self._view = memoryview(self._data).cast("d")

    def place(self, key: bytes) -> tuple["memoryview[float]", int]:
        """The view and the index in it for a key; views of smaller sizes stay valid."""
        at = self._positions.get(key)
        if at is None:
            entry = pack(key)
            while self._used + len(entry) > self._size:
                self._size *= 2
                self._map()
            self._data[self._used : self._used + len(entry)] = entry
            # Only now: a reader believes in what this says.
            self._used += len(entry)
            self._data[: _length.size] = _length.pack(self._used)
            at = self._positions[key] = self._used - 16
        return self._view, at // 8
