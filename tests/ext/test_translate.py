"""Other libraries' real exceptions in our words."""

import contextlib
import socket
import sqlite3
import ssl
import urllib.error

import gevent
import httpx
import marshmallow
import pydantic
import pytest
import redis
import requests
import sqlalchemy as sa
import urllib3
from gunicorn.http import errors as gunicorn_errors
from sqlalchemy.orm import exc as orm_exc

from flask_muset.translate import DISK_REFUSES, translate


def status_error(status, headers=None):
    """httpx's exception for an answer with this status."""
    request = httpx.Request("GET", "http://x")
    response = httpx.Response(status, request=request, headers=headers)
    return httpx.HTTPStatusError("x", request=request, response=response)


def requests_error(status):
    """The same of requests."""
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


def pool_error():
    """urllib3's wrapper around its cause."""
    cause = urllib3.exceptions.ConnectTimeoutError()
    return urllib3.exceptions.MaxRetryError(None, "/", cause)


@pytest.mark.parametrize(
    ("exception", "category", "status", "retryable"),
    [
        (sa.exc.TimeoutError(), "rate_limit", 503, True),
        (sa.exc.InvalidRequestError("x"), "database", 500, False),
        (orm_exc.StaleDataError(), "conflict", 409, False),
        (sqlite3.ProgrammingError("x"), "database", 500, False),
        (redis.ConnectionError(), "network", 503, True),
        (redis.TimeoutError(), "timeout", 504, True),
        (redis.BusyLoadingError(), "external_service", 503, True),
        (redis.AuthenticationError(), "external_service", 503, False),
        (redis.ResponseError(), "external_service", 502, True),
        (httpx.ConnectTimeout("x"), "timeout", 504, True),
        (httpx.ConnectError("x"), "network", 503, True),
        (httpx.RemoteProtocolError("x"), "external_service", 502, True),
        (status_error(500), "external_service", 502, True),
        (status_error(401), "external_service", 503, False),
        (status_error(429, {"Retry-After": "7"}), "external_service", 503, True),
        (requests.Timeout(), "timeout", 504, True),
        (requests.ConnectionError(), "network", 503, True),
        (requests_error(403), "external_service", 503, False),
        (requests.exceptions.MissingSchema(), "internal", 500, False),
        (requests.exceptions.ChunkedEncodingError(), "external_service", 502, True),
        (urllib3.exceptions.NewConnectionError(None, "x"), "network", 503, True),
        (urllib3.exceptions.ReadTimeoutError(None, "/", "x"), "timeout", 504, True),
        (pool_error(), "timeout", 504, True),
        (urllib3.exceptions.ProtocolError("x"), "network", 503, True),
        (urllib.error.URLError("x"), "network", 503, True),
        (socket.gaierror(), "network", 503, True),
        (TimeoutError(), "timeout", 504, True),
        (ConnectionRefusedError(), "network", 503, True),
        (OSError(113, "no route"), "network", 503, True),
        (ssl.SSLError(), "network", 503, True),
        (FileNotFoundError(), "internal", 500, False),
        (gevent.Timeout(1), "timeout", 504, True),
        (gunicorn_errors.InvalidRequestLine("x"), "validation", 400, False),
        (gunicorn_errors.InvalidChunkSize(b"x"), "validation", 400, False),
        (gunicorn_errors.LimitRequestLine(9, 8), "validation", 414, False),
        (gunicorn_errors.LimitRequestHeaders("x"), "validation", 431, False),
        (gunicorn_errors.InvalidResponseHeader("x"), "internal", 500, False),
        (ValueError("x"), "internal", 500, False),
        (KeyError("x"), "internal", 500, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_category_status_and_retryable(exception, category, status, retryable):
    """Each raised type has the stated category, status and retryable flag."""
    error = translate(exception, {})
    assert (error.category, error.status, error.retryable) == (category, status, retryable)


def test_upstream_wait_is_kept():
    """The Retry-After of a service that throttles us reaches our caller."""
    assert translate(status_error(429, {"Retry-After": "7"}), {}).retry_after == 7


def test_real_sqlalchemy_errors(tmp_path):
    """Unique 409, not null 500, no such table 500, locked and unreachable 503."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'x.db'}", connect_args={"timeout": 0})

    def run(target, statement):
        with target.connect() as connection, pytest.raises(sa.exc.DBAPIError) as caught:
            connection.exec_driver_sql(statement)
        error = translate(caught.value, {})
        return error.category, error.status

    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT NOT NULL)")
        connection.exec_driver_sql("INSERT INTO t VALUES (1, 'x')")
    assert run(engine, "INSERT INTO t VALUES (1, 'x')") == ("conflict", 409)
    assert run(engine, "INSERT INTO t VALUES (2, NULL)") == ("database", 500)
    assert run(engine, "SELECT * FROM nowhere") == ("database", 500)
    holder = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert run(engine, "INSERT INTO t VALUES (3, 'x')") == ("database", 503)
    holder.close()
    engine.dispose()
    nowhere = sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder/x.db")
    with pytest.raises(sa.exc.OperationalError) as caught, nowhere.connect():
        pass
    assert translate(caught.value, {}).status == 503
    nowhere.dispose()


def test_field_errors_of_validation_libraries():
    """pydantic and marshmallow: paths such as items.0.email, and no values."""

    class Item(pydantic.BaseModel):
        email: int

    class Order(pydantic.BaseModel):
        items: list[Item]

    with pytest.raises(pydantic.ValidationError) as caught:
        Order.model_validate({"items": [{"email": "hunter2"}]})
    error = translate(caught.value, {})
    assert [(e["field"], e["code"]) for e in error.errors] == [("items.0.email", "int_parsing")]
    assert "hunter2" not in str(error.errors)

    class ItemSchema(marshmallow.Schema):
        email = marshmallow.fields.Int(required=True)

    class OrderSchema(marshmallow.Schema):
        items = marshmallow.fields.List(marshmallow.fields.Nested(ItemSchema))

    with pytest.raises(marshmallow.ValidationError) as raised:
        OrderSchema().load({"items": [{}]})
    assert [e["field"] for e in translate(raised.value, {}).errors] == ["items.0.email"]


def test_a_full_disk():
    """A database that has no room is refused for longer than a moment, and told by its code."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (text)")
        database.execute("PRAGMA max_page_count = 3")
        with pytest.raises(sqlite3.OperationalError, match="full") as caught:
            database.execute("INSERT INTO t VALUES (?)", ["x" * 100_000])
    error = translate(caught.value, {})
    assert (error.status, error.code, error.retryable) == (503, DISK_REFUSES, True)
    assert error.retry_after > 1
