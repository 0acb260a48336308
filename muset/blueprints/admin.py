"""What operators read."""

from flask import Blueprint, Response, current_app, jsonify
from spectree import Response as Described

from flask_muset.error_handler import recent_errors
from flask_muset.errors import NotFoundError
from muset.blueprints.auth import require_admin
from muset.blueprints.openapi import spec
from muset.blueprints.schemas import ErrorList, KeptError

__all__ = ["blueprint"]

blueprint = Blueprint("admin", __name__, url_prefix="/api/v1/admin")
blueprint.before_request(require_admin)


@blueprint.get("/errors")
@spec.validate(resp=Described(HTTP_200=ErrorList), tags=["admin"])
def list_errors() -> Response:
    """The newest errors of the worker process that answers."""
    return jsonify({"items": recent_errors(current_app), "next_cursor": None})


@blueprint.get("/errors/<fingerprint>")
@spec.validate(resp=Described(HTTP_200=KeptError), tags=["admin"])
def get_error(fingerprint: str) -> Response:
    """One of them, by its fingerprint."""
    for kept in recent_errors(current_app):
        if kept["fingerprint"] == fingerprint:
            return jsonify(kept)
    raise NotFoundError(
        f"no error {fingerprint!r} is kept",
        resource_type="error",
        details={"fingerprint": fingerprint},
    )
