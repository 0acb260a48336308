"""A question, the passages that speak about it, and an answer from a provider."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flask_muset.errors import ValidationError
from muset.ports import (
    AnswerStatus,
    Asker,
    Cache,
    CallPolicy,
    Citation,
    DocumentStore,
    Ledger,
    Provider,
    ProviderAnswer,
    Retrieval,
    TrackCall,
)

__all__ = ["Answer", "AskService", "Attempt"]

UNSURE = "The documents do not say enough about this."
#: Seconds for which an answer is kept. The documents cannot change meanwhile: they are in its key.
_KEPT_S = 3600.0


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
    model: str
    cached: bool = False


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
        provider: What makes an answer of them.
        policy: What guards the calls of the provider.
        clock: Seconds that never go back.
        track: Counts a call: model, seconds, outcome, tokens in and out.
        ledger: Where it is written down who has used what; None for nowhere.
    """

    def __init__(
        self,
        documents: DocumentStore,
        cache: Cache,
        provider: Provider,
        policy: CallPolicy,
        clock: Callable[[], float],
        track: TrackCall | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._documents = documents
        self._cache = cache
        self._provider = provider
        self._policy = policy
        self._clock = clock
        self._track = track
        self._ledger = ledger

    def ask(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        k: int = 8,
        model: str | None = None,
        max_tokens: int | None = None,
        asker: Asker | None = None,
    ) -> Answer:
        """Answer a question; the same one about the same documents is answered once.

        Args:
            question: Any text that is not blank.
            document_ids: Use these documents alone; None uses all.
            k: Passages that the provider gets at most.
            model: One that the provider has; None takes its first.
            max_tokens: Length of the answer at most.
            asker: In whose name it is written down; None for nobody's.

        Raises:
            ValidationError: The question is blank, or a model or document does not exist.
        """
        if not question.strip():
            raise ValidationError("must not be blank", field="question")
        chosen = self._model(model)
        if document_ids is not None:
            missing = sorted(set(document_ids) - self._documents.existing(document_ids))
            if missing:
                raise ValidationError(f"unknown ids {missing}", field="document_ids")
        answer = None
        try:
            answer = self._cached(question, document_ids, k, chosen, max_tokens)
            return answer
        finally:
            if asker is not None:
                self._record(asker, chosen, answer)

    def _record(self, asker: Asker, model: str, answer: Answer | None) -> None:
        if self._ledger is None:
            return
        tokens = (0, 0) if answer is None else (answer.input_tokens, answer.output_tokens)
        self._ledger.record(
            asker,
            provider=self._provider.name,
            model=model,
            status="error" if answer is None else "success",
            input_tokens=tokens[0],
            output_tokens=tokens[1],
        )

    def _cached(
        self,
        question: str,
        document_ids: Sequence[int] | None,
        k: int,
        chosen: str,
        max_tokens: int | None,
    ) -> Answer:
        asked = {
            "question": question,
            "documents": None if document_ids is None else sorted(set(document_ids)),
            "k": k,
            "max_tokens": max_tokens,
        }
        attempts: list[Attempt] = []

        def fetch() -> Answer:
            retrieval = self._documents.search(question, k=k, document_ids=document_ids)
            answer = self._answer(question, retrieval, chosen, max_tokens, attempts)
            if answer.status is not AnswerStatus.ANSWERED:
                raise _NotKeptError(answer)
            return answer

        is_kept = True
        try:
            answer: Answer = self._cache.cache_aside(self._key(chosen, asked), fetch, _KEPT_S)
        except _NotKeptError as error:
            answer, is_kept = error.answer, False
        if attempts:
            return answer
        # Somebody else has asked it, before or at this moment.
        return replace(answer, attempts=(), input_tokens=0, output_tokens=0, cached=is_kept)

    def _key(self, model: str, asked: Mapping[str, object]) -> str:
        """Of the model, the documents that there are now, and all that the answer depends on."""
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return f"ask:{model}:{self._documents.version()}:{digest}"

    def _answer(
        self,
        question: str,
        retrieval: Retrieval,
        model: str,
        max_tokens: int | None,
        attempts: list[Attempt],
    ) -> Answer:
        """Ask the provider under its policy; each call is added to `attempts`."""
        ended = self._clock()

        def attempt() -> ProviderAnswer:
            nonlocal ended
            began, outcome, tokens = self._clock(), "error", (0, 0)
            try:
                answer = self._provider.answer(
                    question, retrieval, model=model, max_tokens=max_tokens
                )
                outcome, tokens = "success", (answer.input_tokens, answer.output_tokens)
                return answer
            finally:
                wait_s, ended = began - ended, self._clock()
                attempts.append(Attempt(self._provider.name, model, outcome, wait_s, ended - began))
                if self._track is not None:
                    self._track(model, ended - began, outcome, *tokens)

        result: ProviderAnswer = self._policy.call(attempt)
        return Answer(
            text=result.text or UNSURE,
            status=result.status,
            citations=result.citations,
            attempts=tuple(attempts),
            input_tokens=result.input_tokens,
            output_tokens=result.output_tokens,
            model=model,
        )

    def _model(self, model: str | None) -> str:
        if model is None:
            return self._provider.models[0]
        if model not in self._provider.models:
            known = ", ".join(self._provider.models)
            raise ValidationError(f"must be one of: {known}", field="model")
        return model
