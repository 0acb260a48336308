"""What operators read and change."""

from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from spectree import Response as Described

from flask_muset.cache_strategies import cache_manager
from flask_muset.error_handler import KeptErrors, recent_errors
from flask_muset.errors import ConflictError, NotFoundError, ValidationError
from flask_muset.resilience import breaker_of, force, policies_of, sharing_state
from muset.blueprints.audit import log_change
from muset.blueprints.auth import require_admin
from muset.blueprints.openapi import json_body, spec
from muset.blueprints.schemas import (
    DeadLetterIn,
    DeadLetterList,
    DeadLetterOut,
    DeadLetterQuery,
    ErrorList,
    FoundError,
    InvalidateIn,
    InvalidateOut,
    PolicyIn,
    PolicyList,
    PolicyOut,
)
from muset.services.dead_letters import DeadLetterService

__all__ = ["blueprint"]

_DONE = {"requeue": "requeued", "drop": "dropped"}

blueprint = Blueprint("admin", __name__, url_prefix="/api/v1/admin")
blueprint.before_request(require_admin)


@blueprint.get("/errors")
@spec.validate(resp=Described(HTTP_200=ErrorList), tags=["admin"])
def list_errors() -> Response:
    """The newest errors of all worker processes; of the one that answers where Redis is away."""
    errors = recent_errors(current_app)
    return jsonify({"items": errors, "next_cursor": None, "source": _source(errors)})


@blueprint.get("/errors/<fingerprint>")
@spec.validate(resp=Described(HTTP_200=FoundError), tags=["admin"])
def get_error(fingerprint: str) -> Response:
    """One of them, by its fingerprint."""
    errors = recent_errors(current_app)
    for kept in errors:
        if kept["fingerprint"] == fingerprint:
            return jsonify(kept | {"source": _source(errors)})
    raise NotFoundError(
        f"no error {fingerprint!r} is kept",
        resource_type="error",
        details={"fingerprint": fingerprint, "source": _source(errors)},
    )


def _source(errors: KeptErrors) -> str:
    return "all workers" if errors.is_shared else "this process"


@blueprint.get("/policies")
@spec.validate(resp=Described(HTTP_200=PolicyList), tags=["admin"])
def list_policies() -> Response:
    """The policies with the states of their breakers, which all workers share over Redis."""
    is_shared = sharing_state(current_app) == "shared"
    items = [_policy(name, is_shared=is_shared) for name in sorted(policies_of(current_app))]
    return jsonify({"items": items, "next_cursor": None})


@blueprint.post("/policies/<name>")
@spec.validate(json=PolicyIn, resp=Described(HTTP_200=PolicyOut), tags=["admin"])
def change_policy(name: str) -> Response:
    """Force a policy's circuit breaker open or closed, for a while or until told otherwise.

    `auto` closes it and lets it decide for itself again. `shared` says whether the other workers
    are told now; while Redis is away they are when it is back.
    """
    _check_has_breaker(name)
    body: PolicyIn = json_body()
    if body.mode == "auto" and body.expires_s is not None:
        raise ValidationError("auto has no end; leave expires_s out", field="expires_s")
    is_shared = force(current_app, name, body.mode, body.expires_s)
    how_long = "" if body.expires_s is None else f" for {body.expires_s:g} s"
    log_change(f"policy {name} set to {body.mode}{how_long}")
    return jsonify(_policy(name, is_shared=is_shared))


@blueprint.post("/cache/invalidate")
@spec.validate(json=InvalidateIn, resp=Described(HTTP_200=InvalidateOut), tags=["admin"])
def invalidate_cache() -> Response:
    """Delete keys of the cache, in all worker processes.

    While Redis is away nobody can say how many there are: 503, and some may have been deleted.
    """
    body: InvalidateIn = json_body()
    deleted = cache_manager.delete_pattern(body.pattern)
    log_change(f"{deleted} keys of the cache deleted, which match {body.pattern!a}")
    return jsonify({"deleted": deleted})


@blueprint.get("/cache/dead-letters")
@spec.validate(query=DeadLetterQuery, resp=Described(HTTP_200=DeadLetterList), tags=["admin"])
def list_dead_letters() -> Response:
    """Writes that were accepted and then given up, the first one first."""
    page: DeadLetterQuery = request.context.query  # type: ignore[attr-defined]
    items, cursor = _dead_letters().list(page.limit, page.cursor or "")
    return jsonify({"items": items, "next_cursor": cursor})


@blueprint.post("/cache/dead-letters/<letter_id>")
@spec.validate(json=DeadLetterIn, resp=Described(HTTP_200=DeadLetterOut), tags=["admin"])
def settle_dead_letter(letter_id: str) -> Response:
    """Have a dead letter written again, at its old place in the order, or forget it.

    One that a newer write has superseded can only be dropped: 409.
    """
    body: DeadLetterIn = json_body()
    _dead_letters().settle(letter_id, body.action)
    log_change(f"dead letter {letter_id} {_DONE[body.action]}")
    return jsonify({"id": letter_id, "action": body.action})


def _dead_letters() -> DeadLetterService:
    service: DeadLetterService = current_app.extensions["muset"].dead_letters
    return service


def _policy(name: str, *, is_shared: bool) -> dict[str, Any]:
    parts = policies_of(current_app)[name]
    breaker = breaker_of(parts)
    shown = None if breaker is None else breaker.snapshot()
    return {
        "name": name,
        "shared": is_shared,
        "state": "none" if shown is None else shown["state"],
        "parts": [part.kind for part in parts],
        "breaker": shown,
    }


def _check_has_breaker(name: str) -> None:
    parts = policies_of(current_app).get(name)
    if parts is None:
        raise NotFoundError(f"no policy {name!r}", resource_type="policy", details={"name": name})
    if breaker_of(parts) is None:
        raise ConflictError(
            f"policy {name!r} has no circuit breaker",
            user_message="This policy has no circuit breaker that could be opened or closed.",
        )
