"""The fields of a line: of its request, of the blocks around it, its own."""

import contextvars
import re
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from flask_muset import context
from flask_muset.context import Exchange, current_exchange
from flask_muset.logging.values import (
    Secrets,
    encode,
    encode_field,
    field_name,
    quote,
    without_secrets,
)
from flask_muset.redaction import request_secrets

if TYPE_CHECKING:
    from flask_muset.logging.loggers import Logger

__all__ = [
    "KEYS",
    "OWN",
    "VIEW",
    "LogContext",
    "Scope",
    "current_scope",
    "fields_of_line",
    "head_of",
    "view_of",
]

#: What a line says of its request, in this order.
KEYS = (
    "request_id",
    "trace_id",
    "span_id",
    "user",
    "method",
    "route",
    "status",
    "duration_ms",
    "fingerprint",
)
#: A field of one of these names replaces the line's key, of another key gets a trailing `_`.
_REPLACE = frozenset({"request_id", "trace_id", "user"})
_TAKEN = frozenset({*KEYS, "timestamp", "level", "logger", "message", "exception"}) - _REPLACE
#: Name in `extra` under which a sender lists its fields that are the line's own keys: how
#: ErrorHandler, which knows status and fingerprint, says them.
OWN = "flask_muset"
#: Of the environment: what was found out for the lines before.
VIEW = "flask_muset.logging.view"
_QUOTED_METHODS = {
    method: f'"{method}"'
    for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"]
}
_MAX_FIELDS = 64
_MAX_METHOD = 32
_REQUEST_ID = context.REQUEST_ID_KEY
#: Formatting a float would cost as much as the half of a line.
_THOUSANDTHS = tuple(f".{number:03d}" for number in range(1_000))
_digits = re.compile(r"[0-9a-f-]+").fullmatch


# --- Of the blocks around it ----------------------------------------------------------------------


class Scope:
    """The fields of all blocks around a line; as JSON too, which is made once for many lines."""

    __slots__ = ("_encoded", "_secrets", "block", "fields", "outer")

    def __init__(self, fields: dict[str, Any], block: "LogContext", outer: "Scope | None") -> None:
        self.fields = fields
        self.block = block
        self.outer = outer
        self._encoded: _Encoded | None = None
        self._secrets: Secrets = ()

    def encoded(self, secrets: Secrets) -> "_Encoded":
        """Its fields as JSON."""
        if self._encoded is None or self._secrets is not secrets:
            self._encoded, self._secrets = _encode(self.fields, secrets), secrets
        return self._encoded


class _Encoded(NamedTuple):
    """Fields as JSON.

    Attributes:
        own: Those that are the line's own keys.
        head: The same in their order as members, each with a comma before it.
        members: All others, likewise.
    """

    own: dict[str, str]
    head: str
    members: str


#: Follows the current greenlet, thread or task.
current_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar(
    "flask_muset.log_fields", default=None
)


class LogContext:
    """Put fields on every line that is logged within a block.

        with LogContext(logger, user_id="123"):
            logger.info("Processing request")

    They are on the lines of all loggers, in the same request, thread or task, and of what
    `flask_muset.context.spawn` runs beside it. Blocks nest; an inner field of the same name wins.
    A block may be entered again, also within itself.

    Args:
        logger: Any logger; it says for the reader whose lines are meant.
        **fields: Values of any kind; they are logged without secrets and bounded in size.
    """

    def __init__(self, logger: "Logger | Any" = None, /, **fields: Any) -> None:
        self._logger = logger
        self._fields = fields

    def __enter__(self) -> Self:
        outer = current_scope.get()
        fields = self._fields if outer is None else {**outer.fields, **self._fields}
        current_scope.set(Scope(fields, self, outer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Nothing is kept in the block, which many greenlets may be in, and a generator may leave it
        # in another context than it has entered it.
        scope = current_scope.get()
        while scope is not None and scope.block is not self:
            scope = scope.outer
        if scope is not None:
            current_scope.set(scope.outer)


# --- Of its request -------------------------------------------------------------------------------


class _View:
    """What the lines of one exchange say of it, as JSON, made anew when something has changed."""

    __slots__ = ("_seen", "encoded", "head", "secrets")

    def __init__(self, exchange: Exchange) -> None:
        self.secrets = request_secrets(exchange.environ)
        self._seen: tuple[object, ...] = ()
        self.encoded: dict[str, str] = {}
        self.head = ""

    def update(self, exchange: Exchange) -> Self:
        """Look at the exchange again."""
        seen = (
            exchange.trace_id,
            exchange.span_id,
            exchange.user,
            exchange.route or _matched_route(exchange),
            exchange.status,
            exchange.duration_s,
        )
        if seen != self._seen:
            self._seen = seen
            self.encoded = _said_of(exchange, seen[3], self.secrets)
            self.head = _members(self.encoded)
        return self


def _members(encoded: Mapping[str, str]) -> str:
    """JSON members, each with a comma before it."""
    return "".join([f',"{key}":{value}' for key, value in encoded.items()])


@lru_cache(maxsize=1024)
def _known_of(user: str | None, method: str, route: str | None, status: int) -> str:
    """What many lines have in common."""
    said = "" if user is None else f',"user":{encode(user)}'
    said += f',"method":{_quoted_method(method, ())}'
    said += "" if route is None else f',"route":{quote(route)}'
    return f'{said},"status":{status}' if status else said


def head_of(exchange: Exchange, route: str | None) -> str:
    """What one line says of an exchange of which there is no other; the same as a view's head."""
    environ, trace_id = exchange.environ, exchange.trace_id
    request_id = environ[_REQUEST_ID]
    # Only what a client has chosen can look like anything but an id.
    quoted = _quoted_id(request_id) if "HTTP_X_REQUEST_ID" in environ else f'"{request_id}"'
    trace = "" if trace_id is None else f',"trace_id":"{trace_id}","span_id":"{exchange.span_id}"'
    known = _known_of(exchange.user, environ["REQUEST_METHOD"], route, exchange.status)
    took_us = int((exchange.duration_s or 0.0) * 1e6)
    return (
        f',"request_id":{quoted}{trace}{known}'
        f',"duration_ms":{took_us // 1000}{_THOUSANDTHS[took_us % 1000]}'
    )


def _said_of(exchange: Exchange, route: Any, secrets: Secrets) -> dict[str, str]:
    """The keys of an exchange, in their order, as JSON."""
    method = exchange.environ.get("REQUEST_METHOD", "")
    out = {"request_id": _quoted_id(exchange.request_id)}
    if exchange.trace_id is not None:
        out["trace_id"] = quote(exchange.trace_id)
    if exchange.span_id is not None:
        out["span_id"] = quote(exchange.span_id)
    if exchange.user is not None:
        out["user"] = encode(exchange.user, secrets)
    out["method"] = _quoted_method(method, secrets)
    if route is not None:
        out["route"] = quote(route)
    if exchange.status:
        out["status"] = str(exchange.status)
    if exchange.duration_s is not None:
        took_us = int(exchange.duration_s * 1e6)
        out["duration_ms"] = f"{took_us // 1000}{_THOUSANDTHS[took_us % 1000]}"
    return out


def _quoted_id(request_id: str) -> str:
    """A request's id as JSON: a client may choose it, as long as it is well formed."""
    return f'"{request_id}"' if _digits(request_id) else encode(request_id)


def _quoted_method(method: str, secrets: Secrets) -> str:
    """A request's method as JSON: a client may choose it."""
    known = _QUOTED_METHODS.get(method)
    return quote(without_secrets(method, secrets, _MAX_METHOD)) if known is None else known


def _matched_route(exchange: Exchange) -> str | None:
    """The rule of a line from before the exchange learned it, if Flask knows it already."""
    rule = getattr(exchange.environ.get("werkzeug.request"), "url_rule", None)
    return None if rule is None else str(rule.rule)


def view_of(exchange: Exchange) -> _View:
    """What lines say of an exchange now."""
    view: _View | None = exchange.environ.get(VIEW)
    if view is None:
        view = exchange.environ[VIEW] = _View(exchange)
    return view.update(exchange)


# --- Together -------------------------------------------------------------------------------------


def fields_of_line(extra: Mapping[str, Any] | None) -> tuple[Secrets, str]:
    """Return what the current work adds to a line.

    Args:
        extra: The line's own fields.

    Returns:
        Values that must not be shown in it, and its further members as JSON, each with a comma
        before it.
    """
    exchange, scope = current_exchange.get(), current_scope.get()
    view = None if exchange is None else view_of(exchange)
    secrets = () if view is None else view.secrets
    if extra:
        own, head, members = _encode(extra if scope is None else {**scope.fields, **extra}, secrets)
    elif scope is not None:
        own, head, members = scope.encoded(secrets)
    else:
        return secrets, _head_outside() if view is None else view.head
    if view is None:
        return secrets, (head if "request_id" in own else _head_outside() + head) + members
    if own:
        return secrets, _members(_in_order({**view.encoded, **own})) + members
    return secrets, view.head + members


def _head_outside() -> str:
    """The id that every request has, also where nobody observes exchanges."""
    request_id = context.request_id()
    return "" if request_id is None else f',"request_id":{_quoted_id(request_id)}'


def _in_order(known: Mapping[str, str]) -> dict[str, str]:
    return {key: known[key] for key in KEYS if key in known}


def _encode(fields: Mapping[str, Any], secrets: Secrets) -> _Encoded:
    own: dict[str, str] = {}
    out: dict[str, str] = {}
    said = fields.get(OWN)
    replaced = _REPLACE.union(said) if isinstance(said, tuple) else _REPLACE
    for key, value in fields.items():
        name = key if isinstance(key, str) else str(key)
        if name in replaced and name in KEYS:
            own[name] = encode(value, secrets)
        elif name != OWN:
            _put(out, _shown_name(name, secrets), encode_field(name, value, secrets))
        if len(out) >= _MAX_FIELDS:
            break
    own = _in_order(own)
    members = "".join([f",{quote(name)}:{value}" for name, value in out.items()])
    return _Encoded(own, _members(own), members)


def _shown_name(name: str, secrets: Secrets) -> str:
    if name in _TAKEN:
        return f"{name}_"
    for secret in secrets:  # headers and arguments may have been taken for names
        if secret in name:
            return without_secrets(name, secrets)
    return field_name(name)


def _put(out: dict[str, str], name: str, value: str) -> None:
    while name in out:
        name += "_"
    out[name] = value
