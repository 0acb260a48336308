"""What OpenAI-compatible servers send: pieces of an answer, usage, and what they complain about."""

import re
from typing import Any, TypeGuard

import msgspec

from muset.ports import Tokens

__all__ = ["Choice", "Chunk", "Complaint", "Text", "complaint_of", "name_of", "tokens_of"]

_MOST_TOKENS = 1_000_000_000
#: A name, as servers have them for what is wrong; other words may be those of the question.
_NAME = re.compile(r"[\w.[\]-]{1,64}", re.ASCII)
_MAX_DETAILS = 5


class Text(msgspec.Struct):
    """A text, whole or the next piece of it."""

    content: str | None = None
    refusal: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None


class Choice(msgspec.Struct):
    """One answer; we ask for one alone. `delta` is of a stream, `message` of a whole answer."""

    delta: Text | None = None
    message: Text | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> Text:
        """Whichever there is."""
        return self.delta or self.message or Text()


class Chunk(msgspec.Struct):
    """One event of a stream, or a whole answer. Servers add members of their own."""

    choices: list[Choice] | None = None
    usage: Any = None
    error: Any = None


def tokens_of(usage: Any) -> Tokens | None:
    """The billed tokens as the server says them, None where it does not; a zero is a zero."""
    if not isinstance(usage, dict):
        return None
    sent, received = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (_is_count(sent) and _is_count(received)):
        return None
    return Tokens(sent, received)


def _is_count(value: Any) -> TypeGuard[int]:
    # No answer has so many, and sums of greater ones do not fit into a database's integers.
    return type(value) is int and 0 <= value <= _MOST_TOKENS


class Complaint(msgspec.Struct, frozen=True):
    """What a server says is wrong.

    Attributes:
        code: Its short name, empty where it has none.
        label: Code, type and parameter, for the log; they may still have secrets.
        said: Its sentences and the parameters that they speak of, to search in. What is searched
            for may be there because it was asked, so what follows from it must do no harm.
        limit: Tokens that the model takes, where that is told.
    """

    code: str
    label: str
    said: str
    limit: int | None = None

    def is_too_long(self, status: int) -> bool:
        """Whether the question is too long for the model, if this came with an HTTP status."""
        if self.code in _TOO_LONG_CODES:
            return True
        return status in (400, 413, 422) and _TOO_LONG.search(self.said) is not None

    @property
    def status(self) -> int:
        """What stands for the HTTP status where a stream has begun with 200."""
        if re.fullmatch(r"[45]\d\d", self.code, re.ASCII):
            return int(self.code)
        return next((status for word, status in _STATUSES.items() if word in self.code), 502)


_TOO_LONG_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error"})
#: In the words of OpenAI and vLLM; llama.cpp; Anthropic; Gemini; Text Generation Inference.
_TOO_LONG = re.compile(
    r"(?:maximum|exceed|longer than|larger than)[^.]{0,60}context[ _](?:length|window|size)"
    r"|context[ _](?:length|window|size)[^.]{0,40}exceed|(?:prompt|input) is too long"
    r"|token count.{0,40}exceeds|max_new_tokens. must be",
    re.IGNORECASE,
)
_LIMIT = re.compile(
    r"(?:context (?:length|window|size)|tokens allowed)\D{0,12}(\d{2,9})|(\d{2,9}) maximum",
    re.IGNORECASE,
)
_STATUSES = {
    "rate_limit": 429, "quota": 429, "overloaded": 503, "api_key": 401,
    "content_filter": 400, "content_policy": 400, "invalid_request": 400,
}  # fmt: skip


def complaint_of(error: Any) -> Complaint:
    """Read an error in one of its usual shapes.

    Args:
        error: The body of an answer, or the member `error` of an event.
    """
    if isinstance(error, bytes):
        error = _decoded(error)
    if isinstance(error, dict) and error.get("error"):
        error = error["error"]
    if not isinstance(error, dict):
        return Complaint("", "", error if isinstance(error, str) else "")
    kind, code = (name_of(error.get(key)) for key in ("type", "code"))
    details = _details(error.get("detail"))
    params = [name_of(error.get("param")), *(_path(each.get("loc")) for each in details)]
    said = [error.get("message"), error.get("detail"), *(each.get("msg") for each in details)]
    texts = " ".join(text for text in [*params, *said] if isinstance(text, str))
    label = " ".join(dict.fromkeys(name for name in (code, kind, *params) if name))
    if not code or kind in _TOO_LONG_CODES:
        code = kind
    return Complaint(code, label, texts, _limit(error.get("n_ctx"), texts))


def name_of(value: Any) -> str:
    """A short name as it was sent, empty where there is none."""
    text = str(value) if isinstance(value, str | int) and value else ""
    return text if _NAME.fullmatch(text) else ""


def _details(detail: Any) -> list[dict[str, Any]]:
    """The first entries of a list such as pydantic's."""
    entries = detail[:_MAX_DETAILS] if isinstance(detail, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def _path(parts: Any) -> str:
    return name_of(".".join(map(str, parts))) if isinstance(parts, list) else ""


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode("utf-8", "replace")


def _limit(told: Any, said: str) -> int | None:
    if type(told) is int and told > 0:
        return told
    found = _LIMIT.search(said)
    return int(found[1] or found[2]) if found else None
