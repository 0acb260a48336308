"""Whether the process lives, and whether it can work."""

import sys

from flask import Blueprint, Response, current_app, jsonify
from spectree import Response as Described

from muset.blueprints.openapi import spec
from muset.blueprints.schemas import Live, Ready
from muset.ports import NotReadyError, Probe

__all__ = ["blueprint", "is_draining"]

blueprint = Blueprint("health", __name__, url_prefix="/health")

_PROBE_TIMEOUT_S = 0.25


@blueprint.get("/live")
@spec.validate(resp=Described(HTTP_200=Live), tags=["health"])
def live() -> Response:
    """The process answers; nothing else is touched."""
    return jsonify({"status": "alive"})


@blueprint.get("/ready")
@spec.validate(resp=Described(HTTP_200=Ready, HTTP_503=Ready), tags=["health"])
def ready() -> Response:
    """Whether requests should be sent here."""
    checks, reasons, status = {}, [], "ready"
    for probe in current_app.extensions["muset"].probes:
        checks[probe.name], complaint = _look_at(probe)
        if complaint is not None:
            reasons.append(complaint)
            status = "unavailable" if probe.is_needed or status == "unavailable" else "degraded"
    if is_draining():
        status, reasons = "draining", ["the process is stopping"]
    response = jsonify({"status": status, "reasons": reasons, "checks": checks})
    response.status_code = 200 if status in ("ready", "degraded") else 503
    if response.status_code != 200:
        response.headers["Retry-After"] = "1"
    return response


def is_draining() -> bool:
    """Whether this process has been asked to stop; only our own worker tells."""
    worker = sys.modules.get("flask_muset.worker")
    return worker is not None and bool(worker.draining())


def _look_at(probe: Probe) -> tuple[str, str | None]:
    """A word about it, and what is wrong.

    An unexpected reason stays in the log: it may name hosts and paths.
    """
    try:
        return probe.check(_PROBE_TIMEOUT_S) or "ok", None
    except NotReadyError as error:
        return error.word, str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the part is not ready
        current_app.logger.warning("%s is not ready: %s", probe.name, type(error).__name__)
        return "failed", f"the {probe.name} does not answer"
