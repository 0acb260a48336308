"""The fair worker with real gunicorn processes."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from gunicorn_app import serve
from redis_server import free_port
from waiting import until

APP = """
import time, sys
from flask import Flask
app = Flask("x")

@app.get("/")
def index():
    return "ok"

@app.get("/slow")
def slow():
    print("slow has begun", file=sys.stderr, flush=True)
    draining, end = sys.modules["flask_muset.worker"].draining, time.monotonic() + 20
    while not draining() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1.5)
    return "draining" if draining() else "serving"
"""


@pytest.fixture
def server(tmp_path):
    """gunicorn with one fair worker; yields its process and port."""
    (tmp_path / "fair_app.py").write_text(APP)
    port = free_port()
    config = (
        "from gevent import monkey; monkey.patch_all()\n"
        "def on_starting(server): server.handle_int = server.handle_term\n"
    )
    (tmp_path / "conf.py").write_text(config)
    with (tmp_path / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-c", "conf.py", "-b", f"127.0.0.1:{port}",
             "-k", "flask_muset.worker.FairGeventWorker", "--keep-alive", "20",
             "--no-control-socket", "fair_app:app"],
            cwd=tmp_path, start_new_session=True, stderr=errors,
        )  # fmt: skip

    def answers():
        with contextlib.suppress(OSError):
            return get(port, "/") == (200, "ok")
        return False

    try:
        until(answers, 60)
        yield process, port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def connect(port):
    """A connection that is kept until it is closed."""
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30))


def ask(connection, path):
    """One request on a kept connection; returns status and body."""
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def get(port, path):
    """One request on a new connection."""
    with connect(port) as connection:
        return ask(connection, path)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_stop_waits_for_running_requests_only(server, tmp_path, sig):
    """The running request ends well, the idle connection is closed at once, the exit code is 0."""
    process, port = server
    with connect(port) as idle:
        assert ask(idle, "/") == (200, "ok")
        answers = []
        thread = threading.Thread(target=lambda: answers.append(get(port, "/slow")))
        thread.start()
        until(lambda: "slow has begun" in (tmp_path / "errors.txt").read_text())
        began = time.monotonic()
        os.killpg(process.pid, sig) if sig == signal.SIGINT else process.send_signal(sig)
        assert process.wait(60) == 0
        assert time.monotonic() - began < 10
        thread.join()
        assert idle.sock.recv(1) == b""
    assert answers == [(200, "draining")]


def test_new_connections_are_served_beside_busy_ones(server):
    """32 kept connections at full speed: each of 20 probes on a new connection is answered."""
    _, port = server
    over = threading.Event()
    served = []

    def busy():
        with connect(port) as connection:
            while not over.is_set():
                served.append(ask(connection, "/"))

    threads = [threading.Thread(target=busy) for _ in range(32)]
    for thread in threads:
        thread.start()
    try:
        assert [get(port, "/") for _ in range(20)] == [(200, "ok")] * 20
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(served) == {(200, "ok")}


STUCK = """
from flask import Flask
from flask_muset import Resilience

app = Flask("stuck")
app.config["RESILIENCE_MAX_CONCURRENT_REQUESTS"] = 2
Resilience(app)

@app.get("/big")
def big():
    return b"x" * 20_000_000

@app.get("/")
def index():
    return "ok"
"""


def test_clients_that_do_not_read_give_their_places_up(tmp_path):
    """A client that takes nothing of its answer is closed after a while, and others are served."""
    config = "import flask_muset.worker; flask_muset.worker._STALL_S = 0.5\n"
    with serve(tmp_path, STUCK, config=config) as (_, port):
        stuck = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        for one in stuck:
            one.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        end = time.monotonic() + 20
        statuses = []
        while time.monotonic() < end:
            statuses.append(get(port, "/")[0])
            if statuses[-1] == 200 and 503 in statuses:
                break
            time.sleep(0.05)
        for one in stuck:
            one.close()
    assert 503 in statuses
    assert statuses[-1] == 200


def test_a_stop_answers_who_has_just_connected(tmp_path):
    """A connection that was taken is answered, though its request comes after the stop began."""
    config = "import flask_muset.worker; flask_muset.worker._LAST_CALL_S = 2\n"
    with serve(tmp_path, APP, config=config) as (process, port):
        before = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        assert get(port, "/") == (200, "ok")  # so those before have been taken
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        answers = []
        for one in before:
            one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        for one in before:
            one.settimeout(30)
            answers.append(one.recv(100)[:12])
            one.close()
        assert answers == [b"HTTP/1.1 200"] * 5
        assert process.wait(30) == 0


def test_a_stop_waits_as_long_for_each_that_connects(server):
    """Who connects at the last moment is answered too, unless it says nothing for a second."""
    process, port = server
    process.send_signal(signal.SIGTERM)
    answers = []

    def call(connection, began):
        time.sleep(0.5)
        with connection:
            is_in_time = time.monotonic() - began < 0.9
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answers.append(connection.recv(100)[:12] if is_in_time else b"late")

    threads = []
    with contextlib.suppress(ConnectionRefusedError):
        while True:
            began = time.monotonic()
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            threads.append(threading.Thread(target=call, args=(connection, began)))
            threads[-1].start()
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert set(answers) - {b"late"} == {b"HTTP/1.1 200"}
    assert len(answers) == len(threads)
    assert process.wait(10) == 0


def test_a_stop_does_not_wait_for_who_says_nothing(server):
    """Connections without a request are closed a moment after the stop began."""
    process, port = server
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    assert get(port, "/") == (200, "ok")  # so those before have been taken
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert time.monotonic() - began < 15
    for one in silent:
        one.close()


def test_a_stop_waits_for_a_proxy_s_connections(server):
    """An idle connection that a proxy keeps has one more request answered, and is closed then."""
    process, port = server
    with connect(port) as kept:
        kept.request("GET", "/", headers={"X-Forwarded-For": "192.0.2.1"})
        assert kept.getresponse().read() == b"ok"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        until(lambda: is_free(port))
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))
        kept.request("POST", "/nowhere", body=b"x", headers={"X-Forwarded-For": "192.0.2.1"})
        answer = kept.getresponse()
        answer.read()
        assert (answer.status, answer.headers["Connection"]) == (404, "close")
        assert process.wait(30) == 0


def is_free(port):
    """Whether a server could listen on it."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def test_a_worker_without_a_master_ends_its_requests(server, tmp_path):
    """kill -9 of the master: what runs is answered, and the port is free for another master."""
    process, port = server
    errors = tmp_path / "errors.txt"
    answers = []
    thread = threading.Thread(target=lambda: answers.append(get(port, "/slow")))
    thread.start()
    until(lambda: "slow has begun" in errors.read_text())
    process.kill()
    process.wait()
    thread.join()
    assert answers[0][0] == 200
    until(lambda: is_free(port))
    assert "Parent changed" in errors.read_text()


def test_recycled_workers_lose_no_request(tmp_path):
    """After a number of requests another process goes on; kept connections are told to close."""
    source = APP + "\n@app.get('/pid')\ndef pid():\n    import os\n    return str(os.getpid())\n"
    with serve(tmp_path, source, "--max-requests", "10", "--keep-alive", "5") as (_, port):
        pids = set()

        def are_two():
            assert ask(kept, "/")[0] == 200
            status, pid = get(port, "/pid")
            assert status == 200
            pids.add(pid)
            return len(pids) > 1

        with connect(port) as kept:
            until(are_two)


def test_a_worker_that_has_only_begun_hears_of_the_end(tmp_path):
    """gunicorn tells a worker once, which may have the master's handlers then."""
    config = "import time\ngraceful_timeout = 60\ndef post_fork(server, worker): time.sleep(1)\n"
    with serve(tmp_path, APP, config=config) as (process, _):
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def exchange(port, data):
    """What comes back for some bytes: status and the rest."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(data)
        found = b""
        while piece := sock.recv(65536):
            found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body


def test_what_cannot_be_read(tmp_path):
    """A request that is no HTTP is answered as the app answers its errors."""
    source = APP + (
        "\nfrom flask import request\nfrom flask_muset import ErrorHandler\nErrorHandler(app)\n"
        "@app.post('/body')\ndef body():\n    return request.get_data()\n"
    )
    with serve(tmp_path, source) as (_, port):
        for data, expected in [
            (b"GARBAGE\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nA b: c\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nTransfer-Encoding: wrong\r\n\r\n", 400),
            (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
            (b"GET / HTTP/1.1\r\nA: " + b"b" * 200_000 + b"\r\n\r\n", 431),
            (b"GET / HTTP/1.1\r\nExpect: much\r\n\r\n", 417),
            (b"POST /body HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
            (b"GET / HTTP/1.1\r\nAuthorization Bearer hunter2\r\n\r\n", 400),
        ]:
            status, head, body = exchange(port, data)
            assert status == expected, head
            found = json.loads(body)
            assert (found["error"], found["category"]) == ("ValidationError", "validation")
            assert f"X-Request-ID: {found['request_id']}" in head
        assert get(port, "/") == (200, "ok")
    log = (tmp_path / "gunicorn.log").read_text()
    assert log.count("cannot be read") == 7
    assert "hunter2" not in log
