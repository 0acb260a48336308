"""Values to bytes and back: exactly, or refused with the path; hostile bytes are unreadable."""

import dataclasses
import datetime
import enum
import functools
import json
import math
import operator
import os
import pickle
import struct
import sys
import threading
import tracemalloc
import types
import uuid
import zoneinfo
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import flask
import msgspec
import pytest
import werkzeug.wrappers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.local import LocalProxy

from flask_muset.cache_strategies.codec import MAX_DEPTH, Codec, Unreadable, UnsupportedType

if TYPE_CHECKING:
    from nowhere import Missing

CLAIM = (
    "Decimal, UUID, datetime, set, tuple, bytes, nested dataclasses, Markup and Response "
    "round-trip exactly; an unsupported type is refused at set with the path to it"
)
PARIS = zoneinfo.ZoneInfo("Europe/Paris")
UTC = datetime.UTC
NAIVE_MIN, NAIVE_MAX = datetime.datetime.min, datetime.datetime.max  # noqa: DTZ901
T = TypeVar("T")

repeatable = functools.partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = ("blue", 2)
    ALSO_RED = "red"  # noqa: PIE796 - an alias


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"


class Right(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()
    OWN = enum.auto()


class Bits(enum.IntFlag):
    ONE = 1
    TWO = 2
    THREE = 3


@dataclass(frozen=True)
class Point:
    x: Any
    y: Any = 0


@dataclass(slots=True)
class Slotted:
    name: str
    tags: set[str] = field(default_factory=set)


@dataclass(slots=True)
class SlottedChild(Slotted):
    more: Any = None


@dataclass
class Tree:
    point: Point
    others: list["Tree"] = field(default_factory=list)


@dataclass
class Area:
    """Its size is no argument, and making one is counted."""

    made = 0

    width: int
    height: int
    size: int = field(init=False)
    unit: str = field(init=False, default="m2")

    def __post_init__(self) -> None:
        type(self).made += 1
        self.size = self.width * self.height

    @functools.cached_property
    def half(self) -> float:
        return self.size / 2


@dataclass
class Box(Generic[T]):
    item: T


@dataclass
class Named(Box[str]):
    name: str = ""


class Undecorated(Point):
    """A subclass that adds nothing."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    where: Point | None = None


class Eager(msgspec.Struct):
    number: int

    def __post_init__(self) -> None:
        self.number += 1


class Pair(NamedTuple):
    left: Any
    right: Any = None


class Outer:
    @dataclass
    class Inner:
        """Has a name with a dot."""

        x: int


@dataclass
class DictBased(dict):
    x: int = 0


class SubStr(str):
    __slots__ = ()


class SubMarkup(Markup):
    __slots__ = ()


class SubInt(int):
    pass


class SubDate(datetime.datetime):
    pass


class Here(datetime.tzinfo):
    def utcoffset(self, _moment):
        return datetime.timedelta(hours=1)


Unregistered = namedtuple("Unregistered", "a b")


def same_set(left, right):
    # Equal elements of other types, 1 and True, are never in one set.
    found = {element: element for element in right}
    return left == right and all(same(element, found[element]) for element in left)


def same_moment(left, right):
    naive = left.replace(tzinfo=None) == right.replace(tzinfo=None)
    return naive and (left.fold, repr(left.tzinfo)) == (right.fold, repr(right.tzinfo))


def same_sequence(left, right):
    return len(left) == len(right) and all(map(same, left, right))


def same_by(*parts):
    return lambda left, right: all(same(part(left), part(right)) for part in parts)


SAME = {
    float: same_by(struct.Struct(">d").pack),
    Decimal: same_by(Decimal.as_tuple),
    uuid.UUID: same_by(lambda u: u.bytes, lambda u: u.is_safe.value),
    list: same_sequence,
    tuple: same_sequence,
    dict: same_by(list, lambda d: list(d.values())),
    set: same_set,
    frozenset: same_set,
    datetime.datetime: same_moment,
    datetime.time: same_moment,
}


def same(left, right):
    """Whether two values are of the same types through and through, and equal."""
    if type(left) is not type(right):
        return False
    if dataclasses.is_dataclass(left):
        names = [f.name for f in dataclasses.fields(left)]
        return all(same(getattr(left, name), getattr(right, name)) for name in names)
    if isinstance(left, msgspec.Struct):
        return same(msgspec.structs.asdict(left), msgspec.structs.asdict(right))
    if isinstance(left, Pair):
        return same(tuple(left), tuple(right))
    return SAME.get(type(left), operator.eq)(left, right)


texts = st.text(st.characters(exclude_categories=()), max_size=8)
numbers = st.integers(-(2**200), 2**200) | st.integers(-3, 300)
offsets = st.timedeltas(
    datetime.timedelta(hours=-24, microseconds=1), datetime.timedelta(hours=24, microseconds=-1)
)
zones = st.none() | st.just(UTC) | st.timezones() | st.builds(datetime.timezone, offsets)
named_zones = zones | st.builds(datetime.timezone, offsets, texts)
enums = st.sampled_from([*Colour, *Level, *Word, *Bits, Bits(0), Right(0), ~Right.READ, Right.OWN])
hashable_leaves = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=8)
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.datetimes(timezones=named_zones)
    | st.dates()
    | st.times(timezones=st.none() | st.just(UTC) | st.builds(datetime.timezone, offsets))
    | st.timedeltas()
    | st.builds(Markup, texts)
    | enums
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.frozensets(inner, max_size=3)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=5,
)
leaves = hashable_leaves | st.just(math.nan) | st.sampled_from([Decimal("NaN"), Decimal("-sNaN7")])
values = st.recursive(
    leaves | hashables,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(texts, inner, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.builds(Point, inner, inner)
        | st.builds(SlottedChild, texts, st.sets(texts, max_size=2), inner)
        | st.builds(Box, inner)
        | st.builds(Tree, st.builds(Point, inner), st.just([]))
        | st.builds(Pair, inner, inner)
        | st.builds(Record, number=st.integers(0, 9), where=st.builds(Point, inner))
    ),
    max_leaves=12,
)

codec = Codec()
codec.register(Pair)


@pytest.mark.claim(CLAIM)
def test_values_come_back_exactly(prove):
    """Whatever is made of the supported types comes back: types, order, folds, signs and all."""
    examples = 3000 if prove.full else 300

    @repeatable(max_examples=examples)
    @given(values)
    def check(value):
        assert same(codec.decode(codec.encode(value)), value)

    check()
    prove.figure(f"{examples} generated values")


@pytest.mark.parametrize(
    "value",
    [
        2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 2**5000, -(2**64),
        -0.0, math.inf, -math.inf, math.nan, 5e-324,
        "", "\x00", "\ud800", "\ud83d\ude00", "\U0001f600", b"", b"\x80\x04", Markup("<b>"),
        [], (), {}, set(), frozenset(), [[]], ((),), {(): {}}, {1: "a", "1": "b", None: "c"},
        {True: 1}, {1.0: 2}, {b"k": 1}, {"b": 1, "a": 2}, {(1, "x"): {frozenset({(1,)}): 1}},
        {2**70: "\udfff"}, {"\udfff": 1}, {datetime.datetime(2026, 1, 2, tzinfo=UTC): 1},
        Decimal("1.10"), Decimal("-0E+7"), Decimal("1E+999999"), Decimal("Infinity"),
        uuid.UUID(int=0), uuid.UUID(int=5, is_safe=uuid.SafeUUID.safe),
        NAIVE_MIN, NAIVE_MAX, NAIVE_MIN.replace(tzinfo=UTC), NAIVE_MAX.replace(tzinfo=UTC),
        datetime.datetime(2026, 10, 25, 2, 30, tzinfo=PARIS, fold=1),
        datetime.datetime(2026, 10, 25, 2, 30, tzinfo=PARIS),
        NAIVE_MIN.replace(fold=1),
        datetime.datetime(2026, 10, 25, 2, 30, tzinfo=UTC, fold=1),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(0), "UTC")),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "x")),
        datetime.time.min, datetime.time(2, 30, tzinfo=PARIS, fold=1), datetime.date.max,
        datetime.timedelta.max, datetime.timedelta.min, UTC, PARIS,
        *Colour, *Level, *Word, *Right, *Bits, Right(0), Right.READ | Right.OWN, Bits.THREE,
        Point(Point(1), (Slotted("a", {"b"}),)), Slotted("n"), SlottedChild("n", {"x"}, [1]),
        Tree(Point(1), [Tree(Point(2)), Tree(Point(3), [Tree(Point({}))])]),
        Area(2, 3), Box([Box(1)]), Named("item", "name"), Undecorated(1, 2), Outer.Inner(3),
        Record(number=1, where=Point(2)), Pair(1, Pair({2})),
    ],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
def test_edges_come_back_exactly(value):
    """The ends of each type's range come back, alone and inside of other values."""
    for whole in (value, [value], {"a": (value, {"b": value})}, Point(value)):
        assert same(codec.decode(codec.encode(whole)), whole)


def test_a_nan_is_a_key_of_its_own():
    """A NaN as a key, which equals nothing, comes back as a key."""
    (key,) = codec.decode(codec.encode({math.nan: 1}))
    assert math.isnan(key)


def test_zones_come_back_as_the_zones_that_everybody_has():
    """UTC and a named zone are the objects that the process has; an offset has its name."""
    plus_two = datetime.timezone(datetime.timedelta(hours=2), "\ud800")
    moments = [datetime.datetime(2026, 1, 1, tzinfo=zone) for zone in (UTC, PARIS, plus_two)]
    utc, paris, offset = (moment.tzinfo for moment in codec.decode(codec.encode(moments)))
    assert utc is UTC
    assert paris is PARIS
    assert offset.tzname(None) == "\ud800"


def test_what_was_plain_is_plain_msgpack():
    """A record of plain values has no more bytes than msgpack needs."""
    value = {"id": 1, "roles": ["a", "b"], "score": 1.5, "none": None, "raw": b"x"}
    assert codec.encode(value) == msgspec.msgpack.encode(value)


@repeatable(max_examples=100)
@given(values)
def test_the_callers_value_is_not_changed(value):
    """Encoding reads: the value is afterwards what it was."""
    before = codec.decode(codec.encode(value))
    codec.encode(value)
    assert same(value, before)


def test_a_copy_shares_nothing():
    """What is decoded may be changed without the next one noticing."""
    payload = codec.encode({"roles": ["admin"], "tree": Tree(Point([]))})
    first = codec.decode(payload)
    first["roles"].append("x")
    first["tree"].point.x.append(1)
    assert codec.decode(payload) == {"roles": ["admin"], "tree": Tree(Point([]))}


# --- Dataclasses and other classes


def test_a_dataclass_is_made_without_running_its_code():
    """Neither __init__ nor __post_init__ runs at a read; fields without an argument are kept."""
    area = Area(2, 3)
    area.size = 7
    payload = codec.encode(area)
    made = Area.made
    found = codec.decode(payload)
    assert Area.made == made
    assert (found, found.size, found.unit) == (area, 7, "m2")


def test_a_cached_property_is_no_field():
    """A cached_property that was asked for does not stop a value, and is worked out anew."""
    area = Area(2, 3)
    assert area.half == 3
    found = codec.decode(codec.encode(area))
    assert "half" not in vars(found)
    assert found.half == 3


def test_a_generic_class_with_its_argument():
    """`Box[int](1)`, which notes its argument on the instance, is kept as a Box."""
    assert same(codec.decode(codec.encode(Box[int](1))), Box(1))


def test_what_a_dataclass_has_beside_its_fields_is_not_lost_silently():
    """An attribute that is no field, a field without a value and a dict's items are refused."""
    more = Point(1)
    vars(more)["note"] = 1
    less, least = Slotted("n"), SlottedChild("n")
    del less.tags, least.more
    with pytest.raises(UnsupportedType, match=r"value\[0\] has the attribute 'note'"):
        codec.encode([more])
    with pytest.raises(UnsupportedType, match="value has no value for its field 'tags'"):
        codec.encode(less)
    with pytest.raises(UnsupportedType, match="value has no value for its field 'more'"):
        codec.encode(least)
    with pytest.raises(UnsupportedType, match="more to it than its fields"):
        codec.encode(DictBased(1))


def test_a_flag_with_unknown_bits_is_refused():
    """Bits that have no name could mean something else after a deploy."""
    assert codec.decode(codec.encode(Bits.ONE | Bits.TWO)) is Bits.THREE
    with pytest.raises(UnsupportedType, match="nor made of members"):
        codec.encode(Bits(8 | 1))


def test_a_struct_that_would_run_code_is_refused():
    """A Struct with __post_init__ would not come back as it was."""
    with pytest.raises(UnsupportedType, match=r"value\[0\] is of type .*Eager.*__post_init__"):
        codec.encode([Eager(1)])


def test_a_named_tuple_is_kept_once_it_is_registered():
    """An unknown named tuple is refused with the cure; a registered one comes back as its class."""
    own = Codec()
    with pytest.raises(UnsupportedType, match=r'value\["a"\] .*Unregistered.*register it'):
        own.encode({"a": Unregistered(1, 2)})
    assert own.register(Unregistered) is Unregistered
    assert same(own.decode(own.encode(Unregistered(1, (2,)))), Unregistered(1, (2,)))


def test_classes_are_found_in_the_annotations_of_a_registered_class():
    """A process that only reads knows the classes below the one that it registered."""
    reader = Codec()
    reader.register(Whole)
    part = Part(Level.LOW, Colour.RED, Box(Right.READ), Pair(Record(number=1)), Part.Inside.HERE)
    whole = Whole([part], {"k": part}, None)
    assert same(reader.decode(Codec().encode(Part(Level.LOW))), Part(Level.LOW))
    with_pairs = Codec()
    with_pairs.register(Pair)
    assert same(reader.decode(with_pairs.encode(whole)), whole)


@dataclass
class Whole:
    parts: list["Part"]
    by_name: "dict[str, Part | None]"
    missing: "Missing | None"


@dataclass
class Part:
    level: Level | None
    colour: Literal[Colour.RED] | None = None
    box: "Box[Right] | None" = None
    pair: tuple[Pair, ...] | Record | None = None
    inside: "Inside | None" = None

    class Inside(enum.Enum):
        """Its name leads to it inside of the class alone."""

        HERE = 1


def test_classes_are_found_in_what_a_function_returns():
    """The class that a cached function says that it returns can be read before it ever ran."""

    def load(number: int) -> "list[Whole] | None": ...

    elsewhere = types.FunctionType((lambda: None).__code__, {})
    wrapper = functools.update_wrapper(elsewhere, load)
    reader = Codec()
    reader.register_returned(wrapper)
    reader.register_returned(functools.partial(load, 1))
    reader.register_returned(lambda: None)
    whole = Whole([], {}, Level.LOW)
    assert same(reader.decode(Codec().encode([whole])), [whole])


REGISTERS_AT_IMPORT = """
from dataclasses import dataclass

@codec.register
@dataclass
class First:
    second: "Second"
    more: "First | None" = None

@dataclass
class Second:
    x: int
"""


def test_register_is_a_decorator():
    """A class below the decorated one, which was not there yet, is found when it is met."""
    module = types.ModuleType("registers_at_import")
    sys.modules[module.__name__] = module
    module.codec = reader = Codec()
    try:
        exec(REGISTERS_AT_IMPORT, vars(module))
        value = module.First(module.Second(1), module.First(module.Second(2)))
        assert same(reader.decode(Codec().encode(value)), value)
    finally:
        del sys.modules[module.__name__]


def named(name, fields, **options):
    """A dataclass that says that it is of this module."""
    cls = dataclasses.make_dataclass(name, fields, **options)
    cls.__module__, cls.__qualname__ = __name__, name
    return cls


def test_a_class_that_has_changed_makes_old_bytes_unreadable():
    """A field more, a field less, another order and another member are told, never guessed."""
    writer = Codec()
    payload = writer.encode(writer.register(named("Changing", ["a", "b"]))(1, 2))
    for fields in (["a"], ["a", "b", "c"], ["b", "a"], ["a", "c"]):
        reader = Codec()
        reader.register(named("Changing", fields))
        with pytest.raises(Unreadable, match=r"Changing had the fields a,b, it has"):
            reader.decode(payload)
    reader = Codec()
    reader.register(enum.Enum("Colour", "GREEN", module=__name__))
    with pytest.raises(Unreadable):
        reader.decode(Codec().encode(Colour.RED))


def test_a_reloaded_class_takes_the_place_of_the_old_one():
    """After a reload bytes become the new class, and instances of the old one are refused."""
    own = Codec()
    old = own.register(named("Reloaded", ["a"]))
    payload = own.encode(old(1))
    new = own.register(named("Reloaded", ["a"]))
    assert type(own.decode(payload)) is new
    with pytest.raises(UnsupportedType, match="does not lead to its class"):
        own.encode(old(1))


def test_local_classes_are_refused():
    """A class that was defined inside a function cannot be found by others, registered or not."""

    @dataclass
    class Local:
        x: int

    class Inside(enum.Enum):
        A = 1

    for value in (Local(1), Inside.A):
        with pytest.raises(UnsupportedType, match=r"value\[0\] .*<locals>.*inside a function"):
            codec.encode([value])
        with pytest.raises(UnsupportedType, match=r"an instance is of type .*inside a function"):
            codec.register(type(value))


@pytest.mark.parametrize("cls", [object, int, dict, UserWarning, flask.Response, DictBased])
def test_register_refuses_what_it_cannot_keep(cls):
    """Only dataclasses, enums, Structs and named tuples can be registered."""
    with pytest.raises(UnsupportedType, match="an instance is of type"):
        Codec().register(cls)


def test_register_refuses_an_instance():
    """Giving an instance instead of its class is an error that says so."""
    with pytest.raises(TypeError, match="register takes a class, got Point"):
        Codec().register(Point(1))


def test_names_from_a_store_lead_to_nothing_that_is_not_registered():
    """A stored name imports no module and finds no class, however real it is."""
    absent = "antigravity"
    assert absent not in sys.modules
    names = [f"{absent}:x", "os:system", "builtins:eval", f"{__name__}:Area", f"{__name__}:Box"]
    for name in names:
        for fields in ("", "item", "width,height,size,unit"):
            body = msgspec.msgpack.encode([name, fields, "true"])
            with pytest.raises(Unreadable, match="not registered"):
                Codec().decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(16, body)))
    assert absent not in sys.modules


def test_many_threads_meet_a_class_at_once():
    """Threads that encode and decode a new class at the same time all succeed."""
    payload = Codec().encode([Whole([Part(Level.LOW)], {}, None)])
    for _ in range(20):
        shared = Codec()
        shared.register(Whole)
        shared.register(Part)
        start, failed = threading.Barrier(4), []

        def work(shared=shared, start=start, failed=failed):
            start.wait()
            try:
                shared.decode(payload)
                shared.encode(Whole([Part(Level.HIGH, Colour.BLUE)], {}, None))
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []


# --- Responses


@pytest.mark.claim(CLAIM)
def test_a_response_comes_back(prove):
    """Status with its reason, headers in order with repeated ones, body; cookies stay behind."""
    response = flask.Response("grün".encode(), status="404 Nowhere To Be Found", mimetype="text/x")
    for value in ("1", "2"):
        response.headers.add("X-More", value)
    response.headers["X-mIXed"] = "ä"
    response.set_cookie("session", "secret")
    own = Codec(response_class=flask.Response)
    payload = own.encode({"page": response})
    found = own.decode(payload)["page"]
    assert type(found) is flask.Response
    assert (found.status, found.status_code) == ("404 Nowhere To Be Found", 404)
    assert list(found.headers) == [pair for pair in response.headers if pair[0] != "Set-Cookie"]
    assert found.get_data() == "grün".encode()
    assert b"secret" not in payload
    assert "Set-Cookie" in response.headers
    prove.figure("status, repeated headers, body; no Set-Cookie")


def test_a_response_gets_no_header_that_it_did_not_have():
    """No Content-Type or Content-Length appears on the way; a body in pieces is one."""
    response = werkzeug.wrappers.Response([b"a", "b"], status=204)
    response.headers.clear()
    found = codec.decode(codec.encode(response))
    assert type(found) is werkzeug.wrappers.Response
    assert list(found.headers) == []
    assert found.get_data() == b"ab"
    assert response.response == [b"a", "b"]


def test_a_response_of_a_base_becomes_one_of_the_app():
    """What Werkzeug itself makes, such as an HTTP exception, becomes the app's class."""
    own = Codec(response_class=flask.Response)
    assert type(own.decode(own.encode(werkzeug.wrappers.Response("x")))) is flask.Response


def test_streamed_responses_are_refused():
    """A body that is there only once is refused with its path, and not consumed."""
    stream = werkzeug.wrappers.Response(iter([b"a"]))
    passing = werkzeug.wrappers.Response([b"a"], direct_passthrough=True)
    for response in (stream, passing):
        with pytest.raises(UnsupportedType, match=r'value\["r"\]\[0\] is a response .* streamed'):
            codec.encode({"r": [response]})
    assert list(stream.response) == [b"a"]


def test_responses_of_another_class_are_refused():
    """A subclass would come back as another type; the message has the cure."""
    with pytest.raises(UnsupportedType, match="response_class"):
        codec.encode(flask.Response("x"))
    with pytest.raises(TypeError, match=r"response_class must be .*Response, got <class 'dict'>"):
        Codec(response_class=dict)


# --- Refused


REFUSED = [
    (object(), "object, .*; make a dict"),
    (bytearray(b"x"), "bytearray, .*; make bytes"),
    (memoryview(b"x"), "memoryview, .*; make bytes"),
    (1j, "complex"),
    (range(3), "range"),
    (..., "ellipsis"),
    (int, "type"),
    (len, "builtin_function_or_method"),
    (iter([1]), "list_iterator"),
    (ValueError("x"), "ValueError"),
    (OrderedDict(a=1), r"collections\.OrderedDict, .*; make a plain dict"),
    (defaultdict(list), r"collections\.defaultdict, .*; make a plain dict"),
    (SubStr("x"), r"SubStr, .*; make a plain str"),
    (SubInt(1), r"SubInt, .*; make a plain int"),
    (SubDate(2026, 1, 1), r"SubDate, .*; make a plain datetime\.datetime"),
    (SubMarkup("x"), r"SubMarkup, .*; make a plain markupsafe\.Markup"),
    (Unregistered(1, 2), "Unregistered, .*; register it"),
    (types.SimpleNamespace(a=1), r"types\.SimpleNamespace"),
    (json, "module"),
    (msgspec.UNSET, "UnsetType"),
    (LocalProxy(dict), "LocalProxy"),
]


@pytest.mark.claim(CLAIM)
def test_an_unsupported_type_names_its_path(prove):
    """Where it is, of which type it is and what to do, wherever in a value it is."""
    for bad, says in REFUSED:
        record = Record(number=1, where=Point(1, bad))
        places = {
            "value": bad,
            'value["user"]["roles"][2]': {"user": {"roles": [1, 2, bad]}},
            'value["user"].x[1]': {"user": Point((1, bad))},
            "value[3][0].more.where.y": {3: [SlottedChild("a", set(), record)]},
            "value[(1, 2)].item": {(1, 2): Box(bad)},
        }
        for path, value in places.items():
            with pytest.raises(UnsupportedType, match=says) as caught:
                codec.encode(value)
            assert caught.value.path == path
            assert str(caught.value).startswith(f"{path} is of type ")
    prove.figure(f"{len(REFUSED)} refused types, each in {len(places)} places")


def test_unsupported_keys_and_items_of_sets_are_named():
    """A key and an item of a set have no index; the path says which of both it is."""
    with pytest.raises(UnsupportedType, match=r'value\["a"\]\.<key>\[1\] is of type complex'):
        codec.encode({"a": {("x", 1j): 1}})
    with pytest.raises(UnsupportedType, match=r"value\.<item> is of type complex"):
        codec.encode({1, 1j})
    with pytest.raises(UnsupportedType, match=r"value\.<key> is of type .*SubStr"):
        codec.encode({SubStr("k"): 1})


def test_unknown_zones_are_named():
    """A zone that has no name for others is refused as the zone of its datetime."""
    with open(os.path.join(zoneinfo.TZPATH[0], "Europe/Paris"), "rb") as file:
        nameless = zoneinfo.ZoneInfo.from_file(file)
    for zone in (Here(), nameless, zoneinfo.ZoneInfo.no_cache("Europe/Paris")):
        moment = datetime.datetime(2026, 1, 1, tzinfo=zone)
        with pytest.raises(UnsupportedType, match=r"value\[0\]\.tzinfo is a zone of type"):
            codec.encode([moment])


def test_cycles_are_refused():
    """A value that holds itself is an error with a short path, in any container."""
    for make in (lambda x: [x], lambda x: {"k": x}, lambda x: [(x,)], lambda x: [Point(x)]):
        root = []
        root.append(make(root))
        with pytest.raises(UnsupportedType, match="levels deep, or it holds itself") as caught:
            codec.encode(root)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"k": x}, Point, Box])
def test_depth_has_a_limit_that_can_always_be_read(wrap):
    """What is as deep as allowed is read even far down a stack; one level more is refused."""
    value = 1
    for _ in range(MAX_DEPTH + 1):
        value = wrap(value)
    payload = codec.encode(value)
    assert codec.encode(at_depth(500, codec.decode, payload)) == payload
    for deeper in (wrap(value), [wrap(value)] * 2):
        with pytest.raises(UnsupportedType, match=f"more than {MAX_DEPTH} levels deep"):
            codec.encode(deeper)


def at_depth(frames, fn, *args):
    return fn(*args) if frames == 0 else at_depth(frames - 1, fn, *args)


# --- Hostile bytes

SAMPLES = [
    codec.encode(value)
    for value in (
        {"id": 1, "roles": ["admin"], "at": datetime.datetime(2026, 1, 1, tzinfo=PARIS)},
        [Decimal("1.5"), uuid.UUID(int=7), {1, 2}, (1, 2), frozenset("ab"), 2**70, "\ud800"],
        Tree(Point(1), [Tree(Point({(1, 2): Colour.RED}))]),
        [datetime.date(2026, 1, 1), datetime.time(1), datetime.timedelta(1), UTC, Markup("<b>")],
        {Level.LOW: Right.READ | Right.OWN, (1,): Record(number=1), Pair(1, 2): Word.YES},
        werkzeug.wrappers.Response("body", headers=[("X-A", "1")]),
    )
]


def decode_or_refuse(payload):
    """The only two ways out."""
    try:
        return codec.decode(payload)
    except Unreadable:
        return None


@repeatable(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes(payload):
    """Bytes of nobody are a value or unreadable, and nothing else."""
    decode_or_refuse(payload)


bodies = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | st.sampled_from([f"{__name__}:{name}" for name in ("Point", "Right", "Record", "Pair")])
    | st.sampled_from(["x,y", "number,where", "left,right", "READ", "", "Europe/Paris", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=7)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(
            lambda code, body: msgspec.msgpack.Ext(code, msgspec.msgpack.encode(body)),
            st.integers(0, 18),
            inner,
        )
    ),
    max_leaves=10,
)


@repeatable(max_examples=300)
@given(bodies)
def test_well_formed_bytes_with_wrong_parts(body):
    """Extension types with the parts of others, as only an attacker writes them."""
    decode_or_refuse(msgspec.msgpack.encode(body))


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (6, [[1, 2], [3]]),
        (15, ["no bytes", b"200 OK"]),
        (15, [b"body", b"200 OK", b"a header without a value"]),
        (15, [b"body", b"200 OK", b"X-A", b"1\r\nX-B: 2"]),
        (16, [f"{__name__}:Point", "x,y", 1]),
        (16, [f"{__name__}:Slotted", "name,tags", 1, 2, 3]),
        (16, [f"{__name__}:Record", "number,where", 1]),
        (16, [f"{__name__}:Pair", "left,right", 1]),
        (16, [f"{__name__}:Right", "", "NONE"]),
        (16, [f"{__name__}:Colour", ""]),
        (16, [f"{__name__}:Level", "", "LOW", "HIGH"]),
    ],
)
def test_parts_that_do_not_fit(code, parts):
    """More or fewer parts than there must be are unreadable, not filled up or left out."""
    codec.encode([Point(1), Slotted("a"), Record(number=1), Right.READ, Colour.RED, Level.LOW])
    with pytest.raises(Unreadable):
        codec.decode(
            msgspec.msgpack.encode(msgspec.msgpack.Ext(code, msgspec.msgpack.encode(parts)))
        )


@repeatable(max_examples=300)
@given(st.sampled_from(SAMPLES), st.data())
def test_mutated_bytes(payload, data):
    """Bytes changed, lost, doubled and cut are a value or unreadable."""
    changed = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        cut = data.draw(st.integers(0, 3))
        changed[at : at + cut] = data.draw(st.binary(max_size=3))
    decode_or_refuse(bytes(changed))


def test_every_truncation_is_unreadable():
    """A value that was cut anywhere is never taken for a value."""
    for payload in SAMPLES:
        for end in range(len(payload)):
            with pytest.raises(Unreadable):
                codec.decode(payload[:end])


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", b'{"a": 1}', b"null and more", pickle.dumps({"a": 1}),
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x03", b"\x81\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000, b"\x81\x01" * 100_000, b"\xdd\x0f\xff\xff\xff" + b"\x90" * 1000,
        b"\xd4\x63\x01", b"\xa3\xed\xa0\x80",
    ],
    ids=lambda payload: ascii(payload)[:30],
)  # fmt: skip
def test_hostile_bytes_are_unreadable_and_small(payload):
    """Lengths that lie, nesting without end, pickles and JSON: unreadable, without the memory."""
    tracemalloc.start()
    try:
        with pytest.raises(Unreadable) as caught:
            codec.decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


def test_nesting_of_extension_types_without_end():
    """Sets of sets of sets: unreadable before the stack ends."""
    payload = b"\x01"
    for _ in range(3000):
        payload = msgspec.msgpack.encode(msgspec.msgpack.Ext(3, b"\x91" + payload))
    with pytest.raises(Unreadable):
        codec.decode(payload)


class Planted:
    """Runs a function when it is unpickled."""

    ran = 0

    def __reduce__(self):
        return (plant, ())


def plant():
    Planted.ran += 1
    return 1


def test_a_planted_pickle_runs_nothing():
    """A pickle in the store's place is unreadable bytes, in every protocol."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        planted = pickle.dumps(Planted(), protocol)
        pickle.loads(planted)
        assert Planted.ran == protocol + 1
        with pytest.raises(Unreadable):
            codec.decode(planted)
        assert Planted.ran == protocol + 1


def test_long_names_from_a_store_are_cut_in_messages():
    """Nobody fills the log through a name in a payload."""
    for parts in (["n" * 10_000, ""], [f"{__name__}:Point", "f" * 10_000]):
        body = msgspec.msgpack.encode(parts)
        codec.encode(Point(1))
        with pytest.raises(Unreadable) as caught:
            codec.decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(16, body)))
        assert len(str(caught.value)) < 500


def test_a_value_that_is_too_large_is_refused():
    """What would not fit into an entry is refused at once, with its size and the cure."""
    with pytest.raises(UnsupportedType, match=r"67108871 bytes.*in parts"):
        Codec().encode(bytes((64 << 20) + 2))
