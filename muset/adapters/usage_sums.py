"""The ledger, added up in the database."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, select, tuple_

from muset.adapters.database import Database
from muset.models import Usage
from muset.ports import UsageGroup, UsageSum

__all__ = ["UsageSumStore"]

#: What makes a group, in the order of the list; then what all entries of a group agree in.
_GROUPS: dict[UsageGroup, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    UsageGroup.REQUEST: (
        (Usage.day, Usage.id),
        (Usage.user_id, Usage.model, Usage.provider, Usage.day, Usage.status),
    ),
    UsageGroup.USER: ((Usage.user_id,), (Usage.user_id,)),
    UsageGroup.MODEL: ((Usage.model, Usage.provider), (Usage.model, Usage.provider)),
    UsageGroup.DAY: ((Usage.day,), (Usage.day,)),
}
_SHARED = ("user_id", "model", "provider", "day", "status")
_SUMS = (
    func.sum(Usage.requests),
    func.sum(Usage.input_tokens),
    func.sum(Usage.output_tokens),
    func.max(case((Usage.estimated, 1), else_=0)),
    func.sum(Usage.cost),
)


class UsageSumStore:
    """Implements `muset.ports.UsageSums`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def sums(
        self,
        group_by: UsageGroup,
        *,
        first_day: str,
        last_day: str,
        user_id: int | None,
        after: tuple[int | str, ...] | None,
        limit: int,
    ) -> Sequence[UsageSum]:
        """Sums in the order of what they are grouped by."""
        places, shared = _GROUPS[group_by]
        wanted: list[ColumnElement[bool]] = [Usage.day.between(first_day, last_day)]
        if user_id is not None:
            wanted.append(Usage.user_id == user_id)
        if after is not None:
            wanted.append(tuple_(*places) > tuple_(*after))
        query: Select[Any] = select(*places, *shared, *_SUMS).where(*wanted)
        query = query.group_by(*places, *shared).order_by(*places).limit(limit)
        names = [column.key for column in shared]
        return self._database.read(
            lambda c: [_sum(tuple(row), len(places), names) for row in c.execute(query)]
        )


def _sum(row: tuple[Any, ...], places: int, names: Sequence[str]) -> UsageSum:
    sums = places + len(names)
    shared = dict.fromkeys(_SHARED) | dict(zip(names, row[places:sums], strict=True))
    # PostgreSQL's sums of whole numbers are decimals.
    requests, tokens_in, tokens_out, estimated, cost = map(int, row[sums:])
    return UsageSum(
        after=row[:places],
        **shared,
        requests=requests,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        estimated=bool(estimated),
        cost=cost,
    )
