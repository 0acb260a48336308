"""The newest errors of the service, as operators read them from any worker."""

import pytest
from redis_server import redis_server  # noqa: F401 - a fixture
from waiting import until

from flask_muset import Resilience
from muset import migrations
from muset.app import create_app, make_services
from muset.ports import Role
from muset.settings import load_settings

pytestmark = pytest.mark.usefixtures("patient_redis")

URL = "/api/v1/admin/errors"


@pytest.fixture
def workers(tmp_path, redis_server):  # noqa: F811
    """Two apps of one deployment, each as a worker has it, and an admin's headers."""
    environ = {"MUSET_DATA_DIR": str(tmp_path), "REDIS_URL": redis_server.url}
    settings = load_settings(environ | {"RATE_LIMIT_REQUESTS_PER_MINUTE": "0"})
    services = make_services(settings, Resilience())
    services.database.write(migrations.upgrade)
    key = services.keys.create("admin@example.org", Role.ADMIN)
    services.database.close()
    apps = [create_app(settings) for _ in range(2)]
    for app in apps:
        app.view_functions["ask.ask"] = lambda: 1 / 0
    yield apps, {"Authorization": f"Bearer {key}"}
    for app in apps:
        app.extensions["muset"].database.close()


def get(app, headers, url=URL):
    with app.test_client().get(url, headers=headers) as answer:
        return answer.json


def fail(app, headers):
    with app.test_client().post("/api/v1/ask", headers=headers) as answer:
        assert answer.status_code == 500


def items(app, headers, source):
    """What a worker lists, None while it is not of this source."""
    listed = get(app, headers)
    return listed["items"] if listed["source"] == source else None


def kept_twice(app, headers):
    """The one error that all workers list, once both times are counted."""
    listed = items(app, headers, "all workers")
    return listed if listed and [error["count"] for error in listed] == [2] else None


def test_any_worker_lists_the_errors_of_all(workers, redis_server):  # noqa: F811
    """What happened in one worker is listed and found by the other; without Redis its own."""
    (one, two), admin = workers
    fail(one, admin)
    fail(two, admin)
    until(lambda: kept_twice(one, admin))
    (kept,) = until(lambda: kept_twice(two, admin))
    assert kept["type"] == "ZeroDivisionError"
    found = get(two, admin, f"{URL}/{kept['fingerprint']}")
    assert found == kept | {"source": "all workers"}
    missing = get(two, admin, f"{URL}/none")
    assert missing["details"] == {"fingerprint": "none", "source": "all workers"}

    redis_server.kill()
    own = until(lambda: items(two, admin, "this process"))
    assert [(error["error"], error["count"]) for error in own] == [
        ("NotFoundError", 1),
        ("InternalError", 1),
    ]
    found = get(two, admin, f"{URL}/{kept['fingerprint']}")
    assert (found["count"], found["source"]) == (1, "this process")
