"""Writes that were accepted and then given up, until an operator says what becomes of them."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from flask_muset.errors import NotFoundError, ValidationError
from muset.ports import Cache

__all__ = ["DeadLetterService"]


class DeadLetterService:
    """Lists them, has them written again, or forgets them.

    Args:
        cache: Whose writes they are.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def list(self, limit: int, after: str = "") -> tuple[Sequence[Mapping[str, Any]], str | None]:
        """A page of them, the first one first, and the id to go on after, None at the end.

        Args:
            limit: How many at most.
            after: The id of the last one of the page before.

        Raises:
            ValidationError: No dead letter can have the id `after`.
            CacheUnavailable: The journal is away.
        """
        try:
            found = self._cache.dead_letters(limit + 1, after=after)
        except ValueError:
            raise ValidationError("is no id of a dead letter", field="cursor") from None
        items = [_with_dates(letter) for letter in found[:limit]]
        return items, (items[-1]["id"] if len(found) > limit else None)

    def settle(self, letter_id: str, action: Literal["requeue", "drop"]) -> None:
        """Have one written again, at its old place in the order, or forget it.

        From then on its key is read as the journal and the source have it.

        Raises:
            NotFoundError: There is none with this id.
            ConflictError: A newer write has superseded it, so it can only be dropped.
            CacheUnavailable: The journal is away.
        """
        do = self._cache.requeue if action == "requeue" else self._cache.drop
        if not do(letter_id):
            raise NotFoundError(
                f"no dead letter has the id {letter_id!r}",
                resource_type="dead letter",
                details={"id": letter_id},
            )


def _with_dates(letter: Mapping[str, Any]) -> dict[str, Any]:
    dates = {
        name: datetime.fromtimestamp(letter[name], UTC).isoformat()
        for name in ("first_failed", "last_failed")
    }
    return {**letter, **dates}
