"""Users in the database."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, select, text, update

from flask_muset.errors import ConflictError
from muset.adapters.database import Database, insert_if_new
from muset.models import Key
from muset.models import User as Table
from muset.ports import User

__all__ = ["UserStore"]

_COLUMNS = (Table.id, Table.email, Table.name, Table.created_at, Table.version)
_IS_THERE = Table.deleted_at.is_(None)

#: The greatest sequence, so that no write of preferences that still waits is taken any more. As
#: SQLite and PostgreSQL both know it.
_FORGET_PREFERENCES = text(
    "INSERT INTO preferences (user_id, data, seq) VALUES (:user_id, NULL, 9223372036854775807) "
    "ON CONFLICT (user_id) DO UPDATE SET data = excluded.data, seq = excluded.seq"
)


def _user(row: Any) -> User:
    values = dict(row._mapping)
    values["created_at"] = values["created_at"].replace(tzinfo=UTC)
    return User(**values)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _is_taken(connection: Connection, email: str, *, by_other_than: int) -> bool:
    others = select(Table.id).where(Table.email == email, Table.id != by_other_than)
    return connection.execute(others).first() is not None


class UserStore:
    """Implements `muset.ports.UserStore`.

    Of two that change to an address at the same moment the second is refused here, or by the
    constraint of the table: a conflict as well.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, *, email: str, name: str) -> User | None:
        """Store a user; None if the address is another one's."""
        values = {"email": email, "name": name, "version": 1, "created_at": _now()}

        def work(connection: Connection) -> User | None:
            user_id = insert_if_new(connection, Table, values)
            if user_id is None:
                return None
            return _user(connection.execute(select(*_COLUMNS).where(Table.id == user_id)).one())

        return self._database.write(work)

    def get(self, user_id: int) -> User | None:
        """One user."""
        query = select(*_COLUMNS).where(Table.id == user_id, _IS_THERE)
        row = self._database.read(lambda c: c.execute(query).one_or_none())
        return None if row is None else _user(row)

    def list(self, *, limit: int, after_id: int) -> Sequence[User]:
        """Users in the order of their ids, those above `after_id` alone."""
        query = select(*_COLUMNS).where(Table.id > after_id, _IS_THERE)
        query = query.order_by(Table.id).limit(limit)
        return self._database.read(lambda c: [_user(row) for row in c.execute(query)])

    def replace(self, user: User) -> bool:
        """Store a user in place of the version before; False if that is not there any more."""
        before = (Table.id == user.id, Table.version == user.version - 1, _IS_THERE)
        values = {"email": user.email, "name": user.name, "version": user.version}

        def work(connection: Connection) -> bool:
            if _is_taken(connection, user.email, by_other_than=user.id):
                raise ConflictError(
                    "another user has the address",
                    user_message="Another user has this e-mail address.",
                )
            change = update(Table).where(*before).values(values)
            return connection.execute(change).rowcount == 1

        return self._database.write(work)

    def delete(self, user_id: int, *, version: int | None = None) -> bool:
        """Forget a user with all that is theirs alone; False if there is none."""
        which = [Table.id == user_id, _IS_THERE]
        if version is not None:
            which.append(Table.version == version)
        # The column has to be unlike all others; no address has this form.
        values = {"email": f"deleted:{user_id}", "name": "", "deleted_at": _now()}

        def work(connection: Connection) -> bool:
            if connection.execute(update(Table).where(*which).values(values)).rowcount == 0:
                return False
            connection.execute(delete(Key).where(Key.user_id == user_id))
            connection.execute(_FORGET_PREFERENCES, {"user_id": user_id})
            return True

        return self._database.write(work)
