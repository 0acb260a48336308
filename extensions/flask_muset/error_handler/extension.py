"""ErrorHandler: binds the parts of this folder to a Flask app."""

import errno
import logging
import sys
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask, Request, Response, got_request_exception, request
from werkzeug.exceptions import HTTPException, InternalServerError

from flask_muset import context
from flask_muset.configuration import redis_client
from flask_muset.error_handler import catalogue, render
from flask_muset.error_handler.config import PREFIX, Config, read_config
from flask_muset.error_handler.fingerprint import fingerprint_of, type_name
from flask_muset.error_handler.journal import (
    KeptErrors,
    Occurrence,
    RecentErrors,
    Repeats,
    formatted_traceback,
)
from flask_muset.errors import ErrorCategory, MusetError
from flask_muset.redaction import redact, redact_text, request_secrets
from flask_muset.signals import ErrorEvent, error_handled
from flask_muset.translate import (
    Translation,
    aborted_by_validation,
    is_timeout,
    translate,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from flask_muset.error_handler.shared import SharedErrors
    from flask_muset.redis import GuardedRedis

__all__ = ["ErrorHandler", "error_body", "recent_errors"]

_logger = logging.getLogger(__name__)

_KEY = "error_handler"
#: Marks on an exception: what was done with it. Their value is the token of the request, because an
#: exception object may be raised in several requests. The environment must not refer to the
#: exception instead: its traceback refers back, and only the garbage collector would free them.
_RECORDED = "_flask_muset_recorded"
_TOLD = "_flask_muset_told"
_TOKEN = "flask_muset.token"  # noqa: S105 - a key of the environment
_REFUSAL_WINDOW_S = 1.0
_MAX_KEPT_TEXT = 1_024


@dataclass(slots=True)
class _State:
    """What one app owns."""

    config: Config
    own: dict[type, Translation]
    repeats: Repeats
    recent: RecentErrors
    shared: "SharedErrors | None"


class StreamAbortedError(ConnectionResetError):
    """Ends a response that had begun, so that the client sees that it is not whole.

    Servers take a reset connection as such: they close it without the end mark of a complete body
    and without a second traceback in their log.
    """

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the response failed after it had begun")


class ErrorHandler:
    """Answer every error of an app by one table, without secrets, whatever raised it.

    The instance keeps nothing about an app but the translations declared on it with `map`, so one
    instance may serve several apps.

    Config:
        ERROR_HANDLER_ENABLED: False leaves the app as it is. Default True.
        ERROR_HANDLER_CATALOGUE: Path of the error catalogue, None for none. Default "/errors".
        ERROR_HANDLER_KEEP: How many different errors are kept for operators. Default 100.
        ERROR_HANDLER_REPEAT_WINDOW: Seconds in which repeats are one log line. Default 60.
        ERROR_HANDLER_REDACT_KEYS: More names whose values are secrets. Default none.
        ERROR_HANDLER_WWW_AUTHENTICATE: Challenge of a 401 without one. Default "Bearer".
        ERROR_HANDLER_REDIS_URL: Where all processes keep their errors together. Default None: each
            has its own.
        ERROR_HANDLER_REDIS_MAX_CONNECTIONS: Calls of one process to it at once. Default 10.
        ERROR_HANDLER_REDIS_BUDGET: Seconds that a call may take. Default 0.05.
        ERROR_HANDLER_NAMESPACE: Tells apps that share a Redis apart. Default "default".

    Args:
        app: Is set up at once; else call `init_app`.
        redis: Is used instead of a client made of the configuration.
    """

    def __init__(self, app: Flask | None = None, *, redis: "GuardedRedis | None" = None) -> None:
        self._own: dict[type, Translation] = {}
        self._given_redis = redis
        if app is not None:
            self.init_app(app)

    def map(self, exception: type[BaseException], to: Translation) -> None:
        """Translate a class of exceptions, its subclasses too.

        Args:
            exception: The class; the nearest of several wins, also over the built-in ones.
            to: A category, or a function that takes the exception and returns a MusetError.

        Raises:
            TypeError: `exception` is no exception class, or `to` is neither of the two.
        """
        if not (isinstance(exception, type) and issubclass(exception, BaseException)):
            raise TypeError(f"map needs an exception class, got {exception!r}.")
        if not (isinstance(to, ErrorCategory) or callable(to)):
            raise TypeError(f"map needs an ErrorCategory or a function, got {to!r}.")
        self._own[exception] = to

    def init_app(self, app: Flask) -> None:
        """Read the configuration once and take over the app's errors.

        Raises:
            RuntimeError: It is set up on this app already.
            ValueError: A setting is not allowed.
        """
        config = read_config(app.config)
        repeats = Repeats(partial(_log_repeats, app.name), clock=time.monotonic)
        recent = RecentErrors(config.keep)
        shared = _shared(config, recent, self._given_redis)
        state = _State(config, self._own, repeats, recent, shared)
        context.attach(app, _KEY, "ErrorHandler", state)
        context.translate_with(app, self._own)
        if not config.enabled:
            return
        # Sums that are still open are written when the process ends, or when the app is dropped.
        weakref.finalize(app, repeats.flush)
        _bind(app, state)


def recent_errors(app: Flask) -> KeptErrors:
    """The newest errors, the one that happened last first.

    Those of all processes, where they share a Redis that answers; else those of this process, and
    the list says so: its `is_shared` is False.

    Each has `fingerprint, type, error, category, severity, status, place, message, traceback,
    last_seen, count` and `newest`, its latest occurrences with `at, request_id, method,
    path, message, details`. All texts are redacted.

    Raises:
        RuntimeError: ErrorHandler is not set up on this app.
    """
    if _KEY not in app.extensions:
        raise RuntimeError(f"ErrorHandler is not set up on app {app.name!r}; call init_app first.")
    state: _State = app.extensions[_KEY]
    if state.shared is not None:
        try:
            return KeptErrors(state.shared.newest(), is_shared=True)
        except MusetError as error:
            _logger.info("the errors of this process alone are shown: %s", error)
    return KeptErrors(state.recent.newest(), is_shared=False)


def _shared(
    config: Config, recent: RecentErrors, given: "GuardedRedis | None"
) -> "SharedErrors | None":
    redis = redis_client(given, config, PREFIX, "errors")
    if redis is None or not (config.enabled and config.keep):
        return None
    # Only here, because it needs redis-py.
    from flask_muset.error_handler.shared import SharedErrors

    return SharedErrors(recent, redis, config.keep)


def error_body(app: Flask, exception: Exception, environ: "WSGIEnvironment") -> str:
    """Record an exception of a response that has begun, and say it in JSON on one line.

    For streams that can tell their client what has happened, and end well then.

    Args:
        app: Whose error it is; ErrorHandler is set up on it.
        exception: As it was raised.
        environ: Of the request; whatever it accepts, this is JSON.
    """
    state: _State = app.extensions[_KEY]
    incoming = app.request_class({k: v for k, v in environ.items() if k != "HTTP_ACCEPT"})
    try:
        error, secrets = _record(app, state, exception, incoming, streaming=True)
        answer = _render(app, state, error, exception, incoming, secrets)
        return answer.get_data(as_text=True)
    except Exception as failure:  # noqa: BLE001 - whatever broke, the client gets valid JSON
        _report_failure(failure)
        return render.constant_body(incoming.path, _id_of(incoming)).decode()


def _bind(app: Flask, state: _State) -> None:
    app.register_error_handler(Exception, partial(_answer_in_flask, app, state))
    layers = context.install(app)
    layers.add(context.Rank.ERRORS, lambda wsgi_app: _Boundary(wsgi_app, app, state).__call__)
    layers.guard(partial(_broken, app, state))

    # Both are Flask's own points of extension, methods that an application class overrides.
    trap = app.trap_http_exception
    app.trap_http_exception = (  # type: ignore[method-assign]
        lambda e: trap(e) or aborted_by_validation(e)
    )
    app.log_exception = partial(  # type: ignore[method-assign]
        _log_for_flask, app, state
    )
    app.extensions[context.UNREADABLE] = partial(_unreadable, app, state)
    if state.config.catalogue is not None:
        app.register_blueprint(catalogue.make_blueprint(state.config.catalogue))


# --- Where errors arrive --------------------------------------------------------------------------


def _answer_in_flask(app: Flask, state: _State, exception: Exception) -> Response | HTTPException:
    """Flask's handler for every exception."""
    if isinstance(exception, HTTPException):
        given = exception.response is not None and not aborted_by_validation(exception)
        if given or (exception.code or 500) < 400:
            return exception  # a finished response that somebody aborted with
    source = exception
    if isinstance(exception, InternalServerError) and exception.original_exception is not None:
        source = exception.original_exception  # type: ignore[assignment]
    return _answer(app, state, source, request._get_current_object())  # type: ignore[attr-defined]


def _log_for_flask(app: Flask, state: _State, exc_info: Any) -> None:
    """Flask calls it for an exception that escaped its handlers, just after telling its listeners.

    What follows is our handler, or one that the app has for status 500 and that would hide the
    error from us, so it is recorded here.
    """
    exception = exc_info[1]
    try:
        incoming = request._get_current_object()  # type: ignore[attr-defined]
        _is_new(exception, incoming, _TOLD)
        _record(app, state, exception, incoming, streaming=False)
    except Exception as failure:  # noqa: BLE001 - the answer must still be made
        _report_failure(failure)


class _Boundary:
    """WSGI layer for what no handler of Flask sees: escapes and gevent's Timeout."""

    def __init__(self, wsgi_app: "WSGIApplication", app: Flask, state: _State) -> None:
        self._wsgi_app = wsgi_app
        self._app = app
        self._state = state

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        try:
            return self._wsgi_app(environ, start_response)
        except BaseException as exception:
            if not self._is_ours(exception):
                raise
            answer = _answer(self._app, self._state, exception, self._app.request_class(environ))
            return _begin(answer, environ, start_response)

    def _is_ours(self, exception: BaseException) -> bool:
        """Flask lets exceptions through where PROPAGATE_EXCEPTIONS asks for it."""
        if isinstance(exception, Exception):
            return not self._app.config["PROPAGATE_EXCEPTIONS"]
        return is_timeout(exception)


def _broken(
    app: Flask, state: _State, exception: BaseException, environ: "WSGIEnvironment"
) -> None:
    """Record an exception of a response that had begun, and end it visibly."""
    if not (isinstance(exception, Exception) or is_timeout(exception)):
        return
    try:
        _record(app, state, exception, app.request_class(environ), streaming=True)
    except Exception as failure:  # noqa: BLE001 - the stream must still be ended
        _report_failure(failure)
    raise StreamAbortedError from exception


def _begin(
    answer: Response, environ: "WSGIEnvironment", start_response: "StartResponse"
) -> Iterable[bytes]:
    """Send a whole answer, as Werkzeug does, at a third of its cost.

    Answers from here are mostly refusals, and each one takes time from what can be served.
    """
    if type(answer) is not Response:
        return answer(environ, start_response)
    data = answer.get_data()
    answer.headers["Content-Length"] = str(len(data))
    start_response(answer.status, answer.headers.to_wsgi_list())
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [data]


def _unreadable(app: Flask, state: _State, error: MusetError) -> tuple[int, dict[str, str], bytes]:
    """The answer to a request that the server could not read: status, headers and body."""
    form = render.Form(render.PROBLEM_TYPE, app.json.dumps, state.config.catalogue)
    answer, made = render.answer_of(error, ()), context.new_id()
    content_type, body = render.render(answer, "", made, form, details={}, errors=())
    return answer.status, {"Content-Type": content_type, "X-Request-ID": made}, body


# --- What is done with them -----------------------------------------------------------------------


def _answer(app: Flask, state: _State, exception: BaseException, incoming: Request) -> Response:
    """Record and render; if anything in here raises, the answer of last resort."""
    try:
        error, secrets = _record(app, state, exception, incoming, streaming=False)
        return _render(app, state, error, exception, incoming, secrets)
    except Exception as failure:  # noqa: BLE001 - whatever broke, the client gets valid JSON
        _report_failure(failure)
        _tell_once(app, exception, incoming, quiet=True)
        body = render.constant_body(incoming.path, _id_of(incoming))
        return Response(body, 500, content_type=render.JSON_TYPE)


def _record(
    app: Flask, state: _State, exception: BaseException, incoming: Request, *, streaming: bool
) -> tuple[MusetError, tuple[str, ...]]:
    """Translate, tell the listeners, log and keep, once for each exception of a request."""
    error = translate(exception, state.own)
    secrets = request_secrets(incoming.environ)
    if not _is_new(exception, incoming, _RECORDED):
        return error, secrets
    if got_request_exception.receivers and error.status >= 500 and not error.refusal:
        _tell_once(app, exception, incoming)
    fingerprint, place = fingerprint_of(exception)
    if error_handled.receivers:
        event = ErrorEvent(
            category=error.category,
            severity=error.severity,
            error=type(error).__name__,
            status=error.status,
            retryable=error.retryable,
            refusal=error.refusal,
            streaming=streaming,
            fingerprint=fingerprint,
            request_id=_id_of(incoming),
            exception=exception,
        )
        context.tell(error_handled, app, event)
    _log(app, state, error, exception, incoming, fingerprint, secrets)
    if state.config.keep and not error.refusal:
        _keep(state, error, exception, incoming, fingerprint, place, secrets)
    return error, secrets


def _is_new(exception: BaseException, incoming: Request, mark: str) -> bool:
    """Mark the exception for this request; False if it was."""
    token = incoming.environ.get(_TOKEN)
    if token is None:
        token = incoming.environ[_TOKEN] = object()
    marks = exception.__dict__
    if marks.get(mark) is token:
        return False
    marks[mark] = token
    return True


def _tell_once(
    app: Flask, exception: BaseException, incoming: Request, *, quiet: bool = False
) -> None:
    """Send Flask's own signal, which error trackers listen to, unless Flask has sent it."""
    if not got_request_exception.receivers or not _is_new(exception, incoming, _TOLD):
        return
    try:
        got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=exception)
    except Exception as failure:
        if not quiet:
            raise
        _report_failure(failure)


def _render(
    app: Flask,
    state: _State,
    error: MusetError,
    exception: BaseException,
    incoming: Request,
    secrets: tuple[str, ...],
) -> Response:
    path, keys = state.config.catalogue, state.config.redact_keys
    form = render.Form(
        render.preferred_type(incoming.environ.get("HTTP_ACCEPT")),
        app.json.dumps,
        None if path is None else incoming.root_path + path,
    )
    answer = render.answer_of(error, secrets)
    shown, errors = error.details, error.errors
    if shown and not error.row.shows_details:
        shown = {}
    content_type, data = render.render(
        answer,
        redact_text(incoming.path, secrets),
        _id_of(incoming),
        form,
        details=redact(shown, secrets, extra_keys=keys) if shown else {},
        errors=redact(errors, secrets, extra_keys=keys) if errors else (),
    )
    response = app.response_class(data, answer.status, content_type=content_type)
    render.set_headers(response.headers, answer, exception, state.config.www_authenticate)
    return response


def _log(
    app: Flask,
    state: _State,
    error: MusetError,
    exception: BaseException,
    incoming: Request,
    fingerprint: str,
    secrets: tuple[str, ...],
) -> None:
    logger, level = app.logger, error.row.log_level
    if not logger.isEnabledFor(level):
        return
    if error.refusal:
        state.repeats.is_first((level, type(error).__name__), _REFUSAL_WINDOW_S, only_sums=True)
        return
    key = (level, f"{type_name(exception)} {fingerprint}")
    if not state.repeats.is_first(key, state.config.repeat_window_s):
        return
    text = redact_text(f"{type_name(exception)}: {exception}", secrets)
    if error.status >= 500:
        text = f"{text}\n{formatted_traceback(exception, secrets)}"
    logger.log(
        level,
        "%s %s -> %d %s, fingerprint %s, request %s: %s",
        redact_text(incoming.method, secrets),
        redact_text(incoming.path, secrets),
        error.status,
        type(error).__name__,
        fingerprint,
        _id_of(incoming),
        text,
        extra={
            "request_id": _id_of(incoming),
            "fingerprint": fingerprint,
            "category": error.category.value,
            "severity": error.severity.value,
            "status": error.status,
            # Tells flask_muset.logging that these are its own keys, not somebody's of that name.
            "flask_muset": ("fingerprint", "status"),
        },
    )


def _log_repeats(name: str, key: tuple[int, str], repeats: int, window_s: float) -> None:
    level, what = key
    logging.getLogger(name).log(
        level, "%s: %d more in the last %.0f s", what, repeats, max(window_s, 1.0)
    )


def _keep(
    state: _State,
    error: MusetError,
    exception: BaseException,
    incoming: Request,
    fingerprint: str,
    place: str,
    secrets: tuple[str, ...],
) -> None:
    message = error.message or str(exception)
    # Texts are kept raw, because most are never read; `recent_errors` redacts what it gives.
    # Details may refer to anything of any size, so what is kept of them is a bounded copy.
    details, keys = error.details, state.config.redact_keys
    occurrence = Occurrence(
        _id_of(incoming),
        incoming.method,
        incoming.path,
        message if len(message) <= _MAX_KEPT_TEXT else redact_text(message, secrets),
        redact(details, secrets, extra_keys=keys) if details else {},
        secrets,
    )
    if not state.recent.again(fingerprint, occurrence):
        fault = _fault(error, exception, fingerprint, place, message, secrets)
        state.recent.first(fingerprint, fault, occurrence)
    if state.shared is not None and not state.shared.is_started:
        state.shared.start()


def _fault(
    error: MusetError,
    exception: BaseException,
    fingerprint: str,
    place: str,
    message: str,
    secrets: tuple[str, ...],
) -> dict[str, Any]:
    """What is said of all its occurrences, redacted."""
    return {
        "fingerprint": fingerprint,
        "type": type_name(exception),
        "error": type(error).__name__,
        "category": error.category.value,
        "severity": error.severity.value,
        "status": error.status,
        "place": place,
        "message": redact_text(message, secrets),
        "traceback": formatted_traceback(exception, secrets) if error.status >= 500 else None,
    }


def _id_of(incoming: Request) -> str:
    return str(incoming.environ.get(context.REQUEST_ID_KEY, ""))


def _report_failure(failure: Exception) -> None:
    """Say that error handling itself failed; the logger may be what is broken."""
    try:
        _, place = fingerprint_of(failure)
        sys.stderr.write(f"ErrorHandler failed: {type_name(failure)} at {place}\n")
    except Exception:  # noqa: BLE001, S110 - nothing is left to report to
        pass
