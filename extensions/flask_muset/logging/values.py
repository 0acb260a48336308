"""What is logged, made into JSON: without secrets, on copies, bounded, whatever it is."""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

from flask_muset.redaction import REDACTED, is_secret_key, redact_text

__all__ = [
    "Secrets",
    "encode",
    "encode_field",
    "field_name",
    "may_hold_secret",
    "quote",
    "text_of",
    "without_secrets",
]

Secrets = tuple[str, ...]

#: Characters of one text; about as much as a line of text in a log can be of use.
_MAX_TEXT = 8_192
#: What a cut may leave of a secret at its edge is not longer, and is cut off as well.
_EDGE = 512
_MAX_NAME = 64
_MAX_DEPTH = 8
#: Values in one field, and characters in all of them, so that no field is larger than a message.
_MAX_VALUES = 256
_QUOTED_REDACTED = f'"{REDACTED}"'


#: JSON in ASCII: no character of it can end a line, whatever a reader takes for the end of one.
quote = _quoted


#: What a secret's shape may begin with, found by the character after which nothing is harmless.
_shape = re.compile(
    r"[_.\-IJ](?:(?<=eyJ)|(?<=A[KS]I)|(?<=AI)|(?<=-----)|(?<=sk-)|(?<=SG\.)|(?<=ya29\.)|(?<=msk_)"
    r"|(?<=hf_)|(?<=npm_)|(?<=pypi-)|(?<=gh[oprsu]_)|(?<=_pat_)|(?<=glpat-)|(?<=xox[abeoprs]-)"
    r"|(?<=shpat_)|(?<=_v1_)|(?<=k_live_)|(?<=k_test_))"
).search
#: A part of every name whose value is a secret, in lower case.
_stem = re.compile(
    "auth|bearer|cookie|credential|jwt|key|otp|pass|pin|pwd|secret|session|signature|srf|token"
).search
_said = re.compile("[:=\"']").search
_marked = re.compile("[:=\"'_.\\-IJ]").search


def may_hold_secret(text: str) -> bool:
    """Whether `redact_text` could find anything in a text: False is sure, True is not.

    One look for what all its patterns need; most lines have none of it, and trying the patterns
    costs more than the rest of a line.
    """
    if not text.isascii():
        return True
    # The words are looked for in pieces that hold for all the ways in which they are written.
    if "earer" in text or "asic" in text or "egotiate" in text or "EARER" in text:
        return True
    if not _marked(text):
        return False
    if _shape(text):
        return True
    return bool(_said(text)) and (bool(_stem(text.lower())) or "@" in text)


def without_secrets(text: str, secrets: Secrets = (), limit: int = _MAX_TEXT) -> str:
    """Return a text without what looks like a secret, at most `limit` characters and a mark.

    Args:
        text: Of any length; only its beginning is looked at, so that its length costs nothing.
        secrets: Values that are hidden wherever they occur.
        limit: Characters that are kept, at most 8,192.
    """
    length = len(text)
    # Exact values first: cut in two they would no longer be found.
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, REDACTED)
    if length <= limit:
        return redact_text(text) if may_hold_secret(text) else text
    kept = redact_text(text[:limit])[: limit - _EDGE if limit > _EDGE else limit // 2]
    return f"{kept}… ({length} characters)"


def text_of(value: Any) -> str:
    """The text of any object, also of one whose `__str__` raises."""
    if isinstance(value, str):
        return str.__str__(value)
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a foreign object may raise anything
        return f"<{type(value).__name__}>"


def encode(value: Any, secrets: Secrets = ()) -> str:
    """Return a value as JSON."""
    kind = type(value)
    if kind is str:
        return quote(without_secrets(value, secrets))
    if kind is int and -(2**63) <= value < 2**63:
        return str(value)
    if value is None or kind is bool:
        return "null" if value is None else "true" if value else "false"
    if kind is float and math.isfinite(value):
        return repr(value)
    return _Encoder(secrets).encode(value, 0)


def encode_field(name: str, value: Any, secrets: Secrets = ()) -> str:
    """Return the value of a name as JSON; what has a secret's name is hidden."""
    if is_secret_key(name) and not (value is None or isinstance(value, bool)):
        return _QUOTED_REDACTED
    return encode(value, secrets)


class _Encoder:
    """Encodes one value that may hold others, as many as fit."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._values_left = _MAX_VALUES
        self._text_left = _MAX_TEXT

    def encode(self, value: Any, depth: int) -> str:
        self._values_left -= 1
        if value is None or isinstance(value, bool | int | float):
            return self._number(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return quote(f"<{len(value)} bytes>")
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            if depth >= _MAX_DEPTH or self._values_left <= 0:
                return quote("…")
            if isinstance(value, Mapping):
                return self._mapping(value, depth + 1)
            return self._items(value, depth + 1)
        return self._text(value)

    def _number(self, value: int | float | None) -> str:
        if value is None or isinstance(value, bool):
            return "null" if value is None else "true" if value else "false"
        if isinstance(value, float):
            number = float(value)
            return repr(number) if math.isfinite(number) else quote(str(number))
        # Turning an endless integer into digits is slow, and Python refuses it.
        number = int(value)
        return str(number) if number.bit_length() <= 64 else quote(f"<{number.bit_length()} bits>")

    def _text(self, value: Any) -> str:
        text = text_of(value)
        limit = max(0, self._text_left)
        self._text_left -= len(text)
        return quote(without_secrets(text, self._secrets, limit) if limit else "…")

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> str:
        out = []
        for key, item in value.items():
            if self._values_left <= 0:
                out.append(f"{quote('…')}:{quote(f'{len(value)} items')}")
                break
            name = text_of(key)
            shown = without_secrets(name, self._secrets, _MAX_NAME)
            secret = is_secret_key(name) and not (item is None or isinstance(item, bool))
            out.append(f"{quote(shown)}:{_QUOTED_REDACTED if secret else self.encode(item, depth)}")
        return f"{{{','.join(out)}}}"

    def _items(self, value: Any, depth: int) -> str:
        out = []
        for item in value:
            if self._values_left <= 0:
                out.append(quote(f"… ({len(value)} items)"))
                break
            out.append(self.encode(item, depth))
        return f"[{','.join(out)}]"


@lru_cache(maxsize=1024)
def field_name(name: str) -> str:
    """A field's name as it may be shown."""
    return without_secrets(name, (), _MAX_NAME)
