"""What all extensions share: the request id, the WSGI layers and their order, the current app.

The layers are installed once per application by whichever extension comes first. The outermost
gives each request its id, which lives in the WSGI environment of its own request: one greenlet
serves many requests of a kept connection, so a context variable that nobody resets would show in
the next.
"""

import contextvars
import itertools
import logging
import os
import re
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from blinker import Signal
from flask import Flask, Request, current_app, has_app_context, has_request_context, request
from werkzeug.wsgi import ClosingIterator, FileWrapper

from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.locks import run_beside

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from flask.ctx import RequestContext as RequestContextOfFlask

    from flask_muset.translate import Translation

__all__ = [
    "REQUEST_ID_KEY",
    "UNREADABLE",
    "Broken",
    "Describe",
    "Exchange",
    "Observer",
    "Rank",
    "RequestContext",
    "attach",
    "current_exchange",
    "emit",
    "find",
    "install",
    "is_whole",
    "new_id",
    "request_id",
    "spawn",
    "state",
    "tell",
    "translate_with",
    "translations",
]

_log = logging.getLogger(__name__)
REQUEST_ID_KEY = "flask_muset.request_id"
#: Where an app has, in `app.extensions`, what answers a request that its server cannot read: a
#: function of the error that gives status, headers and body.
UNREADABLE = "flask_muset.unreadable"
_EXTENSION = "flask_muset.context"
_TRANSLATIONS = "flask_muset.translations"
_HEADER = "X-Request-ID"
_valid = re.compile(r"[A-Za-z0-9._-]{8,64}").fullmatch


class _Ids:
    """Process-wide unique ids: a random part per process, then a count."""

    def __init__(self) -> None:
        self.reseed()
        # A forked worker must not go on with its parent's ids.
        os.register_at_fork(after_in_child=self.reseed)

    def reseed(self) -> None:
        self.prefix = secrets.token_hex(8)
        # Eight digits from the start, without the cost of padding them.
        self.count = itertools.count(10_000_000)


_ids = _Ids()


class Rank(IntEnum):
    """The order of the layers, the outermost first, whichever extension is set up first."""

    ERRORS = 1
    LIMITS = 2


class Exchange:
    """One request and its response, from the first to the last moment in which they are ours.

    Attributes:
        environ: Of the request.
        began: `SYSTEM.now()` when it came in.
        status: Of the response, 0 before it has one.
        sent: Bytes of the body that were handed to the server.
        failed: Whether it ended in an exception, also after the response had begun.
        duration_s: Seconds from its beginning to its end, None before it has ended.
        user: Whom the app says it is from, for logs.
        request: Flask's, None before it has come to Flask.
        trace_id: Of the trace that it belongs to, None without one.
        span_id: Of its own span, None without one.
    """

    __slots__ = (
        "_ended",
        "_length",
        "began",
        "duration_s",
        "environ",
        "failed",
        "request",
        "sent",
        "span_id",
        "status",
        "trace_id",
        "user",
    )

    def __init__(self, environ: "WSGIEnvironment") -> None:
        self.environ = environ
        self.began = SYSTEM.now()
        self.status = 0
        self.sent = 0
        self.failed = False
        self.duration_s: float | None = None
        self.user: str | None = None
        self.trace_id: str | None = None
        self.span_id: str | None = None
        self.request: Request | None = None
        self._length = -1
        self._ended = False

    @property
    def route(self) -> str | None:
        """The rule that matched its path, None where none did."""
        rule = None if self.request is None else self.request.url_rule
        return None if rule is None else rule.rule

    @property
    def request_id(self) -> str:
        """Its id."""
        return str(self.environ[REQUEST_ID_KEY])


#: The exchange of the current work, None outside of one and where nobody observes.
current_exchange: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar(
    "flask_muset.exchange", default=None
)


class Observer(Protocol):
    """What is told of each exchange. It must be quick, and it must not raise."""

    def begin(self, exchange: Exchange) -> None:
        """A request has come."""
        ...

    def end(self, exchange: Exchange) -> None:
        """It is known how it went: status, duration and failure are final.

        Told just before the last bytes of a body of known length are handed to the server, so that
        what a client has seen is counted even if the process is killed the next moment; else when
        the body has ended.
        """
        ...

    def close(self, exchange: Exchange) -> None:
        """The server is done with it."""
        ...


#: Adds fields to a response's head, given the environment of its request and all of its fields.
Describe = Callable[["WSGIEnvironment", list[tuple[str, str]]], None]
#: Is told of what ends a body half-way, and may raise something else in its place.
Broken = Callable[[BaseException, "WSGIEnvironment"], None]


class RequestContext:
    """WSGI layer that gives every request an id and every response the header that names it.

    Args:
        app: Whose requests they are; its `wsgi_app` is the innermost of all layers.
    """

    def __init__(self, app: Flask) -> None:
        self._application = app.wsgi_app
        self._app = app
        self._layers: list[tuple[Rank, Callable[[WSGIApplication], WSGIApplication]]] = []
        self._next: WSGIApplication = app.wsgi_app
        self._observers: list[Observer] = []
        self._describers: list[Describe] = []
        self._broken: Broken | None = None

    def add(self, rank: Rank, make: "Callable[[WSGIApplication], WSGIApplication]") -> None:
        """Put in a layer.

        Args:
            rank: Where it stands.
            make: Makes the layer of the next inner one; called again when another one comes in.
        """
        self._layers.append((rank, make))
        self._layers.sort(key=lambda layer: layer[0])
        self._next = self._application
        for _, wrap in reversed(self._layers):
            self._next = wrap(self._next)

    def observe(self, observer: Observer) -> None:
        """Tell somebody of each exchange; all share one look at the response."""
        if not self._observers:
            app, make = self._app, self._app.request_context
            app.request_context = partial(_noted, make)  # type: ignore[method-assign]
        self._observers.append(observer)

    def guard(self, broken: Broken) -> None:
        """Tell somebody of each exception of a response that has begun."""
        self._broken = broken

    def describe(self, describe: Describe) -> None:
        """Let somebody add fields to each response's head, just before it is sent.

        It costs a fifth of a function that Flask calls after a request, and sees those responses
        too that are made outside of Flask.
        """
        self._describers.append(describe)

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Serve one request; an id that the client sent is kept if it is well formed."""
        given = environ.get("HTTP_X_REQUEST_ID")
        if given is not None and _valid(given):
            rid: str = given
        else:
            rid = f"{_ids.prefix}{next(_ids.count)}"
        environ[REQUEST_ID_KEY] = rid

        header = (_HEADER, rid)
        if self._observers:
            return self._observed(environ, start_response, header)
        describers = self._describers

        # Without annotations, which would be made anew for each request.
        def start(status, headers, exc_info=None):  # type: ignore[no-untyped-def]
            fields = [*headers, header]
            for describe in describers:
                describe(environ, fields)
            return start_response(status, fields, exc_info)

        body = self._next(environ, start)
        if self._broken is None or is_whole(body, environ):
            return body
        return _GuardedBody(body, self._broken, environ)

    def _observed(
        self,
        environ: "WSGIEnvironment",
        start_response: "StartResponse",
        header: tuple[str, str],
    ) -> Iterable[bytes]:
        exchange = Exchange(environ)
        current_exchange.set(exchange)
        describers = self._describers

        def start(status, headers, exc_info=None):  # type: ignore[no-untyped-def]
            exchange.status = int(status[:3])
            for name, value in headers:
                if name == "Content-Length" and value.isdigit():
                    exchange._length = int(value)
            fields = [*headers, header]
            for describe in describers:
                describe(environ, fields)
            return start_response(status, fields, exc_info)

        observers = self._observers
        for observer in observers:
            observer.begin(exchange)
        try:
            body = self._next(environ, start)
        except BaseException:
            exchange.failed = True
            _end(exchange, observers)
            _close(exchange, observers)
            raise
        return _ObservedBody(body, exchange, observers, self._broken)


def _noted(
    make: "Callable[[WSGIEnvironment], RequestContextOfFlask]", environ: "WSGIEnvironment"
) -> "RequestContextOfFlask":
    """Keep the request: Flask's context is gone when an exception that escaped is counted."""
    made = make(environ)
    exchange = current_exchange.get()
    if exchange is not None and exchange.environ is environ:
        exchange.request = made.request
    return made


def _end(exchange: Exchange, observers: Sequence[Observer]) -> None:
    if not exchange._ended:
        exchange._ended = True
        exchange.duration_s = SYSTEM.now() - exchange.began
        for observer in observers:
            observer.end(exchange)


def _close(exchange: Exchange, observers: Sequence[Observer]) -> None:
    try:
        for observer in observers:
            observer.close(exchange)
    finally:
        # The greenlet of a kept connection goes on with the next request.
        current_exchange.set(None)


def _nothing() -> None: ...


class _GuardedBody:
    """A response's body on its way to the server, where nobody observes it."""

    __slots__ = ("_broken", "_environ", "_inner", "close")

    def __init__(self, inner: Iterable[bytes], broken: Broken, environ: "WSGIEnvironment") -> None:
        self._inner = inner
        self._broken = broken
        self._environ = environ
        self.close = getattr(inner, "close", _nothing)

    def __iter__(self) -> Iterator[bytes]:
        try:
            # Not `yield from`, which would close the body once more when a client leaves.
            for chunk in self._inner:  # noqa: UP028
                yield chunk
        except GeneratorExit:
            raise
        except BaseException as exception:
            self._broken(exception, self._environ)
            raise


class _ObservedBody:
    """A response's body on its way to the server."""

    __slots__ = ("_broken", "_exchange", "_inner", "_is_closed", "_observers")

    def __init__(
        self,
        inner: Iterable[bytes],
        exchange: Exchange,
        observers: Sequence[Observer],
        broken: Broken | None,
    ) -> None:
        self._inner = inner
        self._broken = broken
        self._exchange = exchange
        self._observers = observers
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        exchange = self._exchange
        try:
            for chunk in self._inner:
                exchange.sent += len(chunk)
                if exchange.sent == exchange._length:
                    _end(exchange, self._observers)
                yield chunk
        except GeneratorExit:
            raise
        except BaseException as exception:
            exchange.failed = True
            if self._broken is not None:
                self._broken(exception, exchange.environ)
            raise
        finally:
            if not exchange._ended:
                _end(exchange, self._observers)

    def close(self) -> None:
        """Close the body; servers call it whatever happened."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            close = getattr(self._inner, "close", None)
            if close is not None:
                close()
        except BaseException:
            self._exchange.failed = True
            raise
        finally:
            if not self._exchange._ended:
                _end(self._exchange, self._observers)
            _close(self._exchange, self._observers)


def is_whole(body: Iterable[bytes], environ: "WSGIEnvironment") -> bool:
    """Whether a body cannot fail half-way, or is a file that servers send unread."""
    if type(body) is ClosingIterator:  # of nearly all of Flask's responses
        return False
    return isinstance(body, (list, tuple, environ.get("wsgi.file_wrapper", FileWrapper)))


def install(app: Flask) -> RequestContext:
    """Return the application's context layer, made at the first call."""
    layer: RequestContext | None = app.extensions.get(_EXTENSION)
    if layer is None:
        layer = app.extensions[_EXTENSION] = RequestContext(app)
        app.wsgi_app = layer.__call__  # type: ignore[method-assign]
    return layer


def new_id() -> str:
    """An id for what is no request, unique among those of requests."""
    return f"{_ids.prefix}{next(_ids.count)}"


def request_id() -> str | None:
    """The id of the current request, None outside of one."""
    return request.environ.get(REQUEST_ID_KEY) if has_request_context() else None


# --- The current app ------------------------------------------------------------------------------

_apps: "dict[str, weakref.WeakSet[Flask]]" = {}


def attach(app: Flask, key: str, what: str, own: Any) -> None:
    """Keep what an extension has for an app.

    Args:
        app: Whose it is.
        key: Of `app.extensions`.
        what: Name of the extension, for people.
        own: What is kept.

    Raises:
        RuntimeError: The extension is set up on this app already.
    """
    if key in app.extensions:
        raise RuntimeError(
            f"{what} is already set up on app {app.name!r}; call init_app once per app."
        )
    app.extensions[key] = own
    _apps.setdefault(key, weakref.WeakSet()).add(app)


def _app_with(key: str) -> Flask | None:
    """The current app, or the only one that has the extension."""
    if has_app_context():
        return current_app._get_current_object()  # type: ignore[attr-defined, no-any-return]
    apps = list(_apps.get(key, ()))
    return apps[0] if len(apps) == 1 else None


def find(key: str) -> Any:
    """What an extension has for the current app, None where there is nothing."""
    app = _app_with(key)
    return None if app is None else app.extensions.get(key)


def state(key: str, what: str) -> Any:
    """What an extension has for the current app; outside of any, for the only app that has it.

    Raises:
        RuntimeError: There is no such app; the text says what to do.
    """
    found = find(key)
    if found is not None:
        return found
    if has_app_context():
        raise RuntimeError(f"{what} is not set up on app {current_app.name!r}; call init_app.")
    count = len(_apps.get(key, ()))
    why = f"{count} apps in this process use it" if count else "no app in this process uses it"
    raise RuntimeError(
        f"{what} needs an application context, because {why}; use `with app.app_context():`."
    )


def translations() -> "Mapping[type, Translation]":
    """What the current app's ErrorHandler was told with `map`."""
    if not has_app_context():
        return {}
    found: Mapping[type, Translation] = current_app.extensions.get(_TRANSLATIONS, {})
    return found


def translate_with(app: Flask, own: "Mapping[type, Translation]") -> None:
    """Make an app's own translations known to all extensions."""
    app.extensions[_TRANSLATIONS] = own


def emit(signal: Signal, event: object) -> None:
    """Send an event from the current app, or from None outside of one."""
    if signal.receivers:
        sender = current_app._get_current_object() if has_app_context() else None  # type: ignore[attr-defined]
        tell(signal, sender, event)


def tell(signal: Signal, sender: Flask | None, event: object) -> None:
    """Send an event. A listener that raises is logged: it must not change what it listens to."""
    try:
        signal.send(sender, event=event)
    except Exception:  # noqa: BLE001 - whatever it is, it is not the caller's
        _log.exception("a listener of the signal %r failed", signal.name)  # type: ignore[attr-defined]


# --- Work beside the request ----------------------------------------------------------------------


def spawn(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function beside the current work, with its context variables and its deadline.

    Plain `gevent.spawn` and `threading.Thread` start with none of both. The request context of
    Flask is carried as well, so it must not outlive the request.

    Args:
        fn: What is run.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        A gevent Greenlet where gevent has patched the process, else a started daemon thread.
    """
    variables = contextvars.copy_context()

    def run() -> Any:
        block = deadline.anew()
        if block is None:
            return fn(*args, **kwargs)
        with block:
            return fn(*args, **kwargs)

    return run_beside(run, variables=variables)
