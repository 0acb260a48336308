"""What reaches the service from anybody: floods, clients that dawdle, bytes that are no HTTP."""

import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter

import pytest
import requests
from nginx_server import Nginx
from services import Service
from waiting import until

from flask_muset.errors import TABLE, ErrorCategory

#: Refusals of the service and of nginx that a request without a key may come to.
REFUSALS = {400, 401, 404, 405, 408, 411, 413, 414, 415, 417, 422, 429, 431}


class Watch:
    """Asks whether the service lives, all the while, each time on a new connection."""

    def __init__(self, url):
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.statuses = Counter()
        self.slowest = 0.0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _run(self):
        while not self._over.wait(0.05):
            began = time.monotonic()
            try:
                status = requests.get(f"{self._url}/health/live", timeout=30).status_code
            except requests.RequestException as error:
                status = type(error).__name__
            self.statuses[status] += 1
            self.slowest = max(self.slowest, time.monotonic() - began)


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """A service and an nginx before it; its worker must be the same at the end."""
    service = Service(tmp_path_factory.mktemp("service"))
    service.start()
    workers = service.workers()
    nginx = Nginx(tmp_path_factory.mktemp("nginx"), [service.address]).start()
    yield service, nginx
    nginx.stop()
    same = service.workers() == workers
    assert service.stop() == 0
    assert same
    assert "Traceback" not in service.output()
    assert service.output().count("Booting worker") == 1


def ways(edge):
    """What clients can reach the service by: name, port, URL."""
    service, nginx = edge
    return [("nginx", nginx.port, nginx.url), ("straight", service.port, service.url)]


# --- Bytes that are no HTTP ---------------------------------------------------------------------


def line(rng):
    """A first line, in half of the cases a wrong one."""
    if rng.random() < 0.5:
        return (
            rng.choice([b"GET /health/live", b"POST /api/v1/ask", b"GET /docs/"]) + b" HTTP/1.1\r\n"
        )
    method = rng.choice([b"GET", b"POST", b"get", b"G\0T", b"", b"\xff\xfe", b"A" * 300, b"PRI"])
    path = rng.choice([
        b"/", b"/health/live", b"*", b"", b"http://[::1", b"/\0", b"/%00%zz", b"/" + b"a" * 9000,
        b"//evil", b"/../../etc/passwd", "/schön".encode(), b"/?" + bytes(range(128, 256)),
    ])  # fmt: skip
    version = rng.choice([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2.0", b"", b"HTTP/1.1 x"])
    end = rng.choice([b"\r\n", b"\r\n", b"\n", b"\r", b"\0\r\n"])
    return rng.choice([b" ", b" ", b"\t", b"  "]).join([method, path, version]) + end


def field(rng):
    """A header, mostly a wrong one."""
    return rng.choice([
        b"Host: x", b"Host: x\r\nHost: y", b"Host: a b\0", b"No colon", b": no name", b" Folded: x",
        b"Na me: x", b"Name : x", b"Null: a\0b", b"High: \xff\xfe", b"Long: " + b"x" * 9000,
        b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 5, 5", b"Content-Length: +3",
        b"Content-Length: 1e3", b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 99999999999999999999", b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: identity", b"Expect: 100-continue",
        b"Expect: much",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA",
        b"Content-Type: application/json", b"Content-Type: multipart/form-data; boundary=",
        b"Range: bytes=9-1", b"X-Forwarded-For: " + b"1," * 500, b"Authorization: Bearer \xff",
        b"X-Request-ID: \r\n evil: yes", b"Accept: */*;q=nan", b"Cookie: " + b"=;" * 1000,
    ])  # fmt: skip


def body(rng):
    """A body, mostly of another length than was said."""
    return rng.choice([
        b"", b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\nhello", b"ffffffffffffffff1\r\n",
        b"5;" + b"e" * 5000 + b"\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"0\r\nTrailer: x\r\n\r\n", b'{"a":', b"0\r\n\r\nGET /next HTTP/1.1\r\nHost: x\r\n\r\n",
    ])  # fmt: skip


_SMUGGLED = '"path":"/smuggled"'
_INNER = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
#: Requests of which two servers may not agree where they end.
SMUGGLING = [
    b"POST /api/v1/ask HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n" + content
    for fields, content in [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n" + _INNER),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"5c\r\n" + _INNER + b"\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", b"0\r\n\r\n" + _INNER),
        (b"Transfer-Encoding : chunked\r\nContent-Length: 5", b"0\r\n\r\n" + _INNER),
        (b"Transfer-Encoding:\x0bchunked\r\nContent-Length: 5", b"0\r\n\r\n" + _INNER),
        (b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 5", b"0\r\n\r\n" + _INNER),
        (b"Content-Length: 0\r\nContent-Length: 44", _INNER),
        (b"Content-Length: 44\r\nContent-Length: 0", _INNER),
        (b"Content-Length: 0, 44", _INNER),
        (b"Content-Length : 0\r\nContent-Length: 44", _INNER),
        (b"Content-Length: +0", _INNER),
        (b"Transfer-Encoding: chunked", b"0\n\n" + _INNER),
        (b"Transfer-Encoding: chunked", b"0_0\r\n\r\n" + _INNER),
    ]
]


def malformed(rng):
    """A request of wrong parts, or one whose bytes were changed or cut."""
    some = [b"Host: x", *(field(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 120])))]
    fields = b"".join(each + b"\r\n" for each in some[rng.random() < 0.2 :])
    data = line(rng) + fields + b"\r\n" + body(rng)
    if rng.random() < 0.3:
        changed = bytearray(
            b"POST /api/v1/ask HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n" + body(rng)
        )
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    return data[: rng.randint(1, len(data))] if rng.random() < 0.1 else data


def answers_of(port, data):
    """All answers that come back until the other side closes: status, head and body of each."""
    found = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)  # there comes no more
            while piece := sock.recv(65536):
                found += piece
    except ConnectionError:
        pass
    answers = []
    while found.startswith(b"HTTP/1."):
        head, _, rest = found.partition(b"\r\n\r\n")
        lengths = [f[15:] for f in head.split(b"\r\n") if f.lower().startswith(b"content-length:")]
        length = int(lengths[0]) if lengths else len(rest)
        answers.append((int(head.split(None, 2)[1]), head, rest[:length]))
        found = rest[length:]
    if found.startswith(b"{"):  # HTTP/0.9, as nginx speaks to who does not say his version
        said = json.loads(found)  # nginx's own errors have their status in them, the service's not
        status = said.get("status") or TABLE[ErrorCategory(said["category"])].status
        answers.append((status, b"application/problem+json", found))
    return answers


def check_answer(status, head, body):
    """What was refused has the form of the service's errors."""
    if 200 <= status < 300 or status == 100:
        return
    assert status in REFUSALS, (head, body)
    if body:
        assert b"application/json" in head or b"application/problem+json" in head, head
        assert {"error", "message", "category", "request_id"} <= json.loads(body).keys()


def seen_by(nginx, text):
    """How often its access log has a text; what it has not written yet comes within a second."""
    return sum(text in line for line in nginx.access_log())


@pytest.mark.claim(
    "10,000 malformed requests through nginx and as many straight: no worker dies, no status but "
    "documented refusals in the form of the service's errors, /health/live answers throughout"
)
def test_malformed_requests(edge, prove):
    """Wrong lines, headers, lengths and chunks, NULs, and two requests in one."""
    service, nginx = edge
    count = 10_000 if prove.full else 300
    for name, port, url in ways(edge):
        rng = random.Random(11)
        sent = [*SMUGGLING, *(malformed(rng) for _ in range(count))]
        with Watch(url) as watch, concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda data, port=port: answers_of(port, data), sent))
        statuses = Counter(status for answers in results for status, _, _ in answers)
        prove.figure(f"{name}: {dict(sorted(statuses.items()))}, alive {dict(watch.statuses)}")
        for data, answers in zip(sent, results, strict=True):
            for answer in answers:
                try:
                    check_answer(*answer)
                except AssertionError as error:
                    raise AssertionError(f"after {data[:500]!r}") from error
        assert set(watch.statuses) == {200}
    # A second request that nginx has seen is one that the client has sent, and no other is there.
    until(lambda: service.output().count(_SMUGGLED) == seen_by(nginx, _SMUGGLED))


# --- Clients that dawdle, and many of them ------------------------------------------------------


def dawdle(port, kind, end):
    """One client that gives or takes a little at a time, until it is refused."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            if kind == "headers":
                sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
                piece = b"X-a: b\r\n"
            elif kind == "body":
                sock.sendall(
                    b"POST /api/v1/ask HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"
                )
                piece = b" "
            else:
                sock.sendall(b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                piece = b""
            while time.monotonic() < end:
                if piece:
                    sock.sendall(piece)
                time.sleep(0.3)
    except OSError:
        return


@pytest.mark.claim(
    "300 clients that send a head, a body or take an answer a little at a time, beside a flood of "
    "new connections, through nginx and straight: others are answered, no worker dies"
)
def test_slow_clients_and_a_flood(edge, prove):
    """Fewer connections than a worker takes (1,000) and than nginx allows an address (512)."""
    service, _ = edge
    each = 100 if prove.full else 15
    for name, port, url in ways(edge):
        end = time.monotonic() + (15 if prove.full else 1.5)
        kinds = ["headers", "body", "answer"] * each
        with Watch(url) as watch, concurrent.futures.ThreadPoolExecutor(len(kinds) + 1) as pool:
            slow = [pool.submit(dawdle, port, kind, end) for kind in kinds]
            opened = 0
            while time.monotonic() < end:
                with socket.create_connection(("127.0.0.1", port), timeout=30):
                    opened += 1
                time.sleep(0.001)
            asked = requests.get(f"{url}/api/v1/documents", headers=service.headers, timeout=60)
            assert asked.status_code == 200
            for one in slow:
                one.result()
            if not prove.full:  # of so short a flood a slow machine may watch nothing
                until(lambda watch=watch: watch.statuses[200] > 3)
        prove.figure(
            f"{name}: {len(kinds)} slow, {opened} opened and closed, alive {dict(watch.statuses)}, "
            f"within {watch.slowest:.1f} s"
        )
        assert set(watch.statuses) == {200}
        assert watch.statuses[200] > 3


#: A head whose body does not come: nginx waits for it before it asks the service.
BODILESS = b"POST /api/v1/ask HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"


@contextlib.contextmanager
def connections(port, count):
    """So many to a port, closed with the block."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(count)
        ]


def test_more_connections_than_an_address_may_have(edge):
    """512 of one address wait for a body; the next one is told to come back, in the usual form."""
    _, nginx = edge
    with connections(nginx.port, 512) as waiting:
        for one in waiting:
            one.sendall(BODILESS)
        # Until nginx has read all heads one more is let in, and ends without an answer.
        ((status, head, body),) = until(lambda: answers_of(nginx.port, BODILESS))
    assert (status, json.loads(body)["category"]) == (429, "rate_limit")
    assert b"Retry-After: 1" in head
    until(lambda: requests.get(f"{nginx.url}/health/live", timeout=30).ok)


@pytest.mark.full_only
@pytest.mark.claim(
    "A head or a body of which nothing comes for 10 s: nginx resets the connection and logs 408"
)
def test_what_does_not_come_to_an_end(edge, prove):
    """Two clients that say no more in the middle of theirs; the service hears of neither."""
    _, nginx = edge
    slow = BODILESS.replace(b"/api/v1/ask", b"/slow")
    began = time.monotonic()
    with connections(nginx.port, 2) as clients:
        for one, text in zip(clients, (b"GET /slow HTTP/1.1\r\n", slow), strict=True):
            one.sendall(text)
        for one in clients:
            with pytest.raises(ConnectionResetError):
                one.recv(4096)
    prove.figure(f"closed after {time.monotonic() - began:.1f} s")
    # The log has those of other tests too.
    told = '"path":"/slow","status":408'
    until(lambda: sum(told in line for line in nginx.access_log()) == 2)
