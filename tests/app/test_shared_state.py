"""One state for all workers: what operators see and change, over a real Redis."""

import time

import pytest
from click.testing import CliRunner
from redis_server import RedisServer
from waiting import until

from muset.app import create_app
from muset.cli import main
from muset.settings import load_settings

pytestmark = [
    pytest.mark.parametrize("database", ["sqlite"], indirect=True),
    pytest.mark.usefixtures("patient_redis"),
]


@pytest.fixture
def redis_server(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def workers(environ, redis_server, services, end):
    """Two apps of one deployment, as two workers have them."""
    apps = [create_app(load_settings(environ | {"REDIS_URL": redis_server.url})) for _ in range(2)]
    yield [app.test_client() for app in apps]
    for app in apps:
        end(app)


def states(client, who):
    items = client.get("/api/v1/admin/policies", headers=who).json["items"]
    return {item["name"]: (item["state"], item["shared"]) for item in items}


def ready(client):
    answer = client.get("/health/ready").json
    return answer["status"], answer["checks"]["state"]


def test_a_forced_breaker_holds_in_all_workers(workers, admin):
    """Forced in one worker it is open in the other, ends by itself, and `auto` ends it at once."""
    first, second = workers
    for client in workers:
        until(lambda c=client: ready(c) == ("ready", "shared"))
    path = "/api/v1/admin/policies/extractive"
    told = first.post(path, json={"mode": "open", "expires_s": 5}, headers=admin)
    assert (told.json["state"], told.json["shared"]) == ("forced_open", True)
    until(lambda: states(second, admin)["extractive"] == ("forced_open", True))
    until(lambda: states(second, admin)["extractive"] == ("closed", True))
    first.post(path, json={"mode": "closed"}, headers=admin)
    until(lambda: states(second, admin)["extractive"] == ("forced_closed", True))
    second.post(path, json={"mode": "auto"}, headers=admin)
    until(lambda: states(first, admin)["extractive"] == ("closed", True))


def test_the_command_line_reaches_the_workers(workers, environ, redis_server, admin):
    """A command forces and lists what the workers have; without Redis it says what to do."""
    settings = environ | {"REDIS_URL": redis_server.url}
    run = CliRunner()
    until(lambda: ready(workers[0]) == ("ready", "shared"))
    done = run.invoke(main, ["policies", "set", "database", "open", "--expires=10m"], env=settings)
    assert (done.exit_code, done.output) == (0, "database is open for 10m.\n")
    done = run.invoke(main, ["policies", "list"], env=settings)
    assert "database\tforced_open" in done.output.splitlines()
    until(lambda: workers[0].get("/api/v1/users", headers=admin).status_code == 503)
    refused = workers[0].get("/api/v1/users", headers=admin)
    assert refused.json["error"] == "CircuitOpenError"
    done = run.invoke(main, ["policies", "set", "database", "auto"], env=settings)
    assert done.exit_code == 0
    until(lambda: workers[0].get("/api/v1/users", headers=admin).status_code == 200)
    alone = run.invoke(main, ["policies", "list"], env=environ)
    assert alone.exit_code == 1
    assert "REDIS_URL" in alone.output


def test_ready_says_whose_state_it_is(workers, redis_server, admin):
    """Without Redis the workers go on with states of their own, and share again when it is back."""
    first, second = workers
    until(lambda: ready(first) == ("ready", "shared"))
    redis_server.freeze()
    until(lambda: ready(first) == ("degraded", "local"))
    path = "/api/v1/admin/policies/extractive"
    told = first.post(path, json={"mode": "open"}, headers=admin).json
    assert (told["state"], told["shared"]) == ("forced_open", False)
    redis_server.thaw()
    until(lambda: ready(first) == ("ready", "shared"))
    until(lambda: states(second, admin)["extractive"] == ("forced_open", True))


def test_a_limit_is_one_for_all_workers(environ, redis_server, services, admin, end):
    """Two workers admit sixty requests of one key together."""
    values = environ | {"REDIS_URL": redis_server.url, "RATE_LIMIT_REQUESTS_PER_MINUTE": "60"}
    apps = [create_app(load_settings(values)) for _ in range(2)]
    began = time.monotonic()
    answers = [
        apps[number % 2].test_client().get("/api/v1/documents", headers=admin).status_code
        for number in range(80)
    ]
    at_most = 60 + int(time.monotonic() - began) + 1
    assert 60 <= answers.count(200) <= at_most
    assert set(answers) <= {200, 429}
    for app in apps:
        end(app)
