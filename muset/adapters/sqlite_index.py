"""The index over passages in SQLite's FTS5, which stems and counts by itself."""

import json
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
)
from muset.models import Passage
from muset.ports import Retrieval

__all__ = ["SqliteIndex"]

_BATCH = 1_000

#: One statement with one value in and one row out, since for each statement and each row the native
#: thread that runs it lets go of Python's lock, and waits to have it again.
_STATISTICS = text("""
SELECT passages, characters, (
    SELECT json_group_object(term, doc) FROM passages_vocab
    WHERE term IN (SELECT value FROM json_each(:terms))
) AS frequencies
FROM corpus
""")
_CANDIDATES = """
SELECT p.document_id, d.title, p.start, p."end", p.text
FROM (SELECT rowid AS id FROM passages_fts WHERE passages_fts MATCH :query {only}
      ORDER BY rank LIMIT :limit) AS found
JOIN passages AS p ON p.id = found.id JOIN documents AS d ON d.id = p.document_id
"""
#: The plus keeps SQLite from asking the full-text index once for each of these rows.
_ONLY = "AND +rowid IN (SELECT id FROM passages WHERE document_id IN :document_ids)"
_IN_ALL = text(_CANDIDATES.format(only=""))
_IN_SOME = text(_CANDIDATES.format(only=_ONLY)).bindparams(
    bindparam("document_ids", expanding=True)
)


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
    row = connection.execute(_STATISTICS, {"terms": json.dumps(list(terms))}).one()
    return Statistics(row.passages, row.characters, json.loads(row.frequencies))


def _candidates(connection: Connection, plan: Plan) -> Sequence[Any]:
    values: dict[str, object] = {
        # The words, which FTS5 stems, as a stem has another stem at times; in quotes, so that
        # nothing in them is an operator.
        "query": " OR ".join(f'"{word}"' for word in plan.terms.values()),
        "limit": plan.limit,
    }
    if plan.document_ids is None:
        return connection.execute(_IN_ALL, values).all()
    values["document_ids"] = list(plan.document_ids)
    return connection.execute(_IN_SOME, values).all()
