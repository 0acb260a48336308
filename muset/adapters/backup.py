"""Copies of SQLite files that are in use."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

__all__ = ["copy_database"]

_PAGES = 1_000


def copy_database(source: Path, target: Path) -> int:
    """Copy a database as it is at one moment, while others read and write it.

    The copy is checked, readable for its owner alone, and appears under its name only when it is
    whole.

    Args:
        source: The file; its write-ahead log belongs to it.
        target: The file to make; it must not be there.

    Returns:
        Size of the copy in bytes.

    Raises:
        FileExistsError: There is such a file already.
        OSError: A file cannot be read or written.
        sqlite3.Error: It is no database, or a broken one.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already; back up to another folder.")
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with (
            closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as there,
            closing(sqlite3.connect(part)) as here,
        ):
            there.backup(here, pages=_PAGES)
            (verdict,) = here.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"{source} is damaged: {verdict}")
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size
