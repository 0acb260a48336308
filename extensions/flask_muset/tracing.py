"""Tracing: W3C trace context for every request, spans where OpenTelemetry is set up.

Without OpenTelemetry a request still belongs to a trace: the caller's if it sent a valid
`traceparent`, else a new one; logs and outgoing calls name it. OpenTelemetry is never imported
here: an application that has set up a tracer provider has imported it.
"""

import os
import random
import re
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, TypeVar

from flask_muset import context
from flask_muset.context import Exchange, current_exchange
from flask_muset.redaction import redact_text, request_secrets
from flask_muset.signals import ErrorEvent, error_handled

__all__ = ["Parent", "init_app", "inject", "parse_traceparent", "traceparent", "tracestate"]

_KEY = "tracing"
#: Of the environment: what is passed on, and what a span needs until it ends.
_FLAGS = "flask_muset.trace_flags"
_STATE = "flask_muset.tracestate"
_SPAN = "flask_muset.span"

_SAMPLED = 1
_parent = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII
).fullmatch
_member = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch
_MAX_STATE, _MAX_MEMBERS = 512, 32
_KNOWN_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}
)

Headers = TypeVar("Headers", bound=MutableMapping[str, str])

#: Seeded by the system; a forked worker must not go on with its parent's ids.
_random = random.Random()  # noqa: S311 - ids are no secrets
os.register_at_fork(after_in_child=_random.seed)


class Parent(NamedTuple):
    """What a `traceparent` says.

    Attributes:
        trace_id: 32 hexadecimal digits, not all 0.
        span_id: 16 hexadecimal digits, not all 0: the caller's span.
        flags: 0 to 255; 1 is set where the caller may have recorded the trace.
    """

    trace_id: str
    span_id: str
    flags: int


def parse_traceparent(value: str | None) -> Parent | None:
    """Read a `traceparent` header, None for one that is not valid.

    Source: W3C Trace Context, "traceparent Header Field Values": version ff is invalid, version 00
    has four parts, later ones may have more.
    """
    found = None if value is None else _parent(value.strip(" \t"))
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return Parent(trace_id, span_id, int(flags, 16))


def _valid_state(value: str | None) -> str | None:
    """A `tracestate` that may be passed on, None for one that may not."""
    if not value or len(value) > _MAX_STATE:
        return None
    members = [member for part in value.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    whole = all(_member(member) for member in members)
    return ",".join(members) if whole and len(keys) == len(members) <= _MAX_MEMBERS else None


def _new_id(bits: int) -> str:
    return f"{_random.getrandbits(bits) or 1:0{bits // 4}x}"


# --- For calls to others --------------------------------------------------------------------------


def traceparent() -> str | None:
    """The `traceparent` for calls made by the current work, None outside of a traced request.

    Its span is the innermost of OpenTelemetry where there is one, else the request's.
    """
    span = _current_span()
    if span is not None:
        return f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"
    exchange = current_exchange.get()
    if exchange is None or exchange.trace_id is None:
        return None
    flags = exchange.environ.get(_FLAGS, _SAMPLED)
    return f"00-{exchange.trace_id}-{exchange.span_id}-{flags:02x}"


def tracestate() -> str | None:
    """The `tracestate` for calls made by the current work, None where there is none."""
    span = _current_span()
    if span is not None:
        return span.trace_state.to_header() or None
    exchange = current_exchange.get()
    return None if exchange is None else exchange.environ.get(_STATE)


def inject(headers: Headers) -> Headers:
    """Set `traceparent` and `tracestate` of an outgoing call; returns the same headers."""
    parent = traceparent()
    if parent is not None:
        headers["traceparent"] = parent
        state = tracestate()
        if state is not None:
            headers["tracestate"] = state
    return headers


def _current_span() -> Any:
    """OpenTelemetry's current span context, None without a valid one."""
    trace = _opentelemetry()
    if trace is None:
        return None
    found = trace.get_current_span().get_span_context()
    return found if found.is_valid else None


def _opentelemetry() -> Any:
    """OpenTelemetry's module `trace`, if the application has imported it."""
    return sys.modules.get("opentelemetry.trace")


# --- For requests ---------------------------------------------------------------------------------


def init_app(app: Any) -> None:
    """Give every request of an app its place in a trace, and a span where OpenTelemetry records.

    The tracer provider is looked up at each request, so it may be set later, as it must be in a
    worker that was forked.

    Args:
        app: A Flask application.

    Raises:
        RuntimeError: It is set up on this app already.
    """
    observer = _Traces()
    context.attach(app, _KEY, "Tracing", observer)
    context.install(app).observe(observer)
    # The app keeps the receiver alive, signals do not.
    error_handled.connect(observer.note_error, sender=app)


class _Traces:
    """Observes the exchanges of an app."""

    def __init__(self) -> None:
        self._provider: Any = None
        self._tracer: Any = None

    def begin(self, exchange: Exchange) -> None:
        """Take over the caller's trace, or begin one."""
        environ = exchange.environ
        parent = parse_traceparent(environ.get("HTTP_TRACEPARENT"))
        flags, state = _SAMPLED, None
        if parent is not None:
            flags, state = parent.flags & _SAMPLED, _valid_state(environ.get("HTTP_TRACESTATE"))
        exchange.trace_id = _new_id(128) if parent is None else parent.trace_id
        exchange.span_id = _new_id(64)
        environ[_FLAGS] = flags
        if state is not None:
            environ[_STATE] = state
        tracer = self._find_tracer()
        if tracer is not None:
            span = _guarded(_Span, exchange, tracer, parent, state)
            if span is not None:
                environ[_SPAN] = span

    def end(self, exchange: Exchange) -> None:
        """End its span."""
        span: _Span | None = exchange.environ.get(_SPAN)
        if span is not None:
            _guarded(span.end, exchange)

    def close(self, exchange: Exchange) -> None:
        """Leave its span, so that the next request of the connection does not begin in it."""
        span: _Span | None = exchange.environ.pop(_SPAN, None)
        if span is not None:
            _guarded(span.leave)

    def note_error(self, sender: Any, *, event: ErrorEvent) -> None:
        """Say in the span what ErrorHandler found."""
        exchange = current_exchange.get()
        span: _Span | None = None if exchange is None else exchange.environ.get(_SPAN)
        if span is not None:
            _guarded(span.note, event)

    def _find_tracer(self) -> Any:
        """The tracer of the provider that the application has set, None without one."""
        trace = _opentelemetry()
        if trace is None:
            return None
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return None
        if provider is not self._provider:
            self._tracer, self._provider = provider.get_tracer("flask_muset"), provider
        return self._tracer


class _Failures:
    said = False


def _guarded(call: Callable[..., Any], *args: Any) -> Any:
    """Call into OpenTelemetry; what fails there must not break a request, and is said once."""
    try:
        return call(*args)
    except Exception as failure:  # noqa: BLE001 - foreign processors and samplers raise anything
        if not _Failures.said:
            _Failures.said = True
            sys.stderr.write(f"flask_muset.tracing: OpenTelemetry failed: {type(failure)}\n")
        return None


class _Span:
    """The server span of one exchange."""

    def __init__(self, exchange: Exchange, tracer: Any, parent: Parent | None, state: Any) -> None:
        from opentelemetry import context as otel_context
        from opentelemetry import trace

        self._trace = trace
        self._detach = otel_context.detach
        environ = exchange.environ
        method = environ.get("REQUEST_METHOD", "")
        self._method = method if method in _KNOWN_METHODS else "_OTHER"
        attributes = {
            "http.request.method": self._method,
            "url.scheme": environ.get("wsgi.url_scheme", "http"),
            "url.path": redact_text(environ.get("PATH_INFO") or "/", request_secrets(environ)),
            "muset.request_id": exchange.request_id,
        }
        # Always from the request: the greenlet's own context may be another request's.
        above = _remote(trace, otel_context.Context(), parent, state)
        self._span = tracer.start_span(
            self._method, context=above, kind=trace.SpanKind.SERVER, attributes=attributes
        )
        self._token = otel_context.attach(trace.set_span_in_context(self._span))
        own = self._span.get_span_context()
        exchange.trace_id = f"{own.trace_id:032x}"
        exchange.span_id = f"{own.span_id:016x}"

    def note(self, event: ErrorEvent) -> None:
        """Say which error it was; its text may be what must not leave the process."""
        self._span.set_attribute("muset.error.fingerprint", event.fingerprint)
        if event.status >= 500:
            self._span.set_attribute("error.type", event.error)

    def end(self, exchange: Exchange) -> None:
        """Say how it went, and end."""
        span = self._span
        if exchange.route is not None:
            span.update_name(f"{self._method} {exchange.route}")
            span.set_attribute("http.route", exchange.route)
        if exchange.status:
            span.set_attribute("http.response.status_code", exchange.status)
        if exchange.failed or exchange.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def leave(self) -> None:
        """Make the span before it the current one."""
        self._detach(self._token)


def _remote(trace: Any, empty: Any, parent: Parent | None, state: str | None) -> Any:
    """A context in which the caller's span is the current one."""
    if parent is None:
        return empty
    remote = trace.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(parent.flags),
        trace_state=trace.TraceState.from_header([state] if state else []),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(remote), empty)
