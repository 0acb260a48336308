"""A small shop that asks a price service; Resilience keeps it up when that does not answer.

flask --app examples/resilience/app.py run
"""

import http.client

from flask import Flask

from flask_muset import ErrorHandler, Resilience
from flask_muset.deadline import deadline
from flask_muset.resilience import Bulkhead, CircuitBreaker, Fallback, RetryStrategy, Timeout

app = Flask(__name__)
app.config["RESILIENCE_REQUEST_TIMEOUT"] = 5.0
app.config["RESILIENCE_RATE_LIMIT_REQUESTS_PER_MINUTE"] = 600
app.config.setdefault("PRICES", "127.0.0.1:9")

resilience = Resilience(app)
ErrorHandler(app)

#: At most three attempts of half a second; what fails five times in a row is left alone for 30 s.
prices = resilience.policy(
    "prices",
    Fallback(None),
    RetryStrategy(max_retries=2, initial_delay=0.05),
    CircuitBreaker("prices", failure_threshold=5, recovery_timeout=30),
    Bulkhead(20, max_wait=0.1),
    Timeout(0.5),
)


@prices
def price(item):
    """Ask the price service."""
    connection = http.client.HTTPConnection(app.config["PRICES"], timeout=deadline.remaining())
    try:
        connection.request("GET", f"/prices/{item}")
        return float(connection.getresponse().read())
    finally:
        connection.close()


@app.get("/items/<item>")
def show(item):
    """An item, with its price if that can be had."""
    return {"item": item, "price": price(item)}
