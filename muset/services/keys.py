"""Who may come in: keys, made once, kept as digests, compared in constant time."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from flask_muset.errors import AuthenticationError, NotFoundError, ValidationError
from muset.ports import KeyRecord, KeyStore, Principal, Role
from muset.services.fields import clean_email
from muset.services.shared_read import SharedRead

__all__ = ["KeyService"]

_PREFIX = "msk_"
_PREFIX_LENGTH = 8
#: Other credentials are refused before they are hashed and looked up.
_KEY = re.compile(_PREFIX + "[!-~]{1,252}")


def _now() -> datetime:
    return datetime.now(UTC)


def _digest(key: str) -> bytes:
    # Keys are 256 random bits: nothing to guess, so a slow password hash would only slow requests.
    return hashlib.sha256(key.encode()).digest()


class KeyService:
    """Makes, checks and withdraws keys.

    Args:
        store: Where they are kept.
        now: The time in UTC.
    """

    def __init__(self, store: KeyStore, now: Callable[[], datetime] = _now) -> None:
        self._store = store
        #: Many requests come with one key; those that come at once share a look at it.
        self._find = SharedRead(store.find)
        self._now = now

    def create(self, email: str, role: Role, lifetime: timedelta | None = None) -> str:
        """Make a key and return it; it cannot be read again.

        Raises:
            ValidationError: The address is none, or the lifetime is not positive.
        """
        return self._make(clean_email(email, "user"), role, lifetime)

    def _make(self, email: str, role: Role, lifetime: timedelta | None) -> str:
        key = _PREFIX + secrets.token_urlsafe(32)
        self._add(key, email, role, lifetime)
        return key

    def first_admin_key(self, email: str, announce: Callable[[str], None]) -> str | None:
        """Make an admin key if no key holds, else return None.

        Args:
            email: Whose key it is.
            announce: Shows it to a person; if that fails the key is withdrawn again, so that the
                next start makes another one.
        """
        key = _PREFIX + secrets.token_urlsafe(32)
        email = clean_email(email, "user")
        record = self._add(key, email, Role.ADMIN, None, only_first=True)
        if record is None:
            return None
        try:
            announce(key)
        except BaseException:
            self._store.revoke(record.id, self._now())
            raise
        return key

    def install(self, key: str, email: str) -> None:
        """Make sure that a given admin key holds; a second call changes nothing."""
        if not any(record.digest == _digest(key) for record in self._found(key)):
            self._add(key, clean_email(email, "user"), Role.ADMIN, None)

    def _add(
        self,
        key: str,
        email: str,
        role: Role,
        lifetime: timedelta | None,
        *,
        only_first: bool = False,
    ) -> KeyRecord | None:
        if lifetime is not None and lifetime <= timedelta():
            raise ValidationError("a key must be valid for some time.", field="expires")
        return self._store.create(
            email=email,
            role=role,
            prefix=key[len(_PREFIX) :][:_PREFIX_LENGTH],
            digest=_digest(key),
            expires_at=None if lifetime is None else self._now() + lifetime,
            only_first=only_first,
        )

    def _found(self, key: str) -> Sequence[KeyRecord]:
        return self._find(key[len(_PREFIX) :][:_PREFIX_LENGTH])

    def authenticate(self, key: str | None) -> Principal:
        """Return who has this key.

        Raises:
            AuthenticationError: There is no such key, it has expired, or it was withdrawn. The
                text does not say which.
        """
        if not key or not _KEY.fullmatch(key):
            raise AuthenticationError(
                "no key, or not one of ours",
                user_message="Send a valid key in the Authorization header, after the word Bearer.",
            )
        digest, now = _digest(key), self._now()
        holds: KeyRecord | None = None
        for record in self._found(key):
            if hmac.compare_digest(record.digest, digest):
                holds = record
        if (
            holds is None
            or holds.revoked_at is not None
            or (holds.expires_at is not None and holds.expires_at <= now)
        ):
            raise AuthenticationError(
                "the key is unknown, withdrawn or expired",
                user_message="This key is not valid, or not any more.",
            )
        return Principal(user_id=holds.user_id, key_id=holds.id, role=holds.role)

    def list(self) -> Sequence[KeyRecord]:
        """All keys, the newest last."""
        return self._store.list()

    def user_id(self, email: str) -> int:
        """The id of a user, made if the address is new.

        Raises:
            ValidationError: The address is none.
        """
        return self._store.user_id(clean_email(email, "user"))

    def revoke(self, key_id: int) -> None:
        """Withdraw a key.

        Raises:
            NotFoundError: No valid key has this id.
        """
        if not self._store.revoke(key_id, self._now()):
            raise NotFoundError(f"no valid key has the id {key_id}", resource_type="key")

    def rotate(self, key_id: int) -> str:
        """Make a key like another one and withdraw that.

        Raises:
            NotFoundError: No valid key has this id.
        """
        old = next((r for r in self._store.list() if r.id == key_id), None)
        if old is None:
            raise NotFoundError(f"no key has the id {key_id}", resource_type="key")
        self.revoke(key_id)
        left = None if old.expires_at is None else old.expires_at - old.created_at
        # The address as it is: it may be one from before there was one form of them.
        return self._make(old.email, old.role, left)
