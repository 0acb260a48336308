"""The index over passages in SQLite's FTS5, which stems and counts by itself."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, bindparam, insert, text

from muset.adapters.passages import (
    NewPassage,
    Plan,
    Statistics,
    count_in,
    count_out,
    cut,
    find,
    statistics,
)
from muset.models import Passage
from muset.ports import Retrieval

__all__ = ["SqliteIndex"]

_BATCH = 1_000

_FREQUENCIES = text("SELECT term, doc FROM passages_vocab WHERE term IN :terms").bindparams(
    bindparam("terms", expanding=True)
)
_CANDIDATES = """
SELECT p.document_id, d.title, p.start, p."end", p.text
FROM (SELECT rowid AS id FROM passages_fts WHERE passages_fts MATCH :query {only}
      ORDER BY rank LIMIT :limit) AS found
JOIN passages AS p ON p.id = found.id JOIN documents AS d ON d.id = p.document_id
"""
#: The plus keeps SQLite from asking the full-text index once for each of these rows.
_ONLY = "AND +rowid IN (SELECT id FROM passages WHERE document_id IN :document_ids)"


class SqliteIndex:
    """Implements `muset.adapters.passages.Index`; triggers keep it in step with the passages."""

    def prepare(self, text: str) -> Sequence[NewPassage]:
        """Cut a text into passages; only computes."""
        return cut(text)

    def add(self, connection: Connection, document_id: int, passages: Sequence[NewPassage]) -> None:
        """Store, index and count the passages of a new document."""
        for first in range(0, len(passages), _BATCH):
            connection.execute(
                insert(Passage),
                [
                    {"document_id": document_id, "start": p.start, "end": p.end, "text": p.text}
                    for p in passages[first : first + _BATCH]
                ],
            )
        count_in(connection, passages)

    def remove(self, connection: Connection, document_id: int) -> None:
        """Count the passages of a document out, which are deleted after this."""
        count_out(connection, document_id)

    def search(
        self, connection: Connection, question: str, *, k: int, document_ids: Sequence[int] | None
    ) -> Retrieval:
        """Find the passages that have most of the question's rarest terms; any text is legal."""
        return find(
            question,
            k=k,
            document_ids=document_ids,
            look_up=partial(_look_up, connection),
            candidates=partial(_candidates, connection),
        )


def _look_up(connection: Connection, terms: Sequence[str]) -> Statistics:
    rows = connection.execute(_FREQUENCIES, {"terms": list(terms)})
    return statistics(connection, {row.term: row.doc for row in rows})


def _candidates(connection: Connection, plan: Plan) -> Sequence[Any]:
    values: dict[str, object] = {
        # The words, which FTS5 stems, as a stem has another stem at times; in quotes, so that
        # nothing in them is an operator.
        "query": " OR ".join(f'"{word}"' for word in plan.terms.values()),
        "limit": plan.limit,
    }
    if plan.document_ids is None:
        return connection.execute(text(_CANDIDATES.format(only="")), values).all()
    values["document_ids"] = list(plan.document_ids)
    statement = text(_CANDIDATES.format(only=_ONLY)).bindparams(
        bindparam("document_ids", expanding=True)
    )
    return connection.execute(statement, values).all()
