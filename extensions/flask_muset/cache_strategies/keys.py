r"""Keys of function calls: readable, the same for the same call, never the same for two others.

    get_user(42)                        user:42
    get_user("42")                      user:"42"
    find("ada@example.org", 1, page=2)  find:ada@example.org:1:page=2
    find(["a", "b c"], None)            find:[a,"b c"]:None:page=1
    report(date(2030, 1, 2), Kind.DAY)  report:date(2030-01-02):<app.kinds:Kind>(DAY)

Parameters stand in the order of the signature, joined by `:`; what can be given by name alone is
written with its name. A call has the same key in all processes and all versions of Python. The
text of an argument has no `*`, and no backslash but in escapes such as `\x2a`, so a key may be used
as the pattern of itself.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from hashlib import blake2b
from inspect import Parameter, signature
from itertools import islice
from types import NoneType
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

__all__ = ["MAX_KEY_LENGTH", "KeyMaker", "check_key"]

#: Characters of the longest key that is taken.
MAX_KEY_LENGTH: Final = 1024
#: Characters of the longest key that is made, and of the prefix that is left of a longer one.
_MAX_MADE: Final = 200
_MAX_PREFIX: Final = 128
_DIGEST_BYTES: Final = 20

_POSITIONAL: Final = {Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD}
_NAMED: Final = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}


def check_key(key: str) -> str:
    """The key, if it may be one.

    Raises:
        TypeError: It is not a str.
        ValueError: It is empty, longer than `MAX_KEY_LENGTH` characters, or has half of a
            surrogate pair.
    """
    if not isinstance(key, str):
        raise TypeError(
            f"a cache key must be a str, got {type(key).__name__}; write it as text first."
        )
    if not 0 < len(key) <= MAX_KEY_LENGTH:
        raise ValueError(
            f"a cache key must have 1 to {MAX_KEY_LENGTH} characters, got {len(key)}; put a digest "
            "in place of what makes it too long."
        )
    if not key.isascii():
        _check_unicode(key)
    return key


def _check_unicode(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the cache key {key!a} has half of a surrogate pair at {error.start}; decode the text "
            "that it was made of as UTF-8."
        ) from None


class KeyMaker:
    """Makes the keys of one function; it is called as the function is.

    A key of more than 200 characters gets a digest, behind `~`, in place of all that follows its
    prefix, of which it keeps the first 128 characters.

    Args:
        fn: Whose calls they are.
        prefix: What all keys begin with; None takes `module:qualname` of the function. Functions
            with the same prefix share their keys.

    Attributes:
        prefix: What all keys begin with.

    Raises:
        TypeError: `fn` cannot be called, or has no name of its own where it needs one; or the
            prefix is not a str.
        ValueError: The prefix is no key, see `check_key`; or nothing is known of the parameters.
    """

    __slots__ = ("_call", "_rest", "prefix")

    def __init__(self, fn: Callable[..., Any], prefix: str | None = None) -> None:
        if not callable(fn):
            raise TypeError(
                f"a {type(fn).__name__} cannot be called, so its calls cannot be cached; put the "
                "decorator below @classmethod or @property, next to the function."
            )
        self.prefix = check_key(_name_of(fn) if prefix is None else prefix)
        self._call = _Call(fn)
        self._rest = self._call.rest()

    def __call__(self, /, *args: Any, **kwargs: Any) -> str:
        """The key of a call.

        Raises:
            TypeError: The function cannot be called so; or an argument has neither a canonical
                text nor a method `__cache_key__`.
            RecursionError: An argument contains itself.
        """
        rest = None if kwargs else self._rest.get(len(args))
        try:
            if rest is None:
                key = ":".join([self.prefix, *self._call.texts(args, kwargs)])
            else:
                key = self.prefix
                for value in args + rest:
                    is_short = type(value) is int and -_BIG < value < _BIG
                    key = f"{key}:{value if is_short else _text(value)}"
        except _NoTextError as error:
            raise TypeError(self._call.refusal(args, kwargs, error)) from None
        return key if len(key) <= _MAX_MADE else self._shortened(key)

    def _shortened(self, key: str) -> str:
        digest = blake2b(key.encode(), digest_size=_DIGEST_BYTES).hexdigest()
        return f"{self.prefix[:_MAX_PREFIX]}:~{digest}"


class _Call:
    """How a function is called, and the texts of what it is called with.

    Args:
        fn: The function.
    """

    __slots__ = ("_defaults", "_leads", "_most", "_signature", "_where")

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._where = getattr(fn, "__qualname__", type(fn).__qualname__)
        self._signature = signature(fn)
        parameters = self._signature.parameters.values()
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        #: Of all parameters, what stands before the value; empty if not each has a name of its own.
        self._leads = {p.name: _lead(p) for p in parameters}
        if not {p.kind for p in parameters} <= _NAMED:
            self._leads = {}
        #: How many of them can be given by position.
        self._most = sum(not lead for lead in self._leads.values())

    def rest(self) -> dict[int, tuple[Any, ...]]:
        """By number of arguments, where all have a position: the defaults of the others."""
        parameters = self._signature.parameters.values()
        if not {p.kind for p in parameters} <= _POSITIONAL:
            return {}
        count, defaults = len(parameters), tuple(self._defaults.values())
        first = count - len(defaults)
        return {n: defaults[n - first :] for n in range(first, count + 1)}

    def texts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What the key of a call is made of, in its order.

        Raises:
            TypeError: The function cannot be called so.
            _NoTextError: An argument has no text.
        """
        values = self._by_name(args, kwargs)
        if values is None:
            return [f"{lead}{_text(value)}" for _, lead, value in self._bound(args, kwargs)]
        leads = self._leads.values()
        return [f"{lead}{_text(value)}" for lead, value in zip(leads, values, strict=True)]

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The values of all parameters; None if it is not as simple as that."""
        values, given = list(args), 0
        if not self._leads or len(args) > self._most:
            return None
        for name in islice(self._leads, len(args), None):
            if name in kwargs:
                values.append(kwargs[name])
                given += 1
            elif name in self._defaults:
                values.append(self._defaults[name])
            else:
                return None
        return values if given == len(kwargs) else None

    def _bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[str, str, Any]]:
        """Name of a parameter, what stands before its value, and the value."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._where}(): {error}") from None
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            parameter = self._signature.parameters[name]
            if parameter.kind is Parameter.VAR_POSITIONAL:
                yield from ((f"*{name}", "", one) for one in value)
            elif parameter.kind is Parameter.VAR_KEYWORD:
                yield from ((one, f"{_str(one)}=", value[one]) for one in sorted(value))
            else:
                yield name, _lead(parameter), value

    def refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: "_NoTextError") -> str:
        """What to say of a call that has no texts."""
        names = (name for name, _, value in self._bound(args, kwargs) if _has_no_text(value))
        return (
            f"{self._where}(): no cache key can be made of the parameter {next(names, '?')!r}: a "
            f"{error} has no canonical text; give that class a method __cache_key__() that returns "
            "what tells its values apart, such as an id, or pass that instead."
        )


def _lead(parameter: Parameter) -> str:
    return "" if parameter.kind in _POSITIONAL else f"{_str(parameter.name)}="


def _name_of(fn: Callable[..., Any]) -> str:
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "<lambda>")
    if module is None or name.endswith("<lambda>"):
        raise TypeError(
            f"a {type(fn).__name__} without a name of its own has no default for its cache keys; "
            "give a key_prefix, or decorate a function that was defined by def."
        )
    if getattr(fn, "__closure__", None):
        raise TypeError(
            f"{name} uses names of the function around it, so several functions may have this name "
            "and different results; give each a key_prefix of its own."
        )
    return f"{module}:{name}"


# --- The texts of values --------------------------------------------------------------------------
#
# Behind each stands the end or one of `:,=)]}`, which none has beside what is in its quotes and
# brackets: so it is plain where each ends, and its beginning tells its type.


class _NoTextError(Exception):
    """There is no canonical text for a type; its text is the name of the type."""


def _text(value: Any) -> str:
    write = _writers.get(type(value))
    return _text_of_object(value) if write is None else write(value)


def _has_no_text(value: Any) -> bool:
    try:
        _text(value)
    except _NoTextError:
        return True
    return False


def _text_of_object(value: Any) -> str:
    kind = type(value)
    if hasattr(kind, "__cache_key__"):
        return f"{_type(kind)}({_text(value.__cache_key__())})"
    if isinstance(value, type):
        return _type(value)
    if isinstance(value, Enum):
        # What is made of several flags may have no name.
        return f"{_type(kind)}({_text(value.value if isinstance(value, Flag) else value._name_)})"
    if is_dataclass(value) and _has_fields_only(value):
        items = [f"{_str(f.name)}={_text(getattr(value, f.name))}" for f in fields(value)]
        return f"{_type(kind)}({','.join(items)})"
    raise _NoTextError(f"{kind.__module__}.{kind.__qualname__}")


def _has_fields_only(value: Any) -> bool:
    """Whether nothing beside its fields tells a dataclass instance from others."""
    own = "__dataclass_fields__" in vars(type(value))
    return own and {f.name for f in fields(value)}.issuperset(getattr(value, "__dict__", ()))


_is_plain_type = re.compile(r"[A-Za-z0-9_.<>:]+").fullmatch


def _type(kind: type) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    return f"<{name}>" if _is_plain_type(name) else f"<{_quoted(name)}>"


# What reads like a number, or as None and such, is quoted. Letters are those of ASCII alone: what
# else is a letter depends on the version of Python.
_WORDS: Final = frozenset(("False", "None", "True", "inf", "nan"))
_is_bare = re.compile(
    r"(?!(?:[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?(?:nan|inf))\Z)"
    "[A-Za-z0-9_.@+/-]+"
).fullmatch
# Quotes, backslashes, asterisks, and what cannot be seen: controls, marks of direction, surrogates.
_odd = re.compile(
    '["\\\\*\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]'
)
_odd_byte = re.compile(r'[^ -~]|["\\*]')


def _str(text: str) -> str:
    if text.isidentifier() and text.isascii():
        return _quoted(text) if text in _WORDS else text
    return text if _is_bare(text) else _quoted(text)


def _quoted(text: str, odd: re.Pattern[str] = _odd) -> str:
    return f'"{odd.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _bytes(value: bytes) -> str:
    return f"b{_quoted(value.decode('latin-1'), _odd_byte)}"


_BIG: Final = 10**40


def _int(value: int) -> str:
    # Python refuses to write a very large one in decimals.
    return str(value) if -_BIG < value < _BIG else f"int({value:#x})"


def _decimal(value: Decimal) -> str:
    # Whether Python writes E or e depends on the decimal context.
    return f"Decimal({str(value).upper()})"


def _moment(value: datetime | time) -> str:
    text = f"{type(value).__name__}({value.isoformat()}"
    # A fixed offset is all in the text, the rules of a zone are not.
    if value.tzinfo is not None and type(value.tzinfo) is not timezone:
        text += f",{_text(value.tzinfo)}"
    return text + (",fold)" if value.fold else ")")


def _zone(value: ZoneInfo) -> str:
    if value.key is None:
        raise _NoTextError("ZoneInfo without a key")
    return f"ZoneInfo({_str(value.key)})"


def _dict(value: dict[Any, Any]) -> str:
    return f"{{{','.join(sorted(f'{_text(k)}={_text(v)}' for k, v in value.items()))}}}"


#: By exact type: a subclass may hold more than its base.
_writers: Final[dict[type, Callable[[Any], str]]] = {
    NoneType: str,
    bool: str,
    int: _int,
    float: str,
    str: _str,
    bytes: _bytes,
    Decimal: _decimal,
    UUID: lambda value: f"UUID({value})",
    date: lambda value: f"date({value})",
    datetime: _moment,
    time: _moment,
    timedelta: lambda value: f"timedelta({value})",
    timezone: lambda value: f"timezone({value.utcoffset(None)})",
    ZoneInfo: _zone,
    list: lambda value: f"[{','.join(map(_text, value))}]",
    tuple: lambda value: f"({','.join(map(_text, value))})",
    set: lambda value: f"set({','.join(sorted(map(_text, value)))})",
    frozenset: lambda value: f"frozenset({','.join(sorted(map(_text, value)))})",
    dict: _dict,
}
