"""An error as the client sees it: JSON, problem+json or a page, with the right headers."""

import html
import json
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from secrets import token_hex
from typing import Any, NamedTuple

from werkzeug.datastructures import Headers, MIMEAccept
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_accept_header

from flask_muset.errors import ErrorCategory, MusetError, Severity
from flask_muset.redaction import redact_text

__all__ = [
    "HTML_TYPE",
    "JSON_TYPE",
    "PROBLEM_TYPE",
    "STYLE_SOURCE",
    "Answer",
    "Form",
    "answer_of",
    "category_of",
    "constant_body",
    "csp_source",
    "page",
    "preferred_type",
    "render",
    "set_headers",
]

JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"
HTML_TYPE = "text/html"


def csp_source(text: str) -> str:
    """What stands in a Content-Security-Policy for a script or a style inside a page."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:12vh auto;padding:0 1rem;
color:#1c2430;background:#fbfbfa}h1{font-size:1.6rem;margin:0 0 .5rem}p{margin:.5rem 0}
code,td:first-child{font-family:ui-monospace,monospace}small{color:#5b6675}
table{border-collapse:collapse;margin:1rem 0}td,th{text-align:left;padding:.3rem .8rem .3rem 0;
border-bottom:1px solid #e3e6ea;vertical-align:top}a{color:#1a5fb4}
@media(prefers-color-scheme:dark){body{color:#e6e9ee;background:#14181d}small{color:#9aa5b1}
td,th{border-color:#2b323a}a{color:#78aeed}}"""
#: What the style-src of a Content-Security-Policy needs, so that the pages look as they should.
STYLE_SOURCE = csp_source(_STYLE)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head>
<body>{body}</body></html>
"""


def page(title: str, body: str) -> bytes:
    """A whole HTML page.

    Args:
        title: Plain text.
        body: HTML, escaped by the caller.
    """
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body).encode(
        "utf-8", "replace"
    )


@lru_cache(maxsize=256)
def preferred_type(header: str | None) -> str:
    """Choose the media type for an error.

    JSON unless the client names one of the two others and wants it at least as much; a header that
    cannot be understood names neither.

    Args:
        header: `Accept` as it was sent, None where it was not.
    """
    accept = parse_accept_header(header, MIMEAccept)
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


class Form(NamedTuple):
    """How an answer is written.

    Attributes:
        media_type: From `preferred_type`.
        dumps: The app's JSON encoder.
        catalogue: Address of the error catalogue, None where there is none.
    """

    media_type: str
    dumps: Callable[[Any], str]
    catalogue: str | None


class Answer(NamedTuple):
    """What an answer says beside its details, its field errors, its path and its request id.

    Plain redacted values, so that answers that say the same are equal.
    """

    error: str
    message: str
    category: ErrorCategory
    severity: Severity
    retryable: bool
    status: int
    retry_after: int | None


def answer_of(error: MusetError, secrets: tuple[str, ...]) -> Answer:
    """Return what is said about an error.

    Args:
        error: What went wrong.
        secrets: Values of the request that are hidden wherever they occur.
    """
    return Answer(
        type(error).__name__,
        redact_text(error.user_message, secrets),
        error.category,
        error.row.severity,
        error.retryable,
        error.status,
        error.retry_after,
    )


def render(
    answer: Answer,
    path: str,
    request_id: str,
    form: Form,
    *,
    details: Mapping[str, Any],
    errors: Sequence[Mapping[str, Any]],
) -> tuple[str, bytes]:
    """Return the content type and the bytes of an answer.

    Args:
        answer: From `answer_of`.
        path: Of the request, redacted.
        request_id: Letters, digits, dots, dashes and underscores only.
        form: How it is written.
        details: Redacted.
        errors: Entries `{field, code, message}`, redacted.
    """
    if not details and not errors and _is_plain(path):
        known = _template(answer, form)
        if known is not None:
            content_type, text = known
            text = text.replace(_PATH, path).replace(_ID, request_id)
            return content_type, text.encode()
    return _render(answer, path, request_id, form, details, errors)


#: Stand where a path and an id will be; nobody else can know them, so no message has them.
_PATH, _ID = token_hex(16), token_hex(16)
#: Characters that stand for themselves in JSON.
_is_plain = re.compile(r"[A-Za-z0-9/._~-]*").fullmatch


@lru_cache(maxsize=128)
def _template(answer: Answer, form: Form) -> tuple[str, str] | None:
    """Render once what differs in path and id only, because encoding is half of an error's cost."""
    content_type, data = _render(answer, _PATH, _ID, form, {}, ())
    text = data.decode()
    # An app's own encoder may do anything to them.
    whole = _ID in text and (form.media_type == HTML_TYPE or _PATH in text)
    return (content_type, text) if whole else None


def _render(
    answer: Answer,
    path: str,
    request_id: str,
    form: Form,
    details: Mapping[str, Any],
    errors: Sequence[Mapping[str, Any]],
) -> tuple[str, bytes]:
    if form.media_type == HTML_TYPE:
        return "text/html; charset=utf-8", _error_page(answer, request_id, errors, form.catalogue)
    body: dict[str, Any] = {
        "error": answer.error,
        "message": answer.message,
        "category": answer.category.value,
        "severity": answer.severity.value,
        "retryable": answer.retryable,
        "details": details,
        "path": path,
        "request_id": request_id,
    }
    if errors:
        body["errors"] = errors
    if answer.retry_after is not None:
        body["retry_after"] = answer.retry_after
    if form.media_type == PROBLEM_TYPE:
        about = f"{form.catalogue}/{body['category']}" if form.catalogue else "about:blank"
        body |= {
            "type": about,
            "title": _phrase(answer.status),
            "status": answer.status,
            "detail": answer.message,
            "instance": path,
        }
    return form.media_type, form.dumps(body).encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _error_page(
    answer: Answer, request_id: str, errors: Sequence[Mapping[str, Any]], catalogue: str | None
) -> bytes:
    title = f"{answer.status} {_phrase(answer.status)}"
    text = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(answer.message)}</p>"]
    for entry in errors:
        field = html.escape(str(entry.get("field") or ""))
        text.append(f"<p><code>{field}</code> {html.escape(str(entry.get('message')))}</p>")
    if answer.retry_after is not None:
        text.append(f"<p>Please try again in {answer.retry_after} seconds.</p>")
    if catalogue:
        link = html.escape(f"{catalogue}/{answer.category}")
        text.append(f'<p><a href="{link}">What this means</a></p>')
    text.append(f"<p><small>Request {html.escape(request_id)}</small></p>")
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


def set_headers(headers: Headers, answer: Answer, source: BaseException, challenge: str) -> None:
    """Set the headers that belong to the error, those of a Werkzeug exception kept.

    Args:
        headers: Of the response; those of its body stay.
        answer: From `answer_of`.
        source: What was raised.
        challenge: For a 401 that brings none.
    """
    if isinstance(source, HTTPException):
        for name, value in source.get_headers():
            if name.lower() not in ("content-type", "content-length"):
                headers.add(name, value)
    if answer.retry_after is not None:
        headers.setdefault("Retry-After", str(answer.retry_after))
    if answer.status == 401:
        headers.setdefault("WWW-Authenticate", challenge)
    # The body bears the id of its own request, so it is nobody else's.
    headers["Cache-Control"] = "no-store"


def category_of(name: str) -> ErrorCategory | None:
    """The category with this name, None if there is none."""
    try:
        return ErrorCategory(name)
    except ValueError:
        return None
