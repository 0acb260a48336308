"""The service on a database of its own for each test, on SQLite and on PostgreSQL."""

import contextlib
import sqlite3

import psycopg
import pytest
from postgres_server import PostgresServer

from flask_muset import Resilience
from flask_muset.cache_strategies import cache_manager
from flask_muset.redis import GuardedRedis
from muset import migrations
from muset.app import create_app, make_services
from muset.ports import Role
from muset.settings import load_settings

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres_server():
    """One server for all tests."""
    server = PostgresServer().start()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def postgres_template(postgres_server):
    """The name of a database with the newest schema, to make others of."""
    url = postgres_server.database()
    services = make_services(load_settings({"DATABASE_URL": url}), Resilience())
    services.database.write(migrations.upgrade)
    services.database.close()
    return url.rpartition("/")[2]


@pytest.fixture
def postgres_url(postgres_server, postgres_template):
    """The URL of a database of the test's own, with the newest schema and nothing in it."""
    url = postgres_server.database(postgres_template)
    yield url
    postgres_server.drop(url)


@pytest.fixture(params=DATABASES)
def database(request):
    """Which database the test runs on; the tests for one alone say so by `sqlite_only`."""
    return request.param


@pytest.fixture
def environ(request, tmp_path, database):
    """The variables of the service."""
    environ = {
        "MUSET_DATA_DIR": str(tmp_path),
        "RATE_LIMIT_REQUESTS_PER_MINUTE": "0",
        "MUSET_WRONG_KEYS_PER_MINUTE": "0",
    }
    if database == "postgresql":
        environ["DATABASE_URL"] = request.getfixturevalue("postgres_url")
    return environ


@pytest.fixture
def patient_redis(monkeypatch):
    """Gives each call of Redis much time: on a slow machine a healthy one is not taken for ill."""
    monkeypatch.setitem(GuardedRedis.__init__.__kwdefaults__, "budget_s", 2.0)


@pytest.fixture
def settings(environ):
    return load_settings(environ)


@pytest.fixture
def services(settings):
    services = make_services(settings, Resilience())
    services.database.write(migrations.upgrade)
    yield services
    services.database.close()


@pytest.fixture
def end():
    """Ends an app, so that nothing of it writes to a database that is gone, in the next test."""

    def end(app):
        with app.app_context():
            cache_manager._cache().behind.drain.close(5)
        app.extensions["muset"].database.close()

    return end


@pytest.fixture
def app(settings, services, end):
    app = create_app(settings)
    yield app
    end(app)


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def admin(services):
    key = services.keys.create("admin@example.org", Role.ADMIN)
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def member(services):
    key = services.keys.create("member@example.org", Role.MEMBER)
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def write_lock(settings, database):
    """A context manager: meanwhile nobody else can write preferences, and all can read."""

    @contextlib.contextmanager
    def lock():
        if database == "sqlite":
            other = sqlite3.connect(settings.data_dir / "muset.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
        else:
            url = settings.database_url.replace("+psycopg", "")
            other = psycopg.connect(url)
            other.execute("LOCK TABLE preferences IN EXCLUSIVE MODE")
        try:
            yield
        finally:
            other.rollback()
            other.close()

    return lock
