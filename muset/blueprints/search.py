"""Passages of the documents."""

from flask import Blueprint, Response, current_app, jsonify, request
from spectree import Response as Described

from muset.blueprints.auth import require_key
from muset.blueprints.openapi import spec
from muset.blueprints.schemas import SearchOut, SearchQuery
from muset.services.search import SearchService

__all__ = ["blueprint"]

blueprint = Blueprint("search", __name__, url_prefix="/api/v1/search")
blueprint.before_request(require_key)


@blueprint.get("")
@spec.validate(query=SearchQuery, resp=Described(HTTP_200=SearchOut), tags=["search"])
def search() -> Response:
    """The passages that match a text, the best first. Nothing in a text is syntax."""
    service: SearchService = current_app.extensions["muset"].search
    asked: SearchQuery = request.context.query  # type: ignore[attr-defined]
    passages = [
        {
            "document_id": passage.document_id,
            "start": passage.start,
            "end": passage.end,
            "text": passage.text,
            "score": passage.score,
        }
        for passage in service.search(asked.q, asked.k)
    ]
    return jsonify({"query": asked.q, "passages": passages})
