"""Streams of a real worker: many at once, clients that leave, a process that stops."""

import http.server
import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import requests
from patched import run_apart
from waiting import until

from muset.testing.upstream import Upstream

BEES = {"title": "Bees", "text": "A bee colony has one queen. The queen lays 2,000 eggs a day."}
STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def asked(make_service):
    """Start a model server, and a service that asks it; gives both."""
    upstreams = []

    def start(upstream_options=None, **environ):
        upstream = Upstream(seed=1, models=["m"], **upstream_options or {})
        upstreams.append(upstream)
        service = make_service(AI_BASE_URL=upstream.base_url, AI_MODEL="m", **environ)
        service.start()
        url = f"{service.url}/api/v1/documents"
        assert requests.post(url, json=BEES, headers=service.headers, timeout=30).ok
        return service, upstream

    yield start
    for upstream in upstreams:
        upstream.close()


def stream(service, question="How many eggs does the queen lay a day?", **options):
    return requests.post(
        f"{service.url}/api/v1/ask",
        json={"question": question, **options},
        headers=service.headers | STREAM,
        stream=True,
        timeout=60,
    )


def ledger(service):
    import sqlite3

    with sqlite3.connect(service.data_dir / "data" / "muset.db") as database:
        rows = database.execute("SELECT status, count(*) FROM usage GROUP BY status").fetchall()
    database.close()
    return dict(rows)


def memory_mb(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


#: One thread and one poll, so that what is measured is the service rather than its clients.
_MANY = """
import select, socket, sys, time
host, port, key, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
gap_s = 5.0 / 1000
poll, streams, began, ended = select.epoll(), {}, time.monotonic(), []

class Stream:
    def __init__(self, number):
        self.found, self.began, self.first = b"", time.monotonic(), None
        body = json.dumps({"question": f"How many eggs does queen {number} lay a day?"})
        self.sock = socket.create_connection((host, port))
        self.sock.sendall(
            f"POST /api/v1/ask HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Bearer {key}\\r\\n"
            "Accept: text/event-stream\\r\\nContent-Type: application/json\\r\\n"
            f"Connection: close\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode()
        )

    def read(self):
        data = self.sock.recv(65536)
        self.found += data
        if self.first is None and b"event: delta" in self.found:
            self.first = time.monotonic() - self.began
        return bool(data)

    def seen(self):
        lines = self.found.split(b"\\n")
        texts = [json.loads(line[6:])["text"] for line in lines if line[:14] == b'data: {"text":']
        ids = [int(line[4:]) for line in lines if line.startswith(b"id: ")]
        return [
            self.found.count(b"event: done"), self.found.count(b"event: error"), len(texts),
            "".join(texts), self.first, ids == list(range(1, len(ids) + 1)),
            self.found[:12].decode(),
        ]

while len(ended) < count:
    number = len(streams) + len(ended)
    wait_s = began + number * gap_s - time.monotonic() if number < count else 60
    if wait_s <= 0:
        stream = Stream(number)
        streams[stream.sock.fileno()] = stream
        poll.register(stream.sock, select.EPOLLIN)
    for fd, _ in poll.poll(max(0, wait_s)):
        if not streams[fd].read():
            ended.append(streams.pop(fd))
            poll.unregister(fd)
            ended[-1].sock.close()
result = [stream.seen() for stream in ended]
"""


@pytest.mark.claim(
    "1,000 streams open at once on one worker (first token after 300 ms, then 2 a second for 10 s; "
    "all come within 5 s): none refused, each whole, in order and ended once, one row each"
)
def test_many_streams(asked, prove):
    """Each client reads its stream to the end; nothing is lost, nothing comes twice."""
    count, tokens = (1000, 21) if prove.full else (40, 5)
    limits = {
        "MAX_CONCURRENT_REQUESTS": str(count + 100),
        "GUNICORN_CMD_ARGS": f"--worker-connections {2 * count + 100}",
    }
    service, upstream = asked(
        {"first_token": "0.3", "tokens_per_second": 2, "tokens": tokens}, **limits
    )
    (pid,) = service.workers()
    before, cpu_before, peak = memory_mb(pid), cpu_s(pid), []
    done = threading.Event()

    def watch():
        while not done.wait(0.1):
            peak.append((memory_mb(pid), upstream.state["active"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = run_apart(_MANY, "127.0.0.1", service.port, service.key, count, timeout=300)
    finally:
        done.set()
        watcher.join()
    used_s = cpu_s(pid) - cpu_before
    seen = upstream.settled()
    assert service.stop() == 0
    rows = ledger(service)
    whole = [one for one in found if one[0] == 1 and one[1] == 0 and one[5]]
    refused = sum(one[6] == "HTTP/1.1 503" for one in found)
    longest = max(one[4] or 60 for one in found)
    megabytes, at_once = map(max, zip(*peak, strict=True))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    prove.figure(
        f"{len(whole)} of {count} whole, {at_once} at once, {refused} refused, "
        f"{sum(one[2] for one in found)} deltas, first text within {longest:.1f} s, "
        f"{(megabytes - before) / count * 1000:.0f} kB and {used_s / count * 1000:.1f} ms of CPU "
        f"for each; MAX_CONCURRENT_REQUESTS={count + 100}, worker_connections={2 * count + 100}, "
        f"RATE_LIMIT_REQUESTS_PER_MINUTE=0, {files} file descriptors, else the defaults"
    )
    assert (len(whole), refused) == (count, 0)
    assert at_once == count or not prove.full
    assert len({one[3].replace("  ", " ") for one in found}) == 1
    assert rows == {"success": count}
    assert len(seen) == count
    assert sum(each.tokens for each in seen) == count * seen[0].tokens


def test_clients_that_leave(asked):
    """The connection to the model is closed soon after, and each leaves one row."""
    service, upstream = asked({"tokens_per_second": 10, "tokens": 300})
    answers = [stream(service, f"How many eggs does queen {n} lay?") for n in range(5)]
    for answer in answers:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        next(answer.iter_content(64))
    until(lambda: upstream.state["active"] == 5)
    for answer in answers:
        answer.close()
    seen = upstream.settled(20)
    assert all(each.client_left for each in seen)
    assert service.stop() == 0
    assert ledger(service) == {"client_closed": 5}


_LETTERS = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n' * 500


@pytest.mark.full_only
@pytest.mark.claim(
    "three clients that never read an answer of 240,000 events: their provider waits, a worker "
    "takes less than 60 MB for them, and after a minute each is a row client_closed"
)
def test_clients_that_never_read(make_service, prove):
    """What they do not take is kept nowhere but in a bounded queue and the sockets."""
    sent, left = [], []

    class Floods(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append(0)
            number = len(sent) - 1
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for _ in range(480):
                    self.wfile.write(_LETTERS)
                    sent[number] += 500
            except OSError:
                left.append(number)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Floods) as model:
        threading.Thread(target=model.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{model.server_port}/v1"
        service = make_service(AI_BASE_URL=url, AI_MODEL="m")
        service.start()
        url = f"{service.url}/api/v1/documents"
        assert requests.post(url, json=BEES, headers=service.headers, timeout=30).ok
        (pid,) = service.workers()
        before, most, began = memory_mb(pid), 0.0, time.monotonic()
        clients = [stream(service, f"How many eggs does queen {n} lay?") for n in range(3)]
        while len(left) < 3:
            assert time.monotonic() - began < 240, (sent, left)
            most = max(most, memory_mb(pid) - before)
            time.sleep(0.5)
        took = time.monotonic() - began
        for client in clients:
            client.close()
        assert service.stop() == 0
        model.shutdown()
    prove.figure(f"{max(sent)} events taken at most, {most:.0f} MB, closed after {took:.0f} s")
    assert max(sent) < 240_000
    assert most < 60
    assert ledger(service) == {"client_closed": 3}


@pytest.mark.full_only
@pytest.mark.claim(
    "SIGTERM: a stream that ends soon is whole, a long one ends in an error event, exit 0 in 30 s"
)
def test_a_stop_ends_streams(asked, prove):
    """A short one comes to its end; a long one gets an error event within the time for a stop."""
    service, upstream = asked({"tokens_per_second": 4, "tokens": 1000})
    upstream.script(["ok"])
    short = stream(service, max_tokens=6)
    long = stream(service, k=3)
    texts = {}

    def read(name, answer):
        texts[name] = answer.text

    threads = [
        threading.Thread(target=read, args=(name, answer))
        for name, answer in (("short", short), ("long", long))
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    assert service.stop() == 0
    took = time.monotonic() - began
    for thread in threads:
        thread.join(60)
    assert "event: done" in texts["short"]
    assert texts["long"].count("event: error") == 1
    error = json.loads(texts["long"].rsplit("data: ", 1)[1])
    assert (error["error"], error["retry_after"]) == ("OverloadedError", 1)
    prove.figure(f"stopped after {took:.1f} s")
    assert took < 30
    assert ledger(service) == {"success": 1, "partial": 1}
