"""Other libraries' exceptions in the words of `flask_muset.errors`.

A class is known by the name of its module and its own, found along the method resolution order, so
that nothing is imported and a library that is not there costs nothing.
"""

import errno
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from werkzeug.http import parse_date

from flask_muset.clock import SYSTEM
from flask_muset.errors import (
    TABLE,
    AuthenticationError,
    AuthorizationError,
    ConflictError,
    DatabaseError,
    ErrorCategory,
    ExternalServiceError,
    InternalError,
    MusetError,
    NetworkError,
    NotFoundError,
    OperationTimeoutError,
    OverloadedError,
    RateLimitError,
    ValidationError,
)

__all__ = [
    "CLASSES",
    "DISK_REFUSES",
    "Translation",
    "aborted_by_validation",
    "field_errors",
    "is_timeout",
    "retry_after_s",
    "translate",
]

#: What an exception becomes: a category, or a function of the exception.
Translation = ErrorCategory | Callable[[Any], MusetError]

CLASSES: Mapping[ErrorCategory, type[MusetError]] = {
    cls.category: cls
    for cls in (
        AuthenticationError,
        AuthorizationError,
        ValidationError,
        NotFoundError,
        ConflictError,
        RateLimitError,
        ExternalServiceError,
        InternalError,
        DatabaseError,
        NetworkError,
        OperationTimeoutError,
    )
}

#: `code` of a DatabaseError whose cause is the database's disk. Reads may go on all the same.
DISK_REFUSES = "disk"
_MAX_FIELD_ERRORS = 100
#: A longer Retry-After is a mistake: nobody waits for a month.
_MAX_RETRY_AFTER_S = 30.0 * 86_400


def translate(exception: BaseException, own: Mapping[type, Translation]) -> MusetError:
    """Return the error that stands for an exception.

    Args:
        exception: As it was raised.
        own: The app's own translations; of two that fit the nearer class wins, and they win over
            the built-in ones.
    """
    if isinstance(exception, MusetError):
        return exception
    # An HTTP client's own exception that stands for a refusal or a time-out of ours.
    ended = getattr(exception, "muset_error", None)
    if isinstance(ended, MusetError):
        return ended
    if own:
        for cls in type(exception).__mro__:
            if cls in own:
                return _apply(own[cls], exception)
    known = _known(type(exception))  # type: ignore[arg-type] # mypy doubts that classes hash
    return InternalError(str(exception)) if known is None else _apply(known, exception)


@lru_cache(maxsize=1024)
def _known(cls: type[BaseException]) -> Translation | None:
    """The nearest built-in translation."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((_KNOWN[name] for name in names if name in _KNOWN), None)


def _apply(translation: Translation, exception: BaseException) -> MusetError:
    if isinstance(translation, ErrorCategory):
        return CLASSES[translation](str(exception))
    return translation(exception)


def is_timeout(exception: BaseException) -> bool:
    """Whether it is gevent's Timeout, which is no `Exception` and passes every handler of Flask."""
    return any(
        cls.__module__ == "gevent.timeout" and cls.__qualname__ == "Timeout"
        for cls in type(exception).__mro__
    )


# --- Werkzeug -------------------------------------------------------------------------------------

_BY_STATUS = {row.status: category for category, row in TABLE.items()} | {
    408: ErrorCategory.TIMEOUT,
    410: ErrorCategory.NOT_FOUND,
    412: ErrorCategory.CONFLICT,
    428: ErrorCategory.CONFLICT,
    # Three categories have 500 or 503; these are the ones that a bare status means.
    500: ErrorCategory.INTERNAL,
    503: ErrorCategory.NETWORK,
}


def _category_of_status(status: int) -> ErrorCategory:
    fallback = ErrorCategory.VALIDATION if status < 500 else ErrorCategory.INTERNAL
    return _BY_STATUS.get(status, fallback)


def _http(exception: Any) -> MusetError:
    """A Werkzeug exception keeps its status, its headers and a description of its own."""
    if exception.code is None:
        return ValidationError(
            "the library refused the request", errors=field_errors(_payload_of(exception) or ())
        )
    data = getattr(exception, "data", None)
    if isinstance(data, Mapping) and data.get("messages"):  # webargs and flask-smorest
        error: MusetError = ValidationError(str(exception), errors=_flat(data["messages"]))
    else:
        cls = CLASSES[_category_of_status(exception.code)]
        error = cls(str(exception), user_message=_description(exception, cls))
    error.status = exception.code
    retry_after = getattr(exception, "retry_after", None)
    if isinstance(retry_after, int | float):
        error._retry_after = float(retry_after)
    return error


def _description(exception: Any, cls: type[MusetError]) -> str | None:
    """The exception's text where it says more than the category's, else None."""
    description = exception.description
    is_default = description == type(exception).description
    if not isinstance(description, str) or (
        is_default and exception.code in (400, TABLE[cls.category].status)
    ):
        return None
    return description


def field_errors(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries `{field, code, message}` of pydantic's, without the values that they bear."""
    return [
        {
            "field": ".".join(str(part) for part in item.get("loc") or ()) or None,
            "code": str(item.get("type") or "invalid"),
            "message": str(item.get("msg") or "The value is not valid."),
        }
        for _, item in zip(range(_MAX_FIELD_ERRORS), items, strict=False)
    ]


def _payload_of(exception: Any) -> list[dict[str, Any]] | None:
    """The list of pydantic's errors in the response that a library aborted with, else None.

    spectree validates and aborts with a finished response, which Flask would send as it is.
    """
    response: Any = getattr(exception, "response", None)
    if exception.code is not None or getattr(response, "status_code", 0) not in (400, 422):
        return None
    payload = response.get_json(silent=True) if response.is_json else None
    is_pydantic = isinstance(payload, list) and all(
        isinstance(item, dict) and {"loc", "msg", "type"} <= item.keys() for item in payload
    )
    return payload if is_pydantic and payload else None


def aborted_by_validation(exception: Any) -> bool:
    """Whether a response-bearing abort is a validation library's own refusal."""
    return _payload_of(exception) is not None


# --- Validation libraries -------------------------------------------------------------------------


def _pydantic(exception: Any) -> MusetError:
    errors = exception.errors(include_url=False, include_context=False, include_input=False)
    return ValidationError(
        f"{exception.error_count()} validation errors for {exception.title}",
        errors=field_errors(errors),
    )


def _flat(messages: Any, path: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Turn nested messages, as marshmallow has them, into entries."""
    if isinstance(messages, Mapping):
        pairs = [
            entry for key, value in messages.items() for entry in _flat(value, (*path, str(key)))
        ]
        return pairs[:_MAX_FIELD_ERRORS]
    texts = messages if isinstance(messages, list | tuple) else [messages]
    # marshmallow puts what belongs to the whole object under "_schema"
    field = ".".join(part for part in path if part != "_schema") or None
    return [
        {"field": field, "code": "invalid", "message": str(text)}
        for text in texts[:_MAX_FIELD_ERRORS]
    ]


def _marshmallow(exception: Any) -> MusetError:
    return ValidationError(str(exception), errors=_flat(exception.messages))


# --- Databases ------------------------------------------------------------------------------------

_UNREACHABLE_SQLITE = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL")
#: 08 connection, 53 resources, 57P0 shut down, 40001 and 40P01 a lost race that may be repeated
_UNREACHABLE_SQLSTATES = ("08", "53", "57P0", "40001", "40P01")
_UNREACHABLE_MYSQL = {1040, 1205, 1213, 2002, 2003, 2006, 2013, 2055}
#: A disk that is full, over its quota or broken: waiting a little changes nothing.
_DISK_SQLITE = ("SQLITE_FULL", "SQLITE_IOERR")
_DISK_SQLSTATES = ("53100", "58030")
#: Seconds after which such a disk may be worth another try.
_DISK_S = 10.0
_CONFLICT_SQLITE = (
    "SQLITE_CONSTRAINT_UNIQUE",
    "SQLITE_CONSTRAINT_PRIMARYKEY",
    "SQLITE_CONSTRAINT_FOREIGNKEY",
)


def _sqlstate(original: Any) -> str:
    return str(getattr(original, "sqlstate", None) or getattr(original, "pgcode", None) or "")


def _cannot_reach(exception: Any, original: Any) -> bool:
    if getattr(exception, "connection_invalidated", False):
        return True
    name = getattr(original, "sqlite_errorname", None)
    if name:
        return str(name).startswith(_UNREACHABLE_SQLITE)
    state = _sqlstate(original)
    if state:
        return state.startswith(_UNREACHABLE_SQLSTATES)
    number = original.args[0] if getattr(original, "args", ()) else None
    if isinstance(number, int):
        return number in _UNREACHABLE_MYSQL
    # psycopg gives a failed connection no SQLSTATE
    return type(original).__name__ == "OperationalError" and type(original).__module__.partition(
        "."
    )[0] in ("psycopg", "psycopg2")


def _is_of_disk(original: Any) -> bool:
    name = str(getattr(original, "sqlite_errorname", None) or "")
    return name.startswith(_DISK_SQLITE) or _sqlstate(original) in _DISK_SQLSTATES


def _database(exception: Any) -> MusetError:
    original = getattr(exception, "orig", None) or exception
    if _sqlstate(original) == "57014":
        return OperationTimeoutError(str(exception))
    if _is_of_disk(original):
        return DatabaseError(
            str(exception), unavailable=True, code=DISK_REFUSES, retry_after=_DISK_S
        )
    return DatabaseError(str(exception), unavailable=_cannot_reach(exception, original))


def _database_busy(exception: Any) -> MusetError:
    return DatabaseError(str(exception), unavailable=True)


def _pool_is_full(exception: Any) -> MusetError:
    """All connections of a pool of ours are in use, which says nothing about the other side."""
    return OverloadedError(str(exception))


def _integrity(exception: Any) -> MusetError:
    """A value that is taken or still referred to is the caller's; a missing one is our fault."""
    original = getattr(exception, "orig", None) or exception
    name = getattr(original, "sqlite_errorname", None)
    state = _sqlstate(original)
    if name:
        conflict = name in _CONFLICT_SQLITE
    else:
        conflict = not state or state in ("23503", "23505", "23P01")
    return ConflictError(str(exception)) if conflict else DatabaseError(str(exception))


# --- Clients of other services --------------------------------------------------------------------


def retry_after_s(headers: Any) -> float | None:
    """Seconds that an answer's Retry-After asks for; None where it is missing or unreadable.

    Args:
        headers: A mapping that knows names in any case. A date is compared with the answer's own
            `Date` where there is one, because the two clocks may differ.
    """
    value = headers.get("Retry-After") if headers is not None else None
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return min(float(value), _MAX_RETRY_AFTER_S)
    at, sent = parse_date(value), parse_date(headers.get("Date"))
    if at is None:
        return None
    now = SYSTEM.wall() if sent is None else sent.timestamp()
    return min(max(0.0, at.timestamp() - now), _MAX_RETRY_AFTER_S)


def _upstream(exception: Any) -> MusetError:
    """An answer with an error status: what it means for our caller, who did not send it."""
    response = getattr(exception, "response", None)
    status = getattr(response, "status_code", None) or getattr(exception, "code", None)
    if status in (401, 403):  # our credentials, so neither the caller's fault nor worth a retry
        return ExternalServiceError(str(exception), unavailable=True, retryable=False)
    if status in (429, 503):
        headers = getattr(response, "headers", None) or getattr(exception, "headers", None)
        wait = retry_after_s(headers)
        return ExternalServiceError(str(exception), unavailable=True, retry_after=wait)
    return ExternalServiceError(str(exception))


def _unavailable(exception: Any) -> MusetError:
    return ExternalServiceError(str(exception), unavailable=True)


def _refused_credentials(exception: Any) -> MusetError:
    return ExternalServiceError(str(exception), unavailable=True, retryable=False)


def _max_retries(exception: Any) -> MusetError:
    reason = getattr(exception, "reason", None)
    if isinstance(reason, BaseException):
        return translate(reason, {})
    return NetworkError(str(exception))


_NETWORK_ERRNOS = {
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EADDRNOTAVAIL,
}


def _os_error(exception: Any) -> MusetError:
    if exception.errno in _NETWORK_ERRNOS:
        return NetworkError(str(exception))
    return InternalError(str(exception))


def _unreadable(status: int) -> Callable[[Any], MusetError]:
    """A request that is no HTTP, or more of it than the server takes."""

    def refuse(exception: Any) -> MusetError:
        error = ValidationError(str(exception), user_message="The request cannot be read.")
        error.status = status
        return error

    return refuse


_EXTERNAL, _NETWORK, _TIMEOUT = (
    ErrorCategory.EXTERNAL_SERVICE,
    ErrorCategory.NETWORK,
    ErrorCategory.TIMEOUT,
)

_KNOWN: Mapping[str, Translation] = {
    "werkzeug.exceptions.HTTPException": _http,
    "pydantic_core._pydantic_core.ValidationError": _pydantic,
    "marshmallow.exceptions.ValidationError": _marshmallow,
    # databases
    "sqlalchemy.exc.IntegrityError": _integrity,
    "sqlalchemy.exc.DBAPIError": _database,
    "sqlalchemy.exc.TimeoutError": _pool_is_full,
    "sqlalchemy.exc.DisconnectionError": _database_busy,
    "sqlalchemy.orm.exc.StaleDataError": ErrorCategory.CONFLICT,
    "sqlalchemy.exc.SQLAlchemyError": ErrorCategory.DATABASE,
    "sqlite3.IntegrityError": _integrity,
    "sqlite3.Error": _database,
    "psycopg.IntegrityError": _integrity,
    "psycopg.Error": _database,
    # redis
    "redis.exceptions.AuthenticationError": _refused_credentials,
    "redis.exceptions.BusyLoadingError": _unavailable,
    "redis.exceptions.TimeoutError": _TIMEOUT,
    "redis.exceptions.ConnectionError": _NETWORK,
    "redis.exceptions.RedisError": _EXTERNAL,
    # HTTP clients
    "httpx.PoolTimeout": _pool_is_full,
    "httpx.TimeoutException": _TIMEOUT,
    "httpx.NetworkError": _NETWORK,
    "httpx.ProxyError": _NETWORK,
    "httpx.HTTPStatusError": _upstream,
    "httpx.UnsupportedProtocol": ErrorCategory.INTERNAL,
    "httpx.LocalProtocolError": ErrorCategory.INTERNAL,
    "httpx.HTTPError": _EXTERNAL,
    "requests.exceptions.Timeout": _TIMEOUT,
    "requests.exceptions.ConnectionError": _NETWORK,
    "requests.exceptions.HTTPError": _upstream,
    "requests.exceptions.MissingSchema": ErrorCategory.INTERNAL,
    "requests.exceptions.InvalidSchema": ErrorCategory.INTERNAL,
    "requests.exceptions.InvalidURL": ErrorCategory.INTERNAL,
    "requests.exceptions.InvalidHeader": ErrorCategory.INTERNAL,
    "requests.exceptions.RequestException": _EXTERNAL,
    "urllib3.exceptions.MaxRetryError": _max_retries,
    "urllib3.exceptions.NewConnectionError": _NETWORK,
    "urllib3.exceptions.TimeoutError": _TIMEOUT,
    "urllib3.exceptions.ProtocolError": _NETWORK,
    "urllib3.exceptions.SSLError": _NETWORK,
    "urllib3.exceptions.ProxyError": _NETWORK,
    "urllib3.exceptions.EmptyPoolError": _pool_is_full,
    "urllib3.exceptions.PoolError": _NETWORK,
    "urllib3.exceptions.LocationParseError": ErrorCategory.INTERNAL,
    "urllib3.exceptions.HTTPError": _EXTERNAL,
    "urllib.error.HTTPError": _upstream,
    "urllib.error.URLError": _NETWORK,
    # gunicorn, also while a body is read
    "gunicorn.http.errors.ParseException": _unreadable(400),
    "gunicorn.http.errors.LimitRequestLine": _unreadable(414),
    "gunicorn.http.errors.LimitRequestHeaders": _unreadable(431),
    "gunicorn.http.errors.ExpectationFailed": _unreadable(417),
    "gunicorn.http.errors.ConfigurationProblem": ErrorCategory.INTERNAL,
    "gunicorn.http.errors.InvalidResponseHeader": ErrorCategory.INTERNAL,
    "gunicorn.http.errors.InvalidResponseHeaderName": ErrorCategory.INTERNAL,
    # sockets and the operating system
    "gevent.timeout.Timeout": _TIMEOUT,
    "builtins.TimeoutError": _TIMEOUT,
    "builtins.ConnectionError": _NETWORK,
    "socket.gaierror": _NETWORK,
    "socket.herror": _NETWORK,
    "ssl.SSLError": _NETWORK,
    "builtins.OSError": _os_error,
}
