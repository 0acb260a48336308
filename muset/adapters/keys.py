"""Keys and users in the database."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from muset.adapters.database import Database, insert_if_new
from muset.models import Key, User
from muset.ports import KeyRecord, Role

__all__ = ["SqlKeyStore"]

#: Prefixes whose keys are kept.
_MOST_KEPT = 1024
#: Keys of users who are there.
_KEYS = select(
    Key.id,
    Key.user_id,
    User.email,
    Key.role,
    Key.prefix,
    Key.digest,
    Key.created_at,
    Key.expires_at,
    Key.revoked_at,
).join(User, (User.id == Key.user_id) & User.deleted_at.is_(None))
#: Made once: each request asks this.
_FIND = _KEYS.where(Key.prefix == bindparam("prefix"))


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


def _naive(moment: datetime | None) -> datetime | None:
    """The columns have no time zone; what is stored is UTC."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)


def _record(row: Any) -> KeyRecord:
    created: datetime = row.created_at.replace(tzinfo=UTC)
    return KeyRecord(
        id=row.id,
        user_id=row.user_id,
        email=row.email,
        role=Role(row.role),
        prefix=row.prefix,
        digest=row.digest,
        created_at=created,
        expires_at=_utc(row.expires_at),
        revoked_at=_utc(row.revoked_at),
    )


def user_id_of(connection: Connection, email: str) -> int:
    """The id of a user, made if the address is new."""
    find = select(User.id).where(User.email == email)
    found = connection.execute(find).scalar_one_or_none()
    if found is not None:
        return found
    values = {"email": email, "created_at": _naive(datetime.now(UTC))}
    made = insert_if_new(connection, User, values)
    return connection.execute(find).scalar_one() if made is None else made


def _has_key(connection: Connection) -> bool:
    holding = select(Key.id).where(Key.revoked_at.is_(None)).limit(1)
    return connection.execute(holding).first() is not None


class SqlKeyStore:
    """Implements `muset.ports.KeyStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        #: What was found, each with the version of the database that it was found in.
        self._kept: dict[str, tuple[object, Sequence[KeyRecord]]] = {}

    def create(
        self,
        *,
        email: str,
        role: Role,
        prefix: str,
        digest: bytes,
        expires_at: datetime | None,
        only_first: bool = False,
    ) -> KeyRecord | None:
        """Store a key, and its user if the address is new; None if it should be the first.

        A key that is there already stays as it is: several processes may install the same.
        """

        def work(connection: Connection) -> KeyRecord | None:
            if only_first and _has_key(connection):
                return None
            user_id = user_id_of(connection, email)
            if only_first:
                # Another process may be doing the same; one waits here for the other.
                connection.execute(select(User.id).where(User.id == user_id).with_for_update())
                if _has_key(connection):
                    return None
            values = {
                "user_id": user_id,
                "role": role.value,
                "prefix": prefix,
                "digest": digest,
                "created_at": _naive(datetime.now(UTC)),
                "expires_at": _naive(expires_at),
            }
            insert_if_new(connection, Key, values)
            return _record(connection.execute(_KEYS.where(Key.digest == digest)).one())

        return self._database.write(work)

    def find(self, prefix: str) -> Sequence[KeyRecord]:
        """All keys with this prefix, revoked and expired ones too, as they are now."""
        # Before it is read: what is committed meanwhile is another version.
        version = self._database.version()
        kept = self._kept.get(prefix)
        if kept is not None and version is not None and kept[0] == version:
            return kept[1]
        found = self._read(prefix)
        if version is not None and found:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[prefix] = (version, found)
        return found

    def _read(self, prefix: str) -> Sequence[KeyRecord]:
        # Past the policy: an operator who has forced the database's breaker open must be able to
        # undo it, and that needs a key.
        return self._database.read(
            lambda c: [_record(row) for row in c.execute(_FIND, {"prefix": prefix})], guarded=False
        )

    def list(self) -> Sequence[KeyRecord]:
        """All keys, the newest last."""
        query = _KEYS.order_by(Key.id)
        return self._database.read(lambda c: [_record(row) for row in c.execute(query)])

    def revoke(self, key_id: int, at: datetime) -> bool:
        """Withdraw a key; False if there is none with this id that still holds."""
        change = (
            update(Key)
            .where(Key.id == key_id, Key.revoked_at.is_(None))
            .values(revoked_at=_naive(at))
        )
        return self._database.write(lambda c: c.execute(change).rowcount == 1)

    def user_id(self, email: str) -> int:
        """The id of a user, made if the address is new."""
        return self._database.write(lambda c: user_id_of(c, email))
