"""The index over passages: SQLite's FTS5, ranked by BM25."""

import math
from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, insert, text

from muset.models import Passage
from muset.ports import Retrieval, ScoredPassage
from muset.services.text import question_terms, split_passages, terms

__all__ = ["index_passages", "search_passages"]

#: Terms of one question; more make it slower and not clearer.
_MAX_TERMS = 64
_BATCH = 1_000

_SEARCH = """
SELECT p.document_id, d.title, p.start, p."end", p.text, -bm25(passages_fts) AS score
FROM passages_fts
JOIN passages AS p ON p.id = passages_fts.rowid
JOIN documents AS d ON d.id = p.document_id
WHERE passages_fts MATCH :query {only}
ORDER BY bm25(passages_fts), p.id LIMIT :k
"""


def index_passages(connection: Connection, document_id: int, document: str) -> int:
    """Store the passages of a document and return their number.

    Triggers of the table keep the full-text index in step, in the same transaction.
    """
    spans = split_passages(document)
    for first in range(0, len(spans), _BATCH):
        connection.execute(
            insert(Passage),
            [
                {
                    "document_id": document_id,
                    "start": span.start,
                    "end": span.end,
                    "text": document[span.start : span.end],
                }
                for span in spans[first : first + _BATCH]
            ],
        )
    return len(spans)


def search_passages(
    connection: Connection, question: str, *, k: int, document_ids: Sequence[int] | None
) -> Retrieval:
    """Find the passages that have most of the question's rarest terms.

    Args:
        connection: In a transaction of the caller's.
        question: Any text; each word is quoted, so that nothing in it is an operator.
        k: Passages at most.
        document_ids: Search these alone; None searches all.
    """
    words = question_terms(question)[:_MAX_TERMS]
    weights = _weights(connection, [stem for word in words for stem in terms(word)])
    if not words or (document_ids is not None and not document_ids):
        return Retrieval((), weights)
    only = "" if document_ids is None else "AND p.document_id IN :document_ids"
    statement = text(_SEARCH.format(only=only))
    values: dict[str, object] = {"query": " OR ".join(f'"{word}"' for word in words), "k": k}
    if document_ids is not None:
        statement = statement.bindparams(bindparam("document_ids", expanding=True))
        values["document_ids"] = list(document_ids)
    rows = connection.execute(statement, values)
    return Retrieval(tuple(ScoredPassage(*row) for row in rows), weights)


def _weights(connection: Connection, stems: Sequence[str]) -> dict[str, float]:
    """Inverse document frequencies: ln(1 + (N - n + 0.5) / (n + 0.5)), as BM25 has them."""
    total = connection.execute(text("SELECT count(*) FROM passages")).scalar_one()
    statement = text("SELECT term, doc FROM passages_vocab WHERE term IN :stems").bindparams(
        bindparam("stems", expanding=True)
    )
    known = {row.term: row.doc for row in connection.execute(statement, {"stems": list(stems)})}
    return {
        stem: math.log(1 + (total - known.get(stem, 0) + 0.5) / (known.get(stem, 0) + 0.5))
        for stem in stems
    }
