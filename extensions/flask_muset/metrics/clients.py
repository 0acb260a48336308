"""Measures the calls of libraries that an app uses: SQLAlchemy and httpx.

All is bound to one app's metrics when it is set up, because a query that runs in gevent's native
thread pool has no Flask context. None of the libraries is imported here.
"""

import re
from collections.abc import Callable
from typing import Any

from flask_muset.clock import SYSTEM
from flask_muset.metrics.series import Families

__all__ = ["measure_httpx", "measure_redis", "measure_sqlalchemy", "operation_and_table"]

_OPERATIONS = frozenset(
    (
        "alter",
        "begin",
        "call",
        "commit",
        "create",
        "delete",
        "drop",
        "explain",
        "insert",
        "merge",
        "pragma",
        "replace",
        "rollback",
        "savepoint",
        "select",
        "set",
        "truncate",
        "update",
        "vacuum",
        "with",
    )
)
_BEGAN = "_flask_muset_began"
_MAX_KEPT = 512
_skip = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/|\()*", re.S)
_word = re.compile(r"[a-z]+", re.I)
_table = re.compile(
    r"\b(?:from|into|update|join|table|merge)\s+(?:if\s+(?:not\s+)?exists\s+|only\s+)?"
    r"(?P<name>[\w$\"`\[\].]+)",
    re.I,
)


def operation_and_table(statement: str) -> tuple[str, str]:
    """The two labels of a statement: its first word and the first table that it names.

    A word that is none of SQL's is `other`, and `-` stands where no table is named.
    """
    start = _skip.match(statement)
    found = _word.match(statement, start.end() if start else 0)
    operation = found[0].lower() if found else "other"
    table = _table.search(statement)
    name = table["name"] if table else "-"
    return (
        operation if operation in _OPERATIONS else "other",
        re.sub(r"[\"`\[\]]", "", name).lower() or "-",
    )


class _Labels:
    """The labels of statements, kept for those that come again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, str]] = {}

    def of(self, statement: str) -> tuple[str, str]:
        found = self._kept.get(statement)
        if found is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            found = self._kept[statement] = operation_and_table(statement)
        return found


def measure_sqlalchemy(families: Families, engine: Any, listen: Callable[..., Any]) -> None:
    """Count the queries of an engine.

    Args:
        families: Where.
        engine: Of SQLAlchemy.
        listen: Its `event.listen`.
    """
    labels = _Labels()

    def count(statement: str, context: Any) -> None:
        began = getattr(context, _BEGAN, None)
        if began is not None:
            setattr(context, _BEGAN, None)
            operation, table = labels.of(statement)
            families["database_queries_total"].add(1, operation, table)
            families["database_query_duration_seconds"].observe(
                SYSTEM.now() - began, operation, table
            )

    def before(_conn: Any, _cursor: Any, _sql: str, _values: Any, context: Any, _: bool) -> None:
        setattr(context, _BEGAN, SYSTEM.now())

    def after(_conn: Any, _cursor: Any, sql: str, _values: Any, context: Any, _: bool) -> None:
        count(sql, context)

    def failed(error: Any) -> None:
        if error.execution_context is not None and error.statement is not None:
            count(error.statement, error.execution_context)

    listen(engine, "before_cursor_execute", before)
    listen(engine, "after_cursor_execute", after)
    listen(engine, "handle_error", failed)


def measure_redis(families: Families, client: Any) -> None:
    """Count the calls of a guarded Redis client.

    Args:
        families: Where.
        client: A `flask_muset.redis.GuardedRedis`.
    """
    name = client.name

    def count(seconds: float, outcome: str) -> None:
        families["redis_calls_total"].add(1, name, outcome)
        families["redis_call_duration_seconds"].observe(seconds, name)

    client.on_call = count


def measure_httpx(families: Families, client: Any, is_async: bool) -> None:
    """Count the requests of a client, those that get no answer too.

    Its event hooks are not told of a request that fails, so `send` is what is measured.
    """
    send = client.send

    def count(request: Any, status: str, began: float) -> None:
        host = request.url.host
        families["http_client_requests_total"].add(1, host, status)
        families["http_client_request_duration_seconds"].observe(SYSTEM.now() - began, host)

    def measured(request: Any, **options: Any) -> Any:
        began, status = SYSTEM.now(), "error"
        try:
            response = send(request, **options)
            status = str(response.status_code)
        finally:
            count(request, status, began)
        return response

    async def measured_async(request: Any, **options: Any) -> Any:
        began, status = SYSTEM.now(), "error"
        try:
            response = await send(request, **options)
            status = str(response.status_code)
        finally:
            count(request, status, began)
        return response

    client.send = measured_async if is_async else measured
