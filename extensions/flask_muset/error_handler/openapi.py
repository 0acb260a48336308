"""The table as OpenAPI components, for whoever describes an API that uses ErrorHandler."""

from typing import Any

from flask_muset.errors import TABLE, ErrorCategory, Row, Severity

__all__ = ["openapi_components"]

_FIELD_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["field", "code", "message"],
    "properties": {
        "field": {"type": ["string", "null"], "description": "Path such as items.0.email."},
        "code": {"type": ["string", "null"]},
        "message": {"type": "string"},
    },
}


def _schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "Every error of this API.",
        "required": [
            "error",
            "message",
            "category",
            "severity",
            "retryable",
            "details",
            "path",
            "request_id",
        ],
        "properties": {
            "error": {"type": "string", "description": "Class of the error."},
            "message": {"type": "string", "description": "For people."},
            "category": {"type": "string", "enum": [category.value for category in TABLE]},
            "severity": {"type": "string", "enum": [severity.value for severity in Severity]},
            "retryable": {"type": "boolean"},
            "details": {"type": "object"},
            "path": {"type": "string"},
            "request_id": {"type": "string"},
            "errors": {"type": "array", "items": _FIELD_ERROR},
            "retry_after": {"type": "integer", "minimum": 0, "description": "Seconds."},
        },
    }


def _response(category: ErrorCategory, row: Row) -> dict[str, Any]:
    schema = {
        "allOf": [
            {"$ref": "#/components/schemas/Error"},
            {"properties": {"category": {"const": category.value}}},
        ]
    }
    headers: dict[str, Any] = {}
    if row.retryable:
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 0}}
    if row.status == 401:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    return {
        "description": row.meaning,
        "headers": headers,
        "content": {"application/json": {"schema": schema}},
    }


def openapi_components() -> dict[str, dict[str, Any]]:
    """Return `schemas` with `Error`, and `responses` with one entry for each class of the table.

    Made anew from the table at each call.
    """
    return {
        "schemas": {"Error": _schema()},
        "responses": {row.error: _response(category, row) for category, row in TABLE.items()},
    }
