"""Users: who may see and change whom, and what is read from the cache."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flask_muset.errors import (
    AuthorizationError,
    CacheUnavailable,
    ConflictError,
    MusetError,
    NotFoundError,
    ValidationError,
)
from muset.ports import Cache, Principal, User, UserStore
from muset.services.documents import MAX_ID
from muset.services.fields import clean_email, clean_name

__all__ = ["UserService", "etag_of"]

_log = logging.getLogger(__name__)

#: Seconds for which a user is read from the cache, and from there alone while the database is away;
#: and for which it is remembered that there is none.
_FRESH_S, _STALE_S, _MISSING_S = 300.0, 3600.0, 30.0

#: Whether a tag is one that the caller has seen.
IsExpected = Callable[[str], bool]


def etag_of(user: User) -> str:
    """Tells the states of a user apart; ids are never given again."""
    return f"{user.id}-{user.version}"


def _key(user_id: int) -> str:
    return f"user:{user_id}:record"


def _not_found(user_id: int) -> NotFoundError:
    return NotFoundError(
        f"no user has the id {user_id}", resource_type="user", details={"user_id": user_id}
    )


def _changed(user_id: int) -> MusetError:
    error = ConflictError(
        f"user {user_id} is not as the caller has seen it",
        user_message="The user has changed meanwhile; read it again.",
    )
    error.status = 412
    return error


class UserService:
    """Users of one deployment: members see themselves and change their name, admins do the rest.

    Args:
        store: Where they are kept.
        cache: Where those are that were read lately.
    """

    def __init__(self, store: UserStore, cache: Cache) -> None:
        self._store = store
        self._cache = cache

    def add(self, who: Principal, email: str, name: str) -> User:
        """Store a user; keys for it are made with `muset keys create`.

        Raises:
            AuthorizationError: The caller is no admin.
            ConflictError: The address is another user's.
            ValidationError: The address or the name is not allowed.
        """
        _check_admin(who, "add users")
        user = self._store.add(email=clean_email(email, "email"), name=clean_name(name, "name"))
        if user is None:
            raise ConflictError(
                "another user has the address",
                user_message="Another user has this e-mail address.",
            )
        # Somebody may have asked for it before it was there.
        self._cache.delete(_key(user.id))
        return user

    def list(self, who: Principal, limit: int, after_id: int) -> tuple[Sequence[User], int | None]:
        """A page of users, and the id to go on after, None at the end.

        Raises:
            AuthorizationError: The caller is no admin.
        """
        _check_admin(who, "list users")
        found = self._store.list(limit=limit + 1, after_id=after_id)
        return found[:limit], (found[limit - 1].id if len(found) > limit else None)

    def get(self, who: Principal, user_id: int) -> User:
        """One user.

        Raises:
            AuthorizationError: It is somebody else, whether there is one or not.
            NotFoundError: There is none.
        """
        _check_access(who, user_id)
        if not 0 < user_id <= MAX_ID:
            raise _not_found(user_id)
        return self._cache.cache_aside(
            _key(user_id),
            lambda: self._read(user_id),
            _FRESH_S,
            stale_if_error=_STALE_S,
            negative_expire=_MISSING_S,
        )

    def change(
        self,
        who: Principal,
        user_id: int,
        *,
        is_expected: IsExpected,
        email: str | None = None,
        name: str | None = None,
    ) -> User:
        """Give a user another address or name, and return it as it is then.

        Args:
            who: Changes it.
            user_id: Which.
            is_expected: Whether the caller knows the state with this tag. In any other state, or if
                somebody else is faster, nothing is changed.
            email: None leaves it.
            name: None leaves it.

        Raises:
            AuthorizationError: It is somebody else, or a member changes an address.
            ConflictError: The address is another user's; with status 412, the user is not as
                expected.
            NotFoundError: There is none.
            ValidationError: The address or the name is not allowed, or there is neither.
        """
        _check_access(who, user_id)
        if email is not None:
            _check_admin(who, "change an address")
        changes = _cleaned(email, name)
        before = self._read(user_id)
        if not is_expected(etag_of(before)):
            raise _changed(user_id)
        after = replace(before, version=before.version + 1, **changes)
        # False is fine: the user is stored, and the cache forgets it before it is read again.
        self._cache.write_through(_key(user_id), after, self._write, _FRESH_S)
        return after

    def _write(self, user: User) -> None:
        if not self._store.replace(user):
            raise _changed(user.id)

    def delete(
        self, who: Principal, user_id: int, *, is_expected: IsExpected | None = None
    ) -> None:
        """Forget a user: address, name, keys and preferences. Documents and usage stay.

        Args:
            who: Deletes it.
            user_id: Which.
            is_expected: As for `change`; None for whatever state.

        Raises:
            AuthorizationError: The caller is no admin.
            ConflictError: It is the caller itself; with status 412, the user is not as expected.
            NotFoundError: There is none.
        """
        _check_admin(who, "delete users")
        if user_id == who.user_id:
            raise ConflictError(
                f"user {user_id} would withdraw the key that it uses",
                user_message="You cannot delete yourself; use the key of another admin.",
            )
        before = self._read(user_id)
        if is_expected is not None and not is_expected(etag_of(before)):
            raise _changed(user_id)
        # Before as well: whoever dies in between leaves nothing behind that could be read.
        forgotten = self._forget(user_id)
        try:
            version = None if is_expected is None else before.version
            if not self._store.delete(user_id, version=version):
                raise _not_found(user_id) if is_expected is None else _changed(user_id)
        finally:
            forgotten += self._forget(user_id)
        _log.info("user %d is deleted, and %d keys of the cache", user_id, forgotten)

    def _forget(self, user_id: int) -> int:
        """What the cache has of a user; how many keys, as far as that can be told."""
        count = 0
        for pattern, key in (
            (f"user:{user_id}:*", _key(user_id)),
            (f"preferences:{user_id}", f"preferences:{user_id}"),
        ):
            try:
                count += self._cache.delete_pattern(pattern)
            except CacheUnavailable:
                # Nobody can count them; the key is forgotten before it is read again.
                self._cache.delete(key)
        return count

    def _read(self, user_id: int) -> User:
        user = self._store.get(user_id) if 0 < user_id <= MAX_ID else None
        if user is None:
            raise _not_found(user_id)
        return user


def _cleaned(email: str | None, name: str | None) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if email is not None:
        changes["email"] = clean_email(email, "email")
    if name is not None:
        changes["name"] = clean_name(name, "name")
    if not changes:
        raise ValidationError("give a name or an email to change")
    return changes


def _check_admin(who: Principal, what: str) -> None:
    if not who.is_admin:
        raise AuthorizationError(
            f"user {who.user_id} may not {what}", user_message=f"Only an admin may {what}."
        )


def _check_access(who: Principal, user_id: int) -> None:
    if not who.is_admin and who.user_id != user_id:
        raise AuthorizationError(
            f"user {who.user_id} may not see user {user_id}",
            user_message="Only the user or an admin may see and change this.",
        )
