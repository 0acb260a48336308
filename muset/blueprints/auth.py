"""Which key came with a request, and what it may do."""

from typing import Any

from flask import Request, current_app, g, request

from flask_muset.errors import AuthenticationError, AuthorizationError
from flask_muset.resilience import UNLIMITED
from muset.ports import Principal
from muset.services.keys import KeyService

__all__ = ["principal", "rate_limit_key", "require_admin", "require_key"]


def _authenticate(incoming: Request) -> Principal:
    """Look the key up once for each request."""
    if "_muset_principal" not in g:
        header = incoming.authorization
        key = header.token if header is not None and header.type == "bearer" else None
        keys: KeyService = current_app.extensions["muset"].keys
        g._muset_principal = keys.authenticate(key)
    return principal()


def rate_limit_key(incoming: Request) -> Any:
    """Whose limit a request counts against.

    A valid key has its own; an invalid one counts against the client's address, so that guessing
    keys is limited. The files of the docs page have no limit: one look at it takes ten of them.
    """
    if incoming.blueprint == "swagger_ui":
        return UNLIMITED
    if not incoming.path.startswith("/api/"):
        return None
    try:
        return _authenticate(incoming).key_id
    except AuthenticationError:
        return None


def require_key() -> None:
    """Refuse a request without a valid key."""
    _authenticate(request)


def require_admin() -> None:
    """Refuse a request without an admin's key."""
    require_key()
    if not principal().is_admin:
        raise AuthorizationError(
            f"key {principal().key_id} is no admin's",
            user_message="This needs the key of an admin.",
        )


def principal() -> Principal:
    """Who sends the current request, after one of the two above."""
    who: Principal = g._muset_principal
    return who
