"""The request context that all extensions share: today the request id.

It is a WSGI layer, installed once per application by whichever extension comes first, and stays the
outermost of them. The id lives in the WSGI environment of its own request: one greenlet serves many
requests of a kept connection, so a context variable that nobody resets would show in the next one.
"""

import itertools
import os
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Flask, has_request_context, request

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["REQUEST_ID_KEY", "RequestContext", "install", "request_id"]

REQUEST_ID_KEY = "flask_muset.request_id"
_EXTENSION = "flask_muset.context"
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


class RequestContext:
    """WSGI layer that gives every request an id and every response the header that names it.

    Attributes:
        wsgi_app: The next layer. An extension that needs a layer of its own puts it here, so that
            this one stays outermost.
    """

    def __init__(self, wsgi_app: "WSGIApplication") -> None:
        self.wsgi_app = wsgi_app

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
        return self.wsgi_app(
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
