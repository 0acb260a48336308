"""Preferences in the database."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, text

from muset.adapters.database import Database
from muset.models import Preferences, User

__all__ = ["SqlPreferenceStore"]

#: As SQLite and PostgreSQL both know it.
_PUT = text(
    "INSERT INTO preferences (user_id, data, seq) VALUES (:user_id, :data, :seq) "
    "ON CONFLICT (user_id) DO UPDATE SET data = excluded.data, seq = excluded.seq "
    "WHERE preferences.seq < excluded.seq"
)


class SqlPreferenceStore:
    """Implements `muset.ports.PreferenceStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, user_id: int) -> dict[str, Any] | None:
        """An empty one for a user without any; None if there is no such user."""
        query = (
            select(User.id, Preferences.data)
            .outerjoin(Preferences, Preferences.user_id == User.id)
            .where(User.id == user_id, User.deleted_at.is_(None))
        )
        row = self._database.read(lambda c: c.execute(query).one_or_none())
        if row is None:
            return None
        found: dict[str, Any] = {} if row.data is None else json.loads(row.data)
        return found

    def put(self, user_id: int, preferences: Mapping[str, Any], seq: int) -> None:
        """Keep them, unless those that are there have a sequence that is not smaller."""
        self._put(user_id, json.dumps(preferences), seq)

    def delete(self, user_id: int, seq: int) -> None:
        """Forget them, unless they have a sequence that is not smaller.

        The row stays with its sequence: without it an older write that comes again would be taken.
        """
        self._put(user_id, None, seq)

    def _put(self, user_id: int, data: str | None, seq: int) -> None:
        values = {"user_id": user_id, "data": data, "seq": seq}
        self._database.write(lambda c: c.execute(_PUT, values))
