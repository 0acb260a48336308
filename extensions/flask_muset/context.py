"""What all extensions share: the request id, the WSGI layers and their order, the current app.

The layers are installed once per application by whichever extension comes first. The outermost
gives each request its id, which lives in the WSGI environment of its own request: one greenlet
serves many requests of a kept connection, so a context variable that nobody resets would show in
the next.
"""

import contextvars
import itertools
import os
import re
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from blinker import Signal
from flask import Flask, current_app, has_app_context, has_request_context, request

from flask_muset.deadline import deadline

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from flask_muset.translate import Translation

__all__ = [
    "REQUEST_ID_KEY",
    "Rank",
    "RequestContext",
    "attach",
    "emit",
    "find",
    "install",
    "request_id",
    "spawn",
    "state",
    "translate_with",
    "translations",
]

REQUEST_ID_KEY = "flask_muset.request_id"
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

    METRICS = 1
    ERRORS = 2
    LIMITS = 3


class RequestContext:
    """WSGI layer that gives every request an id and every response the header that names it.

    Args:
        wsgi_app: The application itself, innermost of all layers.
    """

    def __init__(self, wsgi_app: "WSGIApplication") -> None:
        self._application = wsgi_app
        self._layers: list[tuple[Rank, Callable[[WSGIApplication], WSGIApplication]]] = []
        self._next = wsgi_app

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
        # A lambda, because a function's annotations would be made anew for each request.
        return self._next(
            environ,
            lambda status, headers, exc_info=None: start_response(
                status, [*headers, header], exc_info
            ),
        )


def install(app: Flask) -> RequestContext:
    """Return the application's context layer, made at the first call."""
    layer: RequestContext | None = app.extensions.get(_EXTENSION)
    if layer is None:
        layer = app.extensions[_EXTENSION] = RequestContext(app.wsgi_app)
        app.wsgi_app = layer.__call__  # type: ignore[method-assign]
    return layer


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
        signal.send(sender, event=event)


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
    left = deadline.remaining()

    def run() -> Any:
        if left is None:
            return fn(*args, **kwargs)
        with deadline.anew(left):
            return fn(*args, **kwargs)

    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        import gevent

        return gevent.spawn(variables.run, run)
    thread = threading.Thread(target=variables.run, args=(run,), daemon=True)
    thread.start()
    return thread
