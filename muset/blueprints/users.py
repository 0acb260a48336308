"""Users, and what belongs to them."""

from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from spectree import Response as Described

from flask_muset.errors import ConflictError
from muset.blueprints.audit import log_change
from muset.blueprints.auth import principal, require_key
from muset.blueprints.conditional import check_if_match, is_expected, respond, tag_of
from muset.blueprints.openapi import json_body, json_object, spec
from muset.blueprints.schemas import (
    PageQuery,
    Preferences,
    UserIn,
    UserList,
    UserOut,
    UserPatch,
)
from muset.ports import User
from muset.services.preferences import MAX_BYTES, PreferenceService
from muset.services.users import UserService, etag_of

__all__ = ["blueprint"]

blueprint = Blueprint("users", __name__, url_prefix="/api/v1/users")


@blueprint.before_request
def _enter() -> None:
    # JSON may write a character of two bytes as an escape of six, and blanks where it likes.
    request.max_content_length = 3 * MAX_BYTES + 65_536
    require_key()


def _users() -> UserService:
    service: UserService = current_app.extensions["muset"].users
    return service


def _service() -> PreferenceService:
    service: PreferenceService = current_app.extensions["muset"].preferences
    return service


def _shown(user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "email": user.email,
        "name": user.name,
        "created_at": user.created_at.isoformat(),
    }


@blueprint.post("")
@spec.validate(
    json=UserIn, resp=Described("HTTP_403", "HTTP_409", HTTP_201=UserOut), tags=["users"]
)
def add() -> Response:
    """Add a user; for admins. Keys for it are made with `muset keys create`."""
    body: UserIn = json_body()
    user = _users().add(principal(), body.email, body.name)
    log_change(f"user {user.id} added")
    response = jsonify(_shown(user))
    response.status_code = 201
    response.headers["Location"] = f"{request.script_root}/api/v1/users/{user.id}"
    response.set_etag(etag_of(user))
    return response


@blueprint.get("")
@spec.validate(query=PageQuery, resp=Described("HTTP_403", HTTP_200=UserList), tags=["users"])
def list_users() -> Response:
    """All users in the order of their ids; for admins."""
    page: PageQuery = request.context.query  # type: ignore[attr-defined]
    found, after = _users().list(principal(), page.limit, int(page.cursor or 0))
    cursor = None if after is None else str(after)
    return jsonify({"items": [_shown(user) for user in found], "next_cursor": cursor})


@blueprint.get("/<int:user_id>")
@spec.validate(resp=Described("HTTP_304", "HTTP_403", "HTTP_412", HTTP_200=UserOut), tags=["users"])
def get(user_id: int) -> Response:
    """One user: themselves, admins see all."""
    user = _users().get(principal(), user_id)
    return respond(_shown(user), etag_of(user))


@blueprint.patch("/<int:user_id>")
@spec.validate(
    json=UserPatch,
    resp=Described("HTTP_403", "HTTP_409", "HTTP_412", "HTTP_428", HTTP_200=UserOut),
    tags=["users"],
)
def change(user_id: int) -> Response:
    """Give a user another name or address. Members change their own name.

    `If-Match` has the `ETag` that was read, so that nobody's change is lost: 428 without it, 412 if
    the user has changed since.
    """
    body: UserPatch = json_body()
    if not request.if_match:
        raise _precondition_required()
    user = _users().change(
        principal(), user_id, is_expected=is_expected, email=body.email, name=body.name
    )
    log_change(f"user {user.id} changed")
    response = jsonify(_shown(user))
    response.set_etag(etag_of(user))
    return response


def _precondition_required() -> ConflictError:
    error = ConflictError(
        "there is no If-Match",
        user_message="Read the user, and send its ETag as If-Match with the change.",
    )
    error.status = 428
    return error


@blueprint.delete("/<int:user_id>")
@spec.validate(resp=Described("HTTP_204", "HTTP_403", "HTTP_409", "HTTP_412"), tags=["users"])
def delete(user_id: int) -> Response:
    """Forget a user; for admins.

    Address, name, keys and preferences are gone. Documents stay, and only admins may delete them
    then; usage stays under an id that is never given again.
    """
    expected = is_expected if request.if_match else None
    _users().delete(principal(), user_id, is_expected=expected)
    log_change(f"user {user_id} deleted")
    return Response(status=204)


@blueprint.get("/<int:user_id>/preferences")
@spec.validate(
    resp=Described("HTTP_304", "HTTP_403", "HTTP_412", HTTP_200=Preferences), tags=["users"]
)
def get_preferences(user_id: int) -> Response:
    """What a user likes: what was put last, {} before that. Their own, admins see all."""
    preferences = _service().get(principal(), user_id)
    return respond(preferences, tag_of(preferences))


@blueprint.put("/<int:user_id>/preferences")
@spec.validate(
    json=Preferences, resp=Described("HTTP_403", "HTTP_412", HTTP_200=Preferences), tags=["users"]
)
def put_preferences(user_id: int) -> Response:
    """Put an object in the place of what was there; it is safe, and read, when this answers.

    503 if it cannot be kept safe now: nothing has changed then. `If-Match` is compared with what is
    read when the request comes; of two at the same moment the last one counts.
    """
    preferences = json_object()
    if request.if_match:
        check_if_match(tag_of(_service().get(principal(), user_id)))
    _service().put(principal(), user_id, preferences)
    return jsonify(preferences)
