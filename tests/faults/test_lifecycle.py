"""Reload, stop and recycling of the service behind the shipped nginx: no request is lost."""

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time

import pytest
import requests
from load import Load
from waiting import until

BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays eggs."}


def asked(url):
    """Reads and writes, some of which nginx may not send twice."""

    def store(session, number):
        body = {"title": "t", "text": f"Document number {number} of many."}
        return session.post(f"{url}/api/v1/documents", json=body, timeout=60)

    def ask(session, number):
        question = {"question": f"What does queen {number} lay?"}
        return session.post(f"{url}/api/v1/ask", json=question, timeout=60)

    def listed(session, _):
        return session.get(f"{url}/api/v1/documents?limit=1", timeout=60)

    def put(session, number):
        address = f"{url}/api/v1/users/1/preferences"
        return session.put(address, json={"number": number}, timeout=60)

    return {"store": store, "list": listed, "ask": ask, "put": put}


class Bursts:
    """All clients at once, then a pause: nginx has kept connections of every age."""

    def __init__(self, clients):
        self._barrier = threading.Barrier(clients)

    def __call__(self):
        try:
            self._barrier.wait(60)
        except threading.BrokenBarrierError:
            return False
        return True

    def end(self):
        """Nobody waits for others any longer."""
        self._barrier.abort()


def replaced(service, nginx, seconds, act):
    """Load while workers come and go; gives the load and the ids of all workers seen."""
    count = int(service.environ["WEB_CONCURRENCY"])
    first = set(until(lambda: len(found := service.workers()) == count and found))
    workers = set(first)
    clients = 16
    wait = Bursts(clients)
    kinds = asked(nginx.url)

    def new():
        act()
        workers.update(service.workers())
        return workers - first

    with Load(nginx.url, service.headers, kinds, clients=clients, pause_s=0.05, wait=wait) as load:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            new()
        until(new)
        time.sleep(0.5)  # more load for the new ones
        wait.end()
    nginx.stop()
    assert service.stop() == 0
    return load, workers


@pytest.mark.claim("HUP again and again under load behind nginx: no request fails, POSTs included")
def test_reload_under_load(make_service, make_nginx, prove):
    """GETs and POSTs in bursts, so that idle connections are kept, while all workers change."""
    service = make_service(WEB_CONCURRENCY="2")
    service.start()
    told = [time.monotonic()]

    def reload():
        if time.monotonic() > told[-1] + (4 if prove.full else 0.5) and (
            prove.full or not told[1:]
        ):
            service.process.send_signal(signal.SIGHUP)
            told.append(time.monotonic())

    nginx = make_nginx(service.address)
    load, workers = replaced(service, nginx, 60 if prove.full else 2, reload)
    failed = load.refused()
    prove.figure(
        f"{len(load.answers)} requests, {len(told) - 1} reloads, {len(workers)} workers, "
        f"{len(failed)} failed"
    )
    assert failed == [], (load.failures[:3], nginx.errors()[-2000:])
    assert len(workers) > 2
    assert service.output().count("Booting worker") >= len(workers)


@pytest.mark.full_only
@pytest.mark.claim(
    "MUSET_MAX_REQUESTS: workers give way to new ones under load behind nginx, no request fails"
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_recycled_under_load(make_service, make_nginx, prove, workers):
    """A worker goes when its connections have gone, and what comes meanwhile waits for the next."""
    service = make_service(WEB_CONCURRENCY=workers, MUSET_MAX_REQUESTS="300")
    service.start()
    nginx = make_nginx(service.address)
    load, seen = replaced(service, nginx, 60, lambda: None)
    failed = load.refused()
    slowest = max(each.ended - each.began for each in load.answers)
    prove.figure(
        f"{workers} worker(s): {len(load.answers)} requests, {len(seen)} processes, "
        f"{len(failed)} failed, the longest took {slowest:.1f} s"
    )
    assert failed == [], (load.failures[:3], nginx.errors()[-2000:])
    assert len(seen) > int(workers) + 1
    assert "Autorestarting worker" in service.output()


def test_a_killed_worker_is_replaced(make_service):
    """SIGKILL: the master says so and starts another one, which has what was accepted."""
    service = make_service()
    service.start()
    mine, (pid,) = f"{service.url}/api/v1/users/1/preferences", service.workers()
    assert requests.put(mine, json={"n": 1}, headers=service.headers, timeout=30).ok
    os.kill(pid, signal.SIGKILL)
    until(lambda: set(service.workers()) - {pid})
    assert requests.get(mine, headers=service.headers, timeout=30).json() == {"n": 1}
    assert "was sent SIGKILL" in service.output()


def test_a_stop_says_so_first(make_service):
    """SIGTERM: `ready` is `draining` while connections are taken, what was accepted is written.

    Lost is nothing, no request fails that was accepted; the exit code is 0.
    """
    service = make_service()
    # Who stands still for the second after the signal in which connections are taken sees nothing.
    assert any(_says_so_first(service) for _ in range(3))


def _says_so_first(service):
    service.start()
    mine = f"{service.url}/api/v1/users/1/preferences"
    for number in range(20):
        put = requests.put(mine, json={"n": number}, headers=service.headers, timeout=30)
        assert put.status_code == 200
    service.process.send_signal(signal.SIGTERM)
    seen = []
    with contextlib.suppress(requests.ConnectionError):
        while True:
            ready = requests.get(f"{service.url}/health/ready", timeout=30)
            seen.append((ready.status_code, ready.json()["status"]))
            time.sleep(0.02)
    assert seen == sorted(seen), "it was ready again"
    assert service.wait() == 0
    assert "Worker exiting" in service.output()
    with sqlite3.connect(service.data_dir / "data" / "muset.db") as database:
        (data,) = database.execute("SELECT data FROM preferences").fetchone()
    database.close()
    assert json.loads(data) == {"n": 19}
    return (503, "draining") in seen
