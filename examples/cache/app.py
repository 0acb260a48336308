"""A small shop whose prices come from a slow table; CacheStrategies asks it once for all.

Run it with `flask --app examples/cache/app.py run`, then try /items/kettle twice and look at
X-Cache, and change the price:

    curl -X PUT -H "Content-Type: application/json" -d 25 http://127.0.0.1:5000/items/kettle

With CACHE_REDIS=redis://127.0.0.1:6379/0 in the environment all processes share one cache.
"""

import os
import time

from flask import Flask, request

from flask_muset import CacheStrategies, ErrorHandler
from flask_muset.cache_strategies import cached
from flask_muset.errors import NotFoundError

app = Flask(__name__)
app.config["CACHE_STRATEGIES_REDIS_URL"] = os.environ.get("CACHE_REDIS")
app.config["CACHE_STRATEGIES_NAMESPACE"] = "example-shop"

ErrorHandler(app)
cache = CacheStrategies(app)

PRICES = {"kettle": 20, "cup": 4}
#: What the table was asked for.
queries = []


def read(item):
    """Ask the table, which takes its time."""
    queries.append(item)
    time.sleep(0.05)
    if item not in PRICES:
        raise NotFoundError(f"no item {item}", resource_type="item", details={"item": item})
    return PRICES[item]


#: Fresh for a minute; for half a minute more an old price does while a new one is read, for an hour
#: more while the table cannot be read; that there is no such item is known for two seconds.
@cached(
    key_prefix="price",
    expire=60,
    tags=["prices"],
    stale_while_revalidate=30,
    stale_if_error=3600,
    negative_expire=2,
)
def price(item):
    """The price of an item."""
    return read(item)


@app.get("/items/<item>")
def show(item):
    """An item with its price."""
    return {"item": item, "price": price(item)}


@app.put("/items/<item>")
def change(item):
    """Another price: in the table, and then no old one in the cache."""
    PRICES[item] = int(request.get_json())
    price.invalidate(item)
    return {"item": item, "price": PRICES[item]}


@app.post("/sale")
def sale():
    """All prices fall by half; what is cached is stale from now on."""
    PRICES.update({item: amount / 2 for item, amount in PRICES.items()})
    return {"done": cache.expire_tag("prices")}
