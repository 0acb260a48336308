"""The service as real processes: started, stopped, killed, loaded."""

import concurrent.futures
import random
import re
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import requests
from waiting import until

DATA = Path(__file__).parents[1] / "data"


def words(seed, count):
    """Text that no other seed makes."""
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


def active(service):
    """How many requests are being served, the one that asks included."""
    text = requests.get(f"{service.url}/metrics", timeout=30).text
    return float(re.search(r"^muset_http_requests_active (\S+)", text, re.MULTILINE)[1])


@pytest.mark.claim(
    "make run's command prints the key once, is ready again in under 3 s, and Ctrl-C and SIGTERM "
    "finish running requests and exit 0"
)
def test_start_stop(service, prove):
    """First start with a key, then two stops with an upload in flight, each ending with 0."""
    service.start()
    assert service.output().count("Admin key: ") == 1
    times = []
    for number, (sig, group) in enumerate([(signal.SIGTERM, False), (signal.SIGINT, True)]):
        kept = requests.Session()  # an idle kept connection must not hold up the stop
        kept.get(f"{service.url}/health/live", timeout=30)
        text = "\n\n".join(words(f"{number}-{i}", 60) for i in range(3000))
        answers = []

        def upload(text=text, answers=answers):
            body = {"title": "big", "text": text}
            url = f"{service.url}/api/v1/documents"
            answers.append(requests.post(url, json=body, headers=service.headers, timeout=30))

        thread = threading.Thread(target=upload)
        thread.start()
        until(lambda answers=answers: answers or active(service) >= 2)
        began = time.monotonic()
        assert service.stop(sig, group=group) == 0, service.output()
        times.append(time.monotonic() - began)
        thread.join()
        assert [answer.status_code for answer in answers] == [201]
        ready = service.start()
        assert "Admin key" not in service.output()
    prove.figure(f"ready in {ready:.1f} s; stopped in {times[0]:.1f} and {times[1]:.1f} s, exit 0")
    assert max(times) < (10 if prove.full else 18)
    assert ready < 3 or not prove.full


@pytest.mark.claim(
    "SIGKILL during 100 uploads: every upload answered 201 is there and searchable, "
    "the database passes its integrity check"
)
def test_killed_during_uploads(service, prove):
    """Kills master and workers at random moments of many uploads, then counts."""
    service.start()
    rounds = 5 if prove.full else 2
    per_round = 20 if prove.full else 8
    accepted, sent = {}, 0
    for number in range(rounds):
        stop = threading.Timer(0.05 + random.Random(number).random() * 0.4, service.kill_group)

        def upload(i, number=number):
            text = words(f"{number}-{i}", 400)
            body = {"title": f"{number}-{i}", "text": text}
            url = f"{service.url}/api/v1/documents"
            try:
                answer = requests.post(url, json=body, headers=service.headers, timeout=30)
            except requests.RequestException:
                return
            if answer.status_code == 201:
                accepted[answer.json()["id"]] = text

        upload(0)  # however slow the machine is, one is accepted
        stop.start()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(upload, range(1, per_round)))
        sent += per_round
        stop.join()
        service.start()
    lost = []
    for document_id, text in accepted.items():
        url = f"{service.url}/api/v1/documents/{document_id}"
        read = requests.get(url, headers=service.headers, timeout=30)
        question = {"question": " ".join(text.split()[:6]), "document_ids": [document_id]}
        asked = requests.post(
            f"{service.url}/api/v1/ask", json=question, headers=service.headers, timeout=30
        )
        if read.json().get("text") != text or not asked.json()["citations"]:
            lost.append(document_id)
    with sqlite3.connect(service.data_dir / "data" / "muset.db") as database:
        integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
        database.execute("INSERT INTO passages_fts(passages_fts) VALUES ('integrity-check')")
    database.close()
    prove.figure(f"{sent} sent, {len(accepted)} accepted, {len(lost)} lost, integrity {integrity}")
    assert accepted
    assert lost == []
    assert integrity == "ok"


@pytest.mark.claim(
    "200 connected clients that together offer 60 % of the measured capacity "
    "while a 5 MB document is indexed: no request fails"
)
def test_clients_while_indexing(service, prove):
    """Measures capacity, then offers 60 % of it at a constant rate during the indexing."""
    service.start()
    clients = 200 if prove.full else 40
    body = {"title": "Trees", "text": (DATA / "arbor_day_leaves.txt").read_text("utf-8")}
    url = f"{service.url}/api/v1/documents"
    assert requests.post(url, json=body, headers=service.headers, timeout=30).status_code == 201
    sessions = [requests.Session() for _ in range(clients)]
    target = f"{service.url}/api/v1/documents?limit=1"

    def call(session):
        return session.get(target, headers=service.headers, timeout=30).status_code

    # Below the limit of requests at once, above which a worker says that it is busy.
    with concurrent.futures.ThreadPoolExecutor(min(clients, 50)) as pool:
        assert set(pool.map(call, sessions)) == {200}
        began = time.monotonic()
        assert set(pool.map(call, sessions * 5)) == {200}
        capacity = len(sessions) * 5 / (time.monotonic() - began)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        big = "\n\n".join(words(i, 90) for i in range(8000))[: (5 if prove.full else 1) << 20]
        done = []

        def upload():
            made = {"title": "big", "text": big}
            done.append(requests.post(url, json=made, headers=service.headers, timeout=60))

        thread = threading.Thread(target=upload)
        thread.start()
        began, pace, results = time.monotonic(), 1 / (0.6 * capacity), []
        at_least = 5 if prove.full else 1
        while thread.is_alive() or time.monotonic() - began < at_least:
            results.append(pool.submit(call, sessions[len(results) % clients]))
            time.sleep(max(0.0, began + len(results) * pace - time.monotonic()))
        thread.join()
        statuses = [result.result() for result in results]
    failed = [status for status in statuses if status != 200]
    prove.figure(
        f"{clients} clients, {0.6 * capacity:.0f} requests/s offered, {len(big) / 1e6:.1f} MB, "
        f"{len(statuses)} requests, {len(failed)} failed"
    )
    assert done[0].status_code == 201
    assert failed == []


def test_a_frozen_worker_goes_on_where_it_stopped(service):
    """What was sent while the worker stood still is answered when it goes on; nothing is lost."""
    service.start()

    def ask(_):
        answer = requests.get(
            f"{service.url}/api/v1/documents", headers=service.headers, timeout=20
        )
        return answer.status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        with service.frozen():
            answers = [pool.submit(ask, n) for n in range(8)]
            with pytest.raises(requests.ReadTimeout):
                requests.get(f"{service.url}/health/live", timeout=0.5)
            assert not any(answer.done() for answer in answers)
        assert [answer.result() for answer in answers] == [200] * 8
