"""Libraries that an app uses, measured."""

import threading

import httpx
import pytest
import sqlalchemy as sa
from flask import Flask
from patched import run_patched
from sqlalchemy.pool import StaticPool

from flask_muset.metrics import Metrics, instrument_httpx, instrument_sqlalchemy
from flask_muset.metrics.clients import operation_and_table


@pytest.fixture
def app():
    app = Flask("shop")
    Metrics(app)
    return app


def counted(app, name):
    """The values of a counter by its labels."""
    family = app.extensions["metrics"].families[name]
    return {labels: series.value for labels, series in family._series.items()}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT * FROM users WHERE id = 1", ("select", "users")),
        ('  insert into "Orders" (id) values (1)', ("insert", "orders")),
        ("UPDATE public.users SET a = 1", ("update", "public.users")),
        ("-- why\nDELETE FROM a", ("delete", "a")),
        ("/* hint */ (SELECT 1)", ("select", "-")),
        ("WITH x AS (SELECT * FROM y) SELECT * FROM x", ("with", "y")),
        ("CREATE TABLE IF NOT EXISTS t (id int)", ("create", "t")),
        ("PRAGMA journal_mode", ("pragma", "-")),
        ("FROBNICATE me", ("other", "-")),
        ("", ("other", "-")),
        ("SELECT `a` FROM `b`.`c`", ("select", "b.c")),
        ("select 'x'", ("select", "-")),
    ],
)
def test_labels_of_statements(statement, expected):
    """The first word and the first table, never a value."""
    assert operation_and_table(statement) == expected


def test_sqlalchemy(app):
    """Queries are counted in any thread, failed ones too, with their duration."""
    engine = sa.create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    with app.app_context():
        instrument_sqlalchemy(engine)

    def work():
        with engine.begin() as connection:
            connection.execute(sa.text("create table users (id int)"))
            for number in range(3):
                connection.execute(sa.text("insert into users values (:n)"), {"n": number})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with engine.connect() as connection, pytest.raises(sa.exc.OperationalError):
        connection.execute(sa.text("select * from nothing"))
    assert counted(app, "database_queries_total") == {
        ("create", "users"): 1,
        ("insert", "users"): 3,
        ("select", "nothing"): 1,
    }
    seconds = app.extensions["metrics"].families["database_query_duration_seconds"]
    assert len(seconds) == 3


def test_many_statements_keep_little(app):
    """What is remembered of statements is bounded, and so are the series."""
    engine = sa.create_engine("sqlite://")
    app.extensions["metrics"].families["database_queries_total"]._max_series = 5
    with app.app_context():
        instrument_sqlalchemy(engine)
    with engine.connect() as connection:
        for number in range(600):
            connection.execute(sa.text(f"create table t{number} (id int)"))
    assert len(counted(app, "database_queries_total")) == 6


def test_httpx(app):
    """Answers and failures are counted by host and status."""

    def answer(request):
        if request.url.path == "/down":
            raise httpx.ConnectError("down")
        return httpx.Response(503 if request.url.path == "/busy" else 200)

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        with app.app_context():
            instrument_httpx(client)
        client.get("https://api.example/ok")
        client.get("https://api.example/busy")
        with client.stream("GET", "https://api.example/ok") as stream:
            stream.read()
        with pytest.raises(httpx.ConnectError):
            client.post("https://api.example/down")
    assert counted(app, "http_client_requests_total") == {
        ("api.example", "200"): 2,
        ("api.example", "503"): 1,
        ("api.example", "error"): 1,
    }


def test_httpx_async(app):
    """The asynchronous client too."""
    import asyncio

    async def work():
        transport = httpx.MockTransport(lambda request: httpx.Response(204))
        async with httpx.AsyncClient(transport=transport) as client:
            with app.app_context():
                instrument_httpx(client)
            await client.get("https://api.example/ok")

    asyncio.run(work())
    assert counted(app, "http_client_requests_total") == {("api.example", "204"): 1}


def test_queries_in_gevents_native_threads(tmp_path):
    """In a thread of gevent's pool there is no Flask context, and eight of them lose no count."""
    result = run_patched(
        """
        import sys, sqlite3
        import sqlalchemy as sa
        from flask import Flask
        from sqlalchemy.pool import NullPool
        from flask_muset.metrics import Metrics, instrument_sqlalchemy, track_error
        app = Flask("x")
        Metrics(app)
        engine = sa.create_engine("sqlite:///" + sys.argv[1], poolclass=NullPool)
        with app.app_context():
            instrument_sqlalchemy(engine)
        def work():
            with engine.connect() as connection:
                for _ in range(200):
                    connection.execute(sa.text("select 1"))
        pool = gevent.get_hub().threadpool
        pool.maxsize = 8
        jobs = [pool.spawn(work) for _ in range(8)]
        for _ in range(500):
            track_error("internal", "critical")
            gevent.sleep(0)
        [job.get() for job in jobs]
        families = app.extensions["metrics"].families
        result = [
            families["database_queries_total"].get("select", "-").value,
            families["errors_total"].get("internal", "critical").value,
        ]
        """,
        tmp_path / "x.db",
    )
    assert result == [1600, 500]
