"""Bookmarks: a small JSON API on sqlite3, as it was, and one line more: `ErrorHandler(app)`.

    flask --app examples/bookmarks/app.py run

What that line has changed, and no view with it:

- `abort(404)`, an unknown path or a wrong method was a page of HTML. Now it is JSON for a program,
  RFC 9457 for one that asks for it, and a page for a browser.
- The same address twice, an IntegrityError from below, was a 500. Now it is a 409.
- A locked or broken database was a 500 too. Now it is a 503 with Retry-After, where that helps.
- Each answer has an X-Request-ID, each fault one line in the log with that id, and no answer has
  anything of the query in it.
"""

import sqlite3
from pathlib import Path

from flask import Flask, abort, g, request

from flask_muset import ErrorHandler

app = Flask(__name__)
app.config["DATABASE"] = str(Path(app.instance_path) / "bookmarks.db")
app.config.from_prefixed_env("BOOKMARKS")

ErrorHandler(app)

SCHEMA = """
CREATE TABLE IF NOT EXISTS bookmark (
    id INTEGER PRIMARY KEY,
    url TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    added TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)
"""


def db():
    """The request's connection."""
    if "db" not in g:
        Path(app.config["DATABASE"]).parent.mkdir(parents=True, exist_ok=True)
        g.db = sqlite3.connect(app.config["DATABASE"], timeout=1)
        g.db.row_factory = sqlite3.Row
        g.db.execute(SCHEMA)
    return g.db


@app.teardown_appcontext
def close_db(_error):
    """End it with the request."""
    if connection := g.pop("db", None):
        connection.close()


@app.get("/bookmarks")
def index():
    """All bookmarks, or those with a word in the title."""
    word = request.args.get("q", "")
    rows = db().execute("SELECT * FROM bookmark WHERE instr(lower(title), lower(?))", (word,))
    return [dict(row) for row in rows]


@app.post("/bookmarks")
def add():
    """Add one."""
    data = request.get_json()
    if not str(data.get("url", "")).startswith(("http://", "https://")):
        abort(400, "A bookmark needs a url that begins with http:// or https://.")
    with db():
        row = db().execute(
            "INSERT INTO bookmark (url, title) VALUES (?, ?) RETURNING *",
            (data["url"], data.get("title") or data["url"]),
        )
        return dict(row.fetchone()), 201


@app.get("/bookmarks/<int:bookmark_id>")
def show(bookmark_id):
    """One of them."""
    row = db().execute("SELECT * FROM bookmark WHERE id = ?", (bookmark_id,)).fetchone()
    return dict(row) if row else abort(404)


@app.delete("/bookmarks/<int:bookmark_id>")
def remove(bookmark_id):
    """Remove one."""
    with db():
        gone = db().execute("DELETE FROM bookmark WHERE id = ?", (bookmark_id,)).rowcount
    return ("", 204) if gone else abort(404)
