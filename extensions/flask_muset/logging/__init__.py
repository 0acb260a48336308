"""Logging: one line for each event, with its request, without secrets."""

from flask_muset.logging.config import configure, configured, reset
from flask_muset.logging.extension import init_app
from flask_muset.logging.fields import LogContext
from flask_muset.logging.loggers import Logger, get_logger
from flask_muset.logging.pipeline import lost_lines

__all__ = [
    "LogContext",
    "Logger",
    "configure",
    "configured",
    "get_logger",
    "init_app",
    "lost_lines",
    "reset",
]
