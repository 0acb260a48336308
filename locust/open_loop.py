"""Requests at a constant rate over kept connections, each timed from when it was due.

Whoever waits for an answer before asking again asks a slow server less often, and so never sees how
slow it is. Here the next request is due whatever has become of the last one, and if all connections
are busy the wait for one counts. One process without a framework, so that it takes little of the
machine that it shares with what it measures:

    python locust/open_loop.py < plan.json > result.json
"""

import json
import random
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Plan", "Result", "percentile", "run"]

#: Seconds after the last request was due that answers are waited for.
_PATIENCE_S = 10.0
_LEAD_S = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send.

    Attributes:
        host: Of the server.
        port: Of the server.
        requests: Whole HTTP/1.1 requests, head and body.
        weights: How often each of them is drawn, in relation to the others.
        rate: Requests a second.
        count: Requests in all.
        connections: Kept connections, which is also how many requests wait at once at most.
        marker: Stands in each good answer.
        seed: Of what is drawn.
    """

    host: str
    port: int
    requests: Sequence[str]
    weights: Sequence[float]
    rate: float
    count: int
    connections: int
    marker: str
    seed: int = 1


@dataclass(slots=True)
class Result:
    """What has come of it; times are in seconds.

    Attributes:
        statuses: Answers by status; `lost` for those that never came or were not whole, `unsent`
            for requests that no connection was free for to the end.
        unmarked: Answers with 200 that lack the marker.
        rate: Answers a second, from the first request's time to the last answer.
        p50: Of the times from when a request was due to the end of its answer.
        p95: Likewise.
        p99: Likewise.
        longest: Likewise.
        lag_p95: How late this process sent what a connection was free for.
        waited: Requests that no connection was free for when they were due.
        cpu: Share of one core that this process used.
    """

    statuses: dict[str, int] = field(default_factory=dict)
    unmarked: int = 0
    rate: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    longest: float = 0.0
    lag_p95: float = 0.0
    waited: int = 0
    cpu: float = 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0


class _Connection:
    """One kept connection; it carries one request at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.due = 0.0
        self.is_busy = False
        self._data = b""

    def send(self, request: bytes, due: float) -> None:
        """Send a request; it fits into the buffer of the socket, which is empty."""
        self.due, self.is_busy = due, True
        if self.sock.send(request) != len(request):
            raise ValueError("a request is larger than the buffer of a socket; make it smaller.")

    def read(self) -> bytes | None:
        """The whole answer once it is there; empty if the connection has ended."""
        piece = self.sock.recv(262_144)
        self._data += piece
        if piece and not _is_whole(self._data):
            return None
        data, self._data = self._data, b""
        return data


def _is_whole(data: bytes) -> bool:
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    at = data.find(b"Content-Length: ", 0, end)
    if at < 0:
        return data.endswith(b"\r\n0\r\n\r\n")
    return len(data) >= end + 4 + int(data[at + 16 : data.index(b"\r", at)])


class _Run:
    """The state of one run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._address = (plan.host, plan.port)
        requests = [request.encode() for request in plan.requests]
        rng = random.Random(plan.seed)  # noqa: S311 - repeatable, not secret
        self._order = rng.choices(requests, plan.weights, k=plan.count)
        self._marker = plan.marker.encode()
        self._poll = select.epoll()
        self._all: dict[int, _Connection] = {}
        self._idle: deque[_Connection] = deque()
        for _ in range(plan.connections):
            self._connect()
        self._next = self._over = self._unmarked = self._waited = 0
        self._starved = 0.0
        self._statuses: Counter[str] = Counter()
        self._times: list[float] = []
        self._lags: list[float] = []

    def _connect(self) -> None:
        made = _Connection(self._address)
        self._all[made.sock.fileno()] = made
        self._poll.register(made.sock.fileno(), select.EPOLLIN)
        self._idle.append(made)

    def _send_due(self, began: float) -> float:
        """Send all that is due, as far as connections are free; seconds until there is more."""
        gap = 1 / self._plan.rate
        while self._next < self._plan.count:
            now, due = time.monotonic(), began + self._next * gap
            if due > now:
                return due - now
            if not self._idle:
                self._starved = now
                return 1.0
            connection = self._idle.popleft()
            try:
                connection.send(self._order[self._next], due)
            except ConnectionError:
                # The server has closed it since the last answer.
                self._replace(connection)
                continue
            if due <= self._starved:
                self._waited += 1
            else:
                self._lags.append(now - due)
            self._next += 1
        return 1.0

    def _take(self, connection: _Connection, data: bytes, now: float) -> None:
        status = data[9:12].decode("ascii", "replace") if _is_whole(data) else "lost"
        self._statuses[status] += 1
        self._unmarked += status == "200" and self._marker not in data
        self._times.append(now - connection.due)
        self._over += 1
        connection.is_busy = False

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.read()
        except ConnectionError:
            data = b""
        if data is None:
            return
        if connection.is_busy:
            self._take(connection, data, time.monotonic())
        if _is_whole(data):
            self._idle.append(connection)
            return
        # The server has closed it, in the middle of an answer or between two.
        self._idle = deque(one for one in self._idle if one is not connection)
        self._replace(connection)

    def _replace(self, connection: _Connection) -> None:
        del self._all[connection.sock.fileno()]
        connection.sock.close()
        self._connect()

    def run(self) -> Result:
        """Send, read, and say what came of it."""
        plan = self._plan
        cpu, began = time.process_time(), time.monotonic() + _LEAD_S
        until = began + plan.count / plan.rate + _PATIENCE_S
        while self._over < plan.count and time.monotonic() < until:
            wait_s = self._send_due(began)
            for fd, _ in self._poll.poll(wait_s):
                self._read(self._all[fd])
        ended = time.monotonic()
        for connection in self._all.values():
            connection.sock.close()
        self._poll.close()
        self._statuses["lost"] += self._next - self._over
        self._statuses["unsent"] += plan.count - self._next
        return Result(
            statuses=dict(+self._statuses),
            unmarked=self._unmarked,
            rate=self._over / (ended - began),
            p50=percentile(self._times, 0.5),
            p95=percentile(self._times, 0.95),
            p99=percentile(self._times, 0.99),
            longest=max(self._times, default=0.0),
            lag_p95=percentile(self._lags, 0.95),
            waited=self._waited,
            cpu=(time.process_time() - cpu) / (ended - began),
        )


def run(plan: Plan) -> Result:
    """Carry a plan out, in this process.

    Raises:
        OSError: The server takes no connections.
    """
    return _Run(plan).run()


def main() -> None:
    """Read a plan, print what came of it."""
    given: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps(asdict(run(Plan(**given)))))


if __name__ == "__main__":
    main()
