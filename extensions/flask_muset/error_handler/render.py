"""An error as the client sees it: JSON, problem+json or a page, with the right headers."""

import html
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from flask_muset.errors import TABLE, ErrorCategory, MusetError
from flask_muset.redaction import redact, redact_text

__all__ = [
    "HTML_TYPE",
    "JSON_TYPE",
    "PROBLEM_TYPE",
    "body_of",
    "category_of",
    "constant_body",
    "headers_of",
    "page",
    "preferred_type",
    "render",
]

JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"
HTML_TYPE = "text/html"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:12vh auto;padding:0 1rem;
color:#1c2430;background:#fbfbfa}}h1{{font-size:1.6rem;margin:0 0 .5rem}}p{{margin:.5rem 0}}
code,td:first-child{{font-family:ui-monospace,monospace}}small{{color:#5b6675}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{text-align:left;padding:.3rem .8rem .3rem 0;
border-bottom:1px solid #e3e6ea;vertical-align:top}}a{{color:#1a5fb4}}
@media(prefers-color-scheme:dark){{body{{color:#e6e9ee;background:#14181d}}small{{color:#9aa5b1}}
td,th{{border-color:#2b323a}}a{{color:#78aeed}}}}</style></head>
<body>{body}</body></html>
"""


def page(title: str, body: str) -> bytes:
    """A whole HTML page.

    Args:
        title: Plain text.
        body: HTML, escaped by the caller.
    """
    return _PAGE.format(title=html.escape(title), body=body).encode("utf-8", "replace")


def preferred_type(accept: Any) -> str:
    """Choose the media type for an error.

    JSON unless the client names one of the two others and wants it at least as much; a header that
    cannot be understood names neither.

    Args:
        accept: Werkzeug's parsed `Accept` header.
    """
    best, best_quality = JSON_TYPE, 0.0
    for value, quality in accept:
        value = value.partition(";")[0].strip().lower()
        if quality > best_quality and value in (PROBLEM_TYPE, HTML_TYPE, JSON_TYPE):
            best, best_quality = value, quality
        elif quality == best_quality and value == PROBLEM_TYPE and best == JSON_TYPE:
            best = value  # a client that names both gets the one that is meant for errors
    if best == HTML_TYPE and accept[JSON_TYPE] >= best_quality and JSON_TYPE in accept.values():
        return JSON_TYPE
    return best


def body_of(
    error: MusetError,
    *,
    path: str,
    request_id: str,
    secrets: tuple[str, ...],
    redact_keys: frozenset[str],
) -> dict[str, Any]:
    """The members that every form of the answer has."""
    row = TABLE[error.category]
    shown = error.details if row.shows_details else {}
    details = redact(shown, secrets, extra_keys=redact_keys) if shown else {}
    errors, retry_after = error.errors, error.retry_after
    body: dict[str, Any] = {
        "error": type(error).__name__,
        "message": redact_text(error.user_message, secrets),
        "category": error.category.value,
        "severity": row.severity.value,
        "retryable": error.retryable,
        "details": details,
        "path": redact_text(path, secrets),
        "request_id": request_id,
    }
    if errors:
        body["errors"] = redact(errors, secrets, extra_keys=redact_keys)
    if retry_after is not None:
        body["retry_after"] = retry_after
    return body


def render(
    error: MusetError,
    body: Mapping[str, Any],
    media_type: str,
    *,
    dumps: Callable[[Any], str],
    catalogue: str | None,
) -> tuple[str, bytes]:
    """Return the content type and the bytes of the answer.

    Args:
        error: What went wrong.
        body: From `body_of`.
        media_type: From `preferred_type`.
        dumps: The app's JSON encoder.
        catalogue: Address of the error catalogue, None where there is none.
    """
    if media_type == HTML_TYPE:
        return "text/html; charset=utf-8", _error_page(error.status, body, catalogue)
    if media_type == PROBLEM_TYPE:
        about = f"{catalogue}/{body['category']}" if catalogue else "about:blank"
        problem = {
            "type": about,
            "title": _phrase(error.status),
            "status": error.status,
            "detail": body["message"],
            "instance": body["path"],
        }
        return PROBLEM_TYPE, dumps({**problem, **body}).encode()
    return JSON_TYPE, dumps(body).encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _error_page(status: int, body: Mapping[str, Any], catalogue: str | None) -> bytes:
    title = f"{status} {_phrase(status)}"
    text = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(body['message'])}</p>"]
    for entry in body.get("errors", ()):
        field = html.escape(str(entry.get("field") or ""))
        text.append(f"<p><code>{field}</code> {html.escape(str(entry.get('message')))}</p>")
    if "retry_after" in body:
        text.append(f"<p>Please try again in {body['retry_after']} seconds.</p>")
    if catalogue:
        link = html.escape(f"{catalogue}/{body['category']}")
        text.append(f'<p><a href="{link}">What this means</a></p>')
    text.append(f"<p><small>Request {html.escape(body['request_id'])}</small></p>")
    return page(title, "".join(text))


def constant_body(path: str, request_id: str) -> bytes:
    """The answer of last resort: needs no encoder, no table row and no error object of ours."""
    return json.dumps(
        {
            "error": "InternalError",
            "message": "Something went wrong on our side.",
            "category": "internal",
            "severity": "critical",
            "retryable": False,
            "details": {},
            "path": path,
            "request_id": request_id,
        }
    ).encode()


def headers_of(error: MusetError, source: BaseException, challenge: str) -> list[tuple[str, str]]:
    """The headers that belong to the error, those of a Werkzeug exception kept.

    Args:
        error: What went wrong.
        source: What was raised.
        challenge: For a 401 that brings none.
    """
    kept: list[tuple[str, str]] = []
    get_headers = getattr(source, "get_headers", None)
    if get_headers is not None and not isinstance(source, MusetError):
        kept = [
            (name, value)
            for name, value in get_headers()
            if name.lower() not in ("content-type", "content-length")
        ]
    names = {name.lower() for name, _ in kept}
    if error.retry_after is not None and "retry-after" not in names:
        kept.append(("Retry-After", str(error.retry_after)))
    if error.status == 401 and "www-authenticate" not in names:
        kept.append(("WWW-Authenticate", challenge))
    # The body bears the id of its own request, so it is nobody else's.
    kept.append(("Cache-Control", "no-store"))
    return kept


def category_of(name: str) -> ErrorCategory | None:
    """The category with this name, None if there is none."""
    try:
        return ErrorCategory(name)
    except ValueError:
        return None
