"""What the guarded HTTP clients share: what fails, what may be sent again, what a caller gets.

    answer or exception of the client -> Exchange -> what the policy is told
    what the policy ends with         -> Exchange -> answer or exception of the client

A caller must not be able to tell whether a policy stands between it and the server, but for what
the policy itself does. So when a policy gives up, the real answer is returned, or the client's own
exception raised; and what the policy refuses or ends is raised as an exception of the client's
family, with the reason as its cause. No client library is known here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from flask_muset.deadline import deadline
from flask_muset.errors import (
    ErrorCategory,
    ExternalServiceError,
    MusetError,
    OperationTimeoutError,
)
from flask_muset.resilience.guards import Guard, error_of
from flask_muset.translate import CLASSES, retry_after_s

__all__ = [
    "Answer",
    "AnswerError",
    "Exchange",
    "PolicyEndedError",
    "check_policy",
    "give",
    "is_small",
    "run",
]

#: Source: RFC 9110, 9.2.2. CONNECT is not idempotent.
_IDEMPOTENT = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PUT", "TRACE"})
#: Answers that say "not now": throttled, a gateway without its server, unavailable.
_MAY_PASS = frozenset({429, 502, 503, 504})
#: A body up to this is read to its end, in bytes, so that its connection can be used again while
#: the retry waits. To read a longer one costs more than a new connection.
_SMALL_BYTES = 64 * 1024


class Answer(Protocol):
    """What is asked of a client's response."""

    status_code: int

    @property
    def headers(self) -> Any:
        """Names in any case."""

    def close(self) -> None:
        """Give the connection back."""


R = TypeVar("R", bound=Answer)


class AnswerError(ExternalServiceError):
    """An answer that a policy takes for a failure: 429, or a status of 500 and above.

    429, 502, 503 and 504 are retryable, if the request may be sent again. Other 4xx are no failure:
    they show that the server answers.

    Attributes:
        response: The client's response, for `Fallback` and `retry_on`.
    """

    def __init__(self, response: Any, *, retryable: bool) -> None:
        status = response.status_code
        super().__init__(
            f"answered with status {status}",
            unavailable=status in (429, 503),
            retry_after=retry_after_s(response.headers),
            retryable=retryable,
        )
        self.response = response


class PolicyEndedError(Exception):
    """The policy, or a deadline, ended a request, not the server.

    Each client's module has two of it that are of the client's family too.
    """

    @property
    def muset_error(self) -> MusetError | None:
        """The reason, which is the cause too."""
        return self.__cause__ if isinstance(self.__cause__, MusetError) else None


class _SpentError(ExternalServiceError):
    """A policy asked for one more attempt at what must not be repeated.

    It is a refusal, so no retry goes on, whatever its `retry_on` says, and no breaker counts it.
    """

    refusal = True


def check_policy(owner: str, policy: Any) -> Guard:
    """The policy as it was given.

    Raises:
        ValueError: It is neither a policy nor a part of one.
    """
    if not isinstance(policy, Guard):
        raise ValueError(
            f"{owner}: policy must be a Policy or one of its parts, such as RetryStrategy(), "
            f"got {policy!r}."
        )
    return policy


class Exchange(ABC, Generic[R]):
    """One request, and what its attempts came to.

    Args:
        method: In upper case.
        headers: Of the request, names in any case.
    """

    def __init__(self, method: str | None, headers: Mapping[str, Any]) -> None:
        key = headers.get("Idempotency-Key")
        self._is_idempotent = method in _IDEMPOTENT or bool(key and key.strip())
        self._may_send = True
        #: The failing answer of the last attempt while nobody has it.
        self._answer: R | None = None
        #: What the client raised in the last attempt that failed so.
        self._failure: Exception | None = None
        #: What the policy was told of the last attempt.
        self._told: Exception | None = None

    # --- what each client knows ---

    @abstractmethod
    def is_unsent(self, error: Exception) -> bool:
        """Whether a failure certainly came before a byte of the request was sent."""

    @abstractmethod
    def rewind(self) -> bool:
        """Make the body ready to be sent again; False if that cannot be done."""

    @abstractmethod
    def ended(self, error: MusetError) -> PolicyEndedError:
        """The exception of the client's family for a request that was not the server's to end."""

    # --- an attempt ---

    def begin(self) -> R | None:
        """Begin an attempt; the answer of the one before is returned and has to be closed.

        Raises:
            ExternalServiceError: The request may not be sent again.
        """
        if not self._may_send:
            raise _SpentError("the request must not be sent again") from self._told
        # Before anything is sent: what cuts the attempt off, as a time-out does, says nothing here.
        self._may_send = self._is_idempotent and self.rewind()
        return self._take_answer()

    def left_s(self) -> float | None:
        """Seconds that the attempt may take, above 0, None without a deadline.

        Raises:
            OperationTimeoutError: There is no time left. It is a refusal: nothing was sent, so
                nothing is known of the server.
        """
        left_s, scope = deadline.remaining(), deadline.current()
        if scope is not None and not left_s:
            error = scope.error()
            error.refusal = True
            raise error
        return left_s

    def is_worth_reading(self, response: R) -> bool:
        """Whether an answer is small and will probably be followed by another attempt."""
        return (
            self._is_idempotent and response.status_code in _MAY_PASS and is_small(response.headers)
        )

    def failed(self, error: Exception) -> None:
        """Take note of what the client raised in an attempt.

        Raises:
            MusetError: What the policy has to be told in its place.
        """
        self._may_send = self.is_unsent(error) or (self._is_idempotent and self.rewind())
        self._failure = error
        self._told = self._in_words(error)
        if self._told is not error:
            raise self._told from error

    def _in_words(self, error: Exception) -> Exception:
        known, scope = error_of(error), deadline.current()
        if known.refusal:
            return error
        retryable = None if self._may_send else False
        if scope and known.category is ErrorCategory.TIMEOUT and not deadline.remaining():
            # The client's own time-out was cut to what was left, so it is the deadline's doing.
            self._failure = None
            ended = OperationTimeoutError(scope.error().message, retryable=retryable)
            ended.refusal = not scope.counts
            return ended
        if self._may_send or not known.retryable:
            return error
        return CLASSES[known.category](known.message, retryable=False)

    def answered(self, response: R) -> None:
        """Take note of an answer.

        Raises:
            AnswerError: The answer is a failure.
        """
        status = response.status_code
        if status < 500 and status != 429:
            return
        self._may_send = self._is_idempotent and self.rewind()
        self._answer = response
        self._told = AnswerError(response, retryable=self._may_send and status in _MAY_PASS)
        raise self._told

    # --- the end ---

    def ending(self, error: Exception) -> R | Exception:
        """What a caller gets for what the policy raised: an answer, or an exception."""
        if error is self._told or isinstance(error, _SpentError):
            answer = self._take_answer()
            if answer is not None:
                return answer
            if self._failure is not None:
                return self._failure
        if isinstance(error, _SpentError):
            error = OperationTimeoutError("cut off after it was sent, and not to be sent again")
        if not isinstance(error, MusetError):
            return error
        ended = self.ended(error)
        ended.__cause__ = error
        return ended

    def close(self, given: Any) -> R | None:
        """End; an answer that nobody got is returned and has to be closed.

        Args:
            given: What the caller gets, None if an exception. A Fallback may give the answer that
                failed.
        """
        # Exceptions lead to frames and these to this object: only gc would free the circle.
        self._told = self._failure = None
        answer = self._take_answer()
        return None if answer is given else answer

    def _take_answer(self) -> R | None:
        answer, self._answer = self._answer, None
        return answer


def is_small(headers: Any) -> bool:
    """Whether an answer says that its body is short."""
    length = headers.get("Content-Length") or ""
    # int() refuses thousands of digits
    return length.isascii() and length.isdigit() and len(length) < 9 and int(length) <= _SMALL_BYTES


def run(
    policy: Guard,
    exchange: Exchange[R],
    send: Callable[[float | None], R],
    drop: Callable[[R], None],
) -> Any:
    """Make a request under a policy.

    Args:
        policy: What guards it.
        exchange: Its state.
        send: Makes one attempt; is given the seconds that it may take.
        drop: Closes an answer before the next attempt.

    Returns:
        The answer, or what a Fallback gave.
    """

    def attempt() -> R:
        last = exchange.begin()
        if last is not None:
            drop(last)
        left_s = exchange.left_s()
        try:
            response = send(left_s)
        except Exception as error:
            exchange.failed(error)
            raise
        exchange.answered(response)
        return response

    given: Any = None
    try:
        given = policy.call(attempt)
    except Exception as error:
        given = exchange.ending(error)
        if given is error:
            given = None
            raise
    finally:
        unused = exchange.close(given)
        if unused is not None:
            unused.close()
    # Outside of the handler: what is raised must look as it does without a policy.
    try:
        return give(given)
    finally:
        del given


def give(given: Any) -> Any:
    """Return an answer, raise an exception."""
    if isinstance(given, Exception):
        try:
            raise given
        finally:
            del given
    return given
