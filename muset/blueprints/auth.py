"""Which key came with a request, and what it may do."""

from flask import current_app, g, request

from flask_muset.errors import AuthorizationError
from muset.ports import Principal
from muset.services.keys import KeyService

__all__ = ["principal", "require_admin", "require_key"]


def require_key() -> None:
    """Refuse a request without a valid key."""
    header = request.authorization
    key = header.token if header is not None and header.type == "bearer" else None
    keys: KeyService = current_app.extensions["muset"].keys
    g._muset_principal = keys.authenticate(key)


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
