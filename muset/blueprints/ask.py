"""Questions."""

from dataclasses import asdict

from flask import Blueprint, Response, current_app, jsonify
from spectree import Response as Described

from flask_muset.context import request_id
from muset.blueprints.auth import principal, require_key
from muset.blueprints.openapi import json_body, spec
from muset.blueprints.schemas import AskIn, AskOut
from muset.ports import Asker
from muset.services.ask import AskService

__all__ = ["blueprint"]

blueprint = Blueprint("ask", __name__, url_prefix="/api/v1/ask")
blueprint.before_request(require_key)


@blueprint.post("")
@spec.validate(json=AskIn, resp=Described(HTTP_200=AskOut), tags=["ask"])
def ask() -> Response:
    """Answer a question from the stored documents, with verbatim citations."""
    service: AskService = current_app.extensions["muset"].ask
    body: AskIn = json_body()
    answer = service.ask(
        body.question,
        document_ids=body.document_ids,
        k=body.k,
        model=body.model,
        max_tokens=body.max_tokens,
        asker=Asker(principal().user_id, request_id() or ""),
    )
    return jsonify(
        {
            "answer": answer.text,
            "status": answer.status.value,
            "citations": [asdict(citation) for citation in answer.citations],
            "attempts": [asdict(attempt) for attempt in answer.attempts],
            "usage": {
                "input_tokens": answer.input_tokens,
                "output_tokens": answer.output_tokens,
            },
            "model": answer.model,
            "cached": answer.cached,
        }
    )
