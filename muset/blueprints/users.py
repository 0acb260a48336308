"""What belongs to a user."""

from flask import Blueprint, Response, current_app, jsonify, request
from spectree import Response as Described

from muset.blueprints.auth import principal, require_key
from muset.blueprints.openapi import json_object, spec
from muset.blueprints.schemas import Preferences
from muset.services.preferences import MAX_BYTES, PreferenceService

__all__ = ["blueprint"]

blueprint = Blueprint("users", __name__, url_prefix="/api/v1/users")


@blueprint.before_request
def _enter() -> None:
    # JSON may write a character of two bytes as an escape of six, and blanks where it likes.
    request.max_content_length = 3 * MAX_BYTES + 65_536
    require_key()


def _service() -> PreferenceService:
    service: PreferenceService = current_app.extensions["muset"].preferences
    return service


@blueprint.get("/<int:user_id>/preferences")
@spec.validate(resp=Described("HTTP_304", HTTP_200=Preferences), tags=["users"])
def get_preferences(user_id: int) -> Response:
    """What a user likes: what was put last, {} before that. Their own, admins see all."""
    response = jsonify(_service().get(principal(), user_id))
    response.add_etag()
    return response.make_conditional(request)  # type: ignore[return-value]


@blueprint.put("/<int:user_id>/preferences")
@spec.validate(json=Preferences, resp=Described(HTTP_200=Preferences), tags=["users"])
def put_preferences(user_id: int) -> Response:
    """Put an object in the place of what was there; it is safe, and read, when this answers.

    503 if it cannot be kept safe now: nothing has changed then.
    """
    preferences = json_object()
    _service().put(principal(), user_id, preferences)
    return jsonify(preferences)
