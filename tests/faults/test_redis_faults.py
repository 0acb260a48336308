"""A service whose Redis is killed, stands still, or is cut off from it."""

import contextlib

import pytest
import requests
from redis_server import RedisServer, SlowWay
from waiting import until

BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays eggs."}


class Redis:
    """A Redis that keeps what it accepts, reached through a way that can be cut."""

    def __init__(self, folder):
        self.server = RedisServer(folder, "--appendonly", "yes", "--appendfsync", "always").start()
        self.way = SlowWay(self.server.port)

    @contextlib.contextmanager
    def killed(self):
        """kill -9; started again at the end, with what was in its file."""
        self.server.kill()
        yield
        self.server.start()

    @contextlib.contextmanager
    def frozen(self):
        """Its port takes connections, nothing is answered."""
        self.server.freeze()
        yield
        self.server.thaw()

    @contextlib.contextmanager
    def cut_off(self):
        """It lives and answers others; what is sent to it from here comes to nothing."""
        self.way.hold()
        yield
        self.way.let_go()

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            self.server.thaw()
        self.way.close()
        self.server.kill()


@pytest.fixture
def redis(tmp_path):
    redis = Redis(tmp_path)
    yield redis
    redis.stop()


def test_redis_is_away(make_service, redis):
    """Lost: nothing. Preferences are refused with 503 and a time, all else is answered meanwhile.

    `ready` is degraded and names Redis, its link is down in the metrics, the log says so once; by
    itself all is well again when Redis is.
    """
    service = make_service(REDIS_URL=redis.way.url)
    service.start()
    with requests.Session() as session:
        session.headers = service.headers
        for name, fault in [
            ("killed", redis.killed),
            ("frozen", redis.frozen),
            ("cut off", redis.cut_off),
        ]:
            goes_and_comes_back(service, session, name, fault)


def goes_and_comes_back(service, session, name, fault):
    api = f"{service.url}/api/v1"
    mine = f"{api}/users/1/preferences"

    def put(value):
        return session.put(mine, json={"is": value}, timeout=30)

    def ready():
        return session.get(f"{service.url}/health/ready", timeout=30).json()

    def metric(line):
        text = session.get(f"{service.url}/metrics", timeout=30).text
        return any(found.startswith(line) for found in text.splitlines())

    until(lambda: put(f"before {name}").ok)
    downs = service.output().count("the link to redis is down")
    with fault():
        refused = put("meanwhile")
        assert (refused.status_code, refused.json()["category"]) == (503, "external_service")
        assert int(refused.headers["Retry-After"]) >= 1
        body = {"title": name, "text": f"Stored while Redis was {name}."}
        stored = session.post(f"{api}/documents", json=body, timeout=30)
        assert stored.status_code == 201
        read = session.get(f"{api}/documents/{stored.json()['id']}", timeout=30)
        assert read.json()["text"] == body["text"]
        question = {"question": f"What was stored while Redis was {name}?"}
        answer = session.post(f"{api}/ask", json=question, timeout=30)
        assert answer.json()["status"] == "answered"
        until(lambda: ready()["status"] == "degraded")
        assert "redis" in " ".join(ready()["reasons"]).lower()
        until(lambda: metric('muset_redis_link_state{name="redis",state="down"} 1'))
        assert service.output().count("the link to redis is down") == downs + 1
    until(lambda: ready()["status"] == "ready")
    until(lambda: session.get(mine, timeout=30).json() == {"is": f"before {name}"})
    until(lambda: put(f"after {name}").ok)
    read = until(lambda: (found := session.get(mine, timeout=30)).status_code < 500 and found)
    assert read.json() == {"is": f"after {name}"}
