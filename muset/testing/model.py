"""What the scripted model says: always the same to the same prompt."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

from muset.services.text import split_sentences, terms
from muset.testing.script import MAX_TOKENS

__all__ = ["ChatRequest", "answer", "tokenize"]

#: Where a passage begins: a line with [3], or with <passage ... "3" ...>.
_PASSAGE = re.compile(r'^[ \t]*(?:\[(\d{1,4})\]|<\w+[^>\n]*?"(\d{1,4})"[^>\n]*>)', re.MULTILINE)
#: Where the last one ends.
_END = re.compile(r"^[ \t]*(?:</|<<<|>>>|---|===|Question\b)", re.MULTILINE)
_PHRASE = re.compile(r'["“]([^"”\n]{10,200})["”]')
_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])")
_UNSAID = "The passages do not say it."


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for a chat completion.

    Attributes:
        messages: Role and text of each.
        max_tokens: Length of the answer at most.
    """

    model: str
    messages: tuple[tuple[str, str], ...]
    stream: bool = False
    include_usage: bool = False
    max_tokens: int = MAX_TOKENS

    @classmethod
    def parse(cls, body: Any) -> "ChatRequest":
        """Check a body.

        Raises:
            ValueError: Names the field that is wrong.
        """
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise ValueError("model must be a string")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list that is not empty")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError("max_tokens must be a whole number of at least 1")
        options = body.get("stream_options") or {}
        return cls(
            model=body["model"],
            messages=tuple(_message(message) for message in messages),
            stream=bool(body.get("stream")),
            include_usage=bool(isinstance(options, dict) and options.get("include_usage")),
            max_tokens=MAX_TOKENS if limit is None else limit,
        )

    def count_tokens(self) -> int:
        """Tokens of all messages."""
        return sum(1 for _, text in self.messages for _ in _TOKEN.finditer(text))


def _message(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("each message must be an object with a role")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise ValueError("each message must have content")
    return message["role"], content


def tokenize(text: str) -> list[str]:
    """Words and signs, each with the space before it; joined they are the text."""
    return _TOKEN.findall(text)


@lru_cache(maxsize=256)
def answer(request: ChatRequest, mode: str, length: int | None) -> tuple[str, ...]:
    """The tokens of the answer, not yet cut at `max_tokens`.

    Args:
        request: Whose passages are quoted; its question chooses the first quotation.
        mode: One of `script.MODES`.
        length: Go on quoting until there are so many; None for one quotation.
    """
    if mode == "unsaid":
        return tuple(tokenize(_phrase(request)))
    quotes = _quotes(request)
    if mode == "invented":
        quotes = [f"{quotes[0]} It is also said elsewhere [99]."]
    if length is None:
        return tuple(tokenize(quotes[0]))
    # Longer texts repeat themselves.
    tokens = (token for quote in cycle(quotes) for token in tokenize(f" {quote}"))
    return (next(tokens).lstrip(), *islice(tokens, length - 1))


def _phrase(request: ChatRequest) -> str:
    """What the prompt asks to say then: the last quotation of the system's message."""
    rules = " ".join(text for role, text in request.messages if role in ("system", "developer"))
    return next(reversed(_PHRASE.findall(rules)), _UNSAID)


def _quotes(request: ChatRequest) -> list[str]:
    """All sentences of the passages with their markers, the one that fits the question first.

    The question is the last line.
    """
    *before, (_, last) = request.messages
    rest, _, question_line = last.rstrip().rpartition("\n")
    question = set(terms(question_line))
    found = _sentences("\n".join([*(text for _, text in before), rest]))
    if not found:
        return [f"There is no passage to quote; the question has {len(question)} terms."]
    best = max(found, key=lambda pair: len(question & set(terms(pair[1]))))
    found.remove(best)
    return [_marked(*pair) for pair in (best, *found)]


def _sentences(prompt: str) -> list[tuple[str, str]]:
    """Number of the passage and text, of each sentence."""
    starts = list(_PASSAGE.finditer(prompt))
    ends = [start.start() for start in starts[1:]] + [len(prompt)]
    found = []
    for start, end in zip(starts, ends, strict=True):
        text = _END.split(prompt[start.end() : end], maxsplit=1)[0]
        # What stands beside the number is a title if something follows.
        head, _, rest = text.partition("\n")
        text = rest if rest.strip() else head
        number = start[1] or start[2]
        found += [(number, text[span.start : span.end]) for span in split_sentences(text)]
    return found


def _marked(number: str, sentence: str) -> str:
    text = " ".join(sentence.split())
    end = text[-1] if text[-1] in ".!?" else "."
    return f"{text.rstrip('.!?')} [{number}]{end}"
