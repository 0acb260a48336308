"""A model server that does what it is told, for tests, load runs and demonstrations.

It speaks OpenAI's protocol: `python -m muset.testing.upstream --port 8100`. Tests start one as a
process of its own: `with Upstream(seed=1) as upstream:`.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from http.client import HTTPConnection
from typing import Any, Self
from urllib.parse import urlsplit

from muset.testing.record import Seen
from muset.testing.script import KINDS, MODES, Fault, Options

__all__ = ["Fault", "Seen", "Upstream", "main"]

_CONTROL_TIMEOUT_S = 30.0


class Upstream:
    """A scripted model server in a process of its own; it ends with this one.

    Args:
        port: Where it listens, on 127.0.0.1; 0 takes a free port.
        options: The fields of `muset.testing.script.Options`: `seed`, `models`, `latency`,
            `first_token`, `tokens_per_second`, `tokens`, `mode`, `api_key`, `faults`.

    Attributes:
        base_url: For clients, such as `http://127.0.0.1:8100/v1`.

    Raises:
        ValueError: An option is not allowed.
        RuntimeError: The server did not start; what it said is on standard error.
    """

    def __init__(self, *, port: int = 0, **options: Any) -> None:
        options["faults"] = tuple(map(_fault, options.get("faults", ())))
        line = Options(**options).dumps()
        command = [sys.executable, "-m", __name__, "--port", str(port), "--piped"]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self.base_url = self._process.stdout.readline().strip()
        if not self.base_url:
            self.close()
            raise RuntimeError(f"the model server on port {port} did not start.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.communicate(timeout=_CONTROL_TIMEOUT_S)

    def script(self, faults: Iterable[Fault | str]) -> None:
        """Replace the list of faults; a kind by its name alone is meant for one request."""
        entries = [asdict(_fault(fault)) for fault in faults]
        self._control("POST", "script", {"faults": entries})

    def reset(self) -> None:
        """Forget the script and what was seen."""
        self._control("POST", "reset", {})

    @property
    def requests(self) -> list[Seen]:
        """The completions that were asked for, the newest last; those that still run too."""
        return [Seen(**seen) for seen in self._control("GET", "requests")["requests"]]

    @property
    def state(self) -> dict[str, Any]:
        """`active` requests, open `connections`, and the number of requests by `outcomes`."""
        return self._control("GET", "state")

    def settled(self, timeout: float = 10.0) -> list[Seen]:
        """Wait until no request runs any more.

        Raises:
            TimeoutError: After so many seconds one still does.
        """
        end = time.monotonic() + timeout
        while self.state["active"]:
            if time.monotonic() > end:
                raise TimeoutError(f"a request still runs after {timeout:g} s")
            time.sleep(0.01)
        return self.requests

    def _control(self, method: str, what: str, body: Any = None) -> dict[str, Any]:
        address = urlsplit(self.base_url).netloc
        connection = HTTPConnection(address, timeout=_CONTROL_TIMEOUT_S)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, f"/_control/{what}", payload)
            answer = connection.getresponse()
            value: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(value["error"]["message"])
        return value


def _fault(fault: Fault | str) -> Fault:
    return Fault(fault) if isinstance(fault, str) else fault


# --- the process ----------------------------------------------------------------------------------


def _options(given: argparse.Namespace) -> Options:
    return Options(
        seed=given.seed,
        models=tuple(given.model or Options().models),
        latency=given.latency,
        first_token=given.first_token,
        tokens_per_second=given.tokens_per_second,
        tokens=given.tokens,
        mode=given.mode,
        api_key=given.api_key,
        faults=tuple(map(Fault.parse, given.fault)),
    )


def _parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"  {kind:<18}{meaning}" for kind, meaning in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m muset.testing.upstream",
        description="An OpenAI-compatible model server that does what it is told.",
        epilog=f"faults:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    delay = "seconds, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    add("--host", default="127.0.0.1", help="address (127.0.0.1)")
    add("--port", type=int, default=8100, help="0 takes a free one (8100)")
    add("--seed", type=int, default=0, help="of all that is drawn (0)")
    add("--model", action="append", metavar="NAME", help="a model that it has; may be repeated")
    add("--latency", default="0", metavar="DELAY", help=f"until the head of an answer: {delay}")
    add("--first-token", default="0", metavar="DELAY", help="from there to the first token")
    add("--tokens-per-second", type=float, default=0.0, metavar="N", help="0 for all at once")
    add("--tokens", type=int, metavar="N", help="length of every answer")
    add("--mode", choices=MODES, default="quote", help="how answers are made (quote)")
    add("--api-key", metavar="KEY", help="the only key that is taken; others see it in `ps`")
    add(
        "--fault",
        action="append",
        default=[],
        metavar="KIND[,times=N][,rate=R][,model=M][,after=N][,delay=S][,retry_after=S]",
        help="times=0 is for ever; may be repeated, the first that fits counts",
    )
    add("--piped", action="store_true", help=argparse.SUPPRESS)
    return parser


def _allow_many_connections() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then end with 0."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        options = Options.loads(sys.stdin.readline()) if given.piped else _options(given)
    except ValueError as error:
        parser.error(str(error))
    # Only here: who starts a server as a process needs no gevent.
    import gevent
    from gevent.event import Event
    from gevent.socket import wait_read

    from muset.testing.server import make_server

    _allow_many_connections()
    server = make_server(options, given.host, given.port)
    try:
        server.start()
    except OSError as error:
        parser.exit(1, f"cannot listen on {given.host}:{given.port}: {error.strerror}\n")
    print(f"http://{given.host}:{server.server_port}/v1", flush=True)
    done = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, done.set)
    if given.piped:
        # Nothing more comes: it can be read when the other end is closed.
        gevent.spawn(wait_read, sys.stdin.fileno()).rawlink(lambda _: done.set())
    done.wait()
    server.stop()


if __name__ == "__main__":
    main()
