"""Keep secrets out of everything that leaves the process: by key, by shape, and by request.

Works on copies: what the caller passed in is never changed. Every result is bounded in depth, in
number and in length, and is plain JSON data.
"""

import base64
import binascii
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote_plus

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["REDACTED", "is_secret_key", "redact", "redact_text", "request_secrets"]

REDACTED = "[redacted]"

_MAX_DEPTH = 8
_MAX_ITEMS = 200
_MAX_TEXT = 8_192
_SHORT_TEXT = 128
#: Shorter values of a request are too common to be searched for in other texts.
_MIN_REQUEST_SECRET = 4

_words = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+").findall
_SECRET_WORDS = frozenset(
    {
        "auth",
        "authorization",
        "bearer",
        "cookie",
        "cookies",
        "credential",
        "credentials",
        "csrf",
        "jwt",
        "otp",
        "passcode",
        "passphrase",
        "passwd",
        "password",
        "passwords",
        "pin",
        "pwd",
        "secret",
        "secrets",
        "session",
        "sessionid",
        "signature",
        "token",
        "xsrf",
    }
)
_SECRET_ENDINGS = ("password", "passwd", "secret", "token", "apikey", "cookie", "sessionid")
_SECRET_PAIRS = frozenset(
    {
        ("access", "key"),
        ("account", "key"),
        ("api", "key"),
        ("encryption", "key"),
        ("master", "key"),
        ("private", "key"),
        ("secret", "key"),
        ("signing", "key"),
    }
)
#: After a secret word these say that the value only speaks about the secret.
_ABOUT = frozenset(
    {
        "budget",
        "count",
        "error",
        "expires",
        "limit",
        "name",
        "present",
        "required",
        "type",
        "usage",
    }
)


@lru_cache(maxsize=4096)
def is_secret_key(key: str) -> bool:
    """Whether a value under this name is a secret, in any of the usual spellings."""
    words = [word.lower() for word in _words(key[:256])]
    for position, word in enumerate(words):
        following = words[position + 1] if position + 1 < len(words) else ""
        if (word, following) in _SECRET_PAIRS:
            return True
        if (word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS)) and following not in _ABOUT:
            return True
    return False


_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}-----|\Z)",
            re.DOTALL,
        ),
        REDACTED,
    ),
    # user:password@ of a URL, up to the last @ of its authority
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/?#\"'<>]*@"), rf"\1{REDACTED}@"),
    (re.compile(r"\b(Bearer|bearer|BEARER)(\s+|%20)[A-Za-z0-9._~+/=-]+"), rf"\1 {REDACTED}"),
    (
        re.compile(
            r"\b(Basic|basic|Negotiate|negotiate)\s+"
            r"(?=[A-Za-z0-9+/]*(?:[0-9=+/]|[a-z][A-Z]))[A-Za-z0-9+/]{8,}={0,2}"
        ),
        rf"\1 {REDACTED}",
    ),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"), REDACTED),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:"
            r"(?:msk_|[sr]k_live_|[sr]k_test_|gh[oprsu]_|github_pat_|glpat-|xox[abeoprs]-|shpat_"
            r"|dop_v1_|ya29\.|AIza)[A-Za-z0-9_\-]{6,}"
            r"|sk-[A-Za-z0-9_\-]{12,}|(?:hf_|npm_|pypi-)[A-Za-z0-9_\-]{16,}"
            r"|SG\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}|A[KS]IA[0-9A-Z]{16})"
        ),
        REDACTED,
    ),
)

# From the beginning of a word and without going back, or a long word would cost its length squared.
_KEY = re.compile(
    r"""(?<![A-Za-z0-9_.\-])(?P<name>[A-Za-z0-9_.\-]{2,}+)\\?["']?\s{0,4}(?:=>|=|:)\s{0,4}"""
)
_VALUE = re.compile(
    # JSON within JSON has its quotes escaped
    r"""\\"[^"\\\n]*\\"|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s,;&"'{}()\[\]]+"""
)
_SPOKEN = re.compile(
    r"""\b(password|passphrase|passwd|secret|token|api[ _-]?key)(\s+(?:is\s+|was\s+)?)"""
    r"""("[^"\n]{1,256}"|'[^'\n]{1,256}')""",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"\b((?:set-)?cookie|(?:proxy-)?authorization)(\s{0,4}[:=]\s{0,4})(?![\"'\[])[^\r\n]+",
    re.IGNORECASE,
)


def _hide_pairs(text: str) -> str:
    """Hide the values after `name=`, `name:` and `"name":` where the name is a secret's."""
    out: list[str] = []
    done = 0
    for key in _KEY.finditer(text):
        if key.start() < done or not is_secret_key(key["name"][-256:]):
            continue
        value = _VALUE.match(text, key.end())
        if value is not None and not text.startswith(REDACTED, key.end()):
            out += (text[done : key.end()], REDACTED)
            done = value.end()
    return "".join((*out, text[done:])) if out else text


def _hide_shapes(text: str) -> str:
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    if "=" in text or ":" in text:
        text = _HEADER.sub(rf"\1\2{REDACTED}", text)
        text = _hide_pairs(text)
    return _SPOKEN.sub(rf"\1\2{REDACTED}", text)


_marked = re.compile(r"""[:=_@"'-]""").search
_BEGINNINGS = ("eyJ", "AIza", "AKIA", "ASIA", "ya29", "SG.", "earer", "EARER", "asic", "egotiate")


def _is_suspicious(text: str) -> bool:
    """Whether a text has anything that a pattern could begin with; most texts have not.

    Trying all patterns on each text would cost more than the rest of an error's handling.
    """
    if _marked(text):
        return True
    for beginning in _BEGINNINGS:  # noqa: SIM110 - any() costs three times as much here
        if beginning in text:
            return True
    return False


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the text without what looks like a secret.

    Args:
        text: Any text; what is longer than 8,192 characters is cut.
        secrets: Values that are hidden wherever they occur, such as those of `request_secrets`.
    """
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, REDACTED)
    return _clean_short(text) if len(text) <= _SHORT_TEXT else _clean(text)


def _clean(text: str) -> str:
    if _is_suspicious(text):
        text = _hide_shapes(text)
    # Cut last: half a secret at the edge would no longer have its shape.
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}… ({len(text)} characters)"
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text


#: Paths and messages repeat; those of one fault are looked at once.
_clean_short = lru_cache(maxsize=1024)(_clean)


def redact(
    value: Any, secrets: Iterable[str] = (), *, extra_keys: frozenset[str] = frozenset()
) -> Any:
    """Return a bounded copy of a value as plain JSON data, without secrets.

    Args:
        value: Anything; what JSON does not know becomes its text.
        secrets: Values that are hidden wherever they occur.
        extra_keys: More names, in lower case, whose values are secrets.
    """
    return _copy(value, tuple(secrets), extra_keys, 0)


def _copy(value: Any, secrets: tuple[str, ...], extra: frozenset[str], depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str):
        return redact_text(str(value), secrets)
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return _copy_mapping(value, secrets, extra, depth)
    if isinstance(value, list | tuple | set | frozenset):
        items = [
            _copy(item, secrets, extra, depth + 1)
            for _, item in zip(range(_MAX_ITEMS), value, strict=False)
        ]
        return items if len(value) <= _MAX_ITEMS else [*items, f"… ({len(value)} items)"]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return redact_text(_text_of(value), secrets)


def _number(value: int | float) -> int | float | str:
    """What JSON and its readers can hold; anything else as text."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    # Turning an endless integer into digits is slow, and Python refuses it.
    return int(value) if value.bit_length() <= 64 else f"<{value.bit_length()} bits>"


def _copy_mapping(
    value: Mapping[Any, Any], secrets: tuple[str, ...], extra: frozenset[str], depth: int
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for count, (key, item) in enumerate(value.items()):
        if count >= _MAX_ITEMS:
            out["…"] = f"{len(value)} items"
            break
        name = redact_text(_text_of(key), secrets)
        hidden = is_secret_key(name) or name.lower() in extra
        if hidden and not (item is None or isinstance(item, bool)):
            out[name] = REDACTED
        else:
            out[name] = _copy(item, secrets, extra, depth + 1)
    return out


def _text_of(value: Any) -> str:
    """The text of any object, also of one whose `__str__` raises."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a foreign object may raise anything
        return f"<{type(value).__name__}>"


#: Names in environments that bear no secret; clients choose the names of headers, so it is bounded.
_harmless_names: set[str] = set()
_MAX_HARMLESS_NAMES = 1_000


def request_secrets(environ: "WSGIEnvironment") -> tuple[str, ...]:
    """The secret values that a request itself bears, the longest first.

    Its credentials, cookies, and the headers and query arguments with a secret's name. Hiding these
    very values catches a secret that was copied into a message without its name.
    """
    found: set[str] = set()
    # Nearly all requests have only names that were looked at before.
    for name in environ.keys() - _harmless_names:
        if not (name.startswith("HTTP_") and is_secret_key(name[5:])):
            if len(_harmless_names) < _MAX_HARMLESS_NAMES:
                _harmless_names.add(name)
        elif isinstance(value := environ[name], str):
            found.update(_header_secrets(name, value))
    if environ.get("QUERY_STRING"):
        found.update(_query_secrets(environ["QUERY_STRING"]))
    if not found:
        return ()
    return tuple(sorted((s for s in found if len(s) >= _MIN_REQUEST_SECRET), key=len, reverse=True))


def _query_secrets(query: str) -> Iterable[str]:
    for key, value in parse_qsl(query[:_MAX_TEXT]):
        if is_secret_key(key):
            yield value
            yield _raw_of(query, value)


def _raw_of(query: str, value: str) -> str:
    """The value as it stands in the query string, percent signs and all."""
    for pair in query.split("&"):
        raw = pair.partition("=")[2]
        if unquote_plus(raw) == value:
            return raw
    return value


def _header_secrets(name: str, value: str) -> Iterable[str]:
    if name == "HTTP_COOKIE":
        return [part.partition("=")[2].strip().strip('"') for part in value.split(";")]
    scheme, _, credentials = value.partition(" ")
    if not credentials:
        return [value]
    found = [credentials.strip()]
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(credentials, validate=True).decode("utf-8", "replace")
        except (binascii.Error, ValueError):
            return found
        found += [decoded, decoded.partition(":")[2]]
    return found
