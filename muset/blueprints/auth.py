"""Which key came with a request, and what it may do."""

from typing import Any

from flask import Request, current_app, request

from flask_muset.context import current_exchange
from flask_muset.errors import AuthenticationError, AuthorizationError, MusetError, RateLimitError
from flask_muset.resilience import UNLIMITED, RateLimit, network_of
from muset.ports import Principal
from muset.services.keys import KeyService

__all__ = ["is_admin", "principal", "rate_limit_key", "require_admin", "require_key"]


#: The key of the environment that the outcome of a request's look-up is kept under. Not in `g`,
#: which may outlive the request where an app context is open already.
_WHO = "muset.principal"


def _authenticate(incoming: Request) -> Principal:
    """Look the key up, once for each request, whatever comes of it."""
    found: Principal | MusetError | None = incoming.environ.get(_WHO)
    if found is None:
        # Not `incoming.authorization`: reading other schemes raises at some of what is no base64.
        scheme, _, key = incoming.headers.get("Authorization", "").partition(" ")
        keys: KeyService = current_app.extensions["muset"].keys
        try:
            found = keys.authenticate(key.strip() if scheme.lower() == "bearer" else None)
        except AuthenticationError as error:
            found = error.with_traceback(None)
            if scheme:
                found = _too_many_wrong_keys(incoming) or found
        incoming.environ[_WHO] = found
        exchange = current_exchange.get()
        if exchange is not None and isinstance(found, Principal):
            exchange.user = str(found.user_id)
    if isinstance(found, MusetError):
        raise found
    return found


def _too_many_wrong_keys(incoming: Request) -> RateLimitError | None:
    """Count a wrong key against its client's address; valid keys from there are not concerned."""
    limit: RateLimit | None = current_app.extensions["muset"].wrong_keys
    try:
        if limit is not None:
            limit.enter(f"address {network_of(incoming.remote_addr)}")
    except RateLimitError as error:
        return error.with_traceback(None)
    return None


def rate_limit_key(incoming: Request) -> Any:
    """Whose limit a request counts against.

    A valid key has its own; whoever has none counts by the client's address, and wrong keys have a
    narrower limit beside it. The files of the docs page have no limit: one look at it takes ten.
    """
    if incoming.blueprint == "swagger_ui":
        return UNLIMITED
    if not incoming.path.startswith("/api/"):
        return None
    try:
        return _authenticate(incoming).key_id
    except AuthenticationError:
        return None


def is_admin(incoming: Request) -> bool:
    """Whether a request has the key of an admin.

    Raises:
        RateLimitError: Its address has sent too many wrong ones.
    """
    try:
        return _authenticate(incoming).is_admin
    except AuthenticationError:
        return False


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
    who: Principal = request.environ[_WHO]
    return who
