"""A small shop that answers every error by one table: the whole set-up is the line with `(app)`.

Run it with `flask --app examples/errors/app.py run`, then try /orders/7, /orders/9 and /errors.
"""

from flask import Flask, jsonify
from flask.typing import ResponseReturnValue

from flask_muset import ErrorHandler
from flask_muset.errors import NotFoundError

app = Flask(__name__)
ErrorHandler(app)

ORDERS = {7: {"item": "kettle", "pieces": 2}}


@app.get("/orders/<int:number>")
def order(number: int) -> ResponseReturnValue:
    """One order."""
    if number not in ORDERS:
        raise NotFoundError(f"no order {number}", resource_type="order", details={"number": number})
    return jsonify(ORDERS[number])


@app.get("/orders/<int:number>/price")
def price(number: int) -> ResponseReturnValue:
    """A view with a fault: the client learns that there is one, operators learn where."""
    return jsonify({"price": ORDERS[number]["price"]})
