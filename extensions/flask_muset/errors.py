"""The vocabulary of errors: categories, severities, one table and one exception tree.

    MusetError
    ├── AuthenticationError        401  authentication
    ├── AuthorizationError         403  authorization
    ├── ValidationError            422  validation
    ├── NotFoundError              404  not_found
    ├── ConflictError              409  conflict
    ├── RateLimitError             429  rate_limit
    │   └── OverloadedError        503  rate_limit
    ├── ExternalServiceError       502  external_service
    │   ├── CircuitOpenError       503  external_service
    │   └── CacheUnavailable       503  external_service
    ├── InternalError              500  internal
    ├── DatabaseError              500  database          503 when it cannot be reached
    ├── NetworkError               503  network
    └── OperationTimeoutError      504  timeout

`TABLE` has one row for each category. The body, the headers, the level of the log line, the labels
of the metrics, the decision to retry, what a circuit breaker counts, the OpenAPI components and the
catalogue are all read from it when they are needed, so changing a row changes all of them.
Nothing here knows Flask.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

__all__ = [
    "DEFAULT_RETRY_AFTER_S",
    "TABLE",
    "AuthenticationError",
    "AuthorizationError",
    "CacheUnavailable",
    "CircuitOpenError",
    "ConflictError",
    "DatabaseError",
    "ErrorCategory",
    "ExternalServiceError",
    "InternalError",
    "MusetError",
    "NetworkError",
    "NotFoundError",
    "OperationTimeoutError",
    "OverloadedError",
    "RateLimitError",
    "Row",
    "Severity",
    "ValidationError",
]

#: Seconds that a retryable 429 or 503 tells a client to wait when nothing better is known.
DEFAULT_RETRY_AFTER_S = 1


class ErrorCategory(StrEnum):
    """What kind of thing went wrong."""

    AUTHENTICATION = "authentication"
    AUTHORIZATION = "authorization"
    VALIDATION = "validation"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    RATE_LIMIT = "rate_limit"
    EXTERNAL_SERVICE = "external_service"
    INTERNAL = "internal"
    DATABASE = "database"
    NETWORK = "network"
    TIMEOUT = "timeout"


class Severity(StrEnum):
    """How much it matters to the people who run the service."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Row:
    """All that follows from a category.

    Attributes:
        error: Name of the category's own exception class.
        status: HTTP status of the category's own class.
        other_statuses: Statuses that some errors of the category have instead.
        retryable: Whether the same request may succeed later.
        shows_details: Whether a client may see `details`.
        counts_as_failure: Whether a circuit breaker counts it against the dependency.
        log_level: Level of its log line, a number of `logging`.
        message: What a person reads when the error brings no text of its own.
        meaning: For the catalogue: what happened.
        remedy: For the catalogue: what the caller can do.
    """

    error: str
    status: int
    severity: Severity
    retryable: bool
    shows_details: bool
    counts_as_failure: bool
    log_level: int
    message: str
    meaning: str
    remedy: str
    other_statuses: tuple[int, ...] = ()


TABLE: dict[ErrorCategory, Row] = {
    ErrorCategory.AUTHENTICATION: Row(
        error="AuthenticationError",
        status=401,
        severity=Severity.MEDIUM,
        retryable=False,
        shows_details=True,
        counts_as_failure=False,
        log_level=logging.WARNING,
        message="Authentication is required.",
        meaning="The request has no credentials, or they are not valid.",
        remedy="Send valid credentials.",
    ),
    ErrorCategory.AUTHORIZATION: Row(
        error="AuthorizationError",
        status=403,
        severity=Severity.MEDIUM,
        retryable=False,
        shows_details=True,
        counts_as_failure=False,
        log_level=logging.WARNING,
        message="You are not allowed to do this.",
        meaning="The credentials are valid, but they do not permit this.",
        remedy="Use credentials with the needed role, or ask somebody who has them.",
    ),
    ErrorCategory.VALIDATION: Row(
        error="ValidationError",
        status=422,
        other_statuses=(400, 405, 406, 411, 413, 414, 415, 416, 417, 431),
        severity=Severity.LOW,
        retryable=False,
        shows_details=True,
        counts_as_failure=False,
        log_level=logging.INFO,
        message="The request is not valid.",
        meaning="The request cannot be read (400) or has values that are not allowed (422).",
        remedy="Correct what `errors` lists and send the request again.",
    ),
    ErrorCategory.NOT_FOUND: Row(
        error="NotFoundError",
        status=404,
        other_statuses=(410,),
        severity=Severity.LOW,
        retryable=False,
        shows_details=True,
        counts_as_failure=False,
        log_level=logging.INFO,
        message="The requested resource was not found.",
        meaning="There is nothing at this address, or not any more (410).",
        remedy="Check the address and the ids in it.",
    ),
    ErrorCategory.CONFLICT: Row(
        error="ConflictError",
        status=409,
        other_statuses=(412, 428),
        severity=Severity.LOW,
        retryable=False,
        shows_details=True,
        counts_as_failure=False,
        log_level=logging.INFO,
        message="The request conflicts with the current state of the resource.",
        meaning="The resource is in a state that does not allow this, or it has changed meanwhile.",
        remedy="Read the resource again and decide on its new state.",
    ),
    ErrorCategory.RATE_LIMIT: Row(
        error="RateLimitError",
        status=429,
        other_statuses=(503,),
        severity=Severity.MEDIUM,
        retryable=True,
        shows_details=True,
        counts_as_failure=False,
        log_level=logging.WARNING,
        message="Too many requests. Please wait before the next one.",
        meaning="This caller is too fast (429), or the service has no room left (503).",
        remedy="Wait for the seconds in `Retry-After`, then try again.",
    ),
    ErrorCategory.EXTERNAL_SERVICE: Row(
        error="ExternalServiceError",
        status=502,
        other_statuses=(503,),
        severity=Severity.HIGH,
        retryable=True,
        shows_details=False,
        counts_as_failure=True,
        log_level=logging.ERROR,
        message="A service that this one depends on did not answer properly.",
        meaning="Another service failed (502), or it is known to be away (503).",
        remedy="Try again later; wait for `Retry-After` where it is given.",
    ),
    ErrorCategory.INTERNAL: Row(
        error="InternalError",
        status=500,
        other_statuses=(501, 505),
        severity=Severity.CRITICAL,
        retryable=False,
        shows_details=False,
        counts_as_failure=True,
        log_level=logging.CRITICAL,
        message="Something went wrong on our side.",
        meaning="The service has a fault.",
        remedy="Report it with the `request_id`; sending it again will not help.",
    ),
    ErrorCategory.DATABASE: Row(
        error="DatabaseError",
        status=500,
        other_statuses=(503,),
        severity=Severity.CRITICAL,
        retryable=False,
        shows_details=False,
        counts_as_failure=True,
        log_level=logging.CRITICAL,
        message="The data could not be read or stored.",
        meaning="The database refused (500), or it cannot be reached now (503, retryable).",
        remedy="With 503 wait for `Retry-After` and try again; else report the `request_id`.",
    ),
    ErrorCategory.NETWORK: Row(
        error="NetworkError",
        status=503,
        severity=Severity.HIGH,
        retryable=True,
        shows_details=False,
        counts_as_failure=True,
        log_level=logging.ERROR,
        message="A connection that this request needs could not be made or broke.",
        meaning="The network between this service and another one failed.",
        remedy="Wait for the seconds in `Retry-After`, then try again.",
    ),
    ErrorCategory.TIMEOUT: Row(
        error="OperationTimeoutError",
        status=504,
        other_statuses=(408,),
        severity=Severity.HIGH,
        retryable=True,
        shows_details=False,
        counts_as_failure=True,
        log_level=logging.ERROR,
        message="The operation took too long.",
        meaning="The time allowed for the request, or for a part of it, has passed.",
        remedy="Try again later, with less to do if that is possible.",
    ),
}


class MusetError(Exception):
    """The root of the tree.

    Args:
        message: What happened, for developers; it goes to the log.
        details: More about it, by name. Clients see it where the table says so, redacted.
        user_message: What a person reads; None takes the class's own text.
        retry_after: Seconds after which trying again makes sense, at least 0.
        code: Machine-readable reason, the `code` of this error's entry in `errors`.
        retryable: None takes the table's answer.
    """

    category: ClassVar[ErrorCategory] = ErrorCategory.INTERNAL
    #: True for a deliberate refusal by this process: never retried here, logged in summaries.
    refusal: bool = False
    code: str | None = None
    _details: dict[str, Any] | None = None
    _user_message: str | None = None
    _retry_after: float | None = None
    _retryable: bool | None = None
    _status: int | None = None

    def __init__(
        self,
        message: str = "",
        *,
        details: Mapping[str, Any] | None = None,
        user_message: str | None = None,
        retry_after: float | None = None,
        code: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        # What is not given is the class's: refusals are made by the thousand while a service is
        # overloaded.
        self.args = (message,)
        if details:
            self._details = dict(details)
        if user_message is not None:
            self._user_message = user_message
        if retry_after is not None:
            self._retry_after = retry_after
        if code is not None:
            self.code = code
        if retryable is not None:
            self._retryable = retryable

    @property
    def message(self) -> str:
        """What happened, for developers."""
        return self.args[0]  # type: ignore[no-any-return]

    @property
    def details(self) -> dict[str, Any]:
        """More about it, by name; a dictionary of this error's own."""
        if self._details is None:
            self._details = {}
        return self._details

    @property
    def row(self) -> Row:
        """The table's row for this category."""
        return TABLE[self.category]

    @property
    def status(self) -> int:
        """HTTP status."""
        return self._status or TABLE[self.category].status

    @status.setter
    def status(self, status: int) -> None:
        self._status = status

    @property
    def severity(self) -> Severity:
        """How much it matters."""
        return self.row.severity

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return TABLE[self.category].retryable if self._retryable is None else self._retryable

    @property
    def retry_after(self) -> int | None:
        """Whole seconds to wait, rounded up so that waiting them is always enough, or None."""
        if self._retry_after is not None:
            return max(0, math.ceil(self._retry_after))
        return DEFAULT_RETRY_AFTER_S if self.status in (429, 503) and self.retryable else None

    @property
    def retry_after_s(self) -> float | None:
        """Seconds to wait as whoever raised it said, None where nobody did."""
        return self._retry_after

    @property
    def user_message(self) -> str:
        """What a person reads."""
        return self._default_message() if self._user_message is None else self._user_message

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Entries `{field, code, message}`, for errors that name a field or a code."""
        if self.code is None:
            return []
        return [{"field": None, "code": self.code, "message": self.user_message}]

    def _default_message(self) -> str:
        return self.row.message


class AuthenticationError(MusetError):
    """No credentials, or not valid ones."""

    category = ErrorCategory.AUTHENTICATION


class AuthorizationError(MusetError):
    """Valid credentials that do not permit this."""

    category = ErrorCategory.AUTHORIZATION


class ValidationError(MusetError):
    """A request that is not valid.

    Args:
        field: Path of the value, such as `email` or `items.0.email`.
        errors: Entries `{field, code, message}` where there are several; each is shown to the
            client, redacted.
        malformed: True for a body that cannot be read at all: status 400 instead of 422.
    """

    category = ErrorCategory.VALIDATION

    def __init__(
        self,
        message: str = "",
        field: str | None = None,
        details: Mapping[str, Any] | None = None,
        *,
        errors: Iterable[Mapping[str, Any]] = (),
        malformed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(message, details=details, **options)
        self.field = field
        self._errors: Sequence[Mapping[str, Any]] = tuple(errors)
        if malformed:
            self.status = 400

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Entries `{field, code, message}`."""
        if self._errors:
            return [dict(entry) for entry in self._errors]
        if self.field is None and self.code is None:
            return []
        message = self._user_message or self.message or self.row.message
        return [{"field": self.field, "code": self.code or "invalid", "message": message}]

    def _default_message(self) -> str:
        if self.status == 400:
            return "The request could not be read."
        return f"The value of '{self.field}' is not valid." if self.field else self.row.message


class NotFoundError(MusetError):
    """Nothing is there.

    Args:
        resource_type: What was looked for, such as `user`.
    """

    category = ErrorCategory.NOT_FOUND

    def __init__(
        self,
        message: str = "",
        resource_type: str | None = None,
        details: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(message, details=details, **options)
        self.resource_type = resource_type

    def _default_message(self) -> str:
        if self.resource_type is None:
            return self.row.message
        return f"The requested {self.resource_type} was not found."


class ConflictError(MusetError):
    """A state that does not allow this."""

    category = ErrorCategory.CONFLICT


class RateLimitError(MusetError):
    """A caller that is too fast."""

    category = ErrorCategory.RATE_LIMIT


class _UnavailableError(MusetError):
    """An error that is a 503 while its cause is away.

    Args:
        unavailable: True where the dependency cannot be used at all now.
    """

    unavailable: bool = False

    def __init__(self, message: str = "", *, unavailable: bool = False, **options: Any) -> None:
        super().__init__(message, **options)
        if unavailable:
            self.unavailable = True
            self.status = 503


class OverloadedError(RateLimitError):
    """No room for this request now, whoever sends it."""

    refusal = True
    _status = 503

    def _default_message(self) -> str:
        return "The service is busy. Please try again in a moment."


class ExternalServiceError(_UnavailableError):
    """Another service failed.

    Args:
        unavailable: True where it cannot be used at all now: status 503 instead of 502.
    """

    category = ErrorCategory.EXTERNAL_SERVICE


class CircuitOpenError(ExternalServiceError):
    """A dependency that is known to fail was not called."""

    refusal = True
    unavailable = True
    _status = 503
    # An open circuit refuses what it should relieve, so refusing must be cheap.
    __init__ = MusetError.__init__


class CacheUnavailable(ExternalServiceError):  # noqa: N818 - the name that users know
    """The cache cannot be reached and the answer would be wrong without it."""

    unavailable = True
    _status = 503
    __init__ = MusetError.__init__


class InternalError(MusetError):
    """A fault of this service."""


class DatabaseError(_UnavailableError):
    """The database refused.

    Args:
        unavailable: True where it cannot be reached: status 503 and retryable.
    """

    category = ErrorCategory.DATABASE

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return super().retryable or (self.unavailable and self._retryable is None)


class NetworkError(MusetError):
    """A connection could not be made, or it broke."""

    category = ErrorCategory.NETWORK


class OperationTimeoutError(MusetError):
    """The time has passed."""

    category = ErrorCategory.TIMEOUT
