"""What was used."""

from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from spectree import Response as Described

from muset.blueprints.auth import principal, require_key
from muset.blueprints.openapi import spec
from muset.blueprints.schemas import UsageList, UsageQuery
from muset.ports import UsageGroup, UsageSum
from muset.services.usage_report import UsageReport

__all__ = ["blueprint"]

_BILLIONTHS = 1_000_000_000

blueprint = Blueprint("usage", __name__, url_prefix="/api/v1/usage")
blueprint.before_request(require_key)


@blueprint.get("")
@spec.validate(query=UsageQuery, resp=Described("HTTP_403", HTTP_200=UsageList), tags=["usage"])
def list_usage() -> Response:
    """Requests, tokens and cost: members see their own, admins all.

    All that was accepted before the request is counted; 503 if some of it waits for too long.
    """
    service: UsageReport = current_app.extensions["muset"].usage
    asked: UsageQuery = request.context.query  # type: ignore[attr-defined]
    found, cursor = service.list(
        principal(),
        UsageGroup(asked.group_by),
        first=asked.first,
        last=asked.last,
        user_id=asked.user_id,
        limit=asked.limit,
        cursor=asked.cursor,
    )
    return jsonify({"items": [_shown(item) for item in found], "next_cursor": cursor})


def _shown(item: UsageSum) -> dict[str, Any]:
    shown = asdict(item)
    del shown["after"]
    # Whole billionths through one division: the number's shortest form is exact to 15 digits.
    return {**shown, "cost": item.cost / _BILLIONTHS}
