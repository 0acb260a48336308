"""Conditional requests to single resources: RFC 9110, section 13.

All tags of the service are strong. Werkzeug's own check would refuse `If-Match: *`, and with an
answer that has no body.
"""

from typing import Any

from flask import Response, jsonify, request

from flask_muset.errors import ConflictError, MusetError

__all__ = ["check_if_match", "is_expected", "respond", "tag_of"]


def is_expected(etag: str) -> bool:
    """Whether `If-Match` allows the state with this tag; a weak tag never does."""
    return request.if_match.contains(etag)


def check_if_match(etag: str) -> None:
    """Refuse a request whose `If-Match` does not have the tag of what is there.

    Raises:
        ConflictError: It does not; status 412.
    """
    # Most requests have neither header, and to read one takes longer than to look for it.
    if "HTTP_IF_MATCH" in request.environ and request.if_match and not is_expected(etag):
        raise precondition_failed()


def precondition_failed() -> MusetError:
    """The error for a state that the caller has not seen."""
    error = ConflictError(
        "If-Match has other tags than that of the resource",
        user_message="The resource has changed meanwhile; read it again.",
    )
    error.status = 412
    return error


def tag_of(body: Any) -> str:
    """The tag of a resource that has no version: made of its JSON."""
    response = jsonify(body)
    response.add_etag()
    return response.get_etag()[0] or ""


def respond(body: Any, etag: str) -> Response:
    """A resource with its tag; 304 if the caller has it already, 412 if it must not differ."""
    check_if_match(etag)
    response = jsonify(body)
    response.set_etag(etag)
    if "HTTP_IF_NONE_MATCH" in request.environ and request.if_none_match.contains_weak(etag):
        response.status_code = 304
    return response
