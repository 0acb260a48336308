"""A stand-in for the service that is as slow, or counts as badly, as a test wants it to."""

import json
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from muset.objectives import OBJECTIVES, Kind

_USER = re.compile(r"/api/v1/users/\d+")
_EVENTS = (
    'event: meta\ndata: {"model": "m"}\n\n'
    'event: delta\ndata: {"text": "1,500."}\n\n'
    'event: usage\ndata: {"input_tokens": 3, "output_tokens": 2}\n\n'
    'event: done\ndata: {"status": "answered"}\n\n'
)


def healthy_metrics(count):
    """The metrics of a service in which every objective holds, by so many operations of each."""
    lines = []
    for one in OBJECTIVES:
        labels = ",".join(f'{name}="{value.replace("*", "x")}"' for name, value in one.only)
        if one.kind is Kind.LATENCY:
            lines += [
                f'{one.metric}_bucket{{{labels},le="{le}"}} {count}' for le in (one.limit, "inf")
            ]
            lines += [
                f"{one.metric}_count{{{labels}}} {count}",
                f"{one.metric}_sum{{{labels}}} 0.1",
            ]
        elif one.kind is Kind.HIT_RATE:
            lines.append(f'{one.metric}{{{labels},status="hit"}} {count}')
    return "".join(f"{line}\n".replace("{,", "{") for line in lines)


class ScriptedService:
    """Answers what a load run asks, in threads of this process.

    Args:
        delay_s: Before a user is answered.
        hangs: Whether the tenth read of a user is never answered.
    """

    def __init__(self, *, delay_s=0.0, hangs=False):
        self.delay_s, self.hangs = delay_s, hangs
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.changed = threading.Condition(self.lock)
        self.statuses, self.questions, self.reads, self.users = Counter(), 0, 0, []
        service = self

        class Handler(_Handler):
            owner = service

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self):
        self.closed.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def count(self, path, status):
        with self.lock:
            if path.startswith("/api/"):
                self.statuses[status] += 1

    def ask(self):
        with self.lock:
            self.questions += 1

    def wait_for_reads(self, count):
        """Until users have been read so often."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.reads >= count, 60)

    def read(self):
        """Take the time of a read; whether it is answered."""
        with self.changed:
            self.reads += 1
            self.changed.notify_all()
            is_tenth = self.reads == 10
        if self.hangs and is_tenth:
            self.closed.wait()
            return False
        time.sleep(self.delay_s)
        return True

    def metrics(self):
        with self.lock:
            lines = [
                f'muset_http_requests_total{{endpoint="/api/v1/x",method="GET",status_code="{s}"}} '
                f"{n}\n"
                for s, n in self.statuses.items()
            ]
            seen = self.statuses.total()
        return healthy_metrics(seen) + "".join(lines)


class _Server(ThreadingHTTPServer):
    # Of a hundred users who come at once the kernel would let most try again after a second.
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Users leave when a run ends."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: ScriptedService

    def log_message(self, *_):
        pass

    def _send(self, body, status=200, kind="application/json", **headers):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.owner.count(self.path, status)
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._send(self.owner.metrics(), kind="text/plain")
        elif path == "/api/v1/usage":
            rows = self.owner.questions
            items = [{"requests": rows, "input_tokens": 3 * rows, "output_tokens": 2 * rows}]
            self._send({"items": items})
        elif path == "/api/v1/users":
            items = [{"id": n + 1, "email": email} for n, email in enumerate(self.owner.users)]
            self._send({"items": items, "next_cursor": None})
        elif _USER.fullmatch(path) and not self.owner.read():
            self.close_connection = True
        else:
            self._send({"email": "somebody"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/api/v1/ask":
            if "email" in body:
                self.owner.users.append(body["email"])
            self._send({"id": 1}, 201)
            return
        self.owner.ask()
        if self.headers["Accept"] == "text/event-stream":
            self._send(_EVENTS, kind="text/event-stream")
        else:
            self._send({"usage": {"input_tokens": 3, "output_tokens": 2}, "cached": False})
