"""Server-sent events, read as a client reads them."""

import json

STREAM = {"Accept": "text/event-stream"}


def events_of(text):
    """The events as (name, data); their ids must rise, and nothing may be cut off."""
    assert text.endswith("\n\n")
    found, last = [], 0
    for block in text[:-2].split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line[0] != ":")
        if "event" in fields:
            assert int(fields["id"]) > last
            last = int(fields["id"])
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def text_of(events):
    return "".join(data["text"] for name, data in events if name == "delta")


def assert_one_end(events):
    """Exactly one event ends the stream, and nothing is behind it."""
    names = [name for name, _ in events]
    assert sum(name in ("done", "error") for name in names) == 1, names
    assert names[-1] in ("done", "error")
