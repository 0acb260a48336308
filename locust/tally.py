"""What was sent and what came back, counted while it happens."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Api", "ApiError", "Tally"]

#: How long a connection is used again.
_KEPT_S = 2.0


class ApiError(Exception):
    """A call that the run itself needs was refused; the text says what to do."""


@dataclass(slots=True)
class Tally:
    """One run, as its clients see it.

    Attributes:
        statuses: Answers of `/api/` by status; 0 for none at all.
        api: Answers of `/api/` but for questions.
        times: Seconds by group: `api`, `ai` (a model answered), `probe` (from when it was due).
        cut: Requests that were not waited for at the end.
        refused: Answers with 429 or 503 that said when to come back.
        errors: Other answers that were none, by what was wrong.
        questions: Those that must have left a row in the ledger.
        answers: Of those, the ones that were answered.
        input_tokens: Sum of what the answers said.
        output_tokens: Likewise.
        first_deltas: Seconds to the first text of a stream.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    api: int = 0
    times: dict[str, list[float]] = field(
        default_factory=lambda: {"api": [], "ai": [], "probe": []}
    )
    cut: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    questions: int = 0
    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    first_deltas: list[float] = field(default_factory=list)

    def count(self, status: int, *, is_question: bool = False) -> None:
        """Count an answer of `/api/`."""
        self.statuses[status] += 1
        self.api += not is_question

    def count_answer(self, usage: Mapping[str, int]) -> None:
        """Count an answered question and its tokens."""
        self.questions += 1
        self.answers += 1
        self.input_tokens += usage["input_tokens"]
        self.output_tokens += usage["output_tokens"]


class Api:
    """The calls that the run itself makes, beside its users; they are counted too.

    Args:
        url: Of the service, such as `http://127.0.0.1:8080`.
        key: An admin's.
        tally: Where they are counted.
    """

    def __init__(self, url: str, key: str, tally: Tally) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ApiError(f"--host must be a URL such as http://127.0.0.1:8080, got {url!r}.")
        self._make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address, self._prefix = parts.netloc, parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._tally = tally
        self._kept: HTTPConnection | None = None
        self._used = 0.0

    def _connection(self) -> HTTPConnection:
        """The kept one, unless the server may have closed it by now."""
        if self._kept is None or time.monotonic() > self._used + _KEPT_S:
            self._kept = self._make(self._address, timeout=60)
        return self._kept

    def _send(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        headers = dict(self._headers)
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body), "application/json"
        connection = self._connection()
        try:
            connection.request(method, self._prefix + path, data, headers)
            answer = connection.getresponse()
            text = answer.read()
        except OSError as error:
            raise ApiError(f"the service at {self._address} does not answer ({error}).") from None
        self._used = time.monotonic()
        if path.startswith("/api/"):
            self._tally.count(answer.status)
        return answer.status, text

    def call(self, method: str, path: str, body: Any = None, accept: tuple[int, ...] = ()) -> Any:
        """Send a request and return the body.

        Args:
            method: Of HTTP.
            path: With its query.
            body: Sent as JSON.
            accept: Statuses of errors that are fine.

        Raises:
            ApiError: It was refused, or the service does not answer.
        """
        status, text = self._send(method, path, body)
        if status < 400 or status in accept:
            return json.loads(text)
        cures = {
            401: "set MUSET_KEY to a key of an admin",
            403: "set MUSET_KEY to a key of an admin",
            429: "raise RATE_LIMIT_REQUESTS_PER_MINUTE of the service",
        }
        cure = cures.get(status, text[:200].decode("utf-8", "replace"))
        raise ApiError(f"{method} {path} is answered with {status}: {cure}.")

    def scrape(self) -> str:
        """The service's metrics.

        Raises:
            ApiError: They are refused.
        """
        status, text = self._send("GET", "/metrics")
        if status != 200:
            raise ApiError(
                f"/metrics is answered with {status}; ENABLE_METRICS must be true and MUSET_KEY an "
                "admin's."
            )
        return text.decode()

    def usage(self) -> tuple[int, int, int]:
        """Questions, input tokens and output tokens in the ledger; waits until it is complete."""
        until = time.monotonic() + 20
        while True:
            status, text = self._send("GET", "/api/v1/usage?group_by=day&limit=100")
            if status == 200:
                items = json.loads(text)["items"]
                names = ("requests", "input_tokens", "output_tokens")
                requests, given, made = (sum(item[name] for item in items) for name in names)
                return requests, given, made
            if status != 503 or time.monotonic() > until:
                raise ApiError(f"/api/v1/usage is answered with {status}: {text[:200]!r}")
            time.sleep(1.0)
