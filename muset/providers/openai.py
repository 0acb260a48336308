"""Answers from any server that speaks OpenAI's chat completions."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import msgspec

from flask_muset import tracing
from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import (
    ExternalServiceError,
    MusetError,
    OperationTimeoutError,
    ValidationError,
)
from flask_muset.redaction import redact_text
from flask_muset.translate import retry_after_s
from muset import __version__
from muset.ports import CutShort, Delta, Model, ModelQuestion, Piece, Tokens
from muset.providers.config import ProviderConfig, is_sendable
from muset.providers.connections import Call, Server
from muset.providers.openai_format import Chunk, Complaint, Text, complaint_of, name_of, tokens_of
from muset.providers.prompt import Beginning, messages_of
from muset.providers.sse import Event, EventReader
from muset.services.text import estimated_tokens

__all__ = ["OpenAIProvider", "from_config"]

_PATH = "/chat/completions"
_DONE = b"[DONE]"
_MAX_EVENT_BYTES = 1 << 20
#: Of the text that is passed on.
_MAX_TEXT_BYTES = 256 << 10
#: Of a stream, whose events are some hundred times as long as the few letters that each has.
_MAX_ANSWER_BYTES = 32 << 20
_MAX_COMPLAINT_BYTES = 64 << 10
#: Seconds for the first token where no deadline says it, as on the command line.
_FIRST_TOKEN_S = 60.0
#: How much longer than a deadline the socket waits, so that the deadline is what ends it.
_SLACK_S = 0.005
#: Seconds after which a server is asked in the usual words again: it may be another one by then.
_LEARNED_S = 3600.0
_NOT_UNDERSTOOD = (400, 422)


class _Words(NamedTuple):
    """In which words a question is asked."""

    length_key: str = "max_tokens"
    knows_stream_options: bool = True

    def body(self, question: ModelQuestion, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request."""
        asked: dict[str, Any] = {"model": question.model, "messages": messages, "stream": True}
        if self.knows_stream_options:
            asked["stream_options"] = {"include_usage": True}
        if question.max_tokens is not None:
            asked[self.length_key] = question.max_tokens
        return asked

    def others(self, asked: dict[str, Any], status: int, complaint: Complaint) -> "_Words | None":
        """Other words, which may be taken where these were not."""
        if status not in _NOT_UNDERSTOOD or complaint.is_too_long(status):
            return None
        if "stream_options" in asked and "stream_options" in complaint.said:
            return self._replace(knows_stream_options=False)
        if "max_tokens" in asked and "max_completion_tokens" in complaint.said:
            return self._replace(length_key="max_completion_tokens")
        return None


class OpenAIProvider:
    """One server and its models.

    Args:
        name: For people, metrics and the ledger.
        base_url: Of the API, such as `https://llm.example.org/v1`.
        models: The first one is used where none is asked for.
        api_key: Sent as a bearer token; None for a server that wants none.
        idle_timeout_s: Seconds without a token, once the first has come.
        insecure_hosts: Hosts that may have any address, and get a key over plain http.

    Raises:
        ValueError: The URL or the key cannot be used; the text does not show them.
    """

    has_markers = True

    def __init__(
        self,
        name: str,
        base_url: str,
        models: tuple[Model, ...],
        *,
        api_key: str | None = None,
        idle_timeout_s: float = 10.0,
        insecure_hosts: Collection[str] = (),
    ) -> None:
        self.name = name
        self.models = models
        try:
            self._server = Server(
                name, base_url, has_key=api_key is not None, insecure_hosts=insecure_hosts
            )
        except ValueError as error:
            raise ValueError(f"base_url {error}") from None
        if api_key is not None and not is_sendable(api_key):
            raise ValueError("the API key must be printable ASCII without spaces, and not empty")
        self._api_key = api_key
        self._idle_timeout_s = idle_timeout_s
        #: By model, until when which other words are used, because the usual ones were not taken.
        self._learned: dict[str, tuple[float, _Words]] = {}

    def __repr__(self) -> str:
        return f"<OpenAIProvider {self.name!r}>"

    def stream(self, question: ModelQuestion) -> Iterator[Piece]:
        """Ask the model; see `muset.ports.StreamingProvider`.

        Nothing is sent before the first piece is asked for. What is returned may be closed by any
        greenlet or thread, also while another one waits in it.
        """
        patience = _Patience(self.name, self._idle_timeout_s)
        call = Call(self._server, patience.left_s)
        return _Pieces(call, self._pieces(call, patience, question))

    def _pieces(
        self, call: Call, patience: "_Patience", question: ModelQuestion
    ) -> Iterator[Piece]:
        messages = messages_of(question)
        reply = _Reply(patience)
        try:
            self._post(call, question, messages)
            for event in self._events(call, reply):
                chunk = self._chunk(event, question)
                text = self._text(chunk, reply)
                if text:
                    yield Delta(text)
                    # The time that our reader has taken is not the server's.
                    patience.token_came()
            text = self._rest(reply)
            if text:
                yield Delta(text)
            if reply.finish_reason == "length" and question.max_tokens is None:
                yield CutShort()
            yield reply.tokens or _estimated(messages, reply.characters)
            call.finish()
        finally:
            call.end()

    # --- the request ---

    def _post(self, call: Call, question: ModelQuestion, messages: list[dict[str, str]]) -> None:
        """Send the question; in other words if the server turns out not to take these."""
        words = known = self._words(question.model)
        while True:
            asked = words.body(question, messages)
            call.post(_PATH, msgspec.json.encode(asked), self._headers())
            if call.status == 200:
                break
            complaint = self._complaint(call)
            others = words.others(asked, call.status, complaint)
            if others is None:
                if call.status in _NOT_UNDERSTOOD:  # what was learned may not hold any more
                    self._learned.pop(question.model, None)
                wait_s = retry_after_s(call.headers)
                raise self._error(call.status, complaint, question.model, wait_s)
            words = others
        if words != known:
            self._learned[question.model] = SYSTEM.now() + _LEARNED_S, words

    def _words(self, model: str) -> _Words:
        until, words = self._learned.get(model, (0.0, _Words()))
        return words if SYSTEM.now() < until else _Words()

    def _complaint(self, call: Call) -> Complaint:
        try:
            return complaint_of(call.read_all(_MAX_COMPLAINT_BYTES))
        except ExternalServiceError:  # the status says more than that its reasons were cut off
            return complaint_of(b"")

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"muset/{__version__}",
        }
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return tracing.inject(headers)

    # --- the answer ---

    def _events(self, call: Call, reply: "_Reply") -> Iterator[Event]:
        """The events of a stream; the body of a server that does not stream, as one."""
        if "json" in call.headers.get("Content-Type", "").lower():
            body = call.read_all(_MAX_EVENT_BYTES + 1)
            self._check_length(len(body), _MAX_EVENT_BYTES)
            yield Event(b"", body)
            reply.is_done = True
            return
        for event in self._parsed(call, reply):
            if event.data.strip() == _DONE:
                reply.is_done = True
                return
            yield event

    def _parsed(self, call: Call, reply: "_Reply") -> Iterator[Event]:
        reader, received = EventReader(_MAX_EVENT_BYTES), 0
        try:
            while data := self._read(call, reply):
                received += len(data)
                self._check_length(received, _MAX_ANSWER_BYTES)
                yield from reader.feed(data)
            # Half an event behind the last word is half a bill.
            if reply.finish_reason is None:
                yield from reader.end()
        except ValueError as error:
            self._malformed(str(error))

    def _read(self, call: Call, reply: "_Reply") -> bytes:
        try:
            return call.read()
        except ExternalServiceError:
            # Behind the last word comes only the bill.
            if reply.finish_reason is None:
                raise
            return b""

    def _check_length(self, found: int, most: int, what: str = "an answer") -> None:
        if found > most:
            self._malformed(f"{what} of more than {most} bytes")

    def _chunk(self, event: Event, question: ModelQuestion) -> Chunk:
        if event.name == b"error":
            complaint = complaint_of(event.data)
            raise self._error(complaint.status, complaint, question.model)
        try:
            chunk = _decode_chunk(event.data)
        except msgspec.DecodeError as error:
            self._malformed(str(error))
        if chunk.error:
            complaint = complaint_of(chunk.error)
            raise self._error(complaint.status, complaint, question.model)
        return chunk

    def _text(self, chunk: Chunk, reply: "_Reply") -> str:
        """The text that may go on after a chunk."""
        reply.tokens = tokens_of(chunk.usage) or reply.tokens
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        reply.finish_reason = choice.finish_reason or reply.finish_reason
        if choice.finish_reason == "content_filter" or choice.text.refusal:
            raise ExternalServiceError(
                f"{self.name} refuses to answer this question", retryable=False
            )
        text = reply.take(choice.text)
        self._check_length(reply.text_bytes, _MAX_TEXT_BYTES, "a text")
        return text

    def _rest(self, reply: "_Reply") -> str:
        """The text that was held back to the end of an answer, which must be complete.

        An answer that was ended by the limit of its length is.
        """
        if not reply.is_done and reply.finish_reason is None:
            raise ExternalServiceError(f"{self.name} ended the answer before its end")
        if reply.is_blank:
            self._malformed(f"an answer without text (ended by {name_of(reply.finish_reason)!r})")
        return reply.beginning.end()

    # --- what goes wrong ---

    def _malformed(self, what: str) -> NoReturn:
        raise ExternalServiceError(f"{self.name} sent what cannot be read: {what}")

    def _error(
        self, status: int, complaint: Complaint, model: str, wait_s: float | None = None
    ) -> MusetError:
        """The error that stands for an answer with an error status."""
        if complaint.is_too_long(status):
            return _too_long(model, complaint.limit)
        names = dict.fromkeys([str(status), *complaint.label.split()])
        label = redact_text(" ".join(names), self._secrets)
        if status == 401:  # what it says may have a part of the key
            text = f"{self.name} does not take the key ({label})"
            return ExternalServiceError(text, unavailable=True, retryable=False)
        # Its sentences may repeat the question and the passages, which no log may have.
        text = f"{self.name} answered with {label}"
        if status == 403:
            return ExternalServiceError(text, unavailable=True, retryable=False)
        if status in (429, 503):
            return ExternalServiceError(text, unavailable=True, retry_after=wait_s)
        if 300 <= status < 400:
            text += " (redirects are not followed: set base_url to where this one leads)"
        may_pass = status >= 500 or status == 408
        return ExternalServiceError(text, retryable=None if may_pass else False)

    @property
    def _secrets(self) -> tuple[str, ...]:
        return () if self._api_key is None else (self._api_key,)


_decode_chunk = msgspec.json.Decoder(Chunk).decode


def _too_long(model: str, limit: int | None) -> ValidationError:
    takes = "" if limit is None else f", which takes {limit} tokens"
    return ValidationError(
        f"is too long, with its passages, for the model {model}{takes}",
        field="question",
        code="context_length_exceeded",
        details={} if limit is None else {"limit_tokens": limit},
    )


def _estimated(messages: list[dict[str, str]], characters: int) -> Tokens:
    sent = sum(len(message["content"]) for message in messages)
    return Tokens(estimated_tokens(sent), estimated_tokens(characters), estimated=True)


class _Patience:
    """How long the next token may be waited for.

    Before the first one that is as long as the deadline lets; after it, `idle_s` since the last,
    and no longer than the deadline where there is one still.
    """

    def __init__(self, name: str, idle_s: float) -> None:
        self._name = name
        self._idle_s = idle_s
        self._until: float | None = None

    def token_came(self) -> None:
        """Begin to wait for the next one."""
        self._until = SYSTEM.now() + self._idle_s

    def left_s(self) -> float:
        """Seconds that are left, above 0.

        Raises:
            OperationTimeoutError: None is.
        """
        deadline.check()
        of_deadline = deadline.remaining()
        if self._until is None:
            if of_deadline is not None:
                return of_deadline + _SLACK_S
            self._until = SYSTEM.now() + _FIRST_TOKEN_S
        left_s = self._until - SYSTEM.now()
        if left_s <= 0:
            raise OperationTimeoutError(f"{self._name} sent no token in time")
        return left_s if of_deadline is None else min(left_s, of_deadline + _SLACK_S)


class _Reply:
    """What has come of an answer."""

    def __init__(self, patience: _Patience) -> None:
        self._patience = patience
        self.beginning = Beginning()
        self.is_blank = True
        self.is_done = False
        self.finish_reason: str | None = None
        self.tokens: Tokens | None = None
        self.characters = self.text_bytes = 0

    def take(self, text: Text) -> str:
        """Take note of the next piece; returns the text that may go on."""
        content = text.content
        if content or text.reasoning_content or text.reasoning:
            self._patience.token_came()
        if not content:
            return ""
        self.characters += len(content)
        self.text_bytes += len(content.encode())
        self.is_blank = self.is_blank and content.isspace()
        return self.beginning.feed(content)


class _Pieces(Iterator[Piece]):
    """A generator that may be closed from elsewhere while somebody waits in it."""

    def __init__(self, call: Call, pieces: Iterator[Piece]) -> None:
        self._call = call
        self._pieces: Any = pieces
        self._is_closed = False
        self._is_complete = False

    def __next__(self) -> Piece:
        try:
            piece: Piece = next(self._pieces)
        except StopIteration:
            if self._is_closed and not self._is_complete:
                raise self._call.aborted() from None
            self._is_complete = True
            raise
        return piece

    def close(self) -> None:
        """End it, and break the connection off; whoever goes on reading gets an error."""
        self._is_closed = True
        self._call.abort()
        with suppress(ValueError):  # it runs elsewhere, and ends there by what `abort` has done
            self._pieces.close()


def from_config(config: ProviderConfig) -> OpenAIProvider:
    """Make one as AI_PROVIDERS says.

    Raises:
        ValueError: Something is missing or not allowed.
    """
    if config.base_url is None:
        raise ValueError("base_url is missing; set it to where the API is, such as https://…/v1")
    if not config.models:
        raise ValueError('models is missing; list at least one, such as [{name = "small"}]')
    if config.options:
        raise ValueError(f"options {sorted(config.options)} are not known; remove them")
    return OpenAIProvider(
        config.name,
        config.base_url,
        config.models,
        api_key=config.api_key,
        idle_timeout_s=config.idle_timeout_s,
        insecure_hosts=config.insecure_hosts,
    )
