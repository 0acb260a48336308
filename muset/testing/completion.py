"""One completion, whole or as a stream, with the fault that is meant for it."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from muset.testing.model import ChatRequest, answer
from muset.testing.record import Seen
from muset.testing.script import Delay, Fault, Options
from muset.testing.wire import ERRORS, EndedError, Wire, error_body

__all__ = ["Completion"]

_DRIP_BYTES = 7
_FOR_EVER_S = 1e9
_SAYS_WHEN = ("rate_limited", "unavailable")
#: Faults after which nothing more of a stream comes.
_ENDS = ("truncated", "stream_error", "filtered")


class Completion:
    """Writes one answer.

    Args:
        wire: Where to.
        options: How long, and how fast.
        request: What was asked.
        fault: What is to happen.
        seen: Where it is written down what has happened.
    """

    def __init__(
        self, wire: Wire, options: Options, request: ChatRequest, fault: Fault, seen: Seen
    ) -> None:
        self._wire = wire
        self._options = options
        self._request = request
        self._seen = seen
        self._fault = fault
        mode = fault.kind if fault.kind in ("invented", "unsaid") else options.mode
        tokens = answer(request, mode, options.tokens)
        self._tokens = tokens[: request.max_tokens]
        self._finish = "length" if len(tokens) > request.max_tokens else "stop"

    def run(self) -> None:
        """Answer.

        Raises:
            OSError: The client has left.
            EndedError: The connection must end here.
        """
        kind = self._fault.kind
        rng = random.Random(self._seen.id)  # noqa: S311 - repeatable, not secret
        self._wait(Delay.parse(self._options.latency).draw(rng))
        first_s = Delay.parse(self._options.first_token).draw(rng)
        if kind == "refused":
            self._wire.reset_connection()
        if kind == "hang":
            self._wait(_FOR_EVER_S)
        if kind in ERRORS:
            self._fail()
            return
        first_s += self._fault.delay_s if kind == "slow_first_token" else 0.0
        if self._request.stream:
            self._stream(first_s)
        else:
            pace = self._options.tokens_per_second
            self._wait(first_s + (len(self._tokens) / pace if pace else 0.0))
            self._whole()

    def _wait(self, seconds: float) -> None:
        self._wire.wait_until(time.monotonic() + seconds)

    def _fail(self) -> None:
        self._seen.status = ERRORS[self._fault.kind][0]
        when = self._fault.retry_after if self._fault.kind in _SAYS_WHEN else None
        self._wire.error(*ERRORS[self._fault.kind], retry_after=when)

    def _usage(self) -> dict[str, int]:
        used = (self._seen.input_tokens, self._seen.tokens)
        prompt, completion = (0, 0) if self._fault.kind == "zero_usage" else used
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _send(self, data: bytes) -> None:
        step = _DRIP_BYTES if self._fault.kind == "slow_drip" else len(data)
        for start in range(0, len(data), step or 1):
            self._wire.wfile.write(data[start : start + step])
            if step < len(data):
                self._wait(self._fault.delay_s)

    # --- in one piece -----------------------------------------------------------------------------

    def _whole(self) -> None:
        kind, finish = self._fault.kind, self._finish
        tokens = self._tokens
        if kind == "filtered":
            tokens, finish = tokens[: self._fault.after], "content_filter"
        self._seen.tokens, self._seen.status = len(tokens), 200
        message = {"role": "assistant", "content": "".join(tokens)}
        body = {
            **self._frame("chat.completion"),
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": self._usage(),
        }
        if kind == "missing_usage":
            del body["usage"]
        if kind == "stream_error":
            body = error_body(*ERRORS["server_error"][1:])
        self._send_whole(json.dumps(body).encode())

    def _send_whole(self, data: bytes) -> None:
        half = data[: len(data) // 2]
        if self._fault.kind == "malformed":
            data = half
        self._wire.head(200, {"Content-Length": str(len(data)), "X-Request-Id": self._seen.id})
        if self._fault.kind in ("cut", "truncated", "stall"):
            self._send(half)
            self._break()
        self._send(data)

    def _break(self) -> None:
        """End in the middle, at once or when the client leaves."""
        self._seen.tokens = min(self._seen.tokens, self._fault.after)
        if self._fault.kind == "stall":
            self._wait(_FOR_EVER_S)
        raise EndedError

    # --- as a stream ------------------------------------------------------------------------------

    def _stream(self, first_s: float) -> None:
        is_chunked = self._wire.request_version != "HTTP/1.0"
        coding = {"Transfer-Encoding": "chunked"} if is_chunked else {}
        headers = {"X-Request-Id": self._seen.id, "Cache-Control": "no-cache", **coding}
        self._seen.status = 200
        self._wire.head(200, headers, "text/event-stream")
        for data in self._events(time.monotonic() + first_s):
            self._send(b"%x\r\n%s\r\n" % (len(data), data) if is_chunked else data)
        if is_chunked:
            # A client that has read the last event may be gone.
            with suppress(OSError):
                self._send(b"0\r\n\r\n")

    def _events(self, first: float) -> Iterator[bytes]:
        """The lines of the body; waits as long as it takes between them."""
        pace = self._options.tokens_per_second
        yield self._delta({"role": "assistant", "content": ""})
        last = min(self._fault.after, len(self._tokens))
        for number, token in enumerate(self._tokens):
            self._wire.wait_until(first + (number / pace if pace else 0.0))
            if number == last:
                yield from self._disturb()
                if self._fault.kind in _ENDS:
                    return
            yield self._delta({"content": token})
            self._seen.tokens += 1
        if last == len(self._tokens):
            yield from self._disturb()
            if self._fault.kind in _ENDS:
                return
        yield self._delta({}, self._finish)
        yield from self._end()

    def _disturb(self) -> Iterator[bytes]:
        """What the fault puts between two tokens."""
        kind = self._fault.kind
        if kind in ("cut", "stall"):
            self._break()
        elif kind == "malformed":
            yield b'data: {"id": "chatcmpl", "choices": [{"delta"\n\n'
        elif kind == "stream_error":
            yield _event(error_body(*ERRORS["server_error"][1:]))
        elif kind == "filtered":
            yield self._delta({}, "content_filter")
            yield from self._end()

    def _end(self) -> Iterator[bytes]:
        if self._request.include_usage and self._fault.kind != "missing_usage":
            frame = self._frame("chat.completion.chunk")
            yield _event({**frame, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _delta(self, delta: Mapping[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event({**self._frame("chat.completion.chunk"), "choices": [choice]})

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._seen.id,
            "object": kind,
            "created": int(self._seen.began),
            "model": self._request.model,
        }


def _event(value: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(value).encode()
