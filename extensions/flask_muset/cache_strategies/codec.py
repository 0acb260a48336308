"""Values to bytes and back, exactly or not at all.

msgpack keeps None, bool, int, float, str, bytes, list and dict. All else is an extension type of
ours, whose body is msgpack again. Because msgspec changes what it does not know (a tuple to a list,
a Decimal to a str) without a word, every value is looked through by exact type before it is
encoded; what is not kept exactly is refused, with the path to it.

Classes of callers are named in the bytes, as `module:qualname`. A name is only ever looked up among
the classes that this codec knows: nothing that a store holds can import, find or run anything.
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import operator
import reprlib
import sys
import types
import typing
import zoneinfo
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from enum import Enum, Flag
from typing import Any, Final, TypeVar
from uuid import UUID, SafeUUID

import msgspec
from markupsafe import Markup
from werkzeug.datastructures import Headers
from werkzeug.utils import cached_property
from werkzeug.wrappers import Response

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Codec", "Unreadable", "UnsupportedType"]

T = TypeVar("T")

#: The longest value, in bytes.
MAX_BYTES: Final = 64 << 20
#: Levels of containers in a value. Reading takes a few frames of the stack for each of them, and
#: must have them wherever a value is read.
MAX_DEPTH: Final = 100

_Ext = msgspec.msgpack.Ext
_pack = msgspec.msgpack.Encoder().encode

#: What msgspec keeps as it is ...
_LEAVES: Final = frozenset({type(None), bool, int, float, str, bytes})
#: ... and what it keeps whatever the value: no int beyond 64 bits, no str with a lone surrogate.
_SURE_LEAVES: Final = _LEAVES - {int, str}

_SHOWN_STEPS: Final = 6


class Unreadable(ValueError):  # noqa: N818 - the name that users know
    """Bytes from which no value can be made: broken, foreign, or of a class that has changed."""


class UnsupportedType(TypeError):  # noqa: N818 - the name that users know
    """A value, or something in it, that would not come back as it is.

    Args:
        reason: What is wrong with it and what to do about it, to follow the path.

    Attributes:
        root: What the path begins with.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.root = "value"
        self._steps: list[str] = []

    @property
    def path(self) -> str:
        """Where it is, such as `value["user"].roles[2]`; the middle of a long path is left out."""
        steps = self._steps[::-1]
        if len(steps) > 2 * _SHOWN_STEPS:
            steps[_SHOWN_STEPS:-_SHOWN_STEPS] = ["..."]
        return self.root + "".join(steps)

    def within(self, step: str) -> "UnsupportedType":
        """Say in which part of a container it is; the innermost is said first."""
        self._steps.append(step)
        return self

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


# What msgpack does not have, as parts that it has, and back. Bodies come from stores: `make` may
# raise whatever it likes on parts that do not fit.


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _from_utf8(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _signed(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 8) // 8, "big", signed=True)


def _from_signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _zone(zone: datetime.tzinfo | None) -> Any:
    """None, the name of a ZoneInfo, or the microseconds (and the name) of a fixed offset."""
    if zone is None:
        return None
    if isinstance(zone, datetime.timezone):
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [offset // datetime.timedelta.resolution, *map(_utf8, name)]
    if type(zone) is zoneinfo.ZoneInfo and zone.key and zone is zoneinfo.ZoneInfo(zone.key):
        return zone.key
    raise UnsupportedType(
        f"is a zone of type {_full_name(type(zone))} that no name leads to; take a "
        "datetime.timezone or ZoneInfo(name)"
    )


def _from_zone(parts: Any) -> datetime.tzinfo | None:
    if parts is None:
        return None
    if isinstance(parts, str):
        return zoneinfo.ZoneInfo(parts)
    offset_us, *name = parts
    return datetime.timezone(datetime.timedelta(microseconds=offset_us), *map(_from_utf8, name))


def _zone_of(moment: datetime.datetime | datetime.time) -> Any:
    try:
        return _zone(moment.tzinfo)
    except UnsupportedType as error:
        raise error.within(".tzinfo") from None


def _time(moment: datetime.datetime | datetime.time) -> list[Any]:
    clock = [moment.hour, moment.minute, moment.second, moment.microsecond]
    return [*clock, _zone_of(moment), moment.fold]


def _from_time(parts: list[Any]) -> datetime.time:
    hour, minute, second, microsecond, zone, fold = parts
    return datetime.time(hour, minute, second, microsecond, _from_zone(zone), fold=fold)


def _datetime(moment: datetime.datetime) -> list[Any]:
    return [moment.toordinal(), *_time(moment)]


def _from_datetime(parts: list[Any]) -> datetime.datetime:
    day, *clock = parts
    return datetime.datetime.combine(datetime.date.fromordinal(day), _from_time(clock))


def _timedelta(delta: datetime.timedelta) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _uuid(uuid: UUID) -> list[Any]:
    return [uuid.bytes, uuid.is_safe.value]


def _from_uuid(parts: list[Any]) -> UUID:
    data, is_safe = parts
    return UUID(bytes=data, is_safe=SafeUUID(is_safe))


def _from_map(parts: list[Any]) -> dict[Any, Any]:
    keys, values = parts
    return dict(zip(keys, values, strict=True))


# How a value of a type is made ready for msgspec: a rule gets the codec, the value, the leaves and
# the depth of the value.
_Rule = Callable[["Codec", Any, frozenset[type], int], Any]


def _is_plain(value: Any, levels: int) -> bool:
    """Whether there is nothing in it but what msgspec keeps; most values are like that."""
    kind = type(value)
    if kind is dict and levels >= 0:
        for key, item in value.items():
            if type(key) is not str:
                return False
            if type(item) not in _LEAVES and not _is_plain(item, levels - 1):
                return False
        return True
    if kind is list and levels >= 0:
        for item in value:
            if type(item) not in _LEAVES and not _is_plain(item, levels - 1):
                return False
        return True
    return kind in _LEAVES


def _scalar(code: int, take: Callable[[Any], Any]) -> _Rule:
    def rule(_codec: "Codec", value: Any, _leaves: frozenset[type], _depth: int) -> Any:
        return _Ext(code, _pack(take(value)))

    return rule


def _collection(code: int, step: Callable[[int], str]) -> _Rule:
    def rule(codec: "Codec", value: Any, leaves: frozenset[type], depth: int) -> Any:
        return _Ext(code, _pack(codec._each(value, step, leaves, depth)))

    return rule


def _list_rule(codec: "Codec", value: list[Any], leaves: frozenset[type], depth: int) -> Any:
    return codec._each(value, "[{}]".format, leaves, depth)


def _key_step(key: Any) -> str:
    shown = reprlib.repr(key)
    is_easy = type(key) is str and '"' not in shown
    return f'["{shown[1:-1]}"]' if is_easy else f"[{shown}]"


def _dict_rule(codec: "Codec", value: dict[Any, Any], leaves: frozenset[type], depth: int) -> Any:
    keys: list[Any] = list(value)
    if not leaves.issuperset(map(type, keys)):
        keys = codec._each(keys, lambda _: ".<key>", leaves, depth)
    items = codec._each(value.values(), lambda i: _key_step(list(value)[i]), leaves, depth)
    if _Ext in map(type, keys):
        return _Ext(_MAP, _pack([keys, items]))
    return dict(zip(keys, items, strict=True))


def _str_rule(_codec: "Codec", value: str, _leaves: frozenset[type], _depth: int) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return _Ext(_STR, _pack(_utf8(value)))
    return value


def _int_rule(_codec: "Codec", value: int, _leaves: frozenset[type], _depth: int) -> Any:
    return value if -(2**63) <= value < 2**64 else _Ext(_INT, _pack(_signed(value)))


def _datetime_rule(
    _codec: "Codec", value: datetime.datetime, _leaves: frozenset[type], _depth: int
) -> Any:
    # msgpack has moments of UTC by itself; from others msgspec would take the zone.
    if value.tzinfo is datetime.UTC and not value.fold:
        return value
    return _Ext(_DATETIME, _pack(_datetime(value)))


def _response_rule(_codec: "Codec", value: Response, _leaves: frozenset[type], _depth: int) -> Any:
    if value.is_streamed or value.direct_passthrough:
        raise UnsupportedType(
            "is a response whose body is streamed, which is there only once; "
            "cache what the body is made of, or give the response a body of bytes"
        )
    # A cookie is for one client, and what is cached is for all.
    headers = [(name, text) for name, text in value.headers if name.lower() != "set-cookie"]
    texts = [value.status, *(text for pair in headers for text in pair)]
    return _Ext(_RESPONSE, _pack([value.get_data(), *map(_utf8, texts)]))


# The codes of the extension types. They are on the wire: a new one gets a new number.
_STR: Final = 1
_INT: Final = 2
_TUPLE: Final = 3
_SET: Final = 4
_FROZENSET: Final = 5
_MAP: Final = 6
_DECIMAL: Final = 7
_UUID: Final = 8
_DATETIME: Final = 9
_DATE: Final = 10
_TIME: Final = 11
_TIMEDELTA: Final = 12
_ZONE: Final = 13
_MARKUP: Final = 14
_RESPONSE: Final = 15
_OBJECT: Final = 16

_RULES: Final[dict[type, _Rule]] = {
    str: _str_rule,
    int: _int_rule,
    list: _list_rule,
    dict: _dict_rule,
    tuple: _collection(_TUPLE, "[{}]".format),
    set: _collection(_SET, lambda _: ".<item>"),
    frozenset: _collection(_FROZENSET, lambda _: ".<item>"),
    Decimal: _scalar(_DECIMAL, str),
    UUID: _scalar(_UUID, _uuid),
    datetime.datetime: _datetime_rule,
    datetime.date: _scalar(_DATE, datetime.date.toordinal),
    datetime.time: _scalar(_TIME, _time),
    datetime.timedelta: _scalar(_TIMEDELTA, _timedelta),
    datetime.timezone: _scalar(_ZONE, _zone),
    zoneinfo.ZoneInfo: _scalar(_ZONE, _zone),
    Markup: _scalar(_MARKUP, _utf8),
}

_MAKERS: Final[dict[int, Callable[[Any], Any]]] = {
    _STR: _from_utf8,
    _INT: _from_signed,
    _TUPLE: tuple,
    _SET: set,
    _FROZENSET: frozenset,
    _MAP: _from_map,
    _DECIMAL: Decimal,
    _UUID: _from_uuid,
    _DATETIME: _from_datetime,
    _DATE: datetime.date.fromordinal,
    _TIME: _from_time,
    _TIMEDELTA: lambda parts: datetime.timedelta(*parts),
    _ZONE: _from_zone,
    # It was a Markup, and no other text is made one.
    _MARKUP: lambda data: Markup(_from_utf8(data)),  # noqa: S704
}


def _short(text: Any) -> str:
    """Of what a store holds, no more than a line of a log takes."""
    return str(text)[:200]


# Classes of callers.


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """How the instances of one class are taken apart and made again.

    Attributes:
        cls: The class.
        name: What stands for it in the bytes.
        fields: The names of the parts, which must be the same when it is made again.
        take: Gives the parts.
        make: Makes an instance of parts that came from a store, without running code of its own.
    """

    cls: type
    name: str
    fields: tuple[str, ...]
    take: Callable[[Any], list[Any]]
    make: Callable[[list[Any]], Any]


def _full_name(cls: type) -> str:
    name = cls.__qualname__
    return name if cls.__module__ == "builtins" else f"{cls.__module__}.{name}"


def _wire_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_namedtuple(cls: type) -> bool:
    return issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)


def _is_met(cls: type) -> bool:
    """Whether instances of a class are kept without a word from the caller."""
    return issubclass(cls, (Enum, msgspec.Struct)) or dataclasses.is_dataclass(cls)


def _is_registrable(cls: type) -> bool:
    return _is_met(cls) or _is_namedtuple(cls)


def _resolves(cls: type) -> bool:
    """Whether the name of a class leads to it, so that other processes have it too."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _shape(cls: type) -> _Shape:
    if "<locals>" in cls.__qualname__:
        raise UnsupportedType(
            f"is of type {_full_name(cls)}, a class that was defined inside a function, so nobody "
            "else can find it by its name; move it to the level of the module"
        )
    if issubclass(cls, Enum):
        return _enum_shape(cls)
    if issubclass(cls, msgspec.Struct):
        return _struct_shape(cls)
    if dataclasses.is_dataclass(cls):
        return _dataclass_shape(cls)
    if _is_namedtuple(cls):
        return _namedtuple_shape(cls)
    raise UnsupportedType(
        f"is of type {_full_name(cls)}, which cannot be registered; dataclasses, enums, "
        "msgspec.Struct and named tuples can"
    )


def _enum_shape(cls: type[Enum]) -> _Shape:
    members = cls.__members__

    def take(member: Enum) -> list[Any]:
        if members.get(member._name_) is member:
            return [member._name_]
        parts: list[Any] = list(member) if isinstance(member, Flag) else []
        if isinstance(member, Flag) and functools.reduce(operator.or_, parts, cls(0)) is member:
            return [part._name_ for part in parts]
        raise UnsupportedType(f"is no member of {_full_name(cls)}, nor made of members: {member!r}")

    def make(names: list[Any]) -> Any:
        (name,) = names
        return members[name]

    def make_flag(names: list[Any]) -> Any:
        found: list[Any] = [members[name] for name in names]
        return functools.reduce(operator.or_, found or [cls(0)])

    return _Shape(cls, _wire_name(cls), (), take, make_flag if issubclass(cls, Flag) else make)


def _taker(
    cls: type, names: tuple[str, ...], defaults: dict[str, Any]
) -> Callable[[Any], list[Any]]:
    """What gives the values of the fields, and refuses an instance that has more or less."""
    known = frozenset(names)

    def take(value: Any) -> list[Any]:
        state: Any = object.__getstate__(value)
        if type(state) is tuple:  # the attributes and the slots
            state = {**(state[0] or {}), **(state[1] or {})}
        if state is None or state.keys() != known:
            state = defaults | (state or {})
            _check_state(cls, state.keys(), known)
        return [state[name] for name in names]

    return take


def _check_state(cls: type, found: Collection[str], known: frozenset[str]) -> None:
    for name in known.difference(found):
        raise UnsupportedType(f"has no value for its field {name!r}; set it")
    for name in found:
        if name not in known and not _is_derived(cls, name):
            raise UnsupportedType(
                f"has the attribute {name!r}, which is no field of {_full_name(cls)} and would be "
                "lost; make it a field or a cached_property, or cache something plainer"
            )


def _is_derived(cls: type, name: str) -> bool:
    """Whether an attribute is no part of the value: it comes again when it is asked for.

    The other one is the note that `Box[int](...)` leaves, of the arguments of a generic class.
    """
    attribute = inspect.getattr_static(cls, name, None)
    is_cached = isinstance(attribute, functools.cached_property | cached_property)
    return is_cached or name == "__orig_class__"


def _struct_shape(cls: type[msgspec.Struct]) -> _Shape:
    if hasattr(cls, "__post_init__"):
        raise UnsupportedType(
            f"is of type {_full_name(cls)}, a Struct with __post_init__, which would run again at "
            "each read; take a dataclass"
        )
    names = cls.__struct_fields__

    def make(values: list[Any]) -> Any:
        return cls(**dict(zip(names, values, strict=True)))

    return _Shape(cls, _wire_name(cls), names, _taker(cls, names, {}), make)


def _dataclass_shape(cls: type[Any]) -> _Shape:
    new = object.__new__
    try:
        new(cls)
    except TypeError as error:
        raise UnsupportedType(
            f"is of type {_full_name(cls)}, a dataclass that has more to it than its fields "
            f"({error}); take one that is based on none but dataclasses"
        ) from None
    fields = dataclasses.fields(cls)
    names = tuple(field.name for field in fields)
    slots = [name for name in names if _is_slot(cls, name)]
    defaults = {
        field.name: field.default
        for field in fields
        if field.default is not dataclasses.MISSING and field.name not in slots
    }

    def fill(values: list[Any]) -> Any:
        instance = new(cls)
        instance.__dict__.update(zip(names, values, strict=True))
        return instance

    def fill_slots(values: list[Any]) -> Any:
        instance = new(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(instance, name, value)
        return instance

    take = _taker(cls, names, defaults)
    return _Shape(cls, _wire_name(cls), names, take, fill_slots if slots else fill)


def _is_slot(cls: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(cls, name, None), types.MemberDescriptorType)


def _namedtuple_shape(cls: type[Any]) -> _Shape:
    names: tuple[str, ...] = cls._fields

    def take(value: Any) -> list[Any]:
        _check_state(cls, getattr(value, "__dict__", ()), frozenset())
        return list(tuple.__iter__(value))

    def make(values: list[Any]) -> Any:
        if len(values) != len(names):
            raise Unreadable(f"{len(values)} values are none of {_full_name(cls)}")
        return tuple.__new__(cls, values)

    return _Shape(cls, _wire_name(cls), names, take, make)


def _classes(hint: Any) -> Iterator[type]:
    """All classes in an annotation."""
    if isinstance(hint, type):
        yield hint
    elif isinstance(hint, Enum):  # of a Literal
        yield type(hint)
    for part in (typing.get_origin(hint), *typing.get_args(hint)):
        if part is not None:
            yield from _classes(part)


def _resolved(annotation: Any, near: dict[str, Any], module: dict[str, Any]) -> list[type] | None:
    """The classes in an annotation; None if it has names that lead to nothing."""
    holder = types.SimpleNamespace(__annotations__={"_": annotation})
    try:
        return list(_classes(typing.get_type_hints(holder, near, module)["_"]))
    except (AttributeError, NameError, SyntaxError, TypeError):
        return None


def _annotated(cls: type, fields: Collection[str]) -> tuple[list[type], bool]:
    """The classes in the annotations of the fields, and whether all could be resolved."""
    found: list[list[type] | None] = []
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        scope = vars(module) if module else {}
        near = {**vars(base), base.__name__: base}
        annotations = inspect.get_annotations(base)
        found += [_resolved(annotations[n], near, scope) for n in fields if n in annotations]
    return [other for classes in found for other in classes or ()], None not in found


def _refusal(cls: type) -> UnsupportedType:
    """What to say of a type that is not kept."""
    head = f"is of type {_full_name(cls)}, which a cache does not keep"
    if issubclass(cls, Awaitable):
        return UnsupportedType(f"{head}; await it: flask_muset.aio has the awaited forms")
    if issubclass(cls, bytearray | memoryview):
        return UnsupportedType(f"{head}; make bytes of it")
    if issubclass(cls, Response):
        return UnsupportedType(f"{head}; give the codec this response_class")
    if _is_namedtuple(cls):
        return UnsupportedType(f"{head} unless the class was registered; register it")
    for base in cls.__mro__:
        if base in _LEAVES or base in _RULES:
            return UnsupportedType(f"{head}; make a plain {_full_name(base)} of it")
    return UnsupportedType(f"{head}; make a dict, a list or a dataclass of what you need of it")


class Codec:
    """Encodes values and decodes them to what they were: same types, equal, nothing lost.

    Kept are None, bool, int of any size, float, str, bytes, list, tuple, dict (with any of these
    as keys that can be one), set, frozenset, Decimal, UUID, datetime, date, time, timedelta,
    timezone, ZoneInfo, Markup, enums, dataclasses, `msgspec.Struct`, registered named tuples and
    responses: their status, body and headers, without Set-Cookie.

    A dataclass, an enum and a Struct are registered when one is encoded. A process that only
    decodes has to register them, where they are defined:

        @codec.register
        @dataclass(frozen=True)
        class User: ...

    Of a dataclass the fields are kept, and set again without `__init__` and `__post_init__`.
    What was one object in two places comes back as two.

    Args:
        response_class: What responses are made of again; it and its bases can be encoded.
    """

    def __init__(self, *, response_class: type[Response] | None = None) -> None:
        self._response_class = _response_class(response_class)
        self._rules = dict(_RULES)
        for base in self._response_class.__mro__:
            if issubclass(base, Response):
                self._rules[base] = _response_rule
        self._shapes: dict[str, _Shape] = {}
        #: Classes in whose annotations there may be others; a dict keeps their order.
        self._unexplored: dict[type, Collection[str]] = {}
        self._makers = {
            **_MAKERS,
            _RESPONSE: self._make_response,
            _OBJECT: self._make_object,
        }
        self._read = msgspec.msgpack.Decoder(ext_hook=self._make).decode

    def encode(self, value: Any) -> bytes:
        """Make bytes of a value, which is not changed.

        Raises:
            UnsupportedType: It, or something in it, would not come back as it is, or it is more
                than `MAX_DEPTH` levels deep, or longer than `MAX_BYTES`.
        """
        payload = self._encode(value)
        if len(payload) > MAX_BYTES:
            raise UnsupportedType(
                f"takes {len(payload)} bytes, more than {MAX_BYTES}; keep it in parts"
            )
        return payload

    def _encode(self, value: Any) -> bytes:
        try:
            if _is_plain(value, MAX_DEPTH):
                return _pack(value)
            return _pack(self._wire(value, _LEAVES, 0))
        except (OverflowError, UnicodeEncodeError):
            # Too rare for all others to pay for: look at each int and str.
            return _pack(self._wire(value, _SURE_LEAVES, 0))

    def decode(self, payload: bytes) -> Any:
        """Make the value again.

        Raises:
            Unreadable: The bytes are broken, or the class of something in them is not registered
                or has other fields now.
        """
        try:
            return self._read(payload)
        except Unreadable:
            raise
        except Exception as error:
            text = _short(f"{type(error).__name__}: {error}")
            raise Unreadable(f"bytes that are no value, {text}") from error

    def register(self, cls: type[T]) -> type[T]:
        """Let a class be decoded, and those in the annotations of its fields; a decorator too.

        Args:
            cls: A dataclass, an enum, a `msgspec.Struct` or a named tuple, not defined inside a
                function. It takes the place of an earlier one of the same name.

        Raises:
            UnsupportedType: It is something else.
        """
        if not isinstance(cls, type):
            raise TypeError(f"register takes a class, got {cls!r}; give it the class itself")
        try:
            self._enrol(cls)
        except UnsupportedType as error:
            error.root = "an instance"
            raise
        return cls

    def register_returned(self, fn: Callable[..., Any]) -> None:
        """Register the classes in the annotation of what a function returns, as far as it tells."""
        inner = inspect.unwrap(fn)
        annotation = getattr(inner, "__annotations__", {}).get("return")
        self._enrol_found(_resolved(annotation, {}, getattr(inner, "__globals__", {})) or ())

    def _enrol(self, cls: type) -> _Rule:
        shape = _shape(cls)
        earlier = self._shapes.get(shape.name)
        if earlier is not None and earlier.cls is not cls:
            self._rules.pop(earlier.cls, None)
            self._unexplored.pop(earlier.cls, None)
        rule = _object_rule(shape)
        self._shapes[shape.name] = shape
        self._unexplored[cls] = shape.fields
        self._rules[cls] = rule
        return rule

    def _meet(self, cls: type) -> _Rule:
        """The rule for a type that was not met before."""
        if not _is_met(cls):
            raise _refusal(cls)
        if "<locals>" not in cls.__qualname__ and not _resolves(cls):
            raise UnsupportedType(
                f"is of type {_full_name(cls)}, but that name does not lead to its class; define "
                "it at the level of its module, or register it"
            )
        return self._enrol(cls)

    def _wire(self, value: Any, leaves: frozenset[type], depth: int) -> Any:
        """What msgspec encodes so that it comes back as this value, which is no leaf."""
        kind = type(value)
        rule = self._rules.get(kind) or self._meet(kind)
        if depth > MAX_DEPTH:
            raise UnsupportedType(f"is more than {MAX_DEPTH} levels deep, or it holds itself")
        return rule(self, value, leaves, depth)

    def _each(
        self,
        items: Iterable[Any],
        step: Callable[[int], str],
        leaves: frozenset[type],
        depth: int,
    ) -> list[Any]:
        """The same for all items; `step` is that of the path to one of them, by its number."""
        done: list[Any] = []
        try:
            for item in items:
                done.append(  # noqa: PERF401 - its length is the number of the one that fails
                    item if type(item) in leaves else self._wire(item, leaves, depth + 1)
                )
        except UnsupportedType as error:
            error.within(step(len(done)))
            raise
        return done

    def _make(self, code: int, body: memoryview) -> Any:
        return self._makers[code](self._read(body))

    def _make_response(self, parts: Sequence[Any]) -> Response:
        body, *data = parts
        # In one piece: a call for each costs more than the decoding. None of them has a line end.
        status, *texts = _from_utf8(b"\n".join(data)).split("\n")
        if type(body) is not bytes or len(texts) >= len(data):
            raise Unreadable("a response without a body, or with a line end in its head")
        fields = list(zip(texts[::2], texts[1::2], strict=True))
        headers = Headers()
        headers[:] = fields
        # A list, because of bytes the length would be written into the headers.
        response = self._response_class([body], status=status, headers=headers)
        if len(headers) != len(fields):
            headers[:] = fields  # without what the class has added, such as a Content-Type
        return response

    def _make_object(self, parts: Sequence[Any]) -> Any:
        name, fields, *values = parts
        shape = self._shapes.get(name) or self._find(name)
        if fields != ",".join(shape.fields):
            now = ",".join(shape.fields)
            raise Unreadable(f"{shape.name} had the fields {_short(fields)}, it has {now} now")
        return shape.make(values)

    def _find(self, name: str) -> _Shape:
        """Look for a class in the annotations of those that are registered.

        Not earlier: when a decorator registers a class, those below it do not exist yet.
        """
        ahead = list(self._unexplored)
        for cls in ahead:
            found, is_complete = _annotated(cls, self._unexplored.get(cls, ()))
            ahead += self._enrol_found(found)
            if is_complete:
                self._unexplored.pop(cls, None)
        if name not in self._shapes:
            raise Unreadable(f"{_short(name)} is not registered; register the class at import")
        return self._shapes[name]

    def _enrol_found(self, classes: Iterable[type]) -> list[type]:
        """Register those of the classes that can be and are not yet."""
        new = [cls for cls in classes if cls not in self._rules and _is_registrable(cls)]
        for cls in new:
            # One that is abstract, or defined in a function, says so when it is encoded.
            with contextlib.suppress(UnsupportedType):
                self._enrol(cls)
        return new


def _response_class(given: type[Response] | None) -> type[Response]:
    if given is None:
        return Response
    if not (isinstance(given, type) and issubclass(given, Response)):
        raise TypeError(f"response_class must be a subclass of werkzeug's Response, got {given!r}")
    return given


def _object_rule(shape: _Shape) -> _Rule:
    names, head = shape.fields, [shape.name, ",".join(shape.fields)]

    def rule(codec: "Codec", value: Any, leaves: frozenset[type], depth: int) -> Any:
        parts = codec._each(shape.take(value), lambda i: f".{names[i]}", leaves, depth)
        return _Ext(_OBJECT, _pack([*head, *parts]))

    return rule
