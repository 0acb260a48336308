"""What a model's text refers to: its markers checked against the passages, each with a quote.

A model writes [2] for the second passage that it was sent. Here each marker gets the number of its
quote instead: [n] in a text that went through `Markers` is the nth of its citations.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from muset.ports import Citation, Retrieval, ScoredPassage, Span
from muset.services.text import question_terms, split_sentences, terms

__all__ = ["Markers"]

#: `[2]`, or several as in `[1, 3]`. Four digits are no passage: most likely a year.
_MARKER = re.compile(r"\s{0,8}\[\s{0,2}\d{1,3}(?:\s{0,2}[,;]\s{0,2}\d{1,3}){0,15}\s{0,2}\]")
_NUMBER = re.compile(r"\d{1,3}")
#: The end of a text that may be the beginning of a marker: its bound is what is held back at most.
_BEGINNING = re.compile(r"\s{1,8}$|\s{0,8}\[[\d\s,;]{0,80}$")
#: As much of the text is looked at to find the sentence that bears a marker.
_MAX_SENTENCE = 1_000


class Markers:
    """Checks the markers of one text while it comes in pieces.

    Args:
        retrieval: The passages that were sent, the first of them is [1].

    Attributes:
        citations: A quote for each different source so far, in the order of their numbers.
        has_invented: Whether a marker referred to no passage; it was taken out.
    """

    def __init__(self, retrieval: Retrieval) -> None:
        self._retrieval = retrieval
        #: By passage. Read when a marker refers to it, and then kept: there may be thousands.
        self._sentences: dict[int, Sequence[_Sentence]] = {}
        #: By passage the number of the quote that fits what was said last.
        self._numbers: dict[int, int] = {}
        self._held = ""
        self._said = ""
        self.citations: list[Citation] = []
        self.has_invented = False

    def feed(self, text: str) -> str:
        """The text that is decided after the next piece; a marker that has only begun waits."""
        text = self._held + text
        found = _BEGINNING.search(text)
        end = len(text) if found is None else found.start()
        self._held = text[end:]
        return self._checked(text[:end])

    def end(self) -> str:
        """What was held back to the end: it has become no marker."""
        held, self._held = self._held, ""
        return held

    def _checked(self, text: str) -> str:
        parts, position = [], 0
        for match in _MARKER.finditer(text):
            parts += [self._plain(text[position : match.start()]), self._resolved(match[0])]
            position = match.end()
        return "".join([*parts, self._plain(text[position:])])

    def _plain(self, text: str) -> str:
        # Blanks behind a blank say nothing new: between markers there may be many.
        if text and not (text.isspace() and self._said[-1:].isspace()):
            self._said = (self._said + text)[-_MAX_SENTENCE:]
            self._numbers.clear()
        return text

    def _resolved(self, marker: str) -> str:
        """The marker with the numbers of its quotes, empty if it refers to nothing."""
        numbers = []
        for number in map(int, _NUMBER.findall(marker)):
            if 1 <= number <= len(self._retrieval.passages):
                numbers.append(self._number(number - 1))
            else:
                self.has_invented = True
        blank = self._plain(marker[: len(marker) - len(marker.lstrip())]) if numbers else ""
        return blank + "".join(f"[{number}]" for number in dict.fromkeys(numbers))

    def _number(self, passage: int) -> int:
        """The number of the quote that fits the sentence before the marker."""
        if passage not in self._numbers:
            citation = _best(self._sentences_of(passage), _content(self._sentence()))
            if citation not in self.citations:
                self.citations.append(citation)
            self._numbers[passage] = self.citations.index(citation) + 1
        return self._numbers[passage]

    def _sentences_of(self, passage: int) -> Sequence["_Sentence"]:
        if passage not in self._sentences:
            found = self._retrieval.passages[passage]
            self._sentences[passage] = _sentences_of(found, self._retrieval)
        return self._sentences[passage]

    def _sentence(self) -> str:
        spans = split_sentences(self._said)
        return self._said[spans[-1].start : spans[-1].end] if spans else ""


class _Sentence(NamedTuple):
    """A sentence of a passage, its content terms, and the weight of the question's among them."""

    quote: Citation
    terms: frozenset[str]
    asked: float


def _sentences_of(passage: ScoredPassage, retrieval: Retrieval) -> Sequence[_Sentence]:
    return [
        _sentence_of(passage, span, retrieval)
        for span in split_sentences(passage.text) or [Span(0, len(passage.text))]
    ]


def _sentence_of(passage: ScoredPassage, span: Span, retrieval: Retrieval) -> _Sentence:
    text = passage.text[span.start : span.end]
    own = _content(text)
    quote = Citation(
        document_id=passage.document_id,
        title=passage.title,
        start=passage.start + span.start,
        end=passage.start + span.end,
        quote=text,
    )
    asked = sum(weight for term, weight in retrieval.term_weights.items() if term in own)
    return _Sentence(quote, own, asked)


def _best(sentences: Sequence[_Sentence], wanted: frozenset[str]) -> Citation:
    """The sentence that has most in common with some terms, of equal ones the first.

    That is Dice's coefficient of their content terms, then the weight of the question's terms.
    """

    def fit(sentence: _Sentence) -> tuple[float, float, int]:
        own = sentence.terms
        common = 2 * len(own & wanted) / (len(own) + len(wanted) or 1)
        return common, sentence.asked, -sentence.quote.start

    return max(sentences, key=fit).quote


def _content(text: str) -> frozenset[str]:
    return frozenset(term for word in question_terms(text) for term in terms(word))
