"""What the guide's default limits refuse, through the shipped nginx, with nothing else set."""

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from nginx_server import Nginx
from redis_server import free_port

from muset.testing.upstream import Upstream

ROOT = Path(__file__).parents[2]
#: The guide's, written down here once more: a default that changes must be seen.
A_MINUTE, AT_ONCE = 60, 100
_OURS = ("MUSET_", "AI_", "RATE_LIMIT_", "MAX_CONCURRENT_", "REDIS_", "DATABASE_", "REQUEST_")


class Defaults:
    """The service with its defaults behind nginx, and two keys of two users."""

    def __init__(self, folder, upstream):
        self._port, self._key = free_port(), f"msk_{secrets.token_urlsafe(32)}"
        self._folder = folder
        self.env = {n: v for n, v in os.environ.items() if not n.startswith(_OURS)} | {
            "PORT": str(self._port),
            "METRICS_PORT": "0",
            "MUSET_DATA_DIR": str(folder / "data"),
            "MUSET_ADMIN_KEY": self._key,
            "AI_BASE_URL": upstream.base_url,
            "AI_MODEL": upstream.model,
        }
        self.keys = []
        self.url = ""

    @contextlib.contextmanager
    def running(self):
        """Start both; they end with the block."""
        with (self._folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(
                self._command("serve"), env=self.env, cwd=ROOT, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        nginx = None
        try:
            self._wait(process)
            self.keys = [self._key, self._other_key()]
            place = self._folder / "nginx"
            place.mkdir()
            nginx = Nginx(place, [self._port]).start()
            self.url = f"{nginx.url}/api/v1"
            yield self
        finally:
            if nginx is not None:
                nginx.stop()
            process.terminate()
            process.wait(40)

    def _command(self, *words):
        return [sys.executable, "-m", "muset.cli", *words]

    def _wait(self, process):
        until = time.monotonic() + 40
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{self._port}/health/ready", timeout=5).ok:
                    return
            said = (self._folder / "output.txt").read_text(errors="replace")
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.05)

    def _other_key(self):
        command = self._command("keys", "create", "--user", "b@example.org", "--role", "member")
        done = subprocess.run(
            command, env=self.env, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1]

    def head(self, key=0):
        """The header of one of the two users."""
        return {"Authorization": f"Bearer {self.keys[key]}"}


@pytest.fixture
def defaults(tmp_path):
    """The service, its model slow enough that many answers are open at the same time."""
    options = {"models": ["slow"], "first_token": "0.1", "tokens_per_second": 4, "tokens": 80}
    with Upstream(seed=1, **options) as upstream:
        upstream.model = "slow"
        with Defaults(tmp_path, upstream).running() as service:
            yield service


@pytest.mark.full_only
@pytest.mark.claim(
    "By default, through nginx, a key's 61st request within a minute's allowance is answered 429 "
    "with Retry-After, and another key's is not"
)
def test_requests_a_minute(defaults, prove):
    """60 at once and one more for each second since are allowed; waiting as told is enough."""

    def read(_number):
        return requests.get(f"{defaults.url}/documents", headers=defaults.head(), timeout=30)

    began = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(read, range(A_MINUTE + 40)))
    took_s = time.monotonic() - began
    statuses = Counter(answer.status_code for answer in answers)
    prove.figure(f"{statuses[200]} of {len(answers)} within {took_s:.1f} s, the rest 429")
    assert statuses.keys() == {200, 429}
    assert A_MINUTE <= statuses[200] <= A_MINUTE + took_s * A_MINUTE / 60
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.json()["error"] for answer in refused} == {"RateLimitError"}
    waits = [int(answer.headers["Retry-After"]) for answer in refused]
    assert all(1 <= wait_s <= 60 for wait_s in waits)
    other = requests.get(f"{defaults.url}/documents", headers=defaults.head(1), timeout=30)
    assert other.status_code == 200
    time.sleep(waits[-1])
    assert read(0).status_code == 200


@pytest.mark.full_only
@pytest.mark.claim(
    "By default, through nginx, the 101st request at once is answered 503 with Retry-After, and "
    "the 100 go on"
)
def test_requests_at_once(defaults, prove):
    """100 streams of two keys are open; one more request is told when to come back."""
    body = {"title": "Bees", "text": "A bee colony has one queen. The queen lays eggs."}
    made = requests.post(
        f"{defaults.url}/documents", json=body, headers=defaults.head(), timeout=30
    )
    assert made.status_code == 201

    def ask(number):
        return requests.post(
            f"{defaults.url}/ask", json={"question": f"What does the queen lay? ({number})"},
            headers=defaults.head(number % 2) | {"Accept": "text/event-stream"},
            stream=True, timeout=60,
        )  # fmt: skip

    with ThreadPoolExecutor(AT_ONCE) as threads:
        streams = list(threads.map(ask, range(AT_ONCE)))
        try:
            assert Counter(one.status_code for one in streams) == {200: AT_ONCE}
            refused = requests.get(
                f"{defaults.url}/documents/1", headers=defaults.head(), timeout=30
            )
            live = requests.get(defaults.url.replace("/api/v1", "/health/live"), timeout=30)
            bodies = list(threads.map(lambda one: one.content, streams))
        finally:
            for one in streams:
                one.close()
    whole = sum(b"event: done" in text for text in bodies)
    wait = refused.headers.get("Retry-After")
    prove.figure(f"{refused.status_code}, Retry-After {wait}; {whole} of {AT_ONCE} streams whole")
    assert (refused.status_code, refused.json()["error"]) == (503, "OverloadedError")
    assert 1 <= int(wait) <= 5
    assert live.status_code == 200
    assert whole == AT_ONCE
    again = requests.get(f"{defaults.url}/documents/1", headers=defaults.head(), timeout=30)
    assert again.status_code == 200
