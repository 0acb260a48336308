"""Search in two steps, the same on both databases.

The database finds candidates by the rarest terms of a question, whose lists are short, and ranks
them roughly; then BM25 is computed here, over all terms, for the best of them. A term that half of
all passages have says next to nothing, and costs as much as all others together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, func, select, update

from muset.models import Corpus, Passage
from muset.ports import Retrieval, ScoredPassage
from muset.services.text import question_terms, split_passages, term_counter, terms

__all__ = [
    "Index",
    "NewPassage",
    "Plan",
    "Statistics",
    "count_in",
    "count_out",
    "cut",
    "find",
    "statistics",
]

#: Words of one question; more make it slower and not clearer.
_MAX_WORDS = 64
#: Passages that BM25 is computed for.
_POOL = 48
#: Entries of lists that are read for one question, unless too few passages are found.
_MAX_ENTRIES = 2_000
#: Of BM25, the usual values (Robertson and Zaragoza, 2009).
_K1, _B = 1.2, 0.75
_SIZE = select(Corpus.passages, Corpus.characters)


@dataclass(frozen=True, slots=True)
class NewPassage:
    """A passage that is to be stored; offsets in code points.

    Attributes:
        vector: Its terms as the database takes them; None where that makes them itself.
    """

    start: int
    end: int
    text: str
    vector: str | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What BM25 needs to know of all passages.

    Attributes:
        passages: How many there are.
        characters: Of all of them together.
        frequencies: For terms that were asked for, in how many passages each is.
    """

    passages: int
    characters: int
    frequencies: Mapping[str, int]

    @property
    def average_length(self) -> float:
        """Of a passage, in characters."""
        return self.characters / max(1, self.passages)

    def frequency(self, term: str) -> int:
        """In how many passages it is."""
        return self.frequencies.get(term, 0)

    def weight(self, term: str) -> float:
        """Inverse document frequency: ln(1 + (N - n + 0.5) / (n + 0.5))."""
        n = self.frequency(term)
        return math.log(1 + (self.passages - n + 0.5) / (n + 0.5))


@dataclass(frozen=True, slots=True)
class Plan:
    """How candidates are found.

    Attributes:
        terms: A candidate has one of these; each with the word of the question that it is from.
        weights: Of all terms of the question that some passage has, the rarest first.
        limit: Candidates at most, the most promising ones.
        document_ids: Only in these documents; None for all.
    """

    terms: Mapping[str, str]
    weights: Mapping[str, float]
    limit: int
    document_ids: Sequence[int] | None


class Index(Protocol):
    """The index over passages, in transactions of the caller's."""

    def prepare(self, text: str) -> Sequence[NewPassage]:
        """Cut a text into passages; only computes."""
        ...

    def add(self, connection: Connection, document_id: int, passages: Sequence[NewPassage]) -> None:
        """Store, index and count the passages of a new document."""
        ...

    def remove(self, connection: Connection, document_id: int) -> None:
        """Count the passages of a document out, which are deleted after this."""
        ...

    def search(
        self, connection: Connection, question: str, *, k: int, document_ids: Sequence[int] | None
    ) -> Retrieval:
        """Find the passages that have most of the question's rarest terms.

        Args:
            connection: In a transaction of the caller's.
            question: Any text; nothing in it is an operator.
            k: Passages at most.
            document_ids: Search these alone; None searches all.
        """
        ...


def cut(text: str) -> list[NewPassage]:
    """The passages of a text, without their terms."""
    return [NewPassage(s.start, s.end, text[s.start : s.end]) for s in split_passages(text)]


def count_in(connection: Connection, passages: Sequence[NewPassage]) -> None:
    """Count what a new document brings; see `_change`."""
    _change(connection, len(passages), sum(p.end - p.start for p in passages))


def count_out(connection: Connection, document_id: int) -> None:
    """Count what goes with a document, while it is still there; see `_change`."""
    size = select(func.count(), func.coalesce(func.sum(Passage.end - Passage.start), 0))
    passages, characters = connection.execute(size.where(Passage.document_id == document_id)).one()
    _change(connection, -passages, -characters)


def _change(connection: Connection, passages: int, characters: int) -> None:
    """Give the corpus its new size, and a version that is new for ever.

    Whoever does this keeps all others who want to waiting until its transaction ends, so it comes
    late, and before anything else that they share.
    """
    connection.execute(
        update(Corpus).values(
            version=Corpus.version + 1,
            passages=Corpus.passages + passages,
            characters=Corpus.characters + characters,
        )
    )


def statistics(connection: Connection, frequencies: Mapping[str, int]) -> Statistics:
    """Of the corpus as this transaction sees it."""
    row = connection.execute(_SIZE).one()
    return Statistics(row.passages, row.characters, frequencies)


def find(
    question: str,
    *,
    k: int,
    document_ids: Sequence[int] | None,
    look_up: Callable[[Sequence[str]], Statistics],
    candidates: Callable[[Plan], Sequence[Any]],
) -> Retrieval:
    """Search.

    Args:
        question: Any text.
        k: Passages at most.
        document_ids: Search these alone; None searches all.
        look_up: Gives the statistics with the frequencies of some terms.
        candidates: Gives rows of document_id, title, start, end and text.
    """
    words: dict[str, str] = {}
    for word in question_terms(question)[:_MAX_WORDS]:
        for term in terms(word):
            words.setdefault(term, word)
    known = look_up(list(words))
    weights = {term: known.weight(term) for term in words}
    if not words or (document_ids is not None and not document_ids):
        return Retrieval((), weights)
    rarest = sorted(words, key=known.frequency)
    limit = max(_POOL, 4 * k)

    def found(chosen: Sequence[str]) -> Sequence[Any]:
        return candidates(
            Plan(
                terms={term: words[term] for term in chosen},
                weights={term: weights[term] for term in rarest if known.frequency(term)},
                limit=limit,
                document_ids=document_ids,
            )
        )

    chosen = _choose(rarest, known, k)
    rows = found(chosen)
    if len(rows) < k and len(chosen) < len(rarest):
        rows = found(rarest)
    return Retrieval(_ranked(rows, weights, known.average_length)[:k], weights)


def _choose(rarest: Sequence[str], known: Statistics, enough: int) -> Sequence[str]:
    """As many of the rarest terms as it takes to find enough, and more while that is cheap."""
    entries = 0
    for number, term in enumerate(rarest):
        before, entries = entries, entries + known.frequency(term)
        if before >= enough and entries > _MAX_ENTRIES:
            return rarest[:number]
    return rarest


def _ranked(
    rows: Sequence[Any], weights: Mapping[str, float], average_length: float
) -> tuple[ScoredPassage, ...]:
    count = term_counter(weights)
    found = [
        ScoredPassage(
            row.document_id,
            row.title,
            row.start,
            row.end,
            row.text,
            _score(count(row.text), weights, len(row.text) / average_length),
        )
        for row in rows
    ]
    found.sort(key=lambda passage: (-passage.score, passage.document_id, passage.start))
    return tuple(found)


def _score(times: Mapping[str, int], weights: Mapping[str, float], length: float) -> float:
    """BM25 of a passage, of which is known how often each term is in it.

    Args:
        times: Of the terms that are in it.
        weights: Of all terms.
        length: Of the passage, as a multiple of the average.
    """
    damping = _K1 * (1 - _B + _B * length)
    return sum(weights[term] * n * (_K1 + 1) / (n + damping) for term, n in times.items())
