"""Policies round the exchanges of httpx and requests, with a real server."""

import asyncio
import email.utils
import gc
import io
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import requests
import urllib3
from patched import run_patched
from requests.adapters import HTTPAdapter
from waiting import until

from flask_muset.clock import SYSTEM
from flask_muset.deadline import deadline
from flask_muset.errors import CircuitOpenError, OperationTimeoutError, OverloadedError
from flask_muset.resilience import (
    Bulkhead,
    CircuitBreaker,
    Fallback,
    Policy,
    RetryStrategy,
    Timeout,
    httpx_transport,
    requests_adapter,
    retry,
)
from flask_muset.resilience.http_calls import PolicyEndedError
from flask_muset.resilience.httpx_transport import AsyncPolicyTransport, PolicyTransport
from flask_muset.resilience.requests_adapter import PolicyAdapter
from flask_muset.testing import virtual_clock

RETRIES = 2
DROP, STALL, CUT, CUT_503 = "drop", "stall", "cut", "cut 503"
KEY = {"Idempotency-Key": "k1"}
BIG = b"x" * 100_000


class Handler(BaseHTTPRequestHandler):
    """Does what the script of its server says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def answer(self):
        body = self.read_body()
        step = self.server.step(self.command, body, self.client_address[1])
        if step == STALL:
            self.server.stopped.wait(5)
        if step in (DROP, STALL):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if is_cut := step in (CUT, CUT_503):
            step = (200 if step == CUT else 503, {"Content-Length": "10"}, b"01234")
        status, headers, content = step
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = is_cut


for _method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"):
    setattr(Handler, f"do_{_method}", Handler.answer)


class Server(ThreadingHTTPServer):
    """A scripted server: its steps one after the other, the last one for ever."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.stopped = threading.Event()
        self.script = []
        self.bodies, self.ports = [], []

    def step(self, _method, body, port):
        self.bodies.append(body)
        self.ports.append(port)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return (step, {}, b"answer") if isinstance(step, int) else step

    def does(self, *script):
        self.script = list(script)

    @property
    def count(self):
        return len(self.bodies)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def refusing():
    """A port that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


@pytest.fixture
def clock():
    with virtual_clock() as clock:
        yield clock


class Recorded(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The body of an answer that notes when it is closed."""

    def __init__(self, closed):
        self.closed = closed

    def close(self):
        self.closed.append(1)

    async def aclose(self):
        self.closed.append(1)


class Httpx:
    """What the tests ask of httpx."""

    module = httpx_transport
    transport_errors = httpx.TransportError
    timeouts = httpx.TimeoutException
    status_error = httpx.HTTPStatusError
    cut_errors = httpx.RemoteProtocolError
    unsent = (httpx.ConnectError, httpx.ConnectTimeout)
    guarded = PolicyTransport

    @contextmanager
    def client(self, policy):
        wrapped = httpx.HTTPTransport(verify=False)  # loading the certificates takes its time
        with httpx.Client(transport=PolicyTransport(policy, wrapped)) as client:
            yield client

    def send(self, client, method, url, *, body=None, headers=None):
        return client.request(method, url, content=body, headers=headers)

    def stream(self, client, url):
        with client.stream("GET", url) as response:
            return response.status_code, b"".join(response.iter_bytes())

    def patch(self, monkeypatch, handle):
        def handle_request(_self, request):
            return handle(request)

        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle_request)

    def response(self, status):
        return httpx.Response(status)

    def open_response(self, closed):
        return httpx.Response(503, stream=Recorded(closed))


class Requests:
    """What the tests ask of requests."""

    module = requests_adapter
    transport_errors = requests.ConnectionError
    timeouts = requests.Timeout
    status_error = requests.HTTPError
    cut_errors = requests.exceptions.ChunkedEncodingError
    unsent = (requests.ConnectTimeout,)
    guarded = PolicyAdapter

    @contextmanager
    def client(self, policy):
        with requests.Session() as session:
            session.mount("http://", PolicyAdapter(policy))
            yield session

    def send(self, client, method, url, *, body=None, headers=None):
        return client.request(method, url, data=body, headers=headers, timeout=5)

    def stream(self, client, url):
        with client.get(url, stream=True, timeout=5) as response:
            return response.status_code, b"".join(response.iter_content(4096))

    def patch(self, monkeypatch, handle):
        def send(_self, request, *_args):
            return handle(request)

        monkeypatch.setattr(HTTPAdapter, "send", send)

    def response(self, status):
        response = requests.Response()
        response.status_code = status
        return response

    def open_response(self, closed):
        response = self.response(503)
        response.close = lambda: closed.append(1)
        return response


@pytest.fixture(params=[Httpx(), Requests()], ids=["httpx", "requests"])
def lib(request):
    return request.param


def retries(**options):
    options = {"max_retries": RETRIES, "initial_delay": 0, "max_delay": 60, **options}
    return RetryStrategy(jitter=False, **options)


def breaker(threshold=100):
    return CircuitBreaker("upstream", failure_threshold=threshold)


# --- what is repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "TRACE"])
def test_idempotent_methods_are_repeated_after_a_drop(lib, server, method):
    """A request that may be repeated is, when the server drops the connection: 1 + n in all."""
    server.does(DROP)
    with lib.client(retries()) as client, pytest.raises(lib.transport_errors) as caught:
        lib.send(client, method, server.url)
    assert not isinstance(caught.value, PolicyEndedError)
    assert server.count == 1 + RETRIES


@pytest.mark.parametrize("method", ["POST", "PATCH", "BREW"])
def test_others_are_not_repeated_after_bytes_were_sent(lib, server, method):
    """POST, PATCH and unknown methods are sent once; the breaker still counts the failure."""
    server.does(DROP)
    policy = Policy("p", [retries(), breaker()])
    with lib.client(policy) as client, pytest.raises(lib.transport_errors):
        lib.send(client, method, server.url, body=b"pay")
    assert server.count == 1
    assert policy.breaker.snapshot()["failures"] == 1


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_key_makes_a_post_repeatable(lib, server, method):
    """With an Idempotency-Key a POST is repeated, with the same body."""
    server.does(DROP, 503, 201)
    with lib.client(retries()) as client:
        response = lib.send(client, method, server.url, body=b"pay", headers=KEY)
    assert response.status_code == 201
    assert server.bodies == [b"pay"] * 3


def test_an_empty_key_is_none(lib, server):
    """An Idempotency-Key without a value allows nothing."""
    server.does(DROP)
    with lib.client(retries()) as client, pytest.raises(lib.transport_errors):
        lib.send(client, "POST", server.url, headers={"idempotency-key": ""})
    assert server.count == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_post_is_not_repeated_after_an_answer(lib, server, status):
    """An answer shows that bytes were sent: a POST without key is not sent again."""
    server.does(status)
    policy = Policy("p", [retries(), breaker()])
    with lib.client(policy) as client:
        assert lib.send(client, "POST", server.url, body=b"pay").status_code == status
    assert server.count == 1
    assert policy.breaker.snapshot()["failures"] == 1


def test_retry_on_cannot_allow_what_must_not_be(lib, server):
    """A retry that would repeat everything still sends a POST once; the caller sees the first."""
    server.does(DROP, 503)
    with lib.client(retries(retry_on=Exception)) as client:
        with pytest.raises(lib.transport_errors) as caught:
            lib.send(client, "POST", server.url)
        assert not isinstance(caught.value, PolicyEndedError)
        assert server.count == 1
        response = lib.send(client, "POST", server.url)
    assert (response.status_code, response.content) == (503, b"answer")
    assert server.count == 2


@pytest.mark.parametrize("body", [b"pay", iter([b"pay"])], ids=["bytes", "one-shot"])
def test_a_post_may_be_repeated_when_nothing_was_sent(lib, refusing, clock, body):
    """A refused connection is tried again, whatever the method and the body."""
    began = clock.now
    with (
        lib.client(retries(initial_delay=1)) as client,
        pytest.raises(lib.transport_errors) as caught,
    ):
        lib.send(client, "POST", refusing, body=body)
    assert clock.now - began == 1 + 2
    assert not isinstance(caught.value, PolicyEndedError)


def test_failures_to_connect_allow_a_post(lib, monkeypatch):
    """Each failure that comes before the first byte lets a POST be tried again."""
    calls = []

    def fail(_request):
        calls.append(1)
        raise lib.unsent[len(calls) % len(lib.unsent)]("x")

    lib.patch(monkeypatch, fail)
    with lib.client(retries(max_retries=5)) as client, pytest.raises(lib.transport_errors):
        lib.send(client, "POST", "http://x.test/")
    assert len(calls) == 1 + 5


def test_a_proxy_that_is_not_there_was_sent_nothing(refusing, clock):
    """requests: a proxy that refuses the connection is tried again for a POST too."""
    began = clock.now
    with (
        Requests().client(retries(initial_delay=1)) as client,
        pytest.raises(requests.ConnectionError),
    ):
        client.post("http://x.test/", proxies={"http": refusing}, timeout=5)
    assert clock.now - began == 1 + 2


@pytest.mark.parametrize("step", [DROP, 503])
def test_a_one_shot_body_is_not_repeated(lib, server, step):
    """What a generator has given cannot be sent again, whatever the method."""
    server.does(step)
    with lib.client(retries()) as client:
        if step == DROP:
            with pytest.raises(lib.transport_errors):
                lib.send(client, "PUT", server.url, body=iter([b"a", b"b"]))
        else:
            assert lib.send(client, "PUT", server.url, body=iter([b"a", b"b"])).status_code == 503
    assert server.bodies == [b"ab"]


def test_a_file_is_rewound(server):
    """requests: each attempt sends a file from where it stood first."""
    server.does(503, DROP, 200)
    file = io.BytesIO(b"skipped,sent")
    file.seek(8)
    with Requests().client(retries()) as client:
        assert client.put(server.url, data=file, timeout=5).status_code == 200
    assert server.bodies == [b"sent"] * 3


def test_a_file_that_cannot_be_rewound_is_not_repeated(server):
    """requests: a pipe is sent once, and so is a file that can be rewound no longer."""

    class Pipe(io.BytesIO):
        def tell(self):
            raise OSError("a pipe")

    class Passing(io.BytesIO):
        sent = False

        def read(self, *args):
            self.sent = True
            return super().read(*args)

        def seek(self, *args):
            if self.sent:
                raise OSError("gone")
            return super().seek(*args)

    server.does(503)
    with Requests().client(retries()) as client:
        for file in (Pipe(b"x"), Passing(b"x")):
            assert client.put(server.url, data=file, timeout=5).status_code == 503
    assert server.count == 2


def test_uploads_of_httpx_are_sent_once(server):
    """httpx does not say whether an upload can be read twice, so it is not."""
    server.does(503)
    with Httpx().client(retries()) as client:
        assert client.put(server.url, content=io.BytesIO(b"x")).status_code == 503
        assert client.put(server.url, files={"f": io.BytesIO(b"x")}).status_code == 503
    assert server.count == 2


# --- answers --------------------------------------------------------------------------------------


def test_the_real_answer_is_given_at_the_end(lib, server):
    """When the policy gives up, the caller gets the last answer, body and all, and no exception."""
    server.does(502, 503, (504, {"X-Last": "yes"}, b"the last one"))
    with lib.client(retries()) as client:
        response = lib.send(client, "GET", server.url)
    assert (response.status_code, response.content) == (504, b"the last one")
    assert response.headers["X-Last"] == "yes"
    assert server.count == 1 + RETRIES


@pytest.mark.parametrize("content", [b"small", BIG], ids=["small", "big"])
def test_a_streamed_answer_is_whole(lib, server, content):
    """A caller that streams the last answer gets all of it."""
    server.does((503, {}, content))
    with lib.client(retries()) as client:
        assert lib.stream(client, server.url) == (503, content)
    assert server.count == 1 + RETRIES


def test_an_answer_that_passes_is_repeated_until_it_is_good(lib, server):
    """503 and then 200 is 200."""
    server.does(503, 200)
    with lib.client(retries()) as client:
        assert lib.send(client, "GET", server.url).status_code == 200
    assert server.count == 2


@pytest.mark.parametrize(("status", "failures"), [(200, 0), (404, 0), (401, 0), (500, 1), (501, 1)])
def test_what_is_counted(lib, server, status, failures):
    """Other answers are not repeated; 5xx count as failures, 4xx show that the server answers."""
    server.does(status)
    policy = Policy("p", [retries(), breaker()])
    with lib.client(policy) as client:
        assert lib.send(client, "GET", server.url).status_code == status
    snapshot = policy.breaker.snapshot()
    assert (server.count, snapshot["failures"], snapshot["calls"]) == (1, failures, 1)


@pytest.mark.parametrize(
    ("value", "waited"),
    [("7", 7), ("0", 1), ("-7", 1), ("soon", 1), ("²", 1), ("date", 7)],
)
def test_retry_after_is_waited_for(lib, server, clock, value, waited):
    """Seconds and dates are waited for in full; what cannot be read is ignored."""
    if value == "date":  # it is compared with the answer's Date, which is the real one
        value = email.utils.formatdate(time.time() + 7, usegmt=True)
    headers = {"Retry-After": value.encode().decode("latin-1")}
    server.does((503, headers, b""), 200)
    began = clock.now
    with lib.client(retries(initial_delay=1)) as client:
        assert lib.send(client, "GET", server.url).status_code == 200
    assert clock.now - began == pytest.approx(waited, abs=1.01 if waited == 7 else 0)


def test_a_retry_after_that_is_too_long_ends_it(lib, server, clock):
    """The answer is given at once where its Retry-After is longer than a wait may be."""
    server.does((429, {"Retry-After": "3600"}, b""))
    began = clock.now
    with lib.client(retries()) as client:
        assert lib.send(client, "GET", server.url).status_code == 429
    assert (clock.now, server.count) == (began, 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_connection_of_a_repeated_answer_is_used_again(lib, server, streamed):
    """All attempts with small answers go over one connection."""
    server.does(503, 503, 200)
    with lib.client(retries()) as client:
        if streamed:
            lib.stream(client, server.url)
        else:
            lib.send(client, "GET", server.url)
    assert len(server.ports) == 3
    assert len(set(server.ports)) == 1


def test_a_long_answer_is_not_read(lib, server):
    """A long answer that will be repeated is closed with its connection."""
    server.does((503, {}, BIG), 200)
    with lib.client(retries()) as client:
        assert lib.send(client, "GET", server.url).status_code == 200
    assert len(set(server.ports)) == 2


def test_a_body_that_breaks_off_is_not_repeated(lib, server):
    """The policy guards until the headers have come."""
    server.does(CUT)
    with lib.client(retries()) as client, pytest.raises(lib.cut_errors):
        lib.send(client, "GET", server.url)
    assert server.count == 1


def test_an_answer_that_breaks_off_is_repeated(lib, server):
    """An answer that would be repeated is repeated too where its body breaks off."""
    server.does(CUT_503, 200)
    with lib.client(retries()) as client:
        assert lib.send(client, "GET", server.url).status_code == 200
    assert server.count == 2


def test_the_same_exception_is_raised(lib, monkeypatch):
    """When the policy gives up on an exception the caller gets that very object, unchanged."""
    for error in (httpx.ReadTimeout("x"), requests.ReadTimeout("x"), RuntimeError("x")):
        for method in ("GET", "POST"):

            def fail(_request, error=error):
                raise error

            lib.patch(monkeypatch, fail)
            policy = Policy("p", [retries(), breaker()])
            with lib.client(policy) as client, pytest.raises(type(error)) as caught:
                lib.send(client, method, "http://x.test/")
            assert caught.value is error
            assert error.__cause__ is None
            assert error.__context__ is None
            assert policy.breaker.snapshot()["failures"] >= 1


# --- what the policy ends -------------------------------------------------------------------------


def test_an_open_circuit_refuses(lib, server, clock):
    """After enough failures nothing reaches the server; the client's own handlers catch it."""
    server.does(503)
    policy = Policy("p", [retries(), breaker(2)])
    with lib.client(policy) as client:
        for _ in range(2):
            with pytest.raises(lib.transport_errors) as caught:
                lib.send(client, "GET", server.url)
    assert server.count == 2
    error = caught.value
    assert isinstance(error, lib.module.RequestRefusedError)
    assert isinstance(error.__cause__, CircuitOpenError)
    assert error.muset_error is error.__cause__
    assert error.request.method == "GET"


def test_a_full_bulkhead_refuses(lib, server):
    """A bulkhead without room raises in the client's family too."""
    server.does(200)
    bulkhead = Bulkhead(1)
    with (
        lib.client(bulkhead) as client,
        bulkhead,
        pytest.raises(lib.transport_errors) as caught,
    ):
        lib.send(client, "GET", server.url)
    assert isinstance(caught.value.__cause__, OverloadedError)
    assert server.count == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_time_out_of_the_policy_ends_an_attempt(lib, server, method):
    """A stalled server is left after the policy's Timeout, and a POST is not repeated then."""
    server.does(STALL)
    policy = Policy("p", [retries(), breaker(), Timeout(0.5)])
    began = time.monotonic()
    with lib.client(policy) as client, pytest.raises(lib.timeouts) as caught:
        lib.send(client, method, server.url)
    assert isinstance(caught.value, lib.module.RequestTimeoutError)
    assert isinstance(caught.value.__cause__, OperationTimeoutError)
    assert time.monotonic() - began < 4.5
    sent = 1 + RETRIES if method == "GET" else 1
    until(lambda: server.count >= sent)
    assert (server.count, policy.breaker.snapshot()["failures"]) == (sent, sent)


def test_a_deadline_bounds_the_attempt(lib, server):
    """No attempt outlasts the deadline; one that a caller chose says nothing of the server."""
    server.does(STALL)
    for counts in (True, False):
        policy = Policy("p", [retries(), breaker()])
        began = time.monotonic()
        with (
            lib.client(policy) as client,
            pytest.raises(lib.timeouts) as caught,
            deadline(0.5, counts=counts),
        ):
            lib.send(client, "GET", server.url)
        assert 0.4 < time.monotonic() - began < 4.5
        assert isinstance(caught.value.__cause__, OperationTimeoutError)
        assert policy.breaker.snapshot()["failures"] == counts
    until(lambda: server.count >= 2)
    assert server.count == 2


def test_nothing_is_sent_after_the_deadline(lib, server):
    """A deadline that has passed refuses the request before it is sent, and blames nobody."""
    server.does(200)
    policy = Policy("p", [retries(), breaker()])
    with lib.client(policy) as client, pytest.raises(lib.timeouts) as caught, deadline(0):
        lib.send(client, "GET", server.url)
    assert isinstance(caught.value.__cause__, OperationTimeoutError)
    assert (server.count, policy.breaker.snapshot()["calls"]) == (0, 0)


@pytest.mark.parametrize(
    ("timeout", "expected"),
    [
        (None, (None, None, 2)),
        (5, (5, 5, 2)),
        ((1, 9), (1, 9, 2)),
        (urllib3.Timeout(total=1), (urllib3.Timeout.DEFAULT_TIMEOUT,) * 2 + (1,)),
        (urllib3.Timeout(connect=1, read=3), (1, 3, 2)),
        (urllib3.Timeout(total=9, read=3), (urllib3.Timeout.DEFAULT_TIMEOUT, 3, 2)),
    ],
)
def test_every_form_of_time_out_is_bounded(clock, monkeypatch, timeout, expected):
    """requests: whatever a caller gives, connecting and waiting together end with the deadline."""
    seen = []

    def send(_self, _request, _stream, timeout, *_args):
        seen.append(timeout)
        return Requests().response(200)

    monkeypatch.setattr(HTTPAdapter, "send", send)
    with Requests().client(retries()) as client, deadline(2):
        client.get("http://x.test/", timeout=timeout)
    assert [(t._connect, t._read, t.total) for t in seen] == [expected]


def test_a_wrong_time_out_is_told_by_requests(server):
    """requests: its own text says what is wrong with a time-out, with a deadline or without."""
    with (
        Requests().client(retries()) as client,
        deadline(2),
        pytest.raises(ValueError, match="Invalid timeout"),
    ):
        client.get(server.url, timeout=(1, 2, 3))


def test_the_time_outs_of_httpx_are_bounded(clock):
    """httpx: each of the four is at most what is left, and the request's own are put back."""
    seen = []

    def handle(request):
        seen.append(request.extensions["timeout"])
        return httpx.Response(200)

    transport = PolicyTransport(retries(), httpx.MockTransport(handle))
    timeout = httpx.Timeout(5, connect=1, pool=None)
    with httpx.Client(transport=transport, timeout=timeout) as client, deadline(2):
        response = client.get("http://x.test/")
    assert seen == [{"connect": 1, "read": 2, "write": 2, "pool": 2}]
    assert response.request.extensions["timeout"] == timeout.as_dict()


@pytest.mark.parametrize("step", [DROP, 503])
def test_nested_retries_do_not_multiply(lib, server, step):
    """A retry around the caller's function decides alone: 1 + n requests."""
    server.does(step)

    @retry(strategy=retries(max_retries=3))
    def fetch(client):
        response = lib.send(client, "GET", server.url)
        response.raise_for_status()

    with (
        lib.client(retries(max_retries=3)) as client,
        pytest.raises((lib.transport_errors, lib.status_error)),
    ):
        fetch(client)
    assert server.count == 1 + 3


def test_a_fallback_gives_a_response(lib, server):
    """A Fallback's response is the caller's; it may be the answer that failed; nothing else is."""
    server.does(503)
    made = lib.response(203)
    for value, status in ((made, 203), (lambda error: error.response, 503)):
        with lib.client(Policy("p", [Fallback(value), retries()])) as client:
            assert lib.send(client, "GET", server.url).status_code == status
    with (
        lib.client(Fallback({"no": "response"})) as client,
        pytest.raises(TypeError, match="must give"),
    ):
        lib.send(client, "GET", server.url)


def test_what_a_fallback_raises_is_the_callers(lib, server):
    """An exception of the Fallback's own function is not dressed up."""

    def fall_back(_error):
        raise LookupError("nothing kept")

    server.does(503)
    with (
        lib.client(Policy("p", [Fallback(fall_back), retries()])) as client,
        pytest.raises(LookupError, match="nothing kept"),
    ):
        lib.send(client, "GET", server.url)


def test_a_refusal_from_further_in_stays_one(lib, monkeypatch):
    """A refusal that the wrapped transport raises is neither repeated nor counted."""
    calls = []

    def refuse(_request):
        calls.append(1)
        raise CircuitOpenError("open")

    lib.patch(monkeypatch, refuse)
    policy = Policy("p", [retries(), breaker()])
    with lib.client(policy) as client, pytest.raises(CircuitOpenError):
        lib.send(client, "POST", "http://x.test/")
    assert (len(calls), policy.breaker.snapshot()["calls"]) == (1, 0)


def test_a_foreign_exception_closes_the_answer(lib, server):
    """What passes through from outside passes untouched."""

    class Foreign(BaseException):
        pass

    def sleep(_seconds):
        raise Foreign

    server.does(503)
    with virtual_clock():
        SYSTEM.sleep = sleep
        with lib.client(retries(initial_delay=1)) as client, pytest.raises(Foreign):
            lib.stream(client, server.url)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("last", [0, 1], ids=["original", "refused"])
def test_errors_leave_no_circles(lib, server, method, last):
    """An exception that a caller has dealt with is freed at once, not by the collector."""
    server.does(DROP)

    def failure(client):
        try:
            lib.send(client, method, server.url)
        except lib.transport_errors as error:
            return type(error), weakref.ref(error)

    with lib.client(breaker(1) if last else retries()) as client:
        gc.collect()
        gc.disable()
        try:
            cls, kept = [failure(client) for _ in range(1 + last)][last]
            assert issubclass(cls, PolicyEndedError) == bool(last)
            assert kept() is None
        finally:
            gc.enable()


def test_answers_that_nobody_gets_are_closed(lib, monkeypatch):
    """Those of earlier attempts, and the last one where a Fallback gives another."""
    closed = []
    lib.patch(monkeypatch, lambda _request: lib.open_response(closed))
    with lib.client(Policy("p", [Fallback(lib.response(203)), retries()])) as client:
        assert lib.send(client, "GET", "http://x.test/").status_code == 203
    assert len(closed) == 1 + RETRIES


def test_the_connection_is_free_while_a_retry_waits(lib, server, clock):
    """What is asked for between two attempts goes over the same connection."""
    server.does(503, 200)

    with lib.client(retries(initial_delay=1)) as client:
        SYSTEM.sleep = lambda _seconds: lib.send(client, "GET", server.url)
        assert lib.send(client, "GET", server.url).status_code == 200
    assert len(server.ports) == 3
    assert len(set(server.ports)) == 1


def test_greenlets_are_cut_off(server):
    """Under gevent the policy's Timeout cuts a stalled request off; a foreign one passes."""
    server.does(STALL)
    code = """
        import sys, httpx, requests
        from flask_muset.resilience import Timeout
        from flask_muset.resilience.httpx_transport import PolicyTransport
        from flask_muset.resilience.requests_adapter import PolicyAdapter

        def seen(get, seconds):
            foreign = gevent.Timeout(seconds)
            with foreign:
                try:
                    get(sys.argv[1])
                except BaseException as error:
                    if error is foreign:
                        return "foreign"
                    return [type(error).__name__, type(error.__cause__).__name__]

        result = []
        with (
            httpx.Client(transport=PolicyTransport(Timeout(0.2))) as client,
            requests.Session() as session,
        ):
            session.mount("http://", PolicyAdapter(Timeout(0.2)))
            for get in (client.get, session.get):
                result += [seen(get, 4), seen(get, 0.05)]
        """
    ended = ["RequestTimeoutError", "OperationTimeoutError"]
    assert run_patched(code, server.url) == [ended, "foreign"] * 2


# --- making them ----------------------------------------------------------------------------------


def test_arguments_are_checked(lib):
    """What is no policy is refused when the transport is made."""
    with pytest.raises(ValueError, match="must be a Policy or one of its parts"):
        lib.guarded("openai")


def test_max_retries_is_the_policys():
    """requests' own retries are off and cannot be switched on."""
    assert PolicyAdapter(retries(), pool_maxsize=3).max_retries.total == 0
    with pytest.raises(ValueError, match="give it to a RetryStrategy"):
        PolicyAdapter(retries(), max_retries=3)


def test_the_package_imports_no_client():
    """flask_muset.resilience alone imports neither library."""
    code = (
        "import sys, flask_muset.resilience, flask_muset.resilience.http_calls;"
        "print([m for m in ('httpx', 'requests', 'urllib3') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_wrapped_transport_is_opened_and_closed():
    """Entering and leaving the client reach the wrapped transport."""
    seen = []

    class Wrapped(httpx.BaseTransport):
        def __enter__(self):
            seen.append("entered")
            return self

        def close(self):
            seen.append("closed")

    with httpx.Client(transport=PolicyTransport(retries(), Wrapped())):
        pass
    httpx.Client(transport=PolicyTransport(retries(), Wrapped())).close()
    assert seen == ["entered", "closed", "closed"]


# --- asyncio --------------------------------------------------------------------------------------


def request_async(policy, method, url, **options):
    """One request of an AsyncClient: its answer's status and body, or its exception."""

    async def main():
        async with httpx.AsyncClient(transport=AsyncPolicyTransport(policy)) as client:
            response = await client.request(method, url, **options)
            return response.status_code, response.content

    return asyncio.run(main())


def test_async_answers_are_repeated(server):
    """The last answer is given; all attempts go over one connection."""
    server.does(503, 502, (504, {}, b"last"))
    assert request_async(retries(), "GET", server.url) == (504, b"last")
    assert server.count == 1 + RETRIES
    assert len(set(server.ports)) == 1


def test_async_long_answers_are_closed(server):
    """A long answer is not read before it is repeated."""
    server.does((503, {}, BIG), 200)
    assert request_async(retries(), "GET", server.url) == (200, b"answer")
    assert len(set(server.ports)) == 2


@pytest.mark.parametrize(
    ("method", "headers", "sent"), [("GET", {}, 3), ("POST", {}, 1), ("POST", KEY, 3)]
)
def test_async_drops(server, method, headers, sent):
    """A POST is not repeated after bytes were sent, but with a key it is."""
    server.does(DROP)
    policy = Policy("p", [retries(), breaker()])
    with pytest.raises(httpx.RemoteProtocolError):
        request_async(policy, method, server.url, headers=headers)
    assert (server.count, policy.breaker.snapshot()["failures"]) == (sent, sent)


def test_async_one_shot_bodies(server):
    """An asynchronous generator is sent once."""

    async def body():
        yield b"ab"

    server.does(503)
    assert request_async(retries(), "PUT", server.url, content=body())[0] == 503
    assert server.bodies == [b"ab"]


def test_async_refusals(server):
    """An open circuit refuses in httpx's family without touching the server."""
    server.does(503)
    policy = Policy("p", [retries(), breaker(1)])
    with pytest.raises(httpx.TransportError) as caught:
        request_async(policy, "GET", server.url)
    assert isinstance(caught.value.__cause__, CircuitOpenError)
    assert server.count == 1


def test_async_time_is_bounded(server):
    """The policy's Timeout and a deadline end a stalled attempt, and nothing is sent too late."""
    server.does(STALL)
    for policy, seconds in ((Timeout(0.5), 9), (retries(), 0.5), (retries(), 0)):
        began = time.monotonic()
        with pytest.raises(httpx_transport.RequestTimeoutError) as caught, deadline(seconds):
            request_async(policy, "GET", server.url)
        assert isinstance(caught.value.__cause__, OperationTimeoutError)
        assert time.monotonic() - began < 4.5
    until(lambda: server.count >= 2)
    assert server.count == 2


def test_async_nested_retries(server):
    """A retry around the caller's function decides alone."""
    server.does(503)

    async def main():
        async with httpx.AsyncClient(transport=AsyncPolicyTransport(retries())) as client:

            @retry(strategy=retries())
            async def fetch():
                (await client.get(server.url)).raise_for_status()

            await fetch()

    with pytest.raises(httpx.HTTPStatusError):
        asyncio.run(main())
    assert server.count == 1 + RETRIES


def test_async_answers_that_nobody_gets_are_closed():
    """Those of earlier attempts, and the last one where a Fallback gives another."""
    closed = []

    class Wrapped(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            return httpx.Response(503, stream=Recorded(closed))

    async def main():
        policy = Policy("p", [Fallback(httpx.Response(203)), retries()])
        transport = AsyncPolicyTransport(policy, Wrapped())
        async with httpx.AsyncClient(transport=transport) as client:
            return (await client.get("http://x.test/")).status_code

    assert asyncio.run(main()) == 203
    assert len(closed) == 1 + RETRIES


def test_async_fallback(server):
    """What an awaited Fallback gives is the answer."""
    server.does(DROP)

    async def made(_error):
        return httpx.Response(203, content=b"kept")

    policy = Policy("p", [Fallback(made), retries()])
    assert request_async(policy, "GET", server.url) == (203, b"kept")


_CUT = """
import http.server, sys, threading
from gevent import socket
from flask_muset.resilience import Policy, RetryStrategy, Timeout
seen = []
def serve(listener):
    while True:
        connection, _ = listener.accept()
        gevent.spawn(read, connection)
def read(connection):
    data = connection.recv(65536)
    seen.append(data.split(b" ")[0].decode())
    while connection.recv(65536): pass
listener = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
gevent.spawn(serve, listener)
policy = Policy("x", [RetryStrategy(2, 0.0), Timeout(0.2)])
kinds = []
if sys.argv[1] == "httpx":
    import httpx
    from flask_muset.resilience.httpx_transport import PolicyTransport
    client = httpx.Client(transport=PolicyTransport(policy))
else:
    import requests
    from flask_muset.resilience.requests_adapter import PolicyAdapter
    client = requests.Session()
    client.mount("http://", PolicyAdapter(policy))
for method, headers in (("POST", {}), ("POST", {"Idempotency-Key": "k"}), ("GET", {})):
    try:
        client.request(method, url, headers=headers)
    except Exception as error:
        kinds.append([type(error).__name__, type(error.__cause__).__name__])
    seen.append("|")
result = ["".join(word[0] for word in seen), kinds]
"""


@pytest.mark.parametrize("library", ["httpx", "requests"])
def test_a_time_out_of_ours_does_not_send_a_post_again(library):
    """A POST that our own time-out cuts off was sent once; GET and one with a key are repeated."""
    from patched import run_patched

    seen, kinds = run_patched(_CUT, library)
    assert seen == "P|PPP|GGG|"
    assert kinds == [["RequestTimeoutError", "OperationTimeoutError"]] * 3


def test_a_time_out_of_ours_does_not_send_a_post_again_under_asyncio():
    """The same where asyncio cuts the task off."""
    from flask_muset.resilience import Policy, RetryStrategy, Timeout

    async def main():
        seen = []

        served = []

        async def silent(reader, writer):
            served.append(asyncio.current_task())
            seen.append((await reader.read(65536)).split(b" ")[0])
            await reader.read()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        policy = Policy("x", [RetryStrategy(2, 0.0), Timeout(0.2)])
        async with httpx.AsyncClient(transport=AsyncPolicyTransport(policy)) as client:
            for method in ("POST", "GET"):
                with pytest.raises(httpx.TimeoutException):
                    await client.request(method, url)
        await asyncio.gather(*served)
        server.close()
        await server.wait_closed()
        return seen

    assert asyncio.run(main()) == [b"POST", b"GET", b"GET", b"GET"]
