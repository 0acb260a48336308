"""Redaction: by name, by shape, by request, at any depth, on copies."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_muset.redaction import REDACTED, is_secret_key, redact, redact_text, request_secrets

SECRET = "hunter2hunter2"
KEYS = st.sampled_from(
    ["password", "Token", "api_key", "apiKey", "X-API-Key", "client_secret", "sessionid", "cookie"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


def planted(children):
    """Containers in which a secret stands under a secret's name."""
    return st.builds(lambda key, rest: {**rest, key: SECRET}, KEYS, children) | st.lists(
        children, max_size=3
    )


TREES = st.recursive(
    st.dictionaries(st.text(max_size=8), LEAVES, max_size=3),
    lambda c: planted(st.dictionaries(st.text(max_size=8), c, max_size=3)),
    max_leaves=20,
)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(TREES)
def test_no_planted_secret_survives(tree):
    """Whatever the tree: no secret, valid JSON, and the tree itself unchanged."""
    before = copy.deepcopy(tree)
    text = json.dumps(redact(tree), allow_nan=False)
    assert SECRET not in text
    assert repr(tree) == repr(before)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text(max_size=200), st.text(max_size=50), KEYS)
def test_pairs_in_any_text(before, after, key):
    """name=value is hidden wherever it stands in a text."""
    text = redact_text(f"{before} {key}={SECRET} {after}")
    assert SECRET not in text
    text.encode()


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}",
        f"redis://user:{SECRET}@host:6379/0",
        f"postgresql+psycopg://u:{SECRET}@h/d?x=1",
        f"Cookie: a=1; sid={SECRET}",
        f'{{"password": "{SECRET}"}}',
        f"{{'api_key': '{SECRET}', 'n': 1}}",
        f'{{\\"token\\": \\"{SECRET}\\"}}',
        f"GET /x?token={SECRET}&y=1",
        f"msk_{SECRET}",
        f"key sk-{SECRET}",
        f"ghp_{SECRET}",
        f"ValueError: Error: password: {SECRET}",
        f"the password is '{SECRET}'",
        f"eyJ{SECRET}.{SECRET}.{SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_known_shapes(text):
    """Each known shape is hidden."""
    assert SECRET not in redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "The requested user was not found.",
        "max_tokens=100, token_count=5",
        "a basic problem with the bearing",
        "https://example.org/path?page=2",
        "task-force at 12:30: done",
        "sk-learn is installed",
    ],
)
def test_ordinary_text_is_left_alone(text):
    """What only looks a little like a secret stays readable."""
    assert redact_text(text) == text


def test_names():
    """Spellings of secret names are known, names about secrets are not secret."""
    assert all(map(is_secret_key, ["PASSWORD", "dbPassword", "x-api-key", "refresh_token", "pwd"]))
    assert not any(map(is_secret_key, ["max_tokens", "token_count", "author", "keyboard", "path"]))


def test_bounds():
    """Depth, number, length and odd values are bounded, and nothing raises."""

    class Odd:
        def __str__(self):
            raise RuntimeError

    loop = []
    loop.append(loop)
    out = redact({"loop": loop, "many": list(range(500)), "odd": Odd(), "nan": float("nan"),
                  "huge": 10**5000, "bytes": b"\xff", "text": "x" * 10_000})  # fmt: skip
    text = json.dumps(out, allow_nan=False)
    assert len(text) < 15_000
    assert out["odd"] == "<Odd>"
    assert out["bytes"] == "<1 bytes>"


def test_secrets_of_a_request():
    """Credentials, cookies, secret headers and arguments, decoded and raw."""
    environ = {
        "HTTP_AUTHORIZATION": "Basic dXNlcjpodW50ZXIy",
        "HTTP_X_API_KEY": "abcd1234",
        "HTTP_COOKIE": "a=first-value; b=x",
        "HTTP_ACCEPT": "text/html",
        "QUERY_STRING": "token=a%20b%20c&page=22222",
    }
    found = request_secrets(environ)
    assert {"user:hunter2", "hunter2", "abcd1234", "first-value", "a b c", "a%20b%20c"} <= {*found}
    assert "22222" not in found
    assert redact_text("it was hunter2", found) == f"it was {REDACTED}"


def test_a_long_text_takes_no_long_time():
    """No pattern backtracks: a megabyte of each pattern's beginning is read once."""
    for piece in ("a.b-c:", "eyJ", "://", "key=", "'\\", "-----BEGIN "):
        redact_text(piece * (200_000 // len(piece)))
