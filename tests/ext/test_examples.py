"""The apps in examples/ do what they say, with flask-muset alone."""

import contextlib
import http.server
import importlib.util
import json
import os
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from redis_server import free_port
from waiting import until

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def serve(name, folder, *options, **env):
    """An example, in a folder of its own, under the gunicorn of this environment.

    Yields:
        The process and the URL of its root.
    """
    place = folder / name
    shutil.copytree(EXAMPLES / name, place, ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    with (folder / "gunicorn.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "--no-control-socket",
             *options, "app:app"],
            cwd=place, env=os.environ | env, start_new_session=True, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        end = time.monotonic() + 30
        while True:
            said = (folder / "gunicorn.log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < end, said
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_without_the_service(tmp_path):
    """The examples run where there is no muset: importing it fails."""
    done = subprocess.run(
        [sys.executable, "-c", "import flask_muset\nimport muset"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        pytest.skip("this environment has muset; that of `make test` for tests/ext has not")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'muset'"


def test_readme_names_them_all():
    """Each folder of examples/ has its line."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    apps = sorted(path.parent.name for path in EXAMPLES.glob("*/app.py"))
    assert [name for name in apps if f"({name}/app.py)" not in text] == []


def test_bookmarks(tmp_path):
    """One line gives an API on sqlite3 its JSON errors: 404, 405, 400, 409, 503, and ids."""
    database = tmp_path / "bookmarks.db"
    with serve("bookmarks", tmp_path, BOOKMARKS_DATABASE=str(database)) as (_, url):
        bee = {"url": "https://example.org/bees", "title": "Bees"}
        made = requests.post(f"{url}/bookmarks", json=bee, timeout=30)
        assert (made.status_code, made.json()["id"]) == (201, 1)
        assert requests.get(f"{url}/bookmarks?q=bee", timeout=30).json() == [made.json()]

        def error(method, path, **options):
            answer = requests.request(method, url + path, timeout=30, **options)
            assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
            assert "INSERT" not in answer.text
            return answer.status_code, answer.json()["error"]

        assert error("GET", "/bookmarks/9") == (404, "NotFoundError")
        assert error("PUT", "/bookmarks/1") == (405, "ValidationError")
        assert error("POST", "/bookmarks", data="{") == (415, "ValidationError")
        assert error("POST", "/bookmarks", json={}) == (400, "ValidationError")
        assert error("POST", "/bookmarks", json=bee) == (409, "ConflictError")
        page = requests.get(f"{url}/no", headers={"Accept": "text/html"}, timeout=30)
        assert page.headers["Content-Type"].startswith("text/html")

        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert error("GET", "/bookmarks/1") == (503, "DatabaseError")
        assert requests.delete(f"{url}/bookmarks/1", timeout=30).status_code == 204


class Market(http.server.BaseHTTPRequestHandler):
    """Slow, counted, and at times out of order."""

    asked = 0
    is_open = True

    def do_GET(self):
        Market.asked += 1
        time.sleep(0.3)
        body = json.dumps({"flour": 2, "milk": 1, "eggs": 5, "oats": 3}).encode()
        self.send_response(200 if Market.is_open else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def market():
    """The URL of a running Market."""
    Market.asked, Market.is_open = 0, True
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Market) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/prices"
        server.shutdown()


def test_recipes(tmp_path, market):
    """Over the app's own Cache one thread asks the market for all, and old prices outlive it."""
    settings = {"RECIPES_MARKET_URL": market, "RECIPES_PRICES_EXPIRE": "2"}
    threads = ("-k", "gthread", "--threads", "8")
    with serve("recipes", tmp_path, *threads, **settings) as (_, url):
        assert "porridge" in requests.get(url, timeout=30).text

        def pancakes(_=None):
            answer = requests.get(f"{url}/pancakes", timeout=30)
            assert "<li>200 g flour</li>" in answer.text
            assert "Costs 1.40 today." in answer.text
            return answer.headers["X-Cache"]

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(pancakes, range(8))) <= {"MISS", "HIT"}
        assert Market.asked == 1
        Market.is_open = False
        until(lambda: pancakes() == "STALE")
        assert Market.asked == 2
        assert requests.get(f"{url}/soup", timeout=30).status_code == 404


def test_links(tmp_path):
    """Two processes with threads have one set of metrics, which outlives a killed one."""
    with serve("links", tmp_path, LINKS_DATABASE=str(tmp_path / "links.db")) as (process, url):
        made = requests.post(url, data="https://example.org/", timeout=30)
        assert made.status_code == 201

        def follow(_=None):
            answer = requests.get(made.text.strip(), allow_redirects=False, timeout=30)
            return answer.headers["Location"]

        def count():
            lines = requests.get(f"{url}/metrics", timeout=30).text.splitlines()
            label = 'links_http_requests_total{endpoint="/<word>",method="GET",status_code="302"}'
            return next((float(line.split()[-1]) for line in lines if line.startswith(label)), 0)

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(follow, range(50))) == {"https://example.org/"}
        assert {count() for _ in range(10)} == {50}

        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        first, second = children.read_text().split()
        if importlib.util.find_spec("gevent"):
            assert "gevent" not in Path(f"/proc/{second}/maps").read_text()
        os.kill(int(first), signal.SIGKILL)
        follow()
        assert count() == 51


def test_resilience():
    """A price service that is away costs its price, not the item, and is soon left alone."""
    from flask_muset.testing import virtual_clock

    module = runpy.run_path(str(EXAMPLES / "resilience" / "app.py"))
    client, prices = module["app"].test_client(), module["prices"]
    with virtual_clock():
        assert client.get("/items/kettle").json == {"item": "kettle", "price": None}
        assert prices.breaker.snapshot()["failures"] == 3
        client.get("/items/kettle")
        assert prices.breaker.state == "open"
        assert client.get("/items/kettle").json == {"item": "kettle", "price": None}


def test_cache():
    """A price is read once, new after a change, and old for a moment after a sale."""
    module = runpy.run_path(str(EXAMPLES / "cache" / "app.py"))
    client, queries = module["app"].test_client(), module["queries"]

    def get(item):
        answer = client.get(f"/items/{item}")
        return answer.json.get("price"), answer.headers.get("X-Cache")

    assert [get("kettle"), get("kettle")] == [(20, "MISS"), (20, "HIT")]
    assert [client.get("/items/pot").status_code for _ in range(2)] == [404, 404]
    assert queries == ["kettle", "pot"]
    assert client.put("/items/kettle", json=25).json == {"item": "kettle", "price": 25}
    assert get("kettle") == (25, "MISS")
    assert get("cup") == (4, "MISS")
    assert client.post("/sale").json == {"done": True}
    assert get("cup") == (4, "STALE")
    until(lambda: get("cup")[0] == 2)
    assert get("cup") == (2, "HIT")
