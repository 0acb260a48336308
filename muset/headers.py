"""The headers of each answer that tell browsers and caches what they must not do with it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask_muset.error_handler import STYLE_SOURCE

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["SecurityHeaders"]

_ALWAYS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Embedder-Policy", "require-corp"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
#: A browser shows nothing of ours but the pages of errors, which need their own style alone.
_RESTRICTION = (
    "Content-Security-Policy",
    "; ".join(
        (
            "default-src 'none'",
            f"style-src {STYLE_SOURCE}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
)
_USUAL = [*_ALWAYS, _RESTRICTION]
_KEEP_NOTHING = ("Cache-Control", "no-store")
#: What has a tag may be kept by its own client, which asks each time whether it still holds.
_ASK_EACH_TIME = ("Cache-Control", "private, no-cache")


class SecurityHeaders:
    """WSGI layer that adds them to whatever is answered, errors of last resort and streams too.

    A view's own Content-Security-Policy and Cache-Control are kept. Strict-Transport-Security is
    for whoever ends TLS to say.

    Args:
        app: The next inner layer.
    """

    def __init__(self, app: "WSGIApplication") -> None:
        self._app = app

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Serve one request."""

        def start(status, headers, exc_info=None):  # type: ignore[no-untyped-def]
            names = dict(headers)  # the views write them as they are written here
            more = _ALWAYS if "Content-Security-Policy" in names else _USUAL
            if "Cache-Control" in names:
                return start_response(status, headers + more, exc_info)
            kept = _ASK_EACH_TIME if "ETag" in names else _KEEP_NOTHING
            return start_response(status, [*headers, *more, kept], exc_info)

        return self._app(environ, start)
