"""Short links on gunicorn with threads, without gevent; one line more: `Metrics(app)`.

    cd examples/links && gunicorn app:app

With the import in gunicorn.conf.py, what that line has changed: `curl 127.0.0.1:8000/metrics` says
how many requests there were by route, method and status, how long they took and how many run now,
of all worker processes together, whichever of them answers, and also of those that have ended.
"""

import secrets
import sqlite3
from contextlib import closing
from pathlib import Path

from flask import Flask, abort, redirect, request

from flask_muset import Metrics

app = Flask(__name__)
app.config["METRICS_NAMESPACE"] = "links"
app.config["DATABASE"] = str(Path(app.instance_path) / "links.db")
app.config.from_prefixed_env("LINKS")

Metrics(app)


def query(statement, *values):
    """Run one statement; its rows."""
    with closing(sqlite3.connect(app.config["DATABASE"], timeout=10)) as db, db:
        return db.execute(statement, values).fetchall()


Path(app.config["DATABASE"]).parent.mkdir(parents=True, exist_ok=True)
query("CREATE TABLE IF NOT EXISTS link (word TEXT PRIMARY KEY, target TEXT NOT NULL)")


@app.post("/")
def shorten():
    """Make a short link to the address in the body."""
    target = request.get_data(as_text=True).strip()
    if not target.startswith(("http://", "https://")):
        abort(400, "Send an address that begins with http:// or https://.")
    word = secrets.token_urlsafe(6)
    query("INSERT INTO link VALUES (?, ?)", word, target)
    return request.base_url + word + "\n", 201


@app.get("/<word>")
def follow(word):
    """Go where it leads."""
    found = query("SELECT target FROM link WHERE word = ?", word)
    return redirect(found[0][0]) if found else abort(404)
