"""The apps in examples/ do what they say."""

import runpy
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
