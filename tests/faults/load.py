"""Clients of the service, and what each was answered."""

import itertools
import random
import threading
import time
from dataclasses import dataclass

import requests
from requests.adapters import HTTPAdapter

#: More than nginx waits for an answer.
LAST_ANSWER_S = 90


@dataclass(frozen=True)
class Answered:
    """What one request came to.

    Attributes:
        kind: Name of what was asked.
        began: When it was sent.
        ended: When the answer was there.
        status: 0 if the connection broke.
        category: Of the error, None for none.
        retry_after: Seconds, None where it is not said.
        form: Content type of the answer.
        request_id: Of the answer.
    """

    kind: str
    began: float
    ended: float
    status: int
    category: str | None
    retry_after: int | None
    form: str
    request_id: str


def _turns(kinds):
    """Each once, in ever another order: else one of two hosts would have the same kinds always."""
    chance = random.Random(7)
    while True:
        yield from chance.sample(kinds, len(kinds))


class Load:
    """Threads that ask in turn until the block ends.

    Args:
        url: Of the service, or of what stands in front of it.
        headers: Of each request.
        kinds: By name: a function that is given a session and a number and returns a response.
            The number of the client is the session's `client`.
        clients: How many threads.
        pause_s: Between two requests of one.
        wait: Called before each request, to gather clients for one.

    Attributes:
        answers: What was answered.
        failures: Texts of what failed, for messages.
    """

    def __init__(self, url, headers, kinds, *, clients, pause_s=0.0, wait=None):
        self.url = url
        self.answers = []
        self.failures = []
        self._headers = headers
        self._kinds = _turns(list(kinds.items()))
        self._numbers = itertools.count()
        self._pause_s = pause_s
        self._wait = wait
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(clients)
        ]
        self._turn = threading.Lock()

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        until = time.monotonic() + LAST_ANSWER_S
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))
        waiting = sum(thread.is_alive() for thread in self._threads)
        assert not waiting, f"{waiting} clients have no answer after {LAST_ANSWER_S} s"

    def _run(self, client):
        with requests.Session() as session:
            session.headers = self._headers
            session.client = client
            session.mount("http://", HTTPAdapter(max_retries=0))
            while not self._over.wait(self._pause_s):
                if self._wait is not None and not self._wait():
                    continue
                with self._turn:
                    (kind, ask), number = next(self._kinds), next(self._numbers)
                self.answers.append(self._ask(session, kind, ask, number))

    def _ask(self, session, kind, ask, number):
        began = time.monotonic()
        try:
            answer = ask(session, number)
        except requests.RequestException as error:
            self.failures.append(f"{kind} {number}: {error!r}")
            return Answered(kind, began, time.monotonic(), 0, None, None, "", "")
        form = answer.headers.get("Content-Type", "")
        body = answer.json() if "json" in form else {}
        category = body.get("category") if isinstance(body, dict) else None
        if answer.status_code >= 400:
            self.failures.append(f"{kind} {number}: {answer.status_code} {answer.text[:300]}")
        wait = answer.headers.get("Retry-After")
        return Answered(
            kind,
            began,
            time.monotonic(),
            answer.status_code,
            category if answer.status_code >= 400 else None,
            None if wait is None else int(wait),
            form,
            answer.headers.get("X-Request-ID", ""),
        )

    def refused(self, since=0.0):
        """Those that were no success, of what began after a moment."""
        return [a for a in self.answers if not 200 <= a.status < 300 and a.began >= since]
