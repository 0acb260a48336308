"""A question, the passages that speak about it, and an answer from a provider."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flask_muset.errors import ValidationError
from muset.ports import (
    AnswerStatus,
    CallPolicy,
    Citation,
    DocumentStore,
    Provider,
    ProviderAnswer,
    TrackCall,
)

__all__ = ["Answer", "AskService", "Attempt"]

UNSURE = "The documents do not say enough about this."


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
    """An answer and how it came about."""

    text: str
    status: AnswerStatus
    citations: tuple[Citation, ...]
    attempts: tuple[Attempt, ...]
    input_tokens: int
    output_tokens: int
    model: str


class AskService:
    """Answers from the stored documents.

    Args:
        documents: Where passages are found.
        provider: What makes an answer of them.
        policy: What guards the calls of the provider.
        clock: Seconds that never go back.
        track: Counts a call: model, seconds, outcome, tokens in and out.
    """

    def __init__(
        self,
        documents: DocumentStore,
        provider: Provider,
        policy: CallPolicy,
        clock: Callable[[], float],
        track: TrackCall | None = None,
    ) -> None:
        self._documents = documents
        self._provider = provider
        self._policy = policy
        self._clock = clock
        self._track = track

    def ask(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        k: int = 8,
        model: str | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """Answer a question.

        Args:
            question: Any text that is not blank.
            document_ids: Use these documents alone; None uses all.
            k: Passages that the provider gets at most.
            model: One that the provider has; None takes its first.
            max_tokens: Length of the answer at most.

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
        retrieval = self._documents.search(question, k=k, document_ids=document_ids)
        attempts: list[Attempt] = []
        ended = self._clock()

        def attempt() -> ProviderAnswer:
            nonlocal ended
            began, outcome, tokens = self._clock(), "error", (0, 0)
            try:
                answer = self._provider.answer(
                    question, retrieval, model=chosen, max_tokens=max_tokens
                )
                outcome, tokens = "success", (answer.input_tokens, answer.output_tokens)
                return answer
            finally:
                wait_s, ended = began - ended, self._clock()
                attempts.append(
                    Attempt(self._provider.name, chosen, outcome, wait_s, ended - began)
                )
                if self._track is not None:
                    self._track(chosen, ended - began, outcome, *tokens)

        result: ProviderAnswer = self._policy.call(attempt)
        return Answer(
            text=result.text or UNSURE,
            status=result.status,
            citations=result.citations,
            attempts=tuple(attempts),
            input_tokens=result.input_tokens,
            output_tokens=result.output_tokens,
            model=chosen,
        )

    def _model(self, model: str | None) -> str:
        if model is None:
            return self._provider.models[0]
        if model not in self._provider.models:
            known = ", ".join(self._provider.models)
            raise ValidationError(f"must be one of: {known}", field="model")
        return model
