"""Logging: binds lines to the requests of a Flask app, and writes one for each."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from flask import Flask

from flask_muset import context
from flask_muset.context import Exchange
from flask_muset.logging.fields import VIEW, current_scope, head_of, view_of
from flask_muset.logging.lines import timestamp
from flask_muset.logging.loggers import get_logger
from flask_muset.logging.pipeline import IN_USE, Pipeline, lost
from flask_muset.logging.values import may_hold_secret, quote, without_secrets
from flask_muset.redaction import is_secret_key

__all__ = ["init_app"]

_KEY = "logging"
_OUTSIDE = "flask_muset.logging.outside"
_ACCESS = "flask_muset.access"
_MAX_PATH = 1_024
#: Names in environments, most of which are always the same, and those of them whose values are
#: secrets. Clients choose some of them, so they are bounded.
_seen: set[str] = set()
_bearing: list[str] = []
_MAX_SEEN = 1_000
#: The converter and the name of each variable of a route.
_variables = re.compile(r"<(?:([^:<>(]*)(?:\([^>]*\))?:)?([^<>]*)>").findall
_MIDDLE = f'","level":"INFO","logger":"{_ACCESS}","message":"request"'
_slow = get_logger("flask_muset.slow")


def init_app(app: Flask) -> None:
    """Let the lines of a request name it, and write one line for each request of an app.

    What is written is said by `configure`; without it no line is.

    Raises:
        RuntimeError: It is set up on this app already.
    """
    context.attach(app, _KEY, "Logging", True)
    context.install(app).observe(_Requests())


class _Requests:
    """Observes the exchanges of an app."""

    def begin(self, exchange: Exchange) -> None:
        """Note the fields from outside of it."""
        outside = current_scope.get()
        if outside is not None:
            exchange.environ[_OUTSIDE] = outside

    def end(self, exchange: Exchange) -> None:
        """Nothing: the line is written when all is known."""

    def close(self, exchange: Exchange) -> None:
        """Write its line, and drop the fields of blocks that were never left."""
        state = IN_USE.pipeline
        if state is not None:
            try:
                _log_exchange(exchange, state)
            except Exception as failure:  # noqa: BLE001 - logging must never break a request
                lost("an access line", failure)
        if current_scope.get() is not None:
            current_scope.set(exchange.environ.get(_OUTSIDE))


def _log_exchange(exchange: Exchange, state: Pipeline) -> None:
    if state.access_log:
        head, path = _head_and_path(exchange)
        if state.is_text:
            line = state.make("INFO", _ACCESS, "request", _fields(exchange, path))
        else:
            line = _access_line(exchange, head, path)
        state.write(line, "INFO")
    limit, took = state.slow_request_s, exchange.duration_s or 0.0
    if limit is not None and took >= limit:
        _slow.warning("slow request: %s took %.3f s", exchange.route or "no route", took)


def _access_line(exchange: Exchange, head: str, path: str) -> str:
    """One line, made directly: at one a request its cost is the whole budget."""
    failed = ',"failed":true' if exchange.failed else ""
    client = quote(exchange.environ.get("REMOTE_ADDR") or "")
    return (
        f'{{"timestamp":"{timestamp()}{_MIDDLE}{head},"path":{quote(path)},"bytes":{exchange.sent},'
        f'"client":{client}{failed}}}\n'
    )


def _fields(exchange: Exchange, path: str) -> dict[str, object]:
    client = exchange.environ.get("REMOTE_ADDR") or ""
    fields: dict[str, object] = {"path": path, "bytes": exchange.sent, "client": client}
    if exchange.failed:
        fields["failed"] = True
    return fields


def _head_and_path(exchange: Exchange) -> tuple[str, str]:
    """What the line says of the exchange, and its path with its query, without secrets.

    The secrets of a request are looked for only where its path could hold one.
    """
    environ = exchange.environ
    path, query = environ.get("PATH_INFO") or "", environ.get("QUERY_STRING")
    if not query and VIEW not in environ:
        route = exchange.route
        if _is_plain(environ, route, path):
            return head_of(exchange, route), path
    view = view_of(exchange)
    if query:
        path = f"{path}?{query}"
    return view.head, without_secrets(path, view.secrets, _MAX_PATH)


def _is_plain(environ: Mapping[str, Any], route: str | None, path: str) -> bool:
    """Whether a path can hold no secret: none by its shape, and none that the request bears."""
    if len(path) > _MAX_PATH:
        return False
    if route is not None and _is_of_numbers(route):
        return True
    return not may_hold_secret(path) and not _bears(environ, path)


@lru_cache(maxsize=1024)
def _is_of_numbers(route: str) -> bool:
    """Whether all that is not the rule's own in its paths is numbers, and none by a secret's name.

    Such paths are the most frequent, and need not be looked at.
    """
    return not any(
        converter != "int" or is_secret_key(name) for converter, name in _variables(route)
    )


def _bears(environ: Mapping[str, Any], path: str) -> bool:
    """Whether a request might bear a secret that is in its path."""
    if not _seen.issuperset(environ):
        _look_at_names(environ)
    for name in _bearing:
        value = environ.get(name)
        if value is not None:
            # Cookies are many values, and what is encoded is not seen.
            if name == "HTTP_COOKIE" or "asic" in value:
                return True
            if (value.partition(" ")[2].strip() or value) in path:
                return True
    return False


def _look_at_names(environ: Mapping[str, Any]) -> None:
    """Learn which of an environment's names have secrets as values."""
    for name in environ.keys() - _seen:
        if len(_seen) >= _MAX_SEEN:
            _seen.clear()
            _bearing.clear()
        if name.startswith("HTTP_") and is_secret_key(name[5:]):
            _bearing.append(name)
        _seen.add(name)
