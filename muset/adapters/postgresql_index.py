"""The index over passages in PostgreSQL.

The terms are ours, the same as everywhere, in a column with a GIN index; PostgreSQL's own parser
would make others of hyphens, paths and numbers. How rare each is stands in a table of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy import Connection, text

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
from muset.ports import Retrieval
from muset.services.text import terms

__all__ = ["PostgresqlIndex"]

_BATCH = 1_000
#: PostgreSQL refuses terms of more than 2,046 bytes; a character has four at most.
_MAX_TERM = 255
#: Terms by which candidates are ranked; the more common ones of a long question change little.
_MAX_RANKED = 16

_ADD = text("""
INSERT INTO passages (document_id, start, "end", text, terms)
SELECT :document_id, new.start, new.stop, new.text, CAST(new.terms AS tsvector)
FROM unnest(CAST(:starts AS int[]), CAST(:ends AS int[]), CAST(:texts AS text[]),
            CAST(:terms AS text[])) WITH ORDINALITY AS new (start, stop, text, terms, number)
ORDER BY new.number
""")
#: Whoever does this holds the corpus, so nobody else does.
_COUNT = """
INSERT INTO terms AS known (term, passages)
SELECT found.lexeme, {sign}count(*) FROM passages, unnest(passages.terms) AS found
WHERE passages.document_id = :document_id GROUP BY found.lexeme
ON CONFLICT (term) DO UPDATE SET passages = known.passages + excluded.passages
"""
_COUNT_UP, _COUNT_DOWN = text(_COUNT.format(sign="")), text(_COUNT.format(sign="-"))
_FORGET = text("""
DELETE FROM terms WHERE passages <= 0 AND term IN (
  SELECT found.lexeme FROM passages, unnest(passages.terms) AS found
  WHERE passages.document_id = :document_id)
""")
_FREQUENCIES = text("SELECT term, passages FROM terms WHERE term = ANY(CAST(:terms AS text[]))")
_CANDIDATES = """
SELECT p.document_id, d.title, p.start, p."end", p.text
FROM (SELECT id FROM passages WHERE terms @@ CAST(:query AS tsquery) {only}
      ORDER BY {rank} DESC, id LIMIT :limit) AS found
JOIN passages AS p ON p.id = found.id JOIN documents AS d ON d.id = p.document_id
"""
_ONLY = "AND document_id = ANY(CAST(:document_ids AS bigint[]))"


class PostgresqlIndex:
    """Implements `muset.adapters.passages.Index`."""

    def prepare(self, text: str) -> Sequence[NewPassage]:
        """Cut a text into passages and those into terms; only computes."""
        return [replace(p, vector=_vector(terms(p.text))) for p in cut(text)]

    def add(self, connection: Connection, document_id: int, passages: Sequence[NewPassage]) -> None:
        """Store, index and count the passages of a new document."""
        for first in range(0, len(passages), _BATCH):
            batch = passages[first : first + _BATCH]
            values = {
                "document_id": document_id,
                "starts": [p.start for p in batch],
                "ends": [p.end for p in batch],
                "texts": [p.text for p in batch],
                "terms": [p.vector for p in batch],
            }
            connection.execute(_ADD, values)
        count_in(connection, passages)
        connection.execute(_COUNT_UP, {"document_id": document_id})

    def remove(self, connection: Connection, document_id: int) -> None:
        """Count the passages of a document out, which are deleted after this."""
        count_out(connection, document_id)
        connection.execute(_COUNT_DOWN, {"document_id": document_id})
        connection.execute(_FORGET, {"document_id": document_id})

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


def _quoted(term: str) -> str:
    """A term as tsvector and tsquery read it: nothing in it is an operator."""
    escaped = term[:_MAX_TERM].replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _vector(own: Sequence[str]) -> str:
    """The terms of a passage with their places, of which PostgreSQL counts how many there are."""
    places: dict[str, list[str]] = {}
    for place, term in enumerate(own, 1):
        places.setdefault(_quoted(term), []).append(str(place))
    return " ".join(f"{term}:{','.join(at)}" for term, at in places.items())


def _look_up(connection: Connection, asked: Sequence[str]) -> Statistics:
    short = {term[:_MAX_TERM]: term for term in asked}
    rows = connection.execute(_FREQUENCIES, {"terms": list(short)})
    return statistics(connection, {short[row.term]: row.passages for row in rows})


def _candidates(connection: Connection, plan: Plan) -> Sequence[Any]:
    values: dict[str, object] = dict(_weighted(plan))
    # `ts_rank` of one term grows with its number and is bounded, as in BM25; what PostgreSQL lacks
    # is how much each term counts.
    ranks = [
        f":weight{n} * ts_rank(terms, CAST(:term{n} AS tsquery))" for n in range(len(values) // 2)
    ]
    values |= {"query": " | ".join(_quoted(term) for term in plan.terms), "limit": plan.limit}
    if plan.document_ids is not None:
        values["document_ids"] = list(plan.document_ids)
    only = "" if plan.document_ids is None else _ONLY
    statement = _CANDIDATES.format(only=only, rank=" + ".join(ranks) or "id")
    return connection.execute(text(statement), values).all()


def _weighted(plan: Plan) -> Iterator[tuple[str, object]]:
    for number, (term, weight) in zip(range(_MAX_RANKED), plan.weights.items(), strict=False):
        yield f"term{number}", _quoted(term)
        yield f"weight{number}", weight
