r"""Keys of function calls: the same for the same call, different for different ones, readable."""

import functools
import itertools
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flask_muset.cache_strategies.keys import MAX_KEY_LENGTH, KeyMaker, check_key
from flask_muset.cache_strategies.patterns import compile_pattern


class Colour(Enum):
    RED = 1
    BLUE = 2
    CRIMSON = 1  # noqa: PIE796 - another name of RED


class Shade(Enum):
    RED = 1


class Number(IntEnum):
    ONE = 1


class Word(StrEnum):
    ONE = "1"


class Right(IntFlag):
    READ = 1
    WRITE = 2


class Mode(Flag):
    A = 1
    B = 2


@dataclass
class Point:
    x: object
    y: object = None


@dataclass(frozen=True, slots=True)
class Place:
    x: object
    y: object = None


@dataclass
class Hidden:
    shown: object
    hidden: object = field(compare=False, repr=False, default=None)


class Tenant:
    def __init__(self, number):
        self.number = number

    def __cache_key__(self):
        return self.number


class Customer(Tenant):
    pass


Pair = namedtuple("Pair", "a b")


def anything(*args, **kwargs):
    return exact((args, kwargs))


make = KeyMaker(anything, "p")


def text_of(value):
    """The text of one value, as it stands in a key, of any length."""
    return ":".join(make._call.texts((value,), {}))


def exact(value):
    """Something that is equal for two values only if these are the same, down to their types.

    It is made without any text, so it cannot have the faults of one.
    """
    kind = type(value)
    if isinstance(value, Tenant):
        return kind, exact(value.number)
    if is_dataclass(kind):
        return kind, tuple(exact(getattr(value, one.name)) for one in fields(value))
    if kind in (list, tuple):
        return kind, tuple(map(exact, value))
    if kind in (set, frozenset):
        return kind, frozenset(Counter(map(exact, value)).items())
    if kind is dict:
        items = Counter((exact(key), exact(one)) for key, one in value.items())
        return kind, frozenset(items.items())
    return kind, exact_atom(value)


def exact_atom(value):
    if type(value) is float:
        return value.hex()
    if type(value) is Decimal:
        return value.as_tuple()
    if isinstance(value, Enum):
        return value.value
    if type(value) in (datetime, time):
        zone = getattr(value.tzinfo, "key", None) or (value.tzinfo and value.utcoffset())
        return value.replace(tzinfo=None), value.fold, zone
    return value


NAIVE = datetime(2030, 1, 2)  # noqa: DTZ001 - people have such as well

# --- Values that look like each other -------------------------------------------------------------

LOOKALIKES = [
    None, True, False, 0, 1, -1, 10, 42, 2**63, 10**39, 10**40, -(10**40),
    0.0, -0.0, 1.0, 0.1, 1e16, 1e-7, float("inf"), -float("inf"), float("nan"),
    "", " ", "None", "True", "1", "-1", "1.0", "0x1", "1e5", "+1", "nan", "inf", "-inf", ".5", "1.",
    "a", "a:b", "a,b", "a=1", '"a"', "a*", "\\x2a", "\\", "\n", "\0", "é", "e\u0301", "\ud800",
    "\\ud800", "\u202e", "~", "p", "p:1", "[1]", "(1)", "{1=2}", "b'1'", 'b"1"', "set(1)",
    b"", b"1", b"\\x00", b"\x00", b'"', b"*", b"\xe9",
    Decimal(1), Decimal("1.0"), Decimal("1E+2"), Decimal(100), Decimal("-0"), Decimal("NaN"),
    Decimal("sNaN"), Decimal("Infinity"), Decimal("nan12"),
    UUID(int=1), UUID(int=10**38), str(UUID(int=1)),
    date(2030, 1, 2), NAIVE, NAIVE.replace(fold=1), NAIVE.replace(microsecond=1),
    datetime(2030, 1, 2, tzinfo=UTC), datetime(2030, 1, 2, tzinfo=ZoneInfo("UTC")),
    datetime(2030, 1, 2, tzinfo=ZoneInfo("Europe/Berlin")),
    datetime(2030, 1, 2, tzinfo=ZoneInfo("Europe/Paris")),
    datetime(2030, 1, 2, tzinfo=timezone(timedelta(hours=1))),
    time(1, 2), time(1, 2, fold=1), time(1, 2, tzinfo=UTC), time(1, 2, tzinfo=ZoneInfo("UTC")),
    time(1, 2, tzinfo=ZoneInfo("Europe/Paris")), "2030-01-02", "01:02:00",
    timedelta(0), timedelta(days=1), timedelta(microseconds=1), timedelta(days=-1, seconds=1),
    timezone(timedelta(hours=1)), UTC, ZoneInfo("UTC"),
    Colour.RED, Colour.BLUE, Shade.RED, Number.ONE, Word.ONE, Right.READ, Right.READ | Right.WRITE,
    Right(0), Right(8), Right(16), Mode.A, Mode.A | Mode.B, Mode(0), Colour, Shade, Point, int, str,
    Point(1), Point(1, 2), Place(1), Point(Point(1)), Hidden(1), Hidden(1, 2),
    Tenant(1), Customer(1), Tenant("1"), Tenant((1,)), Tenant(None),
    [], (), {}, set(), frozenset(), [1], (1,), {1}, frozenset({1}), {1: 1}, [True], {True}, ["1"],
    [[1], 2], [1, [2]], [[1, 2]], ["1,2"], [1, 2], (1, 2), {1, 2}, {1: 2}, {"a": 1}, {"a": "1"},
    ["a", "b"], ["a,b"], [["a"], "b"], {"a": 1, "b": 2}, {"a": {"b": 2}}, {(1, 2): 3}, [None], [""],
]  # fmt: skip

SYNTAX = st.text(st.sampled_from(':,=()[]{}<>"\\*~.-+@/ ab1eExu\n'), max_size=8)
ATOMS = st.sampled_from(LOOKALIKES) | SYNTAX | st.text(max_size=4) | st.binary(max_size=3)
NUMBERS = st.integers() | st.floats() | st.decimals() | st.booleans() | st.none()
TIMES = (
    st.dates()
    | st.times()
    | st.datetimes(timezones=st.sampled_from([None, UTC, ZoneInfo("Europe/Berlin")]))
    | st.timedeltas()
)
HASHABLE = (
    NUMBERS.filter(lambda value: not (isinstance(value, Decimal) and value.is_snan())) | SYNTAX
)


def containers(inner):
    """Containers of values, and a str that is what a container looks like."""
    some = st.lists(inner, max_size=3)
    return (
        some
        | some.map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
        | st.builds(Point, inner, inner)
        | st.builds(Tenant, inner)
        | inner.map(text_of)
        | some.map(lambda values: ":".join(map(text_of, values)))
    )


VALUES = st.recursive(ATOMS | NUMBERS | TIMES | st.uuids(), containers, max_leaves=6)
NAMES = st.sampled_from(["a", "b", "c", "x", "self", "é", "a:b", '"a"', "", "1", "None", "args"])
CALLS = st.tuples(
    st.lists(VALUES, max_size=3).map(tuple), st.dictionaries(NAMES, VALUES, max_size=2)
)


def test_all_lookalikes_have_keys_of_their_own():
    """No two of many values that look alike share a key, and each has the same key twice."""
    keys = [make(value) for value in LOOKALIKES]
    shared = [(a, b) for a, b in itertools.combinations(range(len(keys)), 2) if keys[a] == keys[b]]
    assert [(LOOKALIKES[a], LOOKALIKES[b]) for a, b in shared] == []
    assert keys == [make(value) for value in LOOKALIKES]


@settings(max_examples=150, deadline=None)
@given(st.lists(CALLS, min_size=2, max_size=4))
@example([((1,), {}), ((True,), {})])
@example([(("a", "b"), {}), (("a:b",), {})])
@example([(("b=1",), {}), ((), {"b": 1})])
@example([(("a",), {"b": 1}), ((), {"a:b": 1})])
def test_keys_are_equal_exactly_when_calls_are(calls):
    """Of any calls, those have one key that are the same down to the types, and no others."""
    texts = [tuple(make._call.texts(args, kwargs)) for args, kwargs in calls]
    keys = [make(*args, **kwargs) for args, kwargs in calls]
    meanings = [anything(*args, **kwargs) for args, kwargs in calls]
    for a, b in itertools.combinations(range(len(calls)), 2):
        assert (keys[a] == keys[b]) is (meanings[a] == meanings[b])
        # Of long keys as well: a digest does not cover up that they were told apart by chance.
        assert (":".join(texts[a]) == ":".join(texts[b])) is (meanings[a] == meanings[b])


def plain(a, b=2):
    return exact((a, b))


def by_position(a, b=2, /):
    return exact((a, b))


def by_name(a, *, b=2, c=None):
    return exact((a, b, c))


def mixed(a, /, b=2, *rest, c=3, **more):
    return exact((a, b, rest, c, more))


def with_self(self, args=(), kwargs=None):
    return exact((self, args, kwargs))


FEW = st.sampled_from([1, 2, 3, "1", None, True, (), (1,)])
FEW_CALLS = st.tuples(
    st.lists(FEW, max_size=4),
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d", "rest", "more", "self", "args", "kwargs"]),
        FEW,
        max_size=3,
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([plain, by_position, by_name, mixed, with_self]),
    st.lists(FEW_CALLS, min_size=2, max_size=4),
)
def test_every_kind_of_parameter_is_bound_as_python_does(function, calls):
    """Calls that mean the same have one key, others do not, and what Python refuses is refused."""
    maker, seen = KeyMaker(function, "p"), {}
    for args, kwargs in calls:
        try:
            meaning = function(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError, match=rf"^{function.__name__}\(\): "):
                maker(*args, **kwargs)
        else:
            key = maker(*args, **kwargs)
            assert seen.setdefault(key, meaning) == meaning
            assert len(set(seen.values())) == len(seen)


@settings(deadline=None)
@given(CALLS)
def test_a_key_is_a_pattern_of_itself(call):
    """Any key matches itself as a pattern, and all that begin with its prefix match `prefix:*`."""
    args, kwargs = call
    key = make(*args, **kwargs)
    assert "*" not in key
    assert compile_pattern(key)(key)
    assert not compile_pattern(key)(key + "x")
    assert check_key(key) == key
    assert compile_pattern("p:*")(key + (":" if key == "p" else ""))


# --- What keys look like --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "key"),
    [
        ((42,), {}, "user:42"),
        ((-42,), {}, "user:-42"),
        (("42",), {}, 'user:"42"'),
        (("ada",), {}, "user:ada"),
        (("Ada@example.org",), {}, "user:Ada@example.org"),
        (("a/b-c_d.e+f",), {}, "user:a/b-c_d.e+f"),
        (("10.0.0.1",), {}, "user:10.0.0.1"),
        (("2030-01-02",), {}, "user:2030-01-02"),
        (("6f9619ff-8b86-d011",), {}, "user:6f9619ff-8b86-d011"),
        (("12e4",), {}, 'user:"12e4"'),
        (("Ada Lovelace",), {}, 'user:"Ada Lovelace"'),
        (("Zoë",), {}, 'user:"Zoë"'),
        (("a:b",), {}, 'user:"a:b"'),
        (("a*\n\\\"\u202e",), {}, r'user:"a\x2a\x0a\x5c\x22\u202e"'),
        (("",), {}, 'user:""'),
        ((True, None, 1.5), {}, "user:True:None:1.5"),
        ((b"a\x00\xe9",), {}, r'user:b"a\x00\xe9"'),
        ((1,), {"b": 2, "a": "x"}, "user:1:a=x:b=2"),
        (([1, "a", (2,)],), {}, "user:[1,a,(2)]"),
        (({"b": 1, "a": [2]},), {}, "user:{a=[2],b=1}"),
        (({3, 1, 2}, frozenset("ba")), {}, "user:set(1,2,3):frozenset(a,b)"),
        ((UUID(int=1),), {}, "user:UUID(00000000-0000-0000-0000-000000000001)"),
        ((Decimal("1.50"),), {}, "user:Decimal(1.50)"),
        ((date(2030, 1, 2),), {}, "user:date(2030-01-02)"),
        ((datetime(2030, 1, 2, 3, 4, tzinfo=UTC),), {}, "user:datetime(2030-01-02T03:04:00+00:00)"),
        ((time(3, tzinfo=ZoneInfo("Asia/Tokyo")),), {}, "user:time(03:00:00,ZoneInfo(Asia/Tokyo))"),
        ((timedelta(hours=30),), {}, "user:timedelta(1 day, 6:00:00)"),
        ((Colour.CRIMSON,), {}, "user:<test_keys:Colour>(RED)"),
        ((Mode.A | Mode.B,), {}, "user:<test_keys:Mode>(3)"),
        ((Point(1, "a"),), {}, "user:<test_keys:Point>(x=1,y=a)"),
        ((Tenant(7), 42), {}, "user:<test_keys:Tenant>(7):42"),
        ((Tenant, 42), {}, "user:<test_keys:Tenant>:42"),
        ((), {}, "user"),
    ],
)  # fmt: skip
def test_keys_are_readable(args, kwargs, key):
    """A person can read a key and write it down, to delete it or to find all like it."""
    assert KeyMaker(anything, "user")(*args, **kwargs) == key


def test_the_documented_example():
    """A function with a prefix has keys that can be deleted by name and by pattern."""

    def get_user(user_id):
        """One user."""

    key = KeyMaker(get_user, "user")(42)
    assert key == "user:42"
    assert KeyMaker(get_user, "user")(user_id=42) == key
    assert compile_pattern("user:*")(key)


def test_defaults_are_bound():
    """A default that is given, that is left out and that is named is one call."""
    maker = KeyMaker(plain, "p")
    assert {maker(1), maker(1, 2), maker(1, b=2), maker(a=1), maker(b=2, a=1)} == {"p:1:2"}
    assert maker(1, 3) == "p:1:3"
    assert {KeyMaker(by_name, "p")(1), KeyMaker(by_name, "p")(a=1, c=None)} == {"p:1:b=2:c=None"}


def test_arguments_may_be_called_self():
    """A parameter of any name can be given by name, also one that a method has itself."""
    assert KeyMaker(with_self, "p")(self=1, kwargs=2) == "p:1:():2"
    assert make(self=1, args=2, kwargs=3) == "p:args=2:kwargs=3:self=1"


def test_without_a_prefix_the_function_names_itself():
    """The default is the module and the qualified name, through decorators too."""

    @functools.wraps(plain)
    def wrapped(*args, **kwargs):
        return plain(*args, **kwargs)

    assert KeyMaker(plain)(1) == "test_keys:plain:1:2"
    assert KeyMaker(wrapped)(a=1) == "test_keys:plain:1:2"
    assert KeyMaker(Tenant.__cache_key__).prefix == "test_keys:Tenant.__cache_key__"
    assert KeyMaker(with_self, "p").prefix == "p"


def test_the_order_of_items_does_not_matter():
    """Dictionaries and sets have one key, whatever the order in which they were filled."""
    items = [(letter, number) for number, letter in enumerate("fbdgace1")]
    keys = set()
    for seed in range(20):
        random.Random(seed).shuffle(items)
        keys.add(make(dict(items), set(dict(items)), **dict(items)))
    assert len(keys) == 1


def test_keys_do_not_depend_on_the_process():
    """Another process, whose hashes are others, makes the same keys; so does another context."""
    code = (
        "from decimal import Decimal\n"
        "from flask_muset.cache_strategies.keys import KeyMaker\n"
        "def f(*args): ...\n"
        "print(KeyMaker(f, 'p')({'b', 'a', 'c', 'dd'}, {'x': 1, 'y': {2.5, 'z'}}, Decimal('1E+9')))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]
    assert len(set(runs)) == 1
    with localcontext() as context:
        context.capitals = 0
        assert make(Decimal("1E+9")) == "p:Decimal(1E+9)"


# --- Long keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [198, 199, 5_000, 1_000_000])
def test_a_long_key_keeps_its_prefix(size):
    """Up to 200 characters a key is as it is; above it is short, with a digest of all of it."""
    key = KeyMaker(anything, "p")("x" * size)
    if size == 198:
        assert key == "p:" + "x" * 198
    else:
        assert key.startswith("p:~")
        assert len(key) == 3 + 40
        assert key != KeyMaker(anything, "p")("x" * size + "y")
        assert key == KeyMaker(anything, "p")("x" * size)


def test_a_digest_cannot_be_written_by_hand():
    """No argument has the text of a digest, so nobody can name the key of another call."""
    long = make("x" * 1000)
    assert make(long.removeprefix("p:")) != long


def test_a_digest_is_of_the_whole_key():
    """Long keys differ with any argument and with the prefix, also in what is cut off of it."""
    assert make("a", "x" * 300) != make("b", "x" * 300) != make("b", "x" * 300, "c")
    one, other = "q" * 150 + "1", "q" * 150 + "2"
    keys = {KeyMaker(anything, prefix)(42 * 10**60) for prefix in (one, other)}
    assert len(keys) == 2
    assert all(key.startswith("q" * 128 + ":~") and len(key) <= 200 for key in keys)


def test_values_of_any_size_have_keys():
    """Numbers that Python does not write in decimals, and large containers, are no problem."""
    assert make(10**10_000) == make(10**10_000) != make(-(10**10_000))
    assert len(make(list(range(100_000)))) == 43


# --- What is refused ------------------------------------------------------------------------------


class Offset(tzinfo):
    def utcoffset(self, moment):
        return timedelta(hours=1)


CIRCLE = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        ([1, {"a": object()}], "builtins.object"),
        (Point(print), "builtins.builtin_function_or_method"),
        (Tenant(object()), "builtins.object"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        (Pair(1, 2), "test_keys.Pair"),
        (bytearray(b"a"), "builtins.bytearray"),
        (1j, "builtins.complex"),
        (datetime(2030, 1, 2, tzinfo=Offset()), "test_keys.Offset"),
        (list[int], "types.GenericAlias"),
    ],
)
def test_what_has_no_canonical_text_is_refused(value, named):
    """An error names the function, the parameter, the type and the cure."""

    def load(first, second, *, third=None):
        """Something."""

    maker = KeyMaker(load, "p")
    for parameter, call in {
        "first": lambda: maker(value, 1),
        "second": lambda: maker(1, value),
        "third": lambda: maker(1, 2, third=value),
    }.items():
        with pytest.raises(TypeError) as raised:
            call()
        said = str(raised.value)
        assert f"load(): no cache key can be made of the parameter '{parameter}'" in said
        assert named in said
        assert "__cache_key__()" in said


def test_parameters_without_names_of_their_own_are_named():
    """The error names `*args`, and what was given by name."""
    with pytest.raises(TypeError, match=r"the parameter '\*args'"):
        make(1, object())
    with pytest.raises(TypeError, match="the parameter 'option'"):
        make(1, option=object())


def test_a_default_without_a_text_is_named():
    """A default that has no text is an error only where it is used."""

    def load(a, b=object()):  # noqa: B008 - it is what people write
        """Something."""

    assert KeyMaker(load, "p")(1, 2) == "p:1:2"
    with pytest.raises(TypeError, match="the parameter 'b'"):
        KeyMaker(load, "p")(1)


def test_what_contains_itself_is_refused():
    """A list in itself is an error, not a key, and the process goes on."""
    for call in (lambda: make(CIRCLE), lambda: make(values={"a": CIRCLE})):
        with pytest.raises(RecursionError):
            call()
    assert make([[[[[]]]]]) == "p:[[[[[]]]]]"


def test_an_error_of_cache_key_is_the_caller_s_own():
    """What `__cache_key__` raises is not turned into something else."""

    class Broken:
        def __cache_key__(self):
            raise LookupError("no id yet")

    with pytest.raises(LookupError, match="no id yet"):
        make(Broken())


def test_a_call_that_is_not_possible_is_refused():
    """The error is Python's, and names the function."""
    maker = KeyMaker(plain, "p")
    with pytest.raises(TypeError, match=r"plain\(\): missing a required argument: 'a'"):
        maker()
    with pytest.raises(TypeError, match=r"plain\(\): too many positional arguments"):
        maker(1, 2, 3)
    with pytest.raises(TypeError, match=r"plain\(\): .*'c'"):
        maker(1, c=3)


class Service:
    @classmethod
    def find(cls, number):
        """Something."""

    def get(self, number):
        """Something."""


def test_methods():
    """Methods need an object that can be told apart; class methods have the name of the class."""
    maker = KeyMaker(Service.get, "p")
    with pytest.raises(TypeError, match=r"Service\.get\(\): .*'self': a test_keys\.Service"):
        maker(Service(), 1)
    assert KeyMaker(Service.find.__func__)(Service, 1) == (
        "test_keys:Service.find:<test_keys:Service>:1"
    )


@pytest.mark.parametrize(
    ("function", "prefix", "error", "said"),
    [
        (lambda: None, None, TypeError, "key_prefix"),
        (functools.partial(plain, 1), None, TypeError, "key_prefix"),
        (vars(Service)["find"], None, TypeError, "below @classmethod"),
        (property(plain), "p", TypeError, "below @classmethod or @property"),
        (plain, "", ValueError, "1 to 1024"),
        (plain, b"p", TypeError, "bytes"),
        (plain, "\ud800", ValueError, "surrogate"),
        (max, "p", ValueError, "signature"),
    ],
)
def test_functions_and_prefixes_that_are_refused(function, prefix, error, said):
    """What cannot have keys of its own is refused when it is decorated, with the cure."""
    with pytest.raises(error, match=said):
        KeyMaker(function, prefix)


def test_lambdas_and_partials_may_be_given_a_prefix():
    """What has no name of its own works with a prefix."""
    assert KeyMaker(lambda a: a, "p")(1) == "p:1"
    assert KeyMaker(functools.partial(plain, b=5), "p")(1) == "p:1:b=5"


def test_strange_names_of_types_are_quoted():
    """A type that was made with an odd name cannot pass for something else."""
    odd = type("a):b", (), {"__cache_key__": lambda self: 1})
    odd.__module__ = "m"
    assert make(odd()) == 'p:<"m:a):b">(1)'


# --- Keys that callers give -----------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=MAX_KEY_LENGTH))
@example("x" * MAX_KEY_LENGTH)
def test_any_text_is_a_key(key):
    """check_key gives back whatever is text of a length that is allowed."""
    assert check_key(key) is key


@pytest.mark.parametrize(
    ("key", "error", "said"),
    [
        (None, TypeError, "NoneType"),
        (42, TypeError, "int"),
        (b"user:42", TypeError, "bytes"),
        ("", ValueError, "1 to 1024 characters, got 0"),
        ("x" * 1025, ValueError, "1 to 1024 characters, got 1025"),
        ("user:\ud800", ValueError, "surrogate pair at 5"),
    ],
)
def test_what_is_no_key_is_refused(key, error, said):
    """The error says what is wrong with it."""
    with pytest.raises(error, match=said):
        check_key(key)
