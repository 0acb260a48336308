"""A question, the passages that speak about it, and an answer, whole or as a stream."""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flask_muset.errors import ValidationError
from muset.ports import (
    AnswerStatus,
    Asker,
    Cache,
    Delta,
    DocumentStore,
    Ledger,
    Model,
    Tokens,
)
from muset.services.answering import UNSURE, Account, Answer, Answering, Asking, Source
from muset.services.shared_read import SharedRead
from muset.services.streaming import (
    AnswerStream,
    Done,
    Event,
    Meta,
    Sink,
    Times,
    Unsent,
    live,
)

__all__ = ["AskService", "Question"]

#: Seconds for which an answer is kept. The documents cannot change meanwhile: they are in its key.
_KEPT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody asks.

    Attributes:
        text: Any text that is not blank.
        document_ids: Use these documents alone; None uses all.
        k: Passages that a provider gets at most.
        model: One that a provider has; None takes the first of each.
        max_tokens: Length of the answer at most.
        allow_degraded: Whether sentences of the documents may stand for a model's answer when no
            model answers.
    """

    text: str
    document_ids: Sequence[int] | None = None
    k: int = 8
    model: str | None = None
    max_tokens: int | None = None
    allow_degraded: bool = True


class _NotKeptError(Exception):
    """Carries an answer past the cache: only certain ones are kept."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("not kept")
        self.answer = answer


class AskService:
    """Answers from the stored documents.

    Args:
        documents: Where passages are found.
        cache: Where answers are kept.
        answering: The providers that make an answer of them.
        ledger: Where it is written down who has used what; None for nowhere.
        spawn: Runs a function beside the caller, with his context and his deadline; returns a
            greenlet or a started thread.
        times: Of streams.
        is_draining: Whether this process is to stop.
    """

    def __init__(
        self,
        documents: DocumentStore,
        cache: Cache,
        answering: Answering,
        ledger: Ledger | None = None,
        *,
        spawn: Callable[[Callable[[], None]], Any],
        times: Times | None = None,
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._documents = documents
        self._version = SharedRead(documents.version)
        self._cache = cache
        self._answering = answering
        self._ledger = ledger
        self._spawn = spawn
        self._times = times or Times()
        self._is_draining = is_draining

    def ask(self, question: Question, asker: Asker | None = None) -> Answer:
        """Answer a question; the same one about the same documents is answered once.

        Args:
            question: What is asked.
            asker: In whose name it is written down; None for nobody's.

        Raises:
            ValidationError: The question is blank, or a model or document does not exist; or it is
                too long for the model.
            Exception: Nobody has answered; see `Asking.answer`.
        """
        task = self._task(question)
        status, answer = "error", None
        try:
            answer = self._standing(self._kept_or_made(task), task)
            status = "success"
            return answer
        finally:
            self._record(asker, task, status, answer)

    def stream(self, question: Question, asker: Asker | None = None) -> AnswerStream:
        """Answer a question as a stream of events; see `ask`.

        What can be known at once is raised here, all else while the stream is read.
        """
        task = self._task(question)
        try:
            kept = self._cache.get(task.key)
            if isinstance(kept, Answer):
                return self._replayed(self._standing(kept, task), task, asker)
            asking = self._asking(task)
        except BaseException:
            self._record(asker, task, "error")
            raise
        batches = live(
            partial(self._produce, task, asking),
            asking.cancel,
            spawn=self._spawn,
            times=self._times,
            is_draining=self._is_draining,
        )
        return AnswerStream(batches, partial(self._record, asker, task), is_cached=False)

    def _replayed(self, kept: Answer, task: "_Task", asker: Asker | None) -> AnswerStream:
        events = [Meta(kept.model), Delta(kept.text), *_ending(kept, Account())]
        record = partial(self._record, asker, task, answer=kept)
        return AnswerStream(_at_once(events), record, is_cached=True)

    def _task(self, question: Question) -> "_Task":
        """Check a question, and find out whom and what its answer depends on."""
        if not question.text.strip():
            raise ValidationError("must not be blank", field="question")
        candidates = self._answering.candidates(question.model)
        ids = question.document_ids
        if ids is not None:
            missing = sorted(set(ids) - self._documents.existing(ids))
            if missing:
                raise ValidationError(f"unknown ids {missing}", field="document_ids")
        version = self._version()
        models = [(source.provider.name, model.name) for source, model in candidates]
        key = _key(question, models, version)
        return _Task(question, candidates, key, version, Account())

    def _asking(self, task: "_Task") -> Asking:
        question = task.question
        return Asking(
            self._answering,
            task.candidates,
            question.text,
            self._documents.search(question.text, k=question.k, document_ids=question.document_ids),
            max_tokens=question.max_tokens,
            allow_degraded=question.allow_degraded,
            account=task.account,
        )

    # --- A whole answer

    def _kept_or_made(self, task: "_Task") -> Answer:
        def fetch() -> Answer:
            answer = self._asking(task).answer(Unsent())
            if answer.status is not AnswerStatus.ANSWERED:
                raise _NotKeptError(answer)
            return answer

        is_kept = True
        try:
            answer: Answer = self._cache.cache_aside(task.key, fetch, _KEPT_S)
        except _NotKeptError as error:
            answer, is_kept = error.answer, False
        account = task.account
        if answer.status is AnswerStatus.DEGRADED and not account.attempts:
            # It was made for somebody else, who may have had less time.
            answer = self._asking(task).answer(Unsent())
        if account.attempts:
            return replace(
                answer,
                attempts=tuple(account.attempts),
                input_tokens=account.input_tokens,
                output_tokens=account.output_tokens,
            )
        # Somebody else has asked it, before or at this moment.
        return replace(answer, cached=is_kept)

    def _standing(self, answer: Answer, task: "_Task") -> Answer:
        """The answer, unless a document that it cites is gone: then nothing is left of it."""
        if not answer.citations or self._version() == task.version:
            return answer
        cited = {citation.document_id for citation in answer.citations}
        if cited <= self._documents.existing(sorted(cited)):
            return answer
        sure = answer.status is AnswerStatus.ANSWERED
        status = AnswerStatus.UNSURE if sure else answer.status
        return replace(answer, text=UNSURE, status=status, citations=())

    # --- A stream

    def _produce(self, task: "_Task", asking: Asking, sink: Sink) -> None:
        answer = self._standing(asking.answer(sink), task)
        if answer.status is AnswerStatus.ANSWERED:
            self._cache.set(task.key, answer, _KEPT_S)
        for event in _ending(answer, task.account):
            sink.put(event)

    # --- The ledger

    def _record(
        self, asker: Asker | None, task: "_Task", status: str, answer: Answer | None = None
    ) -> None:
        if self._ledger is None or asker is None:
            return
        account = task.account
        source, first = task.candidates[0]
        provider, model = source.provider.name, first.name
        if account.provider:
            provider, model = account.provider, account.model
        elif answer is not None:
            provider, model = answer.provider, answer.model
        self._ledger.record(
            asker,
            provider=provider,
            model=model,
            status=status,
            input_tokens=account.input_tokens,
            output_tokens=account.output_tokens,
            estimated=account.estimated,
            cost=account.billionths,
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """A checked question.

    Attributes:
        candidates: Who may be asked, in order.
        key: Of its answer in the cache.
        version: Of the documents when it was asked.
        account: What it has taken.
    """

    question: Question
    candidates: Sequence[tuple[Source, Model]]
    key: str
    version: str
    account: Account


def _key(question: Question, models: Sequence[tuple[str, str]], version: str) -> str:
    """Of the documents that there are now, and all else that the answer depends on."""
    ids = question.document_ids
    asked: Mapping[str, object] = {
        "question": question.text,
        "documents": None if ids is None else sorted(set(ids)),
        "k": question.k,
        "max_tokens": question.max_tokens,
        "allow_degraded": question.allow_degraded,
        "models": models,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"ask:{models[0][1]}:{version}:{digest}"


def _ending(answer: Answer, account: Account) -> list[Event]:
    """What follows the text."""
    tokens = Tokens(account.input_tokens, account.output_tokens, account.estimated)
    return [*answer.citations, tokens, Done(answer.status)]


def _at_once(events: Sequence[Event]) -> Generator[Sequence[Event], None, None]:
    yield events
