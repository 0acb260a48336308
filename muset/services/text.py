"""Text as passages, sentences and terms. Offsets are Unicode code points, ends exclusive."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import snowballstemmer

from muset.ports import Span

__all__ = [
    "estimated_tokens",
    "question_terms",
    "split_passages",
    "split_sentences",
    "term_counter",
    "terms",
]

#: A passage grows until it has this many characters: some 120 English words, which is enough
#: context for one fact and little enough that its terms mean one thing.
_TARGET_CHARACTERS = 700
#: No passage is longer, also where a text has no break at all.
_MAX_CHARACTERS = 1_400

_HEADING = re.compile(r"\s{0,3}#{1,6}\s")
_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)]|[A-Za-z][.)])\s")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z0-9À-Þ])|[。！？]")  # noqa: RUF001
_BREAK = re.compile(r"\s+")
_ABBREVIATIONS = frozenset(
    {
        "al", "approx", "art", "ca", "cf", "ch", "co", "col", "corp", "dr", "e.g", "ed", "eds",
        "eq", "esq", "etc", "fig", "figs", "gen", "gov", "hon", "i.e", "inc", "jr", "lt", "ltd",
        "mr", "mrs", "ms", "mt", "no", "nos", "op", "p", "pp", "prof", "rev", "sec", "sen", "sr",
        "st", "vol", "vs", "viz",
    }
)  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:[\u0300-\u036f]+[^\W_]*)*")

_POSSESSIVE = re.compile(r"(?<=\w)['’]s\b")  # noqa: RUF001
#: Asks for an age, and texts speak of one with that word.
_HOW_OLD = re.compile(r"\bhow\s+old\b", re.IGNORECASE)
#: Words that ask or join and say nothing about the subject.
_STOP_WORDS = frozenset(
    """a about after all also am an and any are as at be because been before being between both but
    by can could did do does doing done during each either for from get gets give given gives had
    has have having he her here hers him his how i if in into is it its itself just let like make
    makes many may me might more most much must my no nor not of off on once only or other our out
    over own per please s same say says shall she should so some such t tell than that the their
    theirs them then there these they this those through to too under until up upon us used very
    was we were what when where whether which while who whom whose why will with would you
    your""".split()  # noqa: SIM905 - a list of words reads better as a text
)


def estimated_tokens(characters: int) -> int:
    """Tokens of a text, where no provider says how many; some four English characters make one."""
    return math.ceil(characters / 4)


def _blocks(text: str) -> Iterator[Span]:
    """Runs of lines without a blank one between, a heading by itself."""
    start, offset = -1, 0
    for line in text.splitlines(keepends=True):
        end = offset + len(line)
        heading = _HEADING.match(line) is not None
        if start >= 0 and (not line.strip() or heading or end - start > _MAX_CHARACTERS):
            yield Span(start, offset)
            start = -1
        if line.strip():
            start = offset if start < 0 else start
            if heading:
                yield Span(start, end)
                start = -1
        offset = end
    if start >= 0:
        yield Span(start, offset)


def _bounded(text: str, block: Span) -> Iterator[Span]:
    """Cut a block that is too long: after a sentence, else between words, else anywhere."""
    start = block.start
    while block.end - start > _MAX_CHARACTERS:
        window = text[start : start + _MAX_CHARACTERS]
        cut = max((m.end() for m in _SENTENCE_END.finditer(window)), default=0)
        if cut < _MAX_CHARACTERS // 4:
            cut = max((m.end() for m in _BREAK.finditer(window)), default=0)
        cut = cut if cut >= _MAX_CHARACTERS // 4 else _MAX_CHARACTERS
        yield Span(start, start + cut)
        start += cut
    yield Span(start, block.end)


def _stripped(text: str, start: int, end: int) -> Span | None:
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    right = len(piece.rstrip())
    return Span(start + left, start + right) if right > left else None


def split_passages(text: str) -> list[Span]:
    """Cut a text into passages that together hold all of it but blank space.

    Paragraphs are kept together up to a length, a heading stays with what follows it.

    Returns:
        Spans in order, of at most 1,400 characters, that begin and end with no blank.
    """
    passages: list[Span] = []
    start = end = -1

    def close() -> None:
        span = _stripped(text, start, end) if start >= 0 else None
        if span is not None:
            passages.append(span)

    after_heading = False
    for block in _blocks(text):
        heading = _HEADING.match(text[block.start : block.start + 12]) is not None
        for piece in _bounded(text, block):
            full = start >= 0 and (
                piece.end - start > _MAX_CHARACTERS
                or end - start >= _TARGET_CHARACTERS
                or (heading and not after_heading)
            )
            if full or start < 0:
                close()
                start = piece.start
            end = piece.end
        after_heading = heading
    close()
    return passages


def _is_end(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a full stop ends a sentence and not an abbreviation or an initial."""
    if match[0][0] != ".":
        return True
    before = text[start : match.start()].rsplit(None, 1)
    word = before[-1].lstrip("(\"'“‘[").lower() if before else ""  # noqa: RUF001
    if word in _ABBREVIATIONS:
        return False
    return not (len(word) == 1 and word.isalpha() and word != "i") and not re.fullmatch(
        r"(?:[a-z]\.)+[a-z]", word
    )


def _lines(text: str) -> Iterator[Span]:
    """Parts in which a sentence may not reach over an edge: paragraphs, headings, list items."""
    start, offset = -1, 0
    for line in text.splitlines(keepends=True):
        blank, edge = not line.strip(), _HEADING.match(line) or _ITEM.match(line)
        if start >= 0 and (blank or edge):
            yield Span(start, offset)
            start = -1
        if not blank and start < 0:
            start = offset
        offset += len(line)
        if start >= 0 and _HEADING.match(line):
            yield Span(start, offset)
            start = -1
    if start >= 0:
        yield Span(start, offset)


def split_sentences(text: str) -> list[Span]:
    """Cut a text into sentences; a line break inside of one does not end it.

    Returns:
        Spans in order that begin and end with no blank.
    """
    sentences: list[Span] = []
    for part in _lines(text):
        start = part.start
        for match in _SENTENCE_END.finditer(text, part.start, part.end):
            if _is_end(text, start, match):
                span = _stripped(text, start, match.end())
                sentences += [span] if span else []
                start = match.end()
        span = _stripped(text, start, part.end)
        sentences += [span] if span else []
    return sentences


@lru_cache(maxsize=65_536)
def _term(word: str) -> str:
    """One word as the index has it: in lower case, without diacritics, by its stem."""
    decomposed = unicodedata.normalize("NFKD", word.lower())
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    if not plain.isascii() or len(plain) <= 2:
        return plain
    # A stemmer of its own: it keeps its word in itself, and native threads come here at once.
    stem = str(snowballstemmer.stemmer("porter").stemWord(plain))
    # FTS5 has the later rule of the algorithm's author that takes -logi to -log.
    return stem[:-1] if stem.endswith("logi") else stem


def terms(text: str) -> list[str]:
    """The terms of a text in order, as the full-text index makes them."""
    # A mark that stands alone leaves nothing.
    return [term for word in _WORD.findall(text) if (term := _term(word))]


def term_counter(wanted: Collection[str]) -> Callable[[str], Counter[str]]:
    """Make a function that counts some terms in a text.

    In plain ASCII it takes only words that begin like one of them, a tenth of the work: all but the
    last letter of a stem stands at the beginning of its word, whatever rule of Porter's made it.
    """
    beginnings = "|".join(re.escape(term[:-1]) for term in wanted)
    likely = re.compile(rf"\b(?:{beginnings})\w*")

    def count(text: str) -> Counter[str]:
        plain = text.lower().replace("_", " ") if text.isascii() else ""
        words = likely.findall(plain) if plain else _WORD.findall(text)
        return Counter(term for word in words if (term := _term(word)) in wanted)

    return count


def question_terms(question: str) -> list[str]:
    """The words of a question that speak about its subject, each once, as they were written.

    A question of nothing but stop words keeps them all.
    """
    question = _HOW_OLD.sub(" age ", _POSSESSIVE.sub("", question))
    words = list(dict.fromkeys(word.lower() for word in _WORD.findall(question)))
    return [word for word in words if word not in _STOP_WORDS] or words
