"""ErrorHandler: every error of a Flask app, answered properly and without secrets."""

from flask_muset.error_handler.extension import ErrorHandler, error_body, recent_errors
from flask_muset.error_handler.journal import KeptErrors
from flask_muset.error_handler.openapi import openapi_components
from flask_muset.error_handler.render import STYLE_SOURCE

__all__ = [
    "STYLE_SOURCE",
    "ErrorHandler",
    "KeptErrors",
    "error_body",
    "openapi_components",
    "recent_errors",
]
