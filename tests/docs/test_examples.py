"""The apps in examples/ do what they say."""

import runpy
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_errors():
    """One line gives a shop its 404, its 500 and the catalogue."""
    client = runpy.run_path(str(EXAMPLES / "errors" / "app.py"))["app"].test_client()
    assert client.get("/orders/7").json == {"item": "kettle", "pieces": 2}
    missing = client.get("/orders/9")
    assert (missing.status_code, missing.json["error"]) == (404, "NotFoundError")
    assert missing.json["message"] == "The requested order was not found."
    assert client.get("/orders/7/price").json["error"] == "InternalError"
    assert client.get("/errors").status_code == 200


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
    until = time.monotonic() + 5
    while get("cup")[0] != 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert get("cup") == (2, "HIT")
