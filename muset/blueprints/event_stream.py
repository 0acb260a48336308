"""An answer as server-sent events.

Source: HTML Living Standard, 9.2 "Server-sent events".
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

from flask import Flask, Request
from werkzeug.wrappers import Response

from flask_muset.error_handler import error_body
from muset.ports import Citation, Delta, Tokens
from muset.services.streaming import AnswerStream, Done, Event, Meta

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["MEDIA_TYPE", "is_wanted", "respond"]

MEDIA_TYPE = "text/event-stream"
#: How long a client waits before it connects again.
_RETRY = "retry: 2000\n\n"
_COMMENT = ": still at it\n\n"


def is_wanted(request: Request) -> bool:
    """Whether a client wants a stream rather than JSON; of two that it wants alike, JSON."""
    if request.headers.get("Accept") == MEDIA_TYPE:
        return True  # as browsers send it, and it is asked twice for each request
    accept = request.accept_mimetypes
    return accept.best_match(["application/json", MEDIA_TYPE]) == MEDIA_TYPE


def respond(app: Flask, request: Request, stream: AnswerStream, outcome: str) -> Response:
    """The response that sends a stream; it begins when there is something to send.

    Args:
        app: Renders what goes wrong.
        request: Is answered.
        stream: What is sent.
        outcome: Of the cache.

    Raises:
        Exception: The answer has failed before anything was to be sent.
    """
    body = _Body(_chunks(app, request.environ, stream))
    return Response(
        body,
        content_type=f"{MEDIA_TYPE}; charset=utf-8",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Cache": outcome},
    )


class _Body:
    """Chunks of which the first is there already; whoever sends them closes it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks: Any = chunks
        try:
            self._first: bytes | None = next(chunks)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> "_Body":
        return self

    def __next__(self) -> bytes:
        first, self._first = self._first, None
        if first is not None:
            return first
        chunk: bytes = next(self._chunks)
        return chunk

    def close(self) -> None:
        """End the work on the answer."""
        self._chunks.close()


def _chunks(app: Flask, environ: "WSGIEnvironment", stream: AnswerStream) -> Iterator[bytes]:
    ids, lead = count(1), _RETRY
    try:
        with closing(iter(stream)) as batches:
            for batch in batches:
                text = "".join(_event(next(ids), event) for event in batch) or _COMMENT
                yield (lead + text).encode()
                lead = ""
    except Exception as error:
        if lead:
            raise  # nothing is sent: it is answered like every other error
        yield _framed(next(ids), "error", error_body(app, error, environ)).encode()


def _event(number: int, event: Event) -> str:
    if isinstance(event, Delta):
        # Most of all events: a text alone is escaped far quicker than an object that has one.
        return _framed(number, "delta", f'{{"text": {json.dumps(event.text)}}}')
    name, data = _named(event)
    # All of it is plain, so this needs no encoder of the app's, which is made anew for each call.
    return _framed(number, name, json.dumps(data))


def _named(event: Meta | Citation | Tokens | Done) -> tuple[str, Mapping[str, Any]]:
    if isinstance(event, Meta):
        return "meta", {"model": event.model}
    if isinstance(event, Citation):
        return "citation", asdict(event)
    if isinstance(event, Tokens):
        used = {"input_tokens": event.input_tokens, "output_tokens": event.output_tokens}
        return "usage", used
    return "done", {"status": event.status.value}


def _framed(number: int, name: str, data: str) -> str:
    return f"id: {number}\nevent: {name}\ndata: {data}\n\n"
