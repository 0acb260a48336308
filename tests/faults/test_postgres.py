"""The service on PostgreSQL that is killed, started again, or stands still."""

import concurrent.futures
import itertools
import threading
import time

import pytest
import requests
from postgres_server import PostgresServer
from services import Service
from waiting import until


@pytest.fixture(scope="module")
def server():
    """A server that keeps what it has said to have kept."""
    server = PostgresServer(durable=True).start()
    yield server
    server.remove()


@pytest.fixture
def service(server, tmp_path):
    service = Service(tmp_path, DATABASE_URL=server.database())
    service.start()
    yield service
    service.kill_group()


class Load:
    """Clients that store and list documents, and what they were answered.

    Attributes:
        answers: (time, kind, status, whether it says when to come back).
        stored: The texts of those that were answered 201, by id.
    """

    def __init__(self, service, clients):
        self._service = service
        self._clients = clients
        self._numbers = itertools.count()
        self._over = threading.Event()
        self.answers = []
        self.stored = {}

    def __enter__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(self._clients + 1)
        self._running = [self._pool.submit(self._run) for _ in range(self._clients)]
        self._running.append(self._pool.submit(self._watch))
        return self

    def __exit__(self, *_):
        self._over.set()
        self._pool.shutdown()
        for running in self._running:
            running.result()

    def since(self, moment):
        """Each (kind, status) that was answered after a moment."""
        return {(kind, status) for at, kind, status, _ in self.answers if at > moment}

    def _run(self):
        with requests.Session() as session:
            session.headers = self._service.headers
            while not self._over.is_set():
                number = next(self._numbers)
                if number % 2:
                    self._note("list", session.get(f"{self._url}?limit=1", timeout=60))
                else:
                    self._store(session, number)

    def _store(self, session, number):
        text = f"number{number} " + " ".join(f"w{number * n % 991}" for n in range(200))
        answer = session.post(self._url, json={"title": "t", "text": text}, timeout=60)
        self._note("store", answer)
        if answer.status_code == 201:
            self.stored[answer.json()["id"]] = text

    def _watch(self):
        while not self._over.wait(0.05):
            ready = requests.get(f"{self._service.url}/health/ready", timeout=60)
            self._note("ready", ready)

    @property
    def _url(self):
        return f"{self._service.url}/api/v1/documents"

    def _note(self, kind, answer):
        is_told = int(answer.headers.get("Retry-After", 0)) >= 1
        self.answers.append((time.monotonic(), kind, answer.status_code, is_told))


@pytest.mark.claim(
    "PostgreSQL is killed (SIGKILL) and started again under load: only 503 with Retry-After "
    "meanwhile, recovery within 5 s without a hand, no accepted document lost"
)
def test_killed_and_started_again(service, server, prove):
    """Stores and lists all the while; then every document that was answered 201 is there."""
    rounds, clients = (5, 16) if prove.full else (1, 6)
    worst = 0.0
    with Load(service, clients) as load:
        for _ in range(rounds):
            time.sleep(0.5)
            killed = time.monotonic()
            server.kill()
            time.sleep(4 if prove.full else 0)
            until(lambda since=killed: ("ready", 503) in load.since(since))
            server.start()
            back = time.monotonic()
            time.sleep(6 if prove.full else 0)
            until(lambda since=back: {("store", 201), ("list", 200), ("ready", 200)}
                  <= load.since(since))  # fmt: skip
            late = [at - back for at, _, status, _ in load.answers if at > killed and status >= 500]
            worst = max(worst, *late)
    answers = load.answers
    refused = [status for _, _, status, _ in answers if status not in (200, 201)]
    silent = [answer for answer in answers if answer[2] == 503 and not answer[3]]
    lost = [
        document_id
        for document_id, text in load.stored.items()
        if requests.get(
            f"{service.url}/api/v1/documents/{document_id}", headers=service.headers, timeout=30
        ).json()["text"]
        != text
    ]
    prove.figure(
        f"{rounds} kills, {len(answers)} answers, {len(refused)} of them 503, "
        f"{len(load.stored)} accepted, {len(lost)} lost, recovered after {worst:.1f} s"
    )
    assert set(refused) == {503}
    assert silent == []
    assert lost == []
    assert load.stored
    # The small run has waited for it.
    assert worst < 5 or not prove.full


def test_frozen(service, server):
    """A request ends at its deadline and nothing of it is kept; the worker lives and goes on."""
    url, who = f"{service.url}/api/v1/documents", service.headers
    body = {"title": "t", "text": "Stored while it stood still."}
    assert requests.get(url, headers=who, timeout=30).status_code == 200
    server.freeze()
    try:
        late = requests.post(
            url, json=body, headers=who | {"X-Request-Timeout-Ms": "700"}, timeout=30
        )
        assert (late.status_code, late.json()["category"]) == (504, "timeout")
        assert requests.get(f"{service.url}/health/live", timeout=30).status_code == 200
        # What was found lately holds for a second.
        end = time.monotonic() + 20
        while (ready := requests.get(f"{service.url}/health/ready", timeout=30)).ok:
            assert time.monotonic() < end
        assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    finally:
        server.thaw()
    assert requests.post(url, json=body, headers=who, timeout=30).status_code == 201
    assert len(requests.get(url, headers=who, timeout=30).json()["items"]) == 1
