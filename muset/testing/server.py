"""The routes of the scripted model server: OpenAI's, and a control channel for tests."""

from collections.abc import Callable
from dataclasses import asdict
from ipaddress import ip_address
from time import monotonic
from typing import Any, cast
from urllib.parse import urlsplit

from gevent.server import StreamServer

from muset.testing.completion import Completion
from muset.testing.model import ChatRequest
from muset.testing.record import Record
from muset.testing.script import Fault, Options, Script
from muset.testing.wire import ERRORS, EndedError, Wire

__all__ = ["make_server"]


class Service:
    """What all connections share.

    Attributes:
        connections: Those that have asked for something of OpenAI's and are open.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.script = Script(options.seed, options.faults)
        self.record = Record()
        self.connections: set[object] = set()

    def state(self) -> dict[str, Any]:
        """Numbers of now."""
        return {
            "active": self.record.active,
            "connections": len(self.connections),
            "outcomes": dict(self.record.outcomes),
        }


class Handler(Wire):
    """Routes the requests of one connection."""

    def setup(self) -> None:
        """Begin; the server that socketserver speaks of is ours."""
        self._service = cast(Service, self.server)
        super().setup()

    def finish(self) -> None:
        """End."""
        self._service.connections.discard(self)
        super().finish()

    def do_GET(self) -> None:  # noqa: N802 - http.server looks for this name
        """Route."""
        path = urlsplit(self.path).path
        if path.startswith("/_control/"):
            self._control(path.removeprefix("/_control/"), None)
        elif self._is_admitted():
            self._get(path)

    def do_POST(self) -> None:  # noqa: N802
        """Route."""
        path = urlsplit(self.path).path
        body = self.read_json()
        if body is None:
            return
        if path.startswith("/_control/"):
            self._control(path.removeprefix("/_control/"), body)
        elif self._is_admitted():
            self._chat(body) if path == "/v1/chat/completions" else self._unknown(path)

    def _unknown(self, path: str) -> None:
        self.error(404, "invalid_request_error", "unknown_url", f"There is no {path} here.")

    def _is_admitted(self) -> bool:
        """Whether the key holds; if not, that is answered."""
        self._service.connections.add(self)
        key = self._service.options.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.error(*ERRORS["unauthorized"])
        return False

    def _get(self, path: str) -> None:
        names = self._service.options.models
        name = path.removeprefix("/v1/models/")
        if path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [_model(name) for name in names]})
        elif name == path:
            self._unknown(path)
        elif name in names:
            self.send_json(200, _model(name))
        else:
            self._no_model(name)

    def _no_model(self, name: str) -> None:
        text = f"The model {name!r} does not exist."
        self.error(404, "invalid_request_error", "model_not_found", text)

    def _chat(self, body: Any) -> None:
        try:
            request = ChatRequest.parse(body)
        except ValueError as error:
            self.error(400, "invalid_request_error", None, f"{error}.")
            return
        if request.model in self._service.options.models:
            self._complete(request)
        else:
            self._no_model(request.model)

    def _complete(self, request: ChatRequest) -> None:
        options, record = self._service.options, self._service.record
        fault = self._service.script.next(request.model)
        seen = record.add(request, fault.kind, options.seed, dict(self.headers.items()))
        began = monotonic()
        record.active += 1
        try:
            Completion(self, options, request, fault, seen).run()
        except OSError:
            # Whatever the socket says, nobody is there any more.
            seen.client_left = self.close_connection = True
        except EndedError:
            self.close_connection = True
        finally:
            record.active -= 1
            seen.duration_s = monotonic() - began

    # --- the control channel ----------------------------------------------------------------------

    def _control(self, what: str, given: Any) -> None:
        if not ip_address(self.client_address[0]).is_loopback:
            self.error(403, "invalid_request_error", None, "Only for this machine.")
            return
        known: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
            ("GET", "state"): self._service.state,
            ("GET", "requests"): lambda: {"requests": list(map(asdict, self._service.record.seen))},
            ("POST", "script"): lambda: self._load(given),
            ("POST", "reset"): self._reset,
        }
        action = known.get((self.command, what))
        if action is None:
            self._unknown(what)
            return
        try:
            self.send_json(200, action())
        except (ValueError, TypeError, KeyError) as error:
            self.error(400, "invalid_request_error", None, f"This cannot be read: {error}")

    def _load(self, given: Any) -> dict[str, Any]:
        self._service.script.load([Fault(**fault) for fault in given["faults"]])
        return self._service.state()

    def _reset(self) -> dict[str, Any]:
        self._service.script.load(())
        self._service.record.reset()
        return self._service.state()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "muset"}


def make_server(options: Options, host: str, port: int) -> StreamServer:
    """A server that does not listen yet; port 0 takes a free one."""
    service = Service(options)

    def handle(connection: Any, address: Any) -> None:
        try:
            Handler(connection, address, service)  # type: ignore[arg-type]
        except OSError:
            # A client that is gone while its request is read, or while an error is written.
            return

    server = StreamServer((host, port), handle, backlog=4096)
    server.stop_timeout = 0
    return server
