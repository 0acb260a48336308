r"""Patterns of keys: one language, the same in this process and in Redis.

A pattern is held against a whole key. `*` is any text, newlines and the empty text too; `\*` is an
asterisk, `\\` a backslash. Every other character stands for itself, `?`, `[`, `]` and a backslash
before anything else included.
"""

import re
from collections.abc import Callable
from functools import partial

__all__ = ["compile_pattern", "covers", "escape_glob", "literal", "overlap", "redis_glob"]

# Asterisks in a row are taken as one: for Redis 7.0, `**` does not match the empty key.
_tokens = re.compile(r"\\[*\\]|\*+|[^*\\]+|\\").findall
#: What means something in a glob of Redis, within brackets too.
_escape = partial(re.compile(rb"[*?\[\]\\^\-]").sub, rb"\\\g<0>")


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    r"""Make the test of whether a key matches.

    It takes time in proportion to the key for each `*`, whatever the pattern; one without a `*`,
    and one with a single `*` at an end, are tested by one method of str.

    Args:
        pattern: Such as `user:*`.

    Raises:
        TypeError: It is not a str.
        ValueError: It has half of a surrogate pair.
    """
    first, *middles = _split(pattern)
    if not middles:
        return lambda key: key == first
    last = middles.pop()
    if not middles and not last:
        return lambda key: key.startswith(first)
    if not middles and not first:
        return lambda key: key.endswith(last)
    return _in_order(first, middles, last)


def _in_order(first: str, middles: list[str], last: str) -> Callable[[str], bool]:
    """Each piece is looked for once, as early as it can be: no pattern makes it go back."""

    def matches(key: str) -> bool:
        if not (key.startswith(first) and key.endswith(last)):
            return False
        at, end = len(first), len(key) - len(last)
        for middle in middles:
            at = key.find(middle, at, end)
            if at < 0:
                return False
            at += len(middle)
        return at <= end

    return matches


def overlap(one: str, other: str) -> bool:
    """Whether there is a text that both patterns match."""
    ours, theirs = _split(one), _split(other)
    if len(ours) == 1:
        return compile_pattern(other)(ours[0])
    if len(theirs) == 1:
        return compile_pattern(one)(theirs[0])
    # What is between the two ends may be as long as it has to be for the middles of both.
    first, long_first = sorted((ours[0], theirs[0]), key=len)
    last, long_last = sorted((ours[-1], theirs[-1]), key=len)
    return long_first.startswith(first) and long_last.endswith(last)


def covers(one: str, other: str) -> bool:
    """Whether a pattern matches all that another one does."""
    # Only an asterisk matches half of a surrogate pair, as no pattern has one.
    return compile_pattern(one)("\ud800".join(_split(other)))


def redis_glob(pattern: str) -> bytes:
    """The glob for MATCH of Redis that means the same.

    Args:
        pattern: Such as `user:*`.

    Raises:
        TypeError: It is not a str.
        ValueError: It has half of a surrogate pair.
    """
    return b"*".join(map(escape_glob, _split(pattern)))


def escape_glob(text: str) -> bytes:
    """A glob of Redis that matches exactly this text, for example in front of `redis_glob`."""
    return _escape(text.encode())


def literal(text: str) -> str:
    """A pattern that matches exactly this text."""
    return text.replace("\\", "\\\\").replace("*", "\\*")


def _split(pattern: str) -> list[str]:
    """The texts between the asterisks; several in a row are one."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"a pattern of keys must be a str such as 'user:*', got {type(pattern).__name__}."
        )
    _check_unicode(pattern)
    pieces = [""]
    for part in _tokens(pattern):
        if part[0] == "*":
            pieces.append("")
        else:
            pieces[-1] += part[-1] if part in ("\\*", "\\\\") else part
    return pieces


def _check_unicode(pattern: str) -> None:
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the pattern {pattern!a} has half of a surrogate pair at {error.start}, which no key "
            "can have; decode the text that it was made of as UTF-8."
        ) from None
