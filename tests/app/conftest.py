"""The service on a database of its own for each test."""

import pytest

from flask_muset import Resilience
from muset import migrations
from muset.app import create_app, make_services
from muset.ports import Role
from muset.settings import load_settings


@pytest.fixture
def settings(tmp_path):
    environ = {"MUSET_DATA_DIR": str(tmp_path), "RATE_LIMIT_REQUESTS_PER_MINUTE": "0"}
    return load_settings(environ)


@pytest.fixture
def services(settings):
    services = make_services(settings, Resilience())
    services.database.write(migrations.upgrade)
    yield services
    services.database.close()


@pytest.fixture
def app(settings, services):
    app = create_app(settings)
    yield app
    app.extensions["muset"].database.close()


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
