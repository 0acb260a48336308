"""What users like: written often, read often, brought to the database behind the answer."""

import json
from collections.abc import Mapping
from typing import Any

from flask_muset.errors import (
    AuthorizationError,
    CacheUnavailable,
    MusetError,
    NotFoundError,
    ValidationError,
)
from muset.ports import Cache, PreferenceStore, Principal, Write
from muset.services.documents import MAX_ID

__all__ = ["MAX_BYTES", "PreferenceService"]

#: Of an object as compact JSON in UTF-8.
MAX_BYTES = 16_384
_MAX_DEPTH = 64
#: Seconds for which preferences are read from the cache, and from there alone while the database is
#: away.
_FRESH_S, _STALE_S = 300.0, 3600.0
_PREFIX = "preferences:"


class PreferenceService:
    """Preferences of users: their own, admins see and change all.

    Args:
        store: Where they get to.
        cache: Where they are read, and accepted before the store has them.
    """

    def __init__(self, store: PreferenceStore, cache: Cache) -> None:
        self._store = store
        self._cache = cache
        # Once: a journal knows it by the name, the cache by its identity.
        declare = cache.writer("users.preferences", patterns=[f"{_PREFIX}*"])
        self._writer = declare(self._write)

    def get(self, who: Principal, user_id: int) -> dict[str, Any]:
        """The preferences of a user, {} without any; what was accepted last is what is read.

        Raises:
            AuthorizationError: They are somebody else's.
            NotFoundError: There is no such user.
        """
        self._check_access(who, user_id)
        return self._cache.cache_aside(
            f"{_PREFIX}{user_id}",
            lambda: self._read(user_id),
            _FRESH_S,
            stale_if_error=_STALE_S,
        )

    def put(self, who: Principal, user_id: int, preferences: Mapping[str, Any]) -> None:
        """Accept the preferences of a user in place of those that there were.

        Raises:
            AuthorizationError: They are somebody else's.
            NotFoundError: There is no such user.
            ValidationError: They are not allowed; 413 if they are too large.
            CacheUnavailable: They cannot be accepted now; nothing has changed.
        """
        self._check_access(who, user_id)
        _check(preferences)
        if who.user_id != user_id:
            self._read(user_id)
        if not self._cache.write_behind(f"{_PREFIX}{user_id}", preferences, self._writer, _FRESH_S):
            raise CacheUnavailable(
                f"the preferences of user {user_id} were not accepted: the journal is away",
                user_message="Preferences cannot be stored now; nothing has changed.",
            )

    def _check_access(self, who: Principal, user_id: int) -> None:
        if not who.is_admin and who.user_id != user_id:
            raise AuthorizationError(
                f"user {who.user_id} may not see the preferences of user {user_id}",
                user_message="Only the user or an admin may see and change these preferences.",
            )

    def _read(self, user_id: int) -> dict[str, Any]:
        found = self._store.get(user_id) if user_id <= MAX_ID else None
        if found is None:
            raise NotFoundError(
                f"no user has the id {user_id}",
                resource_type="user",
                details={"user_id": user_id},
            )
        return found

    def _write(self, preferences: Mapping[str, Any] | None, context: Write) -> None:
        user_id = int(context.key.removeprefix(_PREFIX))
        if context.deleted or preferences is None:
            self._store.delete(user_id, context.seq)
        else:
            self._store.put(user_id, preferences, context.seq)


def _check(preferences: Mapping[str, Any]) -> None:
    """Refuse what could not be kept as it is."""
    if _is_deep(preferences):
        raise ValidationError(f"more than {_MAX_DEPTH} levels deep")
    try:
        size = len(json.dumps(preferences, ensure_ascii=False, separators=(",", ":")).encode())
    except UnicodeEncodeError:
        raise ValidationError("has half of a surrogate pair") from None
    if size > MAX_BYTES:
        raise _too_large()


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(item, Mapping | list)
        ]
    return bool(level)


def _too_large() -> MusetError:
    error = ValidationError(
        f"more than {MAX_BYTES} bytes",
        user_message=f"Preferences may have at most {MAX_BYTES} bytes as compact JSON.",
        details={"max_bytes": MAX_BYTES},
    )
    error.status = 413
    return error
