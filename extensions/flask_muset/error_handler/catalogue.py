"""The error catalogue: what each category means, read from the table."""

import html
from typing import Any

from flask import Blueprint, Response, jsonify, request

from flask_muset.error_handler.render import HTML_TYPE, category_of, page, preferred_type
from flask_muset.errors import TABLE, ErrorCategory, NotFoundError

__all__ = ["make_blueprint"]


def _entry(category: ErrorCategory) -> dict[str, Any]:
    row = TABLE[category]
    return {
        "category": category.value,
        "error": row.error,
        "status": row.status,
        "other_statuses": list(row.other_statuses),
        "severity": row.severity.value,
        "retryable": row.retryable,
        "message": row.message,
        "meaning": row.meaning,
        "remedy": row.remedy,
    }


def _statuses(entry: dict[str, Any]) -> str:
    return ", ".join(str(status) for status in (entry["status"], *entry["other_statuses"]))


def _list_page(entries: list[dict[str, Any]], here: str) -> bytes:
    rows = "".join(
        f'<tr><td><a href="{html.escape(here)}/{entry["category"]}">{entry["category"]}</a></td>'
        f"<td>{_statuses(entry)}</td><td>{'yes' if entry['retryable'] else 'no'}</td>"
        f"<td>{html.escape(entry['meaning'])}</td></tr>"
        for entry in entries
    )
    head = "<tr><th>Category</th><th>Status</th><th>Try again</th><th>What happened</th></tr>"
    return page("Errors", f"<h1>Errors</h1><table>{head}{rows}</table>")


def _entry_page(entry: dict[str, Any], here: str) -> bytes:
    rows = "".join(
        f"<tr><td>{name}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in (
            ("error", entry["error"]),
            ("status", _statuses(entry)),
            ("severity", entry["severity"]),
            ("retryable", "yes" if entry["retryable"] else "no"),
        )
    )
    text = (
        f"<h1>{entry['category']}</h1><p>{html.escape(entry['meaning'])}</p>"
        f"<p>{html.escape(entry['remedy'])}</p><table>{rows}</table>"
        f'<p><a href="{html.escape(here)}">All errors</a></p>'
    )
    return page(entry["category"], text)


def _answer(payload: Any, as_page: bytes) -> Response:
    if preferred_type(request.headers.get("Accept")) == HTML_TYPE:
        return Response(as_page, content_type="text/html; charset=utf-8")
    return jsonify(payload)


def make_blueprint(path: str) -> Blueprint:
    """Return the two views below `path`."""
    blueprint = Blueprint("error_catalogue", __name__)

    @blueprint.get(path)
    def list_errors() -> Response:
        """All categories."""
        entries = [_entry(category) for category in TABLE]
        return _answer({"items": entries}, _list_page(entries, request.script_root + path))

    @blueprint.get(f"{path}/<category>")
    def show_error(category: str) -> Response:
        """One category."""
        known = category_of(category)
        if known is None:
            raise NotFoundError(
                f"no error category {category!r}",
                resource_type="error category",
                details={"category": category, "known": [name.value for name in TABLE]},
            )
        entry = _entry(known)
        return _answer(entry, _entry_page(entry, request.script_root + path))

    return blueprint
