"""One line of the log: JSON for machines, text for people."""

import json
import re
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from flask_muset.clock import SYSTEM
from flask_muset.logging.fields import fields_of_line
from flask_muset.logging.values import Secrets, quote, without_secrets

__all__ = ["coloured", "json_line", "text_line", "timestamp"]

_MAX_EXCEPTION = 8_192
#: Of an exception's text that is looked at: where it begins, and where it ends, which says most.
_EXCEPTION_HEAD, _EXCEPTION_TAIL = 2_048, 6_144
_COLOURS = {"DEBUG": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
#: The current second and its text, in one object because threads share it.
_second: tuple[float, str] = (-1.0, "")
_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1_000))


def timestamp() -> str:
    """Now: ISO 8601 in UTC with milliseconds."""
    global _second
    now = SYSTEM.wall()
    part = now % 1.0
    whole = now - part
    second, text = _second
    if whole != second:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
        _second = (whole, text)
    return text + _MILLISECONDS[int(part * 1000.0)]


_quoted_name = lru_cache(maxsize=1024)(quote)


def json_line(
    level: str,
    name: str,
    message: str,
    extra: Mapping[str, Any] | None = None,
    exception: BaseException | None = None,
) -> str:
    """Return a line of JSON with its newline.

    Args:
        level: Its name.
        name: Of the logger.
        message: Any text.
        extra: The line's own fields.
        exception: What is logged with it.
    """
    secrets, members = fields_of_line(extra)
    tail = "" if exception is None else f',"exception":{quote(_traceback(exception, secrets))}'
    return (
        f'{{"timestamp":"{timestamp()}","level":"{level}","logger":{_quoted_name(name)},'
        f'"message":{quote(without_secrets(message, secrets))}{members}{tail}}}\n'
    )


def _traceback(exception: BaseException, secrets: Secrets) -> str:
    """The traceback with its chained causes: bounded, without secrets."""
    text = "".join(traceback.format_exception(exception)).rstrip()
    if len(text) <= _MAX_EXCEPTION:
        return without_secrets(text, secrets)
    for secret in secrets:
        text = text.replace(secret, "[redacted]")
    head, tail = text[:_EXCEPTION_HEAD], text[-_EXCEPTION_TAIL:]
    # From whole line to whole line, because a secret that was cut in two would not be known.
    head, tail = head[: head.rfind("\n") + 1], tail[tail.find("\n") :]
    return f"{without_secrets(head)}… ({len(text)} characters){without_secrets(tail)}"


# --- For people -----------------------------------------------------------------------------------

_unprintable = re.compile(r"[^\S ]|[^\x20-\x7e\xa0-\U0010ffff]|[\u2028\u2029\ud800-\udfff]")


def _printable(text: str) -> str:
    """No character that could end the line, or that a terminal would obey."""
    return _unprintable.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def text_line(
    level: str,
    name: str,
    message: str,
    extra: Mapping[str, Any] | None = None,
    exception: BaseException | None = None,
) -> str:
    """Return the same as `json_line` gives as text; only an exception takes lines of its own."""
    return _as_text(json.loads(json_line(level, name, message, extra, exception)))


def _as_text(line: dict[str, Any]) -> str:
    moment = line.pop("timestamp").replace("T", " ").rstrip("Z")
    level, name, message = line.pop("level"), line.pop("logger"), line.pop("message")
    exception = line.pop("exception", None)
    fields = "".join(f" {_printable(key)}={_shown(value)}" for key, value in line.items())
    text = f"{moment} {level:<8} {_printable(name)}: {_printable(message)}{fields}\n"
    if exception is None:
        return text
    return text + "".join(f"    {_printable(part)}\n" for part in exception.split("\n"))


def _shown(value: Any) -> str:
    if isinstance(value, str) and value and not re.search(r'[\s="]', value):
        return _printable(value)
    return _printable(json.dumps(value, ensure_ascii=False))


def coloured(line: str, level: str) -> str:
    """Return a line of text with its level in colour, for a terminal."""
    colour = _COLOURS.get(level)
    if colour is None:
        return line
    return line.replace(f" {level:<8} ", f" \x1b[{colour}m{level:<8}\x1b[0m ", 1)
