"""What a model's text refers to: its markers checked against the passages, each with a quote.

A model writes [2] for the second passage that it was sent. Here each marker gets the number of its
quote instead: [n] in a text that went through `Markers` is the nth of its citations.
"""

import re
from collections.abc import Sequence

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
        self._said = (self._said + text)[-_MAX_SENTENCE:]
        return text

    def _resolved(self, marker: str) -> str:
        """The marker with the numbers of its quotes, empty if it refers to nothing."""
        numbers = []
        for number in map(int, _NUMBER.findall(marker)):
            if 1 <= number <= len(self._retrieval.passages):
                numbers.append(self._number(self._retrieval.passages[number - 1]))
            else:
                self.has_invented = True
        blank = self._plain(marker[: len(marker) - len(marker.lstrip())]) if numbers else ""
        return blank + "".join(f"[{number}]" for number in dict.fromkeys(numbers))

    def _number(self, passage: ScoredPassage) -> int:
        """The number of the quote that fits the sentence before the marker."""
        citation = _quote(passage, self._sentence(), self._retrieval)
        if citation not in self.citations:
            self.citations.append(citation)
        return self.citations.index(citation) + 1

    def _sentence(self) -> str:
        spans = split_sentences(self._said)
        return self._said[spans[-1].start : spans[-1].end] if spans else ""


def _quote(passage: ScoredPassage, sentence: str, retrieval: Retrieval) -> Citation:
    """The passage's sentence that has most in common with another one, of equal ones the first.

    That is Dice's coefficient of their content terms, then the weight of the question's terms.
    """
    wanted = _content(sentence)

    def fit(span: Span) -> tuple[float, float, int]:
        own = _content(passage.text[span.start : span.end])
        common = 2 * len(own & wanted) / (len(own) + len(wanted) or 1)
        asked = sum(weight for term, weight in retrieval.term_weights.items() if term in own)
        return common, asked, -span.start

    spans: Sequence[Span] = split_sentences(passage.text) or [Span(0, len(passage.text))]
    best = max(spans, key=fit)
    return Citation(
        document_id=passage.document_id,
        title=passage.title,
        start=passage.start + best.start,
        end=passage.start + best.end,
        quote=passage.text[best.start : best.end],
    )


def _content(text: str) -> frozenset[str]:
    return frozenset(term for word in question_terms(text) for term in terms(word))
