"""What was used, added up for those who may see it."""

import base64
import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from typing import Any, Protocol

from flask_muset.errors import AuthorizationError, CacheUnavailable, ValidationError
from muset.ports import Cache, Principal, UsageGroup, UsageSum, UsageSums
from muset.services.documents import MAX_ID

__all__ = ["UsageReport"]

_MAX_DAYS = 366
_DEFAULT_DAYS = 30
#: Seconds to wait for what was accepted before and is not in the ledger yet, and between two looks.
_SETTLE_S, _LOOK_S = 2.0, 0.02
#: What the place of a group consists of.
_PLACES: dict[UsageGroup, tuple[type, ...]] = {
    UsageGroup.REQUEST: (str, str),
    UsageGroup.USER: (int,),
    UsageGroup.MODEL: (str, str),
    UsageGroup.DAY: (str,),
}


class _Clock(Protocol):
    now: Callable[[], float]
    sleep: Callable[[float], None]
    wall: Callable[[], float]


class UsageReport:
    """Sums of the ledger: members see their own, admins see all.

    Args:
        sums: Adds them up.
        cache: Accepts entries before the ledger has them.
        clock: Time, and waiting.
    """

    def __init__(self, sums: UsageSums, cache: Cache, clock: _Clock) -> None:
        self._sums = sums
        self._cache = cache
        self._clock = clock

    def list(
        self,
        who: Principal,
        group_by: UsageGroup,
        *,
        first: date | None = None,
        last: date | None = None,
        user_id: int | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[Sequence[UsageSum], str | None]:
        """A page of sums, and the cursor to go on with, None at the end.

        All that was accepted before the call is in them.

        Args:
            who: Wants to see them.
            group_by: What makes a group.
            first: Day in UTC; None for 29 days before the last.
            last: Day in UTC, which belongs to them; None for today.
            user_id: Whose usage; None for all that the caller may see.
            limit: How many at most.
            cursor: Of the page before.

        Raises:
            AuthorizationError: It is somebody else's.
            CacheUnavailable: Something that was accepted is not in the ledger yet.
            ValidationError: The days are too many or the wrong way round, or it is no cursor.
        """
        if not who.is_admin:
            user_id = _own(who, user_id)
        first, last = self._days(first, last)
        after = None if cursor is None else _place_of(cursor, _PLACES[group_by])
        self._settle()
        found = self._sums.sums(
            group_by,
            first_day=first.isoformat(),
            last_day=last.isoformat(),
            user_id=user_id,
            after=after,
            limit=limit + 1,
        )
        is_end = len(found) <= limit
        return found[:limit], (None if is_end else _cursor_of(found[limit - 1].after))

    def _days(self, first: date | None, last: date | None) -> tuple[date, date]:
        if last is None:
            last = datetime.fromtimestamp(self._clock.wall(), UTC).date()
        if first is None:
            first = date.fromordinal(max(1, last.toordinal() - _DEFAULT_DAYS + 1))
        if first > last:
            raise ValidationError(f"{first} is after the last day, {last}", field="from")
        if (last - first).days >= _MAX_DAYS:
            raise ValidationError(
                f"{first} to {last} are more than {_MAX_DAYS} days; ask for them in parts",
                field="from",
            )
        return first, last

    def _settle(self) -> None:
        """Wait until all that was accepted before this call is in the ledger."""
        began = self._clock.now()
        while True:
            waited = self._clock.now() - began
            state = self._cache.pending()
            if not state["pending"] or state["oldest_s"] < waited:
                return
            if waited >= _SETTLE_S:
                raise CacheUnavailable(
                    f"{state['pending']} writes wait, the oldest for {state['oldest_s']:.1f} s",
                    user_message="Some usage is not counted yet; try again in a moment.",
                )
            self._clock.sleep(_LOOK_S)


def _own(who: Principal, user_id: int | None) -> int:
    if user_id is not None and user_id != who.user_id:
        raise AuthorizationError(
            f"user {who.user_id} may not see the usage of user {user_id}",
            user_message="Only the user or an admin may see this usage.",
        )
    return who.user_id


def _cursor_of(place: tuple[int | str, ...]) -> str:
    return (
        base64.urlsafe_b64encode(json.dumps(place, ensure_ascii=False).encode())
        .decode()
        .rstrip("=")
    )


def _place_of(cursor: str, kinds: tuple[type, ...]) -> tuple[int | str, ...]:
    """Where a page begins; a cursor is anybody's text until it is checked.

    Raises:
        ValidationError: It is none, or of another grouping.
    """
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, RecursionError):
        place = None
    is_one = (
        isinstance(place, list)
        and [type(part) for part in place] == list(kinds)
        and all(map(_is_storable, place))
    )
    if not is_one:
        raise ValidationError(
            "is no cursor of this list; take next_cursor of the page before, and leave the rest "
            "of the query as it was",
            field="cursor",
        )
    return tuple(place)


def _is_storable(part: Any) -> bool:
    """Whether every database can compare with it."""
    if isinstance(part, int):
        return abs(part) <= MAX_ID
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in part)
