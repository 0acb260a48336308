"""One answer from several providers: in order, each under its policy, all within one deadline.

A provider has an equal share of the time that is left to bring its first token, so that the next
one is still reached. What has failed is forgotten and the next one is asked, until a part of the
text is with the client. If no model answers, the last resort does, and the answer says `degraded`.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from typing import Any

from flask_muset.clock import SYSTEM
from flask_muset.deadline import Expired, Scope, deadline
from flask_muset.errors import (
    CircuitOpenError,
    ExternalServiceError,
    MusetError,
    NetworkError,
    OperationTimeoutError,
    ValidationError,
)
from muset.ports import (
    AnswerStatus,
    CallPolicy,
    Citation,
    Cited,
    CutShort,
    Delta,
    Model,
    ModelQuestion,
    Piece,
    Retrieval,
    StreamingProvider,
    Tokens,
    TrackCall,
)
from muset.services.citations import Markers
from muset.services.streaming import Meta, Sink
from muset.services.text import estimated_tokens

__all__ = [
    "UNSURE",
    "Account",
    "Answer",
    "Answering",
    "Asking",
    "Attempt",
    "Outcome",
    "Source",
    "is_declined",
]

_log = logging.getLogger(__name__)

UNSURE = "The documents do not say enough about this."
#: What the last resort needs, in seconds, and at most as a share of the time that is left.
_RESORT_S, _RESORT_SHARE = 0.25, 0.1
#: From a price for a million tokens to billionths for one.
_BILLIONTHS = 1000


class Outcome(StrEnum):
    """How a call of a provider has ended; a label of metrics."""

    SUCCESS = "success"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    UNAUTHORIZED = "unauthorized"
    REJECTED = "rejected"
    CUT = "cut"
    ERROR = "error"
    CANCELLED = "cancelled"
    REFUSED_BY_BREAKER = "refused_by_breaker"
    REFUSED_BY_LIMIT = "refused_by_limit"


@dataclass(frozen=True, slots=True)
class Source:
    """A provider and what guards its calls."""

    provider: StreamingProvider
    policy: CallPolicy


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of a provider; times in seconds, the wait is the one before it."""

    provider: str
    model: str
    outcome: str
    wait_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how it came about; one of the cache took no attempt and no tokens."""

    text: str
    status: AnswerStatus
    citations: tuple[Citation, ...]
    attempts: tuple[Attempt, ...]
    input_tokens: int
    output_tokens: int
    provider: str
    model: str
    cached: bool = False


@dataclass(slots=True)
class Account:
    """What one question has taken so far.

    Attributes:
        attempts: Calls of providers, and those that were refused before they were made.
        provider: That was asked last.
        model: The same.
        cost: In billionths, not rounded.
        estimated: Whether some tokens were counted here.
    """

    attempts: list[Attempt] = field(default_factory=list)
    provider: str = ""
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = Decimal(0)
    estimated: bool = False

    @property
    def billionths(self) -> int:
        """The cost, whole."""
        return int(self.cost.to_integral_value(ROUND_HALF_EVEN))

    def bill(self, model: Model, tokens: Tokens) -> None:
        """Add what a call has taken."""
        self.input_tokens += tokens.input_tokens
        self.output_tokens += tokens.output_tokens
        self.estimated = self.estimated or tokens.estimated
        self.cost += _BILLIONTHS * (
            tokens.input_tokens * model.input_price + tokens.output_tokens * model.output_price
        )


class Answering:
    """The providers of the service.

    Args:
        sources: In the order in which they are asked.
        resort: Asked when none of them has answered; None for nothing.
        clock: Seconds that never go back.
        track: Counts a call: model, seconds, outcome, tokens in and out.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        resort: Source | None,
        clock: Callable[[], float],
        track: TrackCall | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.resort = resort
        self.clock = clock
        self.track = track

    def candidates(self, model: str | None) -> list[tuple[Source, Model]]:
        """Who may be asked for a model, in order; None is the first one of each.

        Raises:
            ValidationError: Nobody has it.
        """
        if model is None:
            return [(source, source.provider.models[0]) for source in self.sources]
        everybody = [*self.sources, *([] if self.resort is None else [self.resort])]
        all_models = [(source, each) for source in everybody for each in source.provider.models]
        found = [(source, each) for source, each in all_models if each.name == model]
        if not found:
            known = ", ".join(dict.fromkeys(each.name for _, each in all_models))
            raise ValidationError(f"must be one of: {known}", field="model")
        return found


class Asking:
    """One question on its way through the providers.

    Args:
        answering: Whom it asks.
        candidates: In this order.
        question: As the user wrote it.
        retrieval: What is known about it.
        max_tokens: Length of the answer at most.
        allow_degraded: Whether the last resort may answer.
        account: What it takes is written down here.
    """

    def __init__(
        self,
        answering: Answering,
        candidates: Sequence[tuple[Source, Model]],
        question: str,
        retrieval: Retrieval,
        *,
        max_tokens: int | None,
        allow_degraded: bool,
        account: Account,
    ) -> None:
        self._answering = answering
        self._candidates = candidates
        self._question = question
        self._retrieval = retrieval
        self._max_tokens = max_tokens
        resort = answering.resort if allow_degraded else None
        is_candidate = any(source is resort for source, _ in candidates)
        self._resort = None if is_candidate else resort
        self._account = account
        self._errors: list[Exception] = []
        self._until, self._counts, self._reserved_s = math.inf, True, 0.0
        self._ended = answering.clock()
        self._items: Iterator[Any] | None = None

    def cancel(self) -> None:
        """Break off the call that goes on, from another thread."""
        items = self._items
        if items is not None:
            with suppress(ValueError):  # a plain generator cannot be closed while it runs
                _close(items)

    def answer(self, sink: Sink) -> Answer:
        """Ask until there is an answer.

        Args:
            sink: Gets the model and the text as they come. With the first token a provider's share
                of the time ends, and its policy's time-out; if the sink is live, every deadline
                does: from then on the provider's idle limit holds.

        Raises:
            CircuitOpenError: All are known to fail; with the time until the first may be asked.
            Exception: What the last one that was asked has raised; or the one whose text the client
                has a part of.
        """
        self._begin()
        try:
            answer = self._models_answer(sink) or self._resorts_answer(sink)
            self._log_errors()
            return answer
        finally:
            self._errors.clear()  # their tracebacks know this object: a circle

    def _log_errors(self, but: Exception | None = None) -> None:
        """Say what nobody else will."""
        for error in self._errors:
            if error is not but and not _is_refusal(error):
                _log.warning("a provider failed: %s: %s", type(error).__name__, error)

    def _models_answer(self, sink: Sink) -> Answer | None:
        try:
            with self._bounded(1, self._reserved_s):
                for number, (source, model) in enumerate(self._candidates):
                    answer = self._ask(source, model, len(self._candidates) - number, sink)
                    if answer is not None:
                        return answer
        except OperationTimeoutError as error:
            self._failed(error, sink)
        return None

    def _begin(self) -> None:
        """Whose time it is is known now: a stream is made beside whoever asks for it."""
        scope = deadline.current()
        if scope is not None:
            self._until, self._counts = scope.at, scope.counts
        if self._resort is not None:
            self._reserved_s = min(_RESORT_S, _RESORT_SHARE * (self._until - SYSTEM.now()))

    def _bounded(self, parts: int, reserved_s: float = 0.0) -> AbstractContextManager[object]:
        """One of several equal parts of the time that is left, but for what is reserved."""
        if self._until == math.inf:
            return nullcontext()
        left_s = self._until - reserved_s - SYSTEM.now()
        return deadline(max(0.0, left_s) / parts, counts=self._counts)

    def _resorts_answer(self, sink: Sink) -> Answer:
        if self._resort is not None:
            self._reserved_s = 0.0
            answer = self._ask(self._resort, self._resort.provider.models[0], 1, sink)
            if answer is not None:
                return replace(answer, status=AnswerStatus.DEGRADED)
        real = [error for error in self._errors if not _is_refusal(error)]
        error = real[-1] if real else min(self._errors, key=_wait_s)
        self._log_errors(but=error)
        try:
            raise error
        finally:
            del error, real

    def _ask(self, source: Source, model: Model, share: int, sink: Sink) -> Answer | None:
        """The answer of one provider, None if it has failed and another one may be asked.

        Args:
            source: Whom.
            model: Which of its models.
            share: It has one of so many equal shares of the time, until its first token.
            sink: Where its text goes.
        """
        calls = len(self._account.attempts)
        outer = None if sink.is_live else deadline.current()
        try:
            with self._bounded(share, self._reserved_s):
                answer: Answer = source.policy.call(
                    lambda: self._attempt(source.provider, model, sink, outer)
                )
                return answer
        except _SentError as sent:
            raise sent.error from sent.error.__cause__
        except Exception as error:  # noqa: BLE001 - whatever one raises, the next may answer
            if len(self._account.attempts) == calls:
                self._note_refused(source, model, error)
            self._failed(error, sink)
            return None

    def _failed(self, error: Exception, sink: Sink) -> None:
        """Take note of an error, and forget what came before it; raise it if that is too late."""
        if not sink.void():
            raise error
        if error not in self._errors:
            self._errors.append(error)

    def _note_refused(self, source: Source, model: Model, error: Exception) -> None:
        """A call that was not made: it counts as an attempt, and as nothing else."""
        is_open = isinstance(error, CircuitOpenError)
        outcome = Outcome.REFUSED_BY_BREAKER if is_open else Outcome.REFUSED_BY_LIMIT
        name, account = source.provider.name, self._account
        account.attempts.append(Attempt(name, model.name, outcome.value, 0.0, 0.0))
        if not account.provider:
            account.provider, account.model = name, model.name

    # --- One call

    def _attempt(
        self, provider: StreamingProvider, model: Model, sink: Sink, outer: Scope | None
    ) -> Answer:
        """Call a provider once; whatever becomes of it is written down.

        Args:
            provider: Whom.
            model: Which of its models.
            sink: Where its text goes.
            outer: The deadline that still holds after the first token.
        """
        draft, outcome = _Draft(self._retrieval, has_markers=provider.has_markers), None
        began = self._answering.clock()
        try:
            self._read(provider, model, draft, sink, outer)
            outcome = Outcome.SUCCESS
            return draft.answer(provider.name, model.name)
        except Expired:
            outcome = Outcome.TIMEOUT
            raise
        except Exception as error:
            is_sent = not sink.void()
            outcome = _outcome_of(error, has_text=draft.received > 0)
            self._errors.append(error)
            if is_sent:
                raise _SentError(error) from error
            raise
        finally:
            tokens = draft.tokens or draft.estimated(self._question)
            self._note(provider.name, model, outcome or Outcome.CANCELLED, began, tokens)

    def _read(
        self,
        provider: StreamingProvider,
        model: Model,
        draft: "_Draft",
        sink: Sink,
        outer: Scope | None,
    ) -> None:
        question = ModelQuestion(self._question, self._retrieval, model.name, self._max_tokens)
        items = self._items = provider.stream(question)
        try:
            for item in items:
                if isinstance(item, Delta) and not draft.received:
                    _end_deadlines(outer)
                text = draft.take(item)
                if text:
                    self._tell(text, model, draft, sink)
        finally:
            self._items = None
            _close(items)
        text = draft.end()
        if text:
            self._tell(text, model, draft, sink)

    def _tell(self, text: str, model: Model, draft: "_Draft", sink: Sink) -> None:
        if not draft.text:
            sink.put(Meta(model.name))
        draft.text.append(text)
        sink.put(Delta(text))

    def _note(
        self, provider: str, model: Model, outcome: Outcome, began: float, tokens: Tokens
    ) -> None:
        account, now = self._account, self._answering.clock()
        wait_s, duration_s = max(0.0, began - self._ended), now - began
        self._ended = now
        account.attempts.append(Attempt(provider, model.name, outcome.value, wait_s, duration_s))
        account.provider, account.model = provider, model.name
        account.bill(model, tokens)
        if self._answering.track is not None:
            self._answering.track(
                model.name, duration_s, outcome.value, tokens.input_tokens, tokens.output_tokens
            )


class _Draft:
    """What has come of one call."""

    def __init__(self, retrieval: Retrieval, *, has_markers: bool) -> None:
        self._retrieval = retrieval
        self._markers = Markers(retrieval) if has_markers else None
        self._cited: list[Citation] = []
        #: What the client is told.
        self.text: list[str] = []
        #: Characters from the provider.
        self.received = 0
        self.tokens: Tokens | None = None
        self._is_cut_short = False

    def take(self, item: Piece) -> str:
        """Take the next item in; the text that may go on."""
        if isinstance(item, Tokens):
            self.tokens = item
        elif isinstance(item, CutShort):
            self._is_cut_short = True
        elif isinstance(item, Cited):
            self._cited.append(item.citation)
        else:
            self.received += len(item.text)
            return item.text if self._markers is None else self._markers.feed(item.text)
        return ""

    def end(self) -> str:
        """The text that was held back to the end; that there is no answer, where there is none."""
        held = "" if self._markers is None else self._markers.end()
        if not held and not self.text:
            return UNSURE
        return held

    def estimated(self, question: str) -> Tokens:
        """What a call that was cut off has taken: none before its first text."""
        if not self.received:
            return Tokens(0, 0)
        sent = len(question) + sum(len(p.text) for p in self._retrieval.passages)
        return Tokens(estimated_tokens(sent), estimated_tokens(self.received), estimated=True)

    def answer(self, provider: str, model: str) -> Answer:
        """The whole of it: certain only if that it is, and each statement's source is there."""
        citations = self._cited if self._markers is None else self._markers.citations
        has_invented = self._markers is not None and self._markers.has_invented
        is_sure = self.received and citations and not has_invented and not self._is_cut_short
        return Answer(
            text="".join(self.text),
            status=AnswerStatus.ANSWERED if is_sure else AnswerStatus.UNSURE,
            citations=tuple(citations),
            attempts=(),
            input_tokens=0,
            output_tokens=0,
            provider=provider,
            model=model,
        )


class _SentError(ExternalServiceError):
    """A provider failed when the client had a part of its text: nothing may be tried again."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error), retryable=False)
        self.error = error


def is_declined(error: BaseException) -> bool:
    """Whether a call has failed because of what was asked: the next question may be answered.

    If it were held against the provider, whoever asks such questions could open its circuit for
    everybody.
    """
    if isinstance(error, _SentError):
        error = error.error
    if not isinstance(error, ExternalServiceError):
        return False
    return not (error.retryable or error.unavailable)


def _end_deadlines(outer: Scope | None) -> None:
    """The first token is there: only the outer deadline still holds, for a stream none."""
    while (scope := deadline.current()) is not None and scope is not outer:
        scope.leave()


def _close(items: Iterator[Any]) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, MusetError) and error.refusal


def _wait_s(error: Exception) -> int:
    return (error.retry_after or 0) if isinstance(error, MusetError) else 0


def _outcome_of(error: Exception, *, has_text: bool) -> Outcome:
    """In what way a call has failed."""
    if isinstance(error, OperationTimeoutError):
        return Outcome.TIMEOUT
    if isinstance(error, ValidationError):
        return Outcome.REJECTED
    if isinstance(error, NetworkError):
        return Outcome.UNAVAILABLE
    if not isinstance(error, ExternalServiceError):
        return Outcome.ERROR
    if not error.unavailable:
        return Outcome.CUT if has_text else Outcome.ERROR
    if not error.retryable:
        return Outcome.UNAUTHORIZED
    return Outcome.UNAVAILABLE if error.retry_after_s is None else Outcome.RATE_LIMITED
