"""The OpenAPI document of exactly what is served, and its page."""

import re
from typing import Any

from flask import Blueprint, Flask, Response, jsonify, request
from flask_swagger_ui import get_swaggerui_blueprint
from spectree import SecurityScheme, SpecTree
from spectree.models import SecureType, SecuritySchemeData
from spectree.plugins.flask_plugin import FlaskPlugin
from werkzeug.exceptions import UnsupportedMediaType

from flask_muset.error_handler import openapi_components
from flask_muset.error_handler.render import csp_source
from flask_muset.errors import TABLE, ErrorCategory, ValidationError
from muset import __version__

__all__ = ["json_body", "json_object", "make_blueprint", "make_docs", "spec"]

PATH = "/api/v1/openapi.json"
#: The one style that Swagger UI writes into the page.
LOGO_STYLE = ".logo_small_svg__cls-2{fill:#fff}.logo_small_svg__cls-3{fill:#85ea2d}"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


_EVENTS = {
    "type": "string",
    "description": "Events `meta`, `delta`, `citation`, `usage`, then one of `done` and `error`; "
    "the data of each is a JSON object on one line.",
}


def json_body() -> Any:
    """The validated body of a route that takes JSON.

    Raises:
        UnsupportedMediaType: The body is no JSON; spectree looks at no form where JSON is due.
    """
    if not request.is_json:
        raise UnsupportedMediaType
    return request.context.json  # type: ignore[attr-defined]


def json_object() -> dict[str, Any]:
    """The body of a route that takes any JSON object, as it was sent.

    Spectree takes an empty value, and one that cannot be read, for an empty object.

    Raises:
        UnsupportedMediaType: The body is no JSON.
        BadRequest: It cannot be read.
        ValidationError: It is another value.
    """
    body = request.get_json()
    if not isinstance(body, dict):
        raise ValidationError("the body must be a JSON object")
    return body


def _before(_request: Any, _response: Any, error: Any, _instance: Any, _adapter: Any) -> None:
    """Raise what spectree found, so that ErrorHandler answers it like every other error."""
    if error is None:
        return
    if request.method in ("POST", "PUT", "PATCH") and request.mimetype not in _FORMS:
        request.get_json()  # a body that cannot be read at all is a 400 or 415
    raise error


class _Plugin(FlaskPlugin):
    """Spectree without what a request need not wait for."""

    def request_validation(self, request: Any, *models: Any) -> None:
        """Look at what is sent, where a route says what it must be."""
        if any(models):
            super().request_validation(request, *models)  # type: ignore[no-untyped-call]

    def validate_response(self, resp: Any, *_: Any) -> tuple[Any, None]:
        """Leave answers alone: tests compare them with the document, for all routes.

        Spectree would parse the JSON that was just made and make the response once more.
        """
        return resp, None


spec = SpecTree(
    backend=_Plugin,
    title="Muset",
    version=__version__,
    mode="strict",
    annotations=False,
    before=_before,
    security_schemes=[
        SecurityScheme(name="key", data=SecuritySchemeData(type=SecureType.HTTP, scheme="bearer"))
    ],
)


#: Errors that a route names itself, because they do not follow from its form.
_NAMED = {
    "403": ErrorCategory.AUTHORIZATION,
    "409": ErrorCategory.CONFLICT,
    "412": ErrorCategory.CONFLICT,
    "428": ErrorCategory.CONFLICT,
}


def _statuses(path: str, method: str, operation: dict[str, Any]) -> dict[str, ErrorCategory]:
    """The errors that an operation may answer, by status."""
    if path.startswith("/health/"):
        return {}
    found = {"500": ErrorCategory.INTERNAL}
    found |= {status: _NAMED[status] for status in operation["responses"] if status in _NAMED}
    found |= {
        "401": ErrorCategory.AUTHENTICATION,
        "429": ErrorCategory.RATE_LIMIT,
        "503": ErrorCategory.DATABASE,
        "504": ErrorCategory.TIMEOUT,
    }
    if "requestBody" in operation:
        found |= dict.fromkeys(("400", "413", "415", "422"), ErrorCategory.VALIDATION)
    if operation.get("parameters"):
        found["422"] = ErrorCategory.VALIDATION
    if "{" in path:
        found["404"] = ErrorCategory.NOT_FOUND
    if path.endswith("/ask"):
        found["502"] = ErrorCategory.EXTERNAL_SERVICE
    if "/admin/" in path and "{" in path and method == "post":
        found["409"] = ErrorCategory.CONFLICT
    # Only its owner and admins may delete a thing, or see what is a user's own.
    if "/admin/" in path or "/users/" in path or method == "delete":
        found["403"] = ErrorCategory.AUTHORIZATION
    return found


def _conditions(operation: dict[str, Any]) -> None:
    """Describe the headers that make a request a conditional one."""
    answers = operation["responses"]
    for status, name in (("304", "If-None-Match"), ("412", "If-Match")):
        if status in answers:
            header = {
                "name": name,
                "in": "header",
                "required": name == "If-Match" and "428" in answers,
                "description": "Tags of RFC 9110, or *.",
                "schema": {"type": "string"},
            }
            operation.setdefault("parameters", []).append(header)


def document(app: Flask) -> dict[str, Any]:
    """Spectree's document with the errors, which are the table's, and the keys."""
    with app.app_context():
        spec.app = app
        made: dict[str, Any] = spec._generate_spec()
    components = made.setdefault("components", {})
    for kind, entries in openapi_components().items():
        components.setdefault(kind, {}).update(entries)
    for path, item in made["paths"].items():
        for method, operation in item.items():
            for status, category in _statuses(path, method, operation).items():
                answer = {"$ref": f"#/components/responses/{TABLE[category].error}"}
                operation["responses"][status] = answer
            _conditions(operation)
            if path.startswith("/api/"):
                operation["security"] = [{"key": []}]
    content = made["paths"]["/api/v1/ask"]["post"]["responses"]["200"]["content"]
    content["text/event-stream"] = {"schema": _EVENTS}
    return made


def make_blueprint(app: Flask) -> Blueprint:
    """The document, made at the first request and kept."""
    blueprint = Blueprint("openapi", __name__)
    kept: list[dict[str, Any]] = []

    @blueprint.get(PATH)
    def openapi() -> Response:
        """The OpenAPI document."""
        if not kept:
            kept.append(document(app))
        return jsonify(kept[0])

    return blueprint


def make_docs() -> Blueprint:
    """Swagger UI from the package's own files: no other host is asked for anything."""
    config = {
        "app_name": "Muset",
        "validatorUrl": None,
        "deepLinking": True,
        # Else it is made of the request, and no script of the page may be made of that.
        "oauth2RedirectUrl": None,
    }
    page: Blueprint = get_swaggerui_blueprint("/docs", PATH, config=config)
    kept: list[str] = []

    @page.after_request
    def restrict(response: Response) -> Response:
        """Let the page use its own files and the one script in it, which is always the same."""
        is_page = response.status_code == 200 and response.mimetype == "text/html"
        if is_page and not response.direct_passthrough:
            if not kept:
                kept.append(_policy(response.get_data(as_text=True)))
            response.headers["Content-Security-Policy"] = kept[0]
        return response

    return page


def _policy(page: str) -> str:
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    return (
        f"default-src 'none'; script-src 'self' {' '.join(map(csp_source, scripts))}; "
        f"style-src 'self' {csp_source(LOGO_STYLE)}; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
