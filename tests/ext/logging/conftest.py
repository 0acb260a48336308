"""Logging is the process's: each test leaves it as it was."""

import json

import pytest

from flask_muset.logging import configured, reset


def strictly(line):
    """A line as an object; what JSON does not know is refused."""

    def refuse(text):
        raise ValueError(f"{text} is no JSON")

    found = json.loads(line, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


class Log:
    """A log file and what it holds.

    Attributes:
        path: Of the file.
    """

    def __init__(self, path):
        self.path = path

    @property
    def text(self):
        return self.path.read_text("utf-8")

    @property
    def lines(self):
        """All lines, each checked to be one valid object."""
        raw = self.path.read_bytes()
        assert raw == b"" or raw.endswith(b"\n")
        # Some readers take more characters for the end of a line than "\n".
        lines = raw.decode("ascii").splitlines()
        assert len(lines) == raw.count(b"\n")
        return [strictly(line) for line in lines]

    @property
    def last(self):
        return self.lines[-1]

    def of(self, name):
        """The lines of one logger."""
        return [line for line in self.lines if line["logger"] == name]


@pytest.fixture
def log(tmp_path):
    """Logging set up, at DEBUG, into a file."""
    path = tmp_path / "app.log"
    with configured("DEBUG", file=path):
        yield Log(path)


@pytest.fixture(autouse=True)
def _clean():
    yield
    reset()
