"""Questions."""

from dataclasses import asdict
from typing import Any

from flask import Blueprint, current_app, jsonify, request
from spectree import Response as Described
from werkzeug.wrappers import Response

from flask_muset.context import request_id
from muset.blueprints import event_stream
from muset.blueprints.auth import principal, require_key
from muset.blueprints.openapi import json_body, spec
from muset.blueprints.schemas import AskIn, AskOut
from muset.ports import Asker
from muset.services.answering import Answer
from muset.services.ask import AskService, Question

__all__ = ["blueprint"]

blueprint = Blueprint("ask", __name__, url_prefix="/api/v1/ask")
blueprint.before_request(require_key)


class _JSONOrStream(Described):
    """What spectree checks; a stream it would read to its end."""

    def find_model(self, code: int) -> Any:
        """The model of a status."""
        return None if event_stream.is_wanted(request) else super().find_model(code)


@blueprint.post("")
@spec.validate(json=AskIn, resp=_JSONOrStream(HTTP_200=AskOut), tags=["ask"])
def ask() -> Response:
    """Answer a question from the stored documents, with verbatim citations."""
    service: AskService = current_app.extensions["muset"].ask
    body: AskIn = json_body()
    question = Question(
        body.question,
        document_ids=body.document_ids,
        k=body.k,
        model=body.model,
        max_tokens=body.max_tokens,
        allow_degraded=body.allow_degraded,
    )
    asker = Asker(principal().user_id, request_id() or "")
    if not event_stream.is_wanted(request):
        return jsonify(_described(service.ask(question, asker)))
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    stream = service.stream(question, asker)
    is_on = app.config["CACHE_STRATEGIES_ENABLED"]
    outcome = "HIT" if stream.is_cached else "MISS" if is_on else "BYPASS"
    return event_stream.respond(app, request._get_current_object(), stream, outcome)  # type: ignore[attr-defined]


def _described(answer: Answer) -> dict[str, Any]:
    return {
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
