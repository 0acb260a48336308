"""The shipped nginx configuration, in front of a real service."""

import json
import socket
import subprocess
import time

import pytest
import requests
from nginx_server import Nginx
from waiting import until

from muset.testing.upstream import Upstream


def exchange(nginx, data):
    """Send bytes on a connection of their own; gives the head and the body of what comes."""
    with socket.create_connection(("127.0.0.1", nginx.port), timeout=10) as sock:
        sock.sendall(data)
        found = b""
        while piece := sock.recv(65536):
            found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    return head.decode(), body


def test_the_configuration_is_valid(tmp_path):
    """`nginx -t` takes the shipped files."""
    nginx = Nginx(tmp_path, ["127.0.0.1:8000"])
    found = subprocess.run(nginx.command("-t"), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "warn" not in found.stderr


@pytest.mark.parametrize(
    ("sent", "status", "category"),
    [
        (b"GARBAGE\r\n\r\n", 400, "validation"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "validation"),
        (b"GET / HTTP/9.1\r\nHost: x\r\n\r\n", 400, "validation"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "validation"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431, "validation"),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, "validation"),
        (
            (
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            400,
            "validation",
        ),
        (
            b"GET /a\"'\\$x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            502,
            "external_service",
        ),
    ],
)
def test_its_own_errors(make_nginx, sent, status, category):
    """They have the form of the service's, whatever was sent."""
    head, body = exchange(make_nginx("127.0.0.1:1"), sent)
    assert f" {status} " in head.splitlines()[0]
    assert "Content-Type: application/problem+json" in head
    found = json.loads(body)
    assert (found["status"], found["category"]) == (status, category)
    assert f"X-Request-ID: {found['request_id']}" in head
    assert ("Retry-After: 1" in head) == (found.get("retry_after") == 1) == found["retryable"]


def test_a_large_body_is_refused_before_it_is_read(make_nginx):
    """Its length alone is enough."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nConnection: close\r\n\r\n"
    port = make_nginx("127.0.0.1:1").port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_in_front_of_the_service(make_service, make_nginx):
    """Ids, addresses and errors pass; a stream goes on as it comes."""
    with Upstream(
        seed=1, models=["m"], first_token="0.1", tokens_per_second=4, tokens=12
    ) as upstream:
        service = make_service(AI_BASE_URL=upstream.base_url, AI_MODEL="m")
        service.start()
        nginx = make_nginx(service.address)
        url = f"{nginx.url}/api/v1"
        document = {"title": "Bees", "text": "A bee colony has one queen. The queen lays eggs."}
        ids = {"X-Request-ID": "chosen-by-the-client"}
        made = requests.post(
            f"{url}/documents", json=document, headers=service.headers | ids, timeout=30
        )
        assert (made.status_code, made.headers["X-Request-ID"]) == (201, "chosen-by-the-client")
        refused = requests.get(f"{url}/documents/1", timeout=30)
        assert (refused.status_code, refused.json()["category"]) == (401, "authentication")
        # As a client of another machine: nginx is on this one.
        assert requests.get(f"{nginx.url}/metrics", timeout=30).status_code == 403
        with requests.post(
            f"{url}/ask",
            json={"question": "What does the queen lay?"},
            headers=service.headers | {"Accept": "text/event-stream"},
            stream=True,
            timeout=30,
        ) as answer:
            pieces = [(time.monotonic(), piece) for piece in answer.iter_content(None)]
        assert b"event: done" in b"".join(piece for _, piece in pieces)
        assert len(pieces) > 3
        assert pieces[-1][0] - pieces[0][0] > 0.5
        until(lambda: len(nginx.access_log()) == 4)
        nginx.stop()  # else the service waits for the connections that it keeps
        assert service.stop() == 0
    lines = [json.loads(line) for line in nginx.access_log()]
    assert lines[0]["request_id"] == "chosen-by-the-client"
    assert [line["status"] for line in lines] == [201, 401, 403, 200]
