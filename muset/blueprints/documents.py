"""Documents: in, listed, out."""

from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from spectree import Response as Described

from flask_muset.errors import ValidationError
from muset.blueprints.auth import principal, require_key
from muset.blueprints.conditional import check_if_match, respond
from muset.blueprints.openapi import json_body, spec
from muset.blueprints.schemas import (
    DocumentForm,
    DocumentIn,
    DocumentList,
    DocumentOut,
    DocumentWithText,
    PageQuery,
)
from muset.ports import Document
from muset.services.documents import DocumentService
from muset.services.files import FileService

__all__ = ["blueprint"]

blueprint = Blueprint("documents", __name__, url_prefix="/api/v1/documents")
blueprint.before_request(require_key)


def _service() -> DocumentService:
    service: DocumentService = current_app.extensions["muset"].documents
    return service


def _summary(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "title": document.title,
        "sha256": document.sha256,
        "passages": document.passages,
        "characters": document.characters,
        "created_at": document.created_at.isoformat(),
    }


def _from_form() -> tuple[str, str]:
    """Title and text of an uploaded file."""
    file = request.files.get("file")
    if file is None:
        raise ValidationError("send the document as the file named 'file'", field="file")
    files: FileService = current_app.extensions["muset"].files
    found = files.read(
        file.filename or "",
        file.read(),
        media_type=file.mimetype or "",
        charset=file.mimetype_params.get("charset"),
    )
    return request.form.get("title") or found.title, found.text


@blueprint.post("")
@spec.validate(
    json=DocumentIn,
    form=DocumentForm,
    resp=Described(HTTP_201=DocumentOut, HTTP_200=DocumentOut),
    tags=["documents"],
)
def add() -> Response:
    """Store and index a text, as JSON or as a file; it can be asked about when this answers.

    A file is text or Markdown in UTF-8 (.txt, .md), HTML (.html, .htm) or PDF (.pdf).

    The same text by the same user is kept once: 200 with the document that is there.
    """
    if request.files or request.mimetype == "multipart/form-data":
        title, text = _from_form()
    else:
        body: DocumentIn = json_body()
        title, text = body.title, body.text
    document, is_new = _service().add(principal(), title, text)
    response = jsonify(_summary(document))
    response.status_code = 201 if is_new else 200
    if is_new:
        response.headers["Location"] = f"{request.script_root}/api/v1/documents/{document.id}"
    return response


@blueprint.get("")
@spec.validate(query=PageQuery, resp=Described(HTTP_200=DocumentList), tags=["documents"])
def list_documents() -> Response:
    """All documents in the order of their ids, without their texts."""
    page: PageQuery = request.context.query  # type: ignore[attr-defined]
    found, after = _service().list(page.limit, int(page.cursor or 0))
    cursor = None if after is None else str(after)
    return jsonify({"items": [_summary(d) for d in found], "next_cursor": cursor})


@blueprint.get("/<int:document_id>")
@spec.validate(
    resp=Described("HTTP_304", "HTTP_412", HTTP_200=DocumentWithText), tags=["documents"]
)
def get(document_id: int) -> Response:
    """One document with its text."""
    document = _service().get(document_id)
    return respond({**_summary(document), "text": document.text}, document.sha256)


@blueprint.delete("/<int:document_id>")
@spec.validate(resp=Described("HTTP_204", "HTTP_403", "HTTP_412"), tags=["documents"])
def delete(document_id: int) -> Response:
    """Forget a document; it is never cited again. Only its owner or an admin may."""
    if request.if_match:
        check_if_match(_service().get(document_id).sha256)
    _service().delete(principal(), document_id)
    return Response(status=204)
