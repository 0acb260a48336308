"""Answers without a model: the sentences of the passages that speak most about the question."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from muset.ports import (
    Citation,
    Cited,
    Delta,
    Model,
    ModelQuestion,
    Piece,
    Retrieval,
    ScoredPassage,
    Span,
    Tokens,
)
from muset.providers.config import ProviderConfig
from muset.services.text import split_sentences, terms

__all__ = ["ExtractiveProvider", "from_config"]

#: An answer has at most so many sentences: enough for a fact with its context.
_MAX_SENTENCES = 4
#: Share of the question's weight that one passage must cover; below it the answer is a guess.
_MIN_PASSAGE_COVERAGE = 0.55
#: The same for the best sentence and its neighbours: terms that stand far apart in a passage
#: have met by chance.
_MIN_SENTENCE_COVERAGE = 0.38
#: Later sentences must come near the first one's score, or they only dilute it.
_MIN_SHARE_OF_BEST = 0.6
#: MMR's balance between what fits the question and what repeats a chosen sentence.
_RELEVANCE = 0.75
#: A sentence shorter than this many terms is a heading or a stub.
_MIN_TERMS = 4


@dataclass(frozen=True, slots=True)
class _Candidate:
    passage: ScoredPassage
    span: Span
    text: str
    terms: frozenset[str]
    coverage: float
    score: float


class ExtractiveProvider:
    """Needs no key, no network and no model, and answers the same question always the same way."""

    name = "extractive"
    models: tuple[Model, ...] = (Model("extractive"),)
    has_markers = False

    def stream(self, question: ModelQuestion) -> Iterator[Piece]:
        """Quote at most four sentences, or say nothing where the passages do not cover it.

        `max_tokens` is the number of words: sentences that do not fit are left out.
        """
        yield Tokens(0, 0)
        candidates = _candidates(question.retrieval)
        chosen = _choose(candidates, question.max_tokens)
        if not chosen:
            return
        chosen.sort(key=lambda c: (candidates.index(_best_of(candidates, c)), c.span.start))
        yield Delta(" ".join(" ".join(c.text.split()) for c in chosen))
        for candidate in chosen:
            yield Cited(_citation(candidate))


def _best_of(candidates: Sequence[_Candidate], chosen: _Candidate) -> _Candidate:
    """The best sentence of the same document: documents are told in the order of their best."""
    return next(c for c in candidates if c.passage.document_id == chosen.passage.document_id)


def _share(found: frozenset[str], weights: Mapping[str, float], total: float) -> float:
    return sum(weight for term, weight in weights.items() if term in found) / total


def _candidates(retrieval: Retrieval) -> list[_Candidate]:
    """All sentences of the passages that cover enough, the best first."""
    weights = retrieval.term_weights
    total = sum(weights.values())
    if not retrieval.passages or total <= 0:
        return []
    top = max(passage.score for passage in retrieval.passages) or 1.0
    found: list[_Candidate] = []
    for passage in retrieval.passages:
        covered = _share(frozenset(terms(passage.text)), weights, total)
        if covered >= _MIN_PASSAGE_COVERAGE:
            found += _of_passage(passage, weights, total, covered, passage.score / top)
    found.sort(key=lambda c: (-c.score, c.passage.document_id, c.span.start))
    return found


def _of_passage(
    passage: ScoredPassage,
    weights: Mapping[str, float],
    total: float,
    covered: float,
    relative: float,
) -> list[_Candidate]:
    spans = split_sentences(passage.text)
    sets = [frozenset(terms(passage.text[s.start : s.end])) for s in spans]
    out = []
    for position, (span, own) in enumerate(zip(spans, sets, strict=True)):
        if len(own) < _MIN_TERMS and len(spans) > 1:
            continue
        around = own.union(*sets[max(0, position - 1) : position + 2])
        near = _share(around, weights, total)
        share = _share(own, weights, total)
        # A long sentence covers more by its length alone.
        length = 1.0 + max(0, len(own) - 25) / 100
        score = (share / length) + 0.35 * near + 0.35 * covered + 0.2 * relative
        text = passage.text[span.start : span.end]
        out.append(_Candidate(passage, span, text, own, max(share, 0.9 * near), score))
    return out


def _choose(candidates: Sequence[_Candidate], max_tokens: int | None) -> list[_Candidate]:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998) over the sentences."""
    if not candidates or max(c.coverage for c in candidates) < _MIN_SENTENCE_COVERAGE:
        return []
    floor = candidates[0].score * _MIN_SHARE_OF_BEST
    rest = [c for c in candidates if c.score >= floor]
    left = max_tokens if max_tokens is not None else 1 << 30
    chosen: list[_Candidate] = []
    while rest and len(chosen) < _MAX_SENTENCES:
        best = max(rest, key=lambda c: _RELEVANCE * c.score - (1 - _RELEVANCE) * _same(c, chosen))
        rest.remove(best)
        words = len(best.text.split())
        if words <= left and _same(best, chosen) < 0.8:
            chosen.append(best)
            left -= words
    return chosen


def _same(candidate: _Candidate, chosen: Sequence[_Candidate]) -> float:
    """How much of a sentence is said already: the greatest Jaccard index of their terms."""
    return max(
        (len(candidate.terms & c.terms) / len(candidate.terms | c.terms) for c in chosen),
        default=0.0,
    )


def _citation(candidate: _Candidate) -> Citation:
    passage = candidate.passage
    return Citation(
        document_id=passage.document_id,
        title=passage.title,
        start=passage.start + candidate.span.start,
        end=passage.start + candidate.span.end,
        quote=candidate.text,
    )


def from_config(config: ProviderConfig) -> ExtractiveProvider:
    """Make one where AI_PROVIDERS lists it; it is the last one without that too.

    Raises:
        ValueError: It has another name, or is told what it cannot use.
    """
    if config != ProviderConfig(ExtractiveProvider.name, idle_timeout_s=config.idle_timeout_s):
        raise ValueError(f"a provider of this kind is named {ExtractiveProvider.name!r}, no more")
    return ExtractiveProvider()
