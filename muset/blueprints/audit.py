"""One line in the log for each change that an operator makes."""

import logging

from flask_muset.context import request_id
from muset.blueprints.auth import principal

__all__ = ["log_change"]

_audit = logging.getLogger("muset.audit")
# Whatever LOG_LEVEL is: what an operator changes is always written down.
_audit.setLevel(logging.INFO)


def log_change(what: str) -> None:
    """Write down what was changed, by whom and with which request."""
    who = principal()
    _audit.info(
        "audit: %s by user %d with key %d, request %s",
        what,
        who.user_id,
        who.key_id,
        request_id(),
    )
