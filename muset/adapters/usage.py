"""The ledger in the database."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import text

from muset.adapters.database import Database
from muset.ports import UsageEntry

__all__ = ["SqlUsageStore"]

_NAMES = [field.name for field in fields(UsageEntry)]
#: As SQLite and PostgreSQL both know it.
_ADD = text(
    f"INSERT INTO usage ({', '.join(_NAMES)}) VALUES ({', '.join(f':{n}' for n in _NAMES)}) "  # noqa: S608
    "ON CONFLICT (id) DO NOTHING"
)


class SqlUsageStore:
    """Implements `muset.ports.UsageStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add entries in one transaction; one whose id is there already is left as it is."""
        if entries:
            self._database.write(lambda c: c.execute(_ADD, list(entries)))
