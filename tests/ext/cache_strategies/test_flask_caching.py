"""Flask-Caching on our store: its documented uses, each on its own SimpleCache and on ours."""

import dataclasses
import datetime
import decimal
import itertools
import logging
import threading
import time
import uuid
import warnings
from types import SimpleNamespace

import pytest
from flask import (
    Flask,
    Response,
    abort,
    jsonify,
    make_response,
    redirect,
    render_template,
    request,
)
from flask_caching import (
    Cache,
    CachedResponse,
    cache_memoize_hit,
    cache_memoize_miss,
    cache_view_hit,
    cache_view_miss,
    make_template_fragment_key,
)
from flask_caching.backends.simplecache import SimpleCache
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import DictLoader, FileSystemLoader
from markupsafe import Markup
from patched import run_patched
from werkzeug.exceptions import Conflict, HTTPException, NotFound

from flask_muset.cache_strategies import CacheStrategies
from flask_muset.cache_strategies.codec import Codec, UnsupportedType
from flask_muset.cache_strategies.entry import NEVER, Entry, Lease
from flask_muset.cache_strategies.flask_caching_backend import StoreBackend, _Aborted
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.tiered_store import TieredStore
from flask_muset.clock import SYSTEM
from flask_muset.redis import GuardedRedis
from flask_muset.testing import virtual_clock

OURS = "flask_muset.cache_strategies.flask_caching_backend.StoreBackend"


@pytest.fixture
def clock(monkeypatch):
    """A virtual clock, by which cachelib's own SimpleCache goes too."""
    with virtual_clock() as clock:
        monkeypatch.setattr("cachelib.simple.time", lambda: SYSTEM.wall())
        yield clock


def make_app(kind, **config):
    """An app and its cache; in debug mode Flask-Caching swallows no error of a backend."""
    app = Flask("shop")
    app.debug = app.testing = True
    CacheStrategies(app)
    return app, Cache(app, config={"CACHE_TYPE": kind, **config})


@pytest.fixture(params=["SimpleCache", OURS], ids=["simple", "ours"])
def shop(request, clock):
    """The app, its cache, a client, and a number that grows with each call."""
    app, cache = make_app(request.param)
    count = itertools.count(1)
    with app.app_context():
        yield SimpleNamespace(
            app=app, cache=cache, client=app.test_client(), clock=clock, next=lambda: next(count)
        )


@pytest.fixture
def ours(clock):
    """Our backend alone, over a store of the process."""
    return StoreBackend(LocalStore(1 << 20), Codec())


def texts(shop, *paths, **options):
    """What GET answers, one after the other."""
    return [shop.client.get(path, **options).text for path in paths]


# --- cached, on views -----------------------------------------------------------------------------


def test_cached_view(shop):
    """One call serves until the timeout has passed, per path."""

    @shop.app.route("/<name>")
    @shop.cache.cached(timeout=50)
    def view(name):
        return f"{name} {shop.next()}"

    assert texts(shop, "/a", "/a", "/b", "/b", "/a") == ["a 1", "a 1", "b 2", "b 2", "a 1"]
    shop.clock.advance(49)
    assert texts(shop, "/a") == ["a 1"]
    shop.clock.advance(1)
    assert texts(shop, "/a", "/b") == ["a 3", "b 4"]


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [(None, 300), (7, 7), (datetime.timedelta(seconds=3, milliseconds=1), 4), ("9", 9)],
)
def test_timeouts_of_views(shop, timeout, seconds):
    """None is the default of 300 seconds; timedelta and text are read too."""

    @shop.app.route("/")
    @shop.cache.cached(timeout=timeout)
    def view():
        return str(shop.next())

    assert texts(shop, "/", "/") == ["1", "1"]
    shop.clock.advance(seconds - 1)
    assert texts(shop, "/") == ["1"]
    shop.clock.advance(1)
    assert texts(shop, "/") == ["2"]


def test_timeout_is_an_attribute(shop):
    """`cache_timeout` of a decorated function may be set, also to never; `uncached` is bare."""

    @shop.app.route("/")
    @shop.cache.cached(timeout=5)
    def view():
        return str(shop.next())

    view.cache_timeout = 0
    assert texts(shop, "/") == ["1"]
    shop.clock.advance(10**6)
    assert texts(shop, "/") == ["1"]
    assert view.uncached() == "2"


def test_query_string(shop):
    """With query_string the values count and their order does not; without it neither does."""

    @shop.app.route("/by-query")
    @shop.cache.cached(query_string=True)
    def by_query():
        return str(shop.next())

    @shop.app.route("/by-path")
    @shop.cache.cached()
    def by_path():
        return str(shop.next())

    assert texts(shop, "/by-query?a=1&b=2", "/by-query?b=2&a=1") == ["1", "1"]
    assert texts(shop, "/by-query?a=2&b=2", "/by-query") == ["2", "3"]
    assert texts(shop, "/by-path?a=1", "/by-path?a=2") == ["4", "4"]


@pytest.mark.parametrize(
    ("prefix", "key"),
    [("page/%s", "page//x"), ("plain", "plain"), (lambda: "given:ü ☃", "given:ü ☃")],
    ids=["path", "text", "callable"],
)
def test_key_prefix(shop, prefix, key):
    """A prefix is the key, with the path in it where it says so, or what a callable returns."""

    @shop.app.route("/x")
    @shop.cache.cached(key_prefix=prefix)
    def view():
        return str(shop.next())

    assert texts(shop, "/x", "/x") == ["1", "1"]
    assert shop.cache.get(key) == "1"


def test_make_cache_key(shop):
    """A function of the request makes the key, here of the body of a POST."""

    def key():
        return f"{request.method} {request.path} {request.get_data(as_text=True)}"

    @shop.app.route("/", methods=["GET", "POST"])
    @shop.cache.cached(make_cache_key=key)
    def view():
        return str(shop.next())

    def posted(data):
        return shop.client.post("/", data=data).text

    assert [posted("a"), posted("b"), posted("a")] == ["1", "2", "1"]
    assert texts(shop, "/", "/") == ["3", "3"]


def test_methods_share_a_path(shop):
    """Without a key of its own a POST gets what a GET has put in."""

    @shop.app.route("/", methods=["GET", "POST"])
    @shop.cache.cached()
    def view():
        return f"{request.method} {shop.next()}"

    assert texts(shop, "/") == ["GET 1"]
    assert shop.client.post("/").text == "GET 1"


def test_unless(shop):
    """While `unless` says so the cache is neither read nor written."""
    skip = [False]

    @shop.app.route("/")
    @shop.cache.cached(unless=lambda: skip[0])
    def view():
        return str(shop.next())

    assert texts(shop, "/", "/") == ["1", "1"]
    skip[0] = True
    assert texts(shop, "/", "/") == ["2", "3"]
    skip[0] = False
    assert texts(shop, "/") == ["1"]


def test_forced_update(shop):
    """A forced update is put in for those who come after it."""
    force = [False]

    @shop.app.route("/")
    @shop.cache.cached(forced_update=lambda: force[0])
    def view():
        return str(shop.next())

    assert texts(shop, "/", "/") == ["1", "1"]
    force[0] = True
    assert texts(shop, "/") == ["2"]
    force[0] = False
    assert texts(shop, "/", "/") == ["2", "2"]


def test_is_stale(shop):
    """A value of which `is_stale` says so is made anew."""

    @shop.app.route("/")
    @shop.cache.cached(is_stale=lambda value: value == "1")
    def view():
        return str(shop.next())

    assert texts(shop, "/", "/", "/") == ["1", "2", "2"]


def test_response_filter(shop):
    """What the filter refuses is not kept."""

    @shop.app.route("/")
    @shop.cache.cached(response_filter=lambda response: response[1] == 200)
    def view():
        number = shop.next()
        return str(number), 500 if number < 3 else 200

    answers = [shop.client.get("/") for _ in range(4)]
    assert [(answer.text, answer.status_code) for answer in answers] == [
        ("1", 500),
        ("2", 500),
        ("3", 200),
        ("3", 200),
    ]


def test_response_hit_indication(shop):
    """A header tells of a hit."""

    @shop.app.route("/")
    @shop.cache.cached(response_hit_indication=True)
    def view():
        return str(shop.next())

    headers = [shop.client.get("/").headers.get("hit_cache") for _ in range(3)]
    assert headers == [None, "True", "True"]


def test_source_check(shop):
    """Two functions with one key share a value, unless their source is a part of it."""

    def pair(**options):
        one = shop.cache.cached(key_prefix="one key", **options)(lambda: "first")
        two = shop.cache.cached(key_prefix="one key", **options)(lambda: "the other")
        return one(), two(), one(), two()

    with shop.app.test_request_context():
        assert pair() == ("first", "first", "first", "first")

        @shop.cache.cached(key_prefix="k", source_check=True)
        def one():
            return "first"

        @shop.cache.cached(key_prefix="k", source_check=True)
        def two():
            return "the other"

        assert (one(), two(), one(), two()) == ("first", "the other", "first", "the other")


def test_delete_cached(shop):
    """A view's value is deleted by its path, its query or its arguments."""

    @shop.app.route("/works/<int:number>")
    @shop.cache.cached(query_string=True)
    def works(number):
        return str(shop.next())

    @shop.app.route("/plain/<name>")
    @shop.cache.cached()
    def plain(name):
        return str(shop.next())

    assert texts(shop, "/works/1?a=1", "/works/1?a=2") == ["1", "2"]
    with shop.app.test_request_context():
        assert shop.cache.delete_cached(works, "/works/1", {"a": 1}) is True
        assert shop.cache.delete_cached(works, "/works/1", {"a": 1}) is False
    assert texts(shop, "/works/1?a=2", "/works/1?a=1") == ["2", "3"]
    assert texts(shop, "/plain/x") == ["4"]
    with shop.app.test_request_context():
        assert shop.cache.delete_cached(plain, name="x") is True
    assert texts(shop, "/plain/x") == ["5"]


REFUSALS = {
    "abort": lambda: abort(404, "nothing here"),
    "abort with a response": lambda: abort(Response("no", 418, {"X-By": "us"})),
    "code and response": lambda: abort(409, response=Response("taken", 409)),
    "retry_after": lambda: abort(429, retry_after=7),
    "valid methods": lambda: abort(405, valid_methods=["GET", "PUT"]),
    "redirect": lambda: abort(redirect("/elsewhere")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_cached_abort(shop, name):
    """A view that aborts is answered alike from the cache, also where the app handles it."""
    handled = []

    @shop.app.errorhandler(HTTPException)
    def handle(error):
        handled.append((type(error), error.code, error.description))
        return error

    @shop.app.route("/")
    @shop.cache.cached()
    def view():
        shop.next()
        REFUSALS[name]()

    first, second = shop.client.get("/"), shop.client.get("/")
    assert first.status_code >= 300
    assert second.status == first.status
    assert second.data == first.data
    assert fields(second) == fields(first)
    # Flask does not show its handlers an exception that is nothing but a response.
    assert handled[1:] == handled[:1]
    assert shop.next() == 2


def _response():
    response = make_response(b"\x00\xff", 201)
    response.headers.add("X-Two", "a")
    response.headers.add("X-Two", "b")
    response.mimetype = "application/octet-stream"
    return response


ANSWERS = {
    "text": lambda: "wörld",
    "bytes": lambda: b"\x00\xff",
    "empty": lambda: "",
    "dict": lambda: {"a": [1, None, {"b": 1.5}]},
    "list": lambda: [1, 2, "three"],
    "status": lambda: ("made", 201),
    "headers": lambda: ("said", {"X-By": "us"}),
    "both": lambda: ({"a": 1}, 202, [("X-By", "us"), ("X-By", "them")]),
    "response": _response,
    "json": lambda: jsonify(a=1, b="ü"),
    "response in a tuple": lambda: (_response(), 418),
    "template": lambda: render_template("page.html", name="<b>"),
    "redirect": lambda: Response(status=302, headers={"Location": "/elsewhere"}),
}


def fields(answer):
    """The fields of an answer's head, but for the id that each request has."""
    return [(name, value) for name, value in answer.headers if name != "X-Request-ID"]


@pytest.mark.parametrize("name", ANSWERS)
def test_what_views_return(shop, name):
    """Whatever a view returns, the answer from the cache has its status, headers and bytes."""
    shop.app.jinja_loader = DictLoader({"page.html": "Hello {{ name }}"})
    calls = []

    @shop.app.route("/cached")
    @shop.cache.cached()
    def cached():
        calls.append(1)
        return ANSWERS[name]()

    @shop.app.route("/bare")
    def bare():
        return ANSWERS[name]()

    expected = shop.client.get("/bare")
    for _ in range(3):
        answer = shop.client.get("/cached")
        assert answer.data == expected.data
        assert answer.status == expected.status
        assert fields(answer) == fields(expected)
    assert len(calls) == 1


def test_generators(shop):
    """What a view yields is joined and kept; a response that streams is passed on, not kept."""
    shop.app.debug = False

    @shop.app.route("/yields")
    @shop.cache.cached()
    def yields():
        return (str(shop.next()) for _ in range(3))

    @shop.app.route("/streams")
    @shop.cache.cached()
    def streams():
        return Response(str(shop.next()) for _ in range(3))

    assert texts(shop, "/yields", "/yields", "/streams", "/streams") == ["123", "123", "456", "789"]


def test_template_result_is_still_text(shop):
    """What render_template returned is equal text, and Markup stays Markup."""
    shop.cache.set("page", Markup("<b>") + "<i>")
    assert shop.cache.get("page") == "<b>&lt;i&gt;"
    assert type(shop.cache.get("page")) is Markup


def test_cached_response(shop):
    """A CachedResponse brings its own timeout."""

    @shop.app.route("/")
    @shop.cache.cached(timeout=50)
    def view():
        return CachedResponse(make_response(str(shop.next())), timeout=5)

    assert texts(shop, "/", "/") == ["1", "1"]
    shop.clock.advance(5)
    assert texts(shop, "/") == ["2"]


def test_cache_none_of_views(shop):
    """None is kept where cache_none asks for it, and made anew where it does not."""

    def returns_none():
        shop.next()

    kept = shop.cache.cached(key_prefix="kept", cache_none=True)(returns_none)
    anew = shop.cache.cached(key_prefix="anew")(returns_none)
    assert [kept(), kept(), kept()] == [None, None, None]
    assert shop.next() == 2
    assert [anew(), anew()] == [None, None]
    assert shop.next() == 5


def test_cached_plain_function(shop):
    """Any function is cached under a key of its own, its mutable value too."""

    @shop.cache.cached(timeout=50, key_prefix="all_comments")
    def comments():
        return [shop.next()]

    comments().append("changed by a caller")
    assert comments() == [1]
    assert shop.cache.delete("all_comments") is True
    assert comments() == [2]


def test_view_signals(shop):
    """A miss and a hit are told by Flask-Caching's signals."""
    shop.cache.enable_signals = True
    seen = []

    def hit(_sender, **told):
        seen.append("hit")

    def miss(_sender, **told):
        seen.append("miss")

    function = shop.cache.cached(key_prefix="k")(lambda: 1)
    method = shop.cache.memoize()(lambda x: x)
    with (
        cache_view_hit.connected_to(hit),
        cache_view_miss.connected_to(miss),
        cache_memoize_hit.connected_to(hit),
        cache_memoize_miss.connected_to(miss),
    ):
        assert [function(), function(), method(1), method(1)] == [1, 1, 1, 1]
    assert seen == ["miss", "hit", "miss", "hit"]


# --- memoize --------------------------------------------------------------------------------------


def test_memoize(shop):
    """Arguments make the key, however they are given; defaults count."""

    @shop.cache.memoize(50)
    def add(a, b=2, *rest, c=0):
        return a + b + sum(rest) + c, shop.next()

    assert add(1) == add(1, 2) == add(a=1) == add(b=2, a=1) == (3, 1)
    assert add(2, 1) == (3, 2)
    assert add(1, 2, 3) == (6, 3)
    assert add(1, 2, c=3) == (6, 4)
    assert add(1, 2, c=3) == (6, 4)
    assert add(1.0, 2) == (3.0, 5)
    shop.clock.advance(50)
    assert add(1) == (3, 6)


def test_delete_memoized(shop):
    """One call's value is forgotten by its arguments, all by the function alone."""

    @shop.cache.memoize()
    def value(a, b):
        return shop.next()

    @shop.cache.memoize()
    def other(a, b):
        return shop.next()

    assert [value(1, 2), value(2, 2), other(1, 2)] == [1, 2, 3]
    shop.cache.delete_memoized(value, 1, 2)
    assert [value(1, 2), value(2, 2), other(1, 2)] == [4, 2, 3]
    shop.cache.delete_memoized(value, 2, b=2)
    assert [value(1, 2), value(2, 2), other(1, 2)] == [4, 5, 3]
    shop.cache.delete_memoized(value)
    assert [value(1, 2), value(2, 2), other(1, 2)] == [6, 7, 3]
    value.delete_memoized()
    assert [value(1, 2), value(2, 2), other(1, 2)] == [8, 9, 3]


def test_delete_memoized_verhash(shop):
    """Without its version nothing of a function is found; another function's is."""

    @shop.cache.memoize()
    def value(a):
        return shop.next()

    @shop.cache.memoize()
    def other(a):
        return shop.next()

    assert [value(1), value(2), other(1)] == [1, 2, 3]
    shop.cache.delete_memoized_verhash(value)
    assert [value(1), value(2), other(1)] == [4, 5, 3]


def test_memoized_methods(shop):
    """Methods are memoized per object; a bound one forgets its object's alone, the class's all."""

    class Adder:
        def __init__(self, name):
            self.name = name

        def __repr__(self):
            return f"Adder({self.name})"

        @shop.cache.memoize()
        def add(self, b):
            return self.name, b, shop.next()

        @classmethod
        @shop.cache.memoize()
        def made(cls, b):
            return b, shop.next()

    one, two = Adder("one"), Adder("two")

    def all_of_them():
        return [one.add(1)[2], one.add(2)[2], two.add(1)[2]]

    assert all_of_them() == [1, 2, 3]
    assert all_of_them() == [1, 2, 3]
    shop.cache.delete_memoized(one.add, 1)
    assert all_of_them() == [4, 2, 3]
    shop.cache.delete_memoized(one.add)
    assert all_of_them() == [5, 6, 3]
    shop.cache.delete_memoized(Adder.add, two, 1)
    assert all_of_them() == [5, 6, 7]
    shop.cache.delete_memoized(Adder.add)
    assert all_of_them() == [8, 9, 10]
    assert [Adder.made(1), Adder.made(1)] == [(1, 11), (1, 11)]
    shop.cache.delete_memoized(Adder.made, Adder, 1)
    assert Adder.made(1) == (1, 12)


def test_memoize_options(shop):
    """Each of its options does what it does for views, and two name the key."""

    @shop.cache.memoize(unless=lambda: True)
    def never(a):
        return shop.next()

    @shop.cache.memoize(forced_update=lambda a: a == "forced")
    def forced(a):
        return shop.next()

    @shop.cache.memoize(is_stale=lambda value: value % 2 == 1)
    def stale(a):
        return shop.next()

    @shop.cache.memoize(response_filter=lambda value: value % 2 == 0)
    def filtered(a):
        return shop.next()

    @shop.cache.memoize(make_name=lambda name: "another name", args_to_ignore=["b"])
    def ignoring(a, b):
        return shop.next()

    @shop.cache.memoize(cache_none=True)
    def nothing(a):
        shop.next()

    assert [never(1), never(1)] == [1, 2]
    assert [forced(1), forced(1), forced("forced"), forced("forced")] == [3, 3, 4, 5]
    assert [stale(1), stale(1), stale(2), stale(2), stale(2)] == [6, 6, 7, 8, 8]
    assert [filtered(1), filtered(1), filtered(1)] == [9, 10, 10]
    assert [ignoring(1, 1), ignoring(1, 2), ignoring(2, 1)] == [11, 11, 12]
    assert [nothing(1), nothing(1)] == [None, None]
    assert shop.next() == 14


@dataclasses.dataclass
class Point:
    x: int
    y: int


VALUES = [
    0, -1, 2**63, 1.5, True, "", "ü", b"\x00", None, [], [1, [2]], (1, (2,)), {"a": {1: 2}}, {1, 2},
    frozenset({3}), decimal.Decimal("1.10"), uuid.UUID(int=7), datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC), datetime.time(1, 2),
    datetime.timedelta(days=1), Markup("<b>"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_equal(shop, value):
    """A value comes back equal and of its type, directly, memoized and among several."""
    memoized = shop.cache.memoize(cache_none=True)(lambda x: value)
    shop.cache.set("k", value)
    found = [shop.cache.get("k"), memoized(1), memoized(1), *shop.cache.get_many("k")]
    assert found == [value] * 4
    assert {type(one) for one in found} == {type(value)}
    assert shop.cache.has("k")


# --- Templates ------------------------------------------------------------------------------------


def test_template_fragments(shop, tmp_path):
    """A block is rendered once per its names, until it is deleted or its time has passed."""
    page = (
        "{% cache 60, 'part', who %}{{ who }} {{ next() }}{% endcache %}"
        "{% cache 30 %} own {{ next() }}{% endcache %}"
        "{% cache None, 'kept' %} kept {{ next() }}{% endcache %}"
    )
    for name in ("page", "other"):
        (tmp_path / f"{name}.html").write_text(page)
    shop.app.jinja_loader = FileSystemLoader(tmp_path)

    def rendered(name, who):
        return render_template(f"{name}.html", who=who, next=shop.next)

    assert rendered("page", "<b>") == "&lt;b&gt; 1 own 2 kept 3"
    assert rendered("page", "<b>") == "&lt;b&gt; 1 own 2 kept 3"
    assert rendered("page", "x") == "x 4 own 2 kept 3"
    assert rendered("other", "x") == "x 4 own 5 kept 3"
    assert shop.cache.delete(make_template_fragment_key("part", vary_on=["x"])) is True
    assert rendered("page", "x") == "x 6 own 2 kept 3"
    shop.clock.advance(30)
    assert rendered("page", "x") == "x 6 own 7 kept 3"


def test_template_fragment_deleted_by_itself(shop):
    """The timeout 'del' deletes the block's value and renders it."""
    shop.app.jinja_loader = DictLoader({
        "keep": "{% cache 60, 'part' %}{{ next() }}{% endcache %}",
        "drop": "{% cache 'del', 'part' %}{{ next() }}{% endcache %}",
    })  # fmt: skip
    names = ["keep", "keep", "drop", "keep"]
    assert [render_template(name, next=shop.next) for name in names] == ["1", "1", "2", "3"]


# --- The cache itself -----------------------------------------------------------------------------


def test_direct_calls(shop):
    """Every call that Flask-Caching passes on returns what its own backend does."""
    cache = shop.cache
    assert cache.get("a") is None
    assert cache.set("a", 1) is True
    assert (cache.get("a"), cache.has("a"), cache.has("b")) == (1, True, False)
    assert cache.add("a", 2) is False
    assert cache.add("b", 2) is True
    assert cache.set_many({"c": 3, "d": None}) == ["c", "d"]
    assert cache.get_many("a", "b", "c", "d", "e", "a") == [1, 2, 3, None, None, 1]
    assert cache.get_dict("a", "e") == {"a": 1, "e": None}
    assert cache.has("d")
    assert (cache.delete("a"), cache.delete("a")) == (True, False)
    assert cache.delete_many("b", "x") == ["b", "x"]
    assert cache.unlink("c") == ["c"]
    assert cache.get_many("a", "b", "c") == [None, None, None]
    assert cache.get_many() == []
    assert cache.set_many({}) == []
    assert cache.delete_many() == []
    assert cache.clear() is True
    assert not cache.has("d")


def test_counters(shop):
    """inc and dec begin at 0, add up, and begin the default timeout anew."""
    backend = shop.cache.cache
    assert [backend.inc("n"), backend.inc("n", 5), backend.dec("n"), backend.dec("m", 3)] == [
        1, 6, 5, -3
    ]  # fmt: skip
    backend.set("n", 10, timeout=5)
    assert backend.inc("n", 0) == 10
    shop.clock.advance(299)
    assert (backend.get("n"), backend.get("m")) == (10, -3)
    shop.clock.advance(1)
    assert (backend.get("n"), backend.inc("m")) == (None, 1)


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (None, 300), (0, NEVER), (1, 1), (True, 1), (10**9, 10**9), (10**30, NEVER),
        (10**400, NEVER), (-1, 0), (-(10**30), 0), (datetime.timedelta(0), NEVER),
        (datetime.timedelta(milliseconds=1), 1), (datetime.timedelta(days=-1), 0),
    ],
)  # fmt: skip
def test_timeouts(shop, timeout, seconds):
    """How long set, add and set_many keep a value, for each form of a timeout."""
    cache = shop.cache
    for key in ("old", "older"):
        cache.set(key, "of before", timeout=0)
    assert cache.set("old", 1, timeout=timeout) is True
    assert cache.add("new", 1, timeout=timeout) is True
    assert cache.add("old" if seconds else "third", 1, timeout=timeout) is (seconds == 0)
    assert cache.set_many({"older": 1}, timeout=timeout) == ["older"]
    keys = ("old", "new", "older")
    if seconds:
        shop.clock.advance(min(seconds, 10**10) - 1)
        assert cache.get_many(*keys) == [1, 1, 1]
        shop.clock.advance(1)
    assert cache.get_many(*keys) == ([1, 1, 1] if seconds == NEVER else [None] * 3)
    assert [cache.has(key) for key in keys] == [seconds == NEVER] * 3


def test_timeouts_that_are_none(shop):
    """A float is rounded up and warned of, text is refused, as cachelib has it."""
    with pytest.warns(DeprecationWarning, match="Float timeouts"):
        shop.cache.set("k", 1, timeout=0.2)
    shop.clock.advance(0.9)
    assert shop.cache.get("k") == 1
    with pytest.raises(TypeError, match="timeout must be an int"):
        shop.cache.set("k", 1, timeout="5")


@pytest.mark.parametrize(
    "key", ["", " ", "ключ", "a\x00b", "*", "?[x]\\", "x" * 5000, "\ud800", "flask_cache_view//"]
)
def test_any_text_is_a_key(shop, key):
    """Keys are any text, and tell from one another."""
    shop.cache.set(key + "1", "another")
    assert shop.cache.set(key, "mine") is True
    assert shop.cache.get_many(key, key + "1") == ["mine", "another"]
    assert shop.cache.delete(key) is True
    assert shop.cache.get_many(key, key + "1") == [None, "another"]


def test_default_timeout_of_the_configuration(clock):
    """CACHE_DEFAULT_TIMEOUT and CACHE_OPTIONS reach the backend."""
    app, cache = make_app(OURS, CACHE_DEFAULT_TIMEOUT=datetime.timedelta(seconds=7))
    with app.app_context():
        cache.set("k", 1)
        clock.advance(6)
        assert cache.get("k") == 1
        clock.advance(1)
        assert cache.get("k") is None
    app, cache = make_app(OURS, CACHE_OPTIONS={"default_timeout": 3})
    with app.app_context():
        assert cache.cache.default_timeout == 3


KEYS = st.sampled_from(["a", "b", "c"])
TIMEOUTS = st.sampled_from([None, 0, 1, 5, -1, datetime.timedelta(seconds=2)])
NUMBERS = st.integers(-5, 5)
CALLS = st.one_of(
    st.tuples(st.just("set"), KEYS, NUMBERS, TIMEOUTS),
    st.tuples(st.just("add"), KEYS, NUMBERS, TIMEOUTS),
    st.tuples(st.just("set_many"), st.dictionaries(KEYS, NUMBERS), TIMEOUTS),
    st.tuples(st.sampled_from(["get", "has", "delete"]), KEYS),
    st.tuples(st.sampled_from(["get_many", "get_dict", "delete_many"]), KEYS, KEYS),
    st.tuples(st.sampled_from(["inc", "dec"]), KEYS, NUMBERS),
    st.tuples(st.just("clear")),
    st.integers(1, 5),
)


@given(calls=st.lists(CALLS, max_size=40))
@settings(max_examples=150, deadline=None)
def test_same_as_simple_cache(calls):
    """Any run of calls, with time that passes, returns the same on SimpleCache and on ours."""
    with virtual_clock() as clock, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cachelib.simple.time", lambda: SYSTEM.wall())
        simple, ours = SimpleCache(), StoreBackend(LocalStore(1 << 20), Codec())
        for call in calls:
            if isinstance(call, int):
                clock.advance(call)
                continue
            name, *args = call
            # cachelib's own also counts what has expired and is not thrown away yet as there.
            is_expired = name == "delete" and not simple.has(*args)
            expected = getattr(simple, name)(*args)
            assert getattr(ours, name)(*args) == (False if is_expired else expected), call


# --- What is ours alone ---------------------------------------------------------------------------


def test_no_extension():
    """Without CacheStrategies on the app the message says what to do."""
    with pytest.raises(RuntimeError, match=r"on app 'bare'; set up CacheStrategies\(app\) first"):
        Cache(Flask("bare"), config={"CACHE_TYPE": OURS})


def test_serializers_are_not_used():
    """CACHE_SERIALIZER, which would bring pickle back, is warned of and changes nothing."""
    from cachelib.serializers import SimpleSerializer

    with pytest.warns(UserWarning, match="StoreBackend does not use"):
        app, cache = make_app(OURS, CACHE_SERIALIZER=SimpleSerializer())
    with app.app_context(), pytest.raises(UnsupportedType):
        cache.set("k", object())


def test_unsupported_values(clock, caplog):
    """set, add and set_many raise and keep nothing; decorated functions go on uncached."""
    app, cache = make_app(OURS)
    app.debug = False
    with app.app_context():
        cache.set("there", 1)
        for attempt in (
            lambda: cache.set("k", {"a": object()}),
            lambda: cache.add("there", object()),
            lambda: cache.set_many({"k": 1, "l": object()}),
        ):
            with pytest.raises(UnsupportedType):
                attempt()
        assert cache.get_many("k", "l", "there") == [None, None, 1]
        function = cache.cached(key_prefix="f")(object)
        with caplog.at_level(logging.ERROR, "flask_caching"):
            assert function() is not function()
    assert "UnsupportedType" in caplog.text


class OutOfStock(Conflict):
    """An app's own, of which the code tells nothing."""


def test_unsupported_exceptions(clock, caplog):
    """An app's own exception is raised by each call, and is not made another one by the cache."""
    app, cache = make_app(OURS)
    app.debug = False

    @cache.cached(key_prefix="k")
    def function():
        raise OutOfStock("no more")

    with app.app_context():
        for _ in range(2):
            with pytest.raises(OutOfStock):
                function()
        assert not cache.has("k")
    assert "OutOfStock" in caplog.text


def test_aborts_of_another_process(ours):
    """A process that has seen none of these exceptions itself can read them."""
    ours.set("k", NotFound("nothing here"))
    other = StoreBackend(ours._store, Codec())
    found = other.get("k")
    assert (type(found), found.description) == (NotFound, "nothing here")


def test_unknown_code(ours):
    """An exception of a code that this version does not know is a miss."""
    payload = Codec().encode(_Aborted(799, {}))
    ours._store.write("k", Entry(payload, created_at=SYSTEM.now()))
    assert not ours.has("k")


def test_what_it_tells(clock):
    """Every call is counted as cache_manager's are, and tells of the keys that it changes."""
    told, changed = [], []
    state = SimpleNamespace(
        store=LocalStore(1 << 20),
        codec=Codec(),
        tell=lambda *what: told.append(what),
        detach=lambda *what: changed.append(what),
    )
    app = Flask("shop")
    app.extensions["cache_strategies"] = state
    backend = StoreBackend.factory(app, {}, [], {})
    backend.get("a")
    backend.set("a", 1)
    backend.get_many("a", "b")
    assert told == [
        ("get", "miss", 0.0), ("set", "ok", None), ("get", "hit", 0.0), ("get", "miss", 0.0)
    ]  # fmt: skip
    state.store.write("b", Entry(b"\xc1", created_at=SYSTEM.now()))
    told.clear()
    backend.get("b")
    backend.add("c", 1)
    backend.inc("n")
    backend.set_many({"d": 1})
    backend.delete("d")
    backend.delete_many("d", "e")
    backend.clear()
    assert [(operation, status) for operation, status, _ in told] == [
        ("get", "unreadable"), *[("set", "ok")] * 3, *[("delete", "ok")] * 3, ("clear", "ok")
    ]  # fmt: skip
    assert changed == [
        ("key", "a"), ("key", "c"), ("key", "n"), ("key", "d"), ("key", "d"), ("key", "d"),
        ("key", "e"), ("all", ""),
    ]  # fmt: skip


def test_unreadable_bytes(ours):
    """Bytes that are no value count as absent for every call, so that they are replaced."""
    now = SYSTEM.now()

    def spoil(key):
        ours._store.write(key, Entry(b"\xc1 no msgpack", created_at=now))

    for key in ("get", "add", "inc", "set"):
        spoil(key)
    assert ours.get("get") is None
    assert not ours.has("get")
    assert ours.get_many("get", "add") == [None, None]
    assert ours.delete("get") is False
    assert ours.add("add", 1) is True
    assert ours.inc("inc") == 1
    assert ours.set("set", 1) is True
    assert ours.get_many("add", "inc", "set") == [1, 1, 1]


@pytest.mark.parametrize("kind", ["stale", "negative"])
def test_what_others_keep(ours, kind):
    """A stale entry of `cache_aside`, or one for what was not found, is not served as a value."""
    payload, now = Codec().encode("old"), SYSTEM.now()
    fresh_until = now if kind == "stale" else NEVER
    entry = Entry(payload, created_at=now, fresh_until=fresh_until, is_negative=kind == "negative")
    ours._store.write("k", entry)
    assert (ours.get("k"), ours.has("k"), ours.get_many("k")) == (None, False, [None])
    assert ours.add("k", "new") is True
    assert ours.get("k") == "new"


def test_every_hit_is_a_copy(ours):
    """A caller that changes what it got changes it for nobody else."""
    value = {"a": [1]}
    ours.set("k", value)
    value["a"].append(2)
    ours.get("k")["a"].append(3)
    ours.get_many("k")[0]["a"].append(4)
    assert ours.get("k") == {"a": [1]}


def test_inc_of_what_is_no_number(ours):
    """The error is Python's, the value stays, and nothing is held afterwards."""
    ours.set("k", "text")
    began = SYSTEM.now()
    for _ in range(2):
        with pytest.raises(TypeError):
            ours.inc("k")
    assert ours.get("k") == "text"
    assert SYSTEM.now() == began


def test_patience_ends(ours):
    """While somebody else loads the key add and inc wait for a second, then give up."""
    lease = ours._store.lease("k", None)
    began = SYSTEM.now()
    assert ours.add("k", 1) is False
    assert ours.inc("k") is None
    assert 2.0 <= SYSTEM.now() - began < 2.1
    assert ours._store.settle(lease, None) is False
    assert ours.add("k", 1) is True


def test_a_backoff_is_passed_over(ours):
    """A load that has failed a short while ago keeps nobody from adding or counting."""
    for key in ("added", "counted"):
        ours._store.settle(ours._store.lease(key, None), None, backoff_s=60)
    assert ours.add("added", 1) is True
    assert ours.inc("counted") == 1


def test_set_breaks_a_load(ours):
    """A value that was set while a load went on stays; what was loaded is not put in."""
    lease = ours._store.lease("k", None)
    ours.set("k", "set")
    loaded = Entry(Codec().encode("loaded"), created_at=SYSTEM.now())
    assert ours._store.settle(lease, loaded) is False
    assert ours.get("k") == "set"


class Refusing(LocalStore):
    """A store that carries nothing out, as one whose Redis is away."""

    def write(self, key, entry):
        return False

    def write_many(self, entries):
        return False

    def delete(self, key):
        return False

    def delete_many(self, keys):
        return False

    def settle(self, lease, entry, *, backoff_s=0.0):
        super().settle(lease, None, backoff_s=backoff_s)
        return False

    def invalidate_tag(self, tag, *, keep_stale):
        return False


def test_store_that_refuses(clock):
    """Nothing raises beside delete_many of what is still there, and everything says False."""
    store, told = Refusing(1 << 20), set()
    backend = StoreBackend(store, Codec(), tell=lambda *what: told.add(what[:2]))
    assert backend.set("k", 1) is False
    assert backend.add("k", 1) is False
    assert backend.set_many({"k": 1}) == []
    assert backend.inc("k") is None
    assert backend.delete("k") is False
    assert backend.clear() is False
    assert backend.delete_many("k", "l") == ["k", "l"]
    assert told == {("set", "queued"), ("delete", "queued"), ("clear", "queued")}
    LocalStore.write(store, "k", Entry(Codec().encode(1), created_at=SYSTEM.now()))
    with pytest.raises(RuntimeError, match=r"\['k'\]"):
        backend.delete_many("k", "l")
    lenient = StoreBackend(store, Codec(), ignore_delete_many_errors=True)
    assert lenient.delete_many("k", "l") == ["l"]


def at_once(count, function):
    """What a function returned in threads that began together."""
    results, barrier = [], threading.Barrier(count)

    def run(number):
        barrier.wait()
        results.append(function(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_add_once():
    """Of many threads that add a key at once exactly one is told so, and its value is there."""
    backend = StoreBackend(LocalStore(1 << 20), Codec())
    for turn in range(50):
        key = f"k{turn}"
        won = at_once(8, lambda number, key=key: (backend.add(key, number), number))
        winners = [number for has_won, number in won if has_won]
        assert len(winners) == 1
        assert backend.get(key) == winners[0]


def test_threads_count_exactly():
    """No increment of many threads is lost, and none is counted twice."""
    backend = StoreBackend(LocalStore(1 << 20), Codec())
    seen = at_once(8, lambda _number: [backend.inc("n") for _ in range(100)])
    assert sorted(itertools.chain(*seen)) == list(range(1, 801))


def test_processes_that_share_a_redis(redis_server):
    """Two stores of one Redis, as two processes have them, add once and count exactly together."""
    redis = [GuardedRedis(redis_server.url, budget_s=5.0) for _ in range(2)]
    stores = [TieredStore(one, max_bytes=1 << 20) for one in redis]
    backends = [StoreBackend(store, Codec()) for store in stores]

    def run(number):
        backend = backends[number % 2]
        added = [backend.add(f"k{turn}", number) for turn in range(20)]
        return added, [backend.inc("n") for _ in range(20)]

    results = at_once(6, run)
    assert [sum(turns) for turns in zip(*(added for added, _ in results), strict=True)] == [1] * 20
    assert sorted(itertools.chain(*(seen for _, seen in results))) == list(range(1, 121))
    # At once, whatever the memory of the other one has not heard yet.
    for turn in range(20):
        assert backends[turn % 2].get("n") is not None
        assert backends[1 - turn % 2].delete("n") is True
        assert backends[turn % 2].inc("n") == 1
        assert backends[turn % 2].delete("k") is False
        assert backends[1 - turn % 2].add("k", "again") is True
        assert backends[turn % 2].get("k") == "again"
        assert backends[1 - turn % 2].delete("k") is True
    for closed in (*stores, *redis):
        closed.close()


def test_a_key_that_changes_while_it_is_counted(redis_server):
    """What is deleted between the lease and the sum is not added to, and nothing stays held."""
    redis = GuardedRedis(redis_server.url, budget_s=5.0)
    store = TieredStore(redis, max_bytes=0)
    backend = StoreBackend(store, Codec())
    backend.set("n", 10)
    lease, deletions = store.lease, iter([True])

    def overtaken(key, known, *, anyway=False):
        got = lease(key, known, anyway=anyway)
        if isinstance(got, Lease) and next(deletions, False):
            store.delete(key)
        return got

    store.lease = overtaken
    assert backend.inc("n") == 1
    assert isinstance(lease("n", store.read("n")), Lease)
    for closed in (store, redis):
        closed.close()


def test_while_redis_is_away(redis_server):
    """Each process adds and counts alone, by what its memory has, and nothing raises or waits."""
    redis = GuardedRedis(redis_server.url, budget_s=5.0)
    store = TieredStore(redis, max_bytes=1 << 20)
    backend = StoreBackend(store, Codec())
    while store.explain("there")["invalidations"] != "linked":
        time.sleep(0.005)
    assert backend.set("there", 1) is True
    redis_server.kill()
    assert backend.set("k", 1) is False
    began = SYSTEM.now()
    assert backend.get_many("there", "k") == [1, 1]
    assert backend.add("there", 2) is False
    assert backend.add("k", 2) is False
    assert backend.add("new", 3) is True
    assert [backend.inc("there"), backend.inc("counted"), backend.dec("counted", 5)] == [2, 1, -4]
    assert backend.get_many("there", "k", "new", "counted") == [2, 1, 3, -4]
    assert backend.clear() is False
    assert backend.get_many("there", "k", "new") == [None] * 3
    assert SYSTEM.now() - began < 4  # below the budget
    for closed in (store, redis):
        closed.close()


def test_under_gevent():
    """In a patched process greenlets add once and count exactly."""
    result = run_patched(
        """
        from flask_muset.cache_strategies.codec import Codec
        from flask_muset.cache_strategies.flask_caching_backend import StoreBackend
        from flask_muset.cache_strategies.local_store import LocalStore

        class Slow(LocalStore):
            def settle(self, lease, entry, *, backoff_s=0.0):
                gevent.sleep(0.001)
                return super().settle(lease, entry, backoff_s=backoff_s)

        backend = StoreBackend(Slow(1 << 20), Codec())
        adds = [gevent.spawn(backend.add, "k", number) for number in range(50)]
        incs = [gevent.spawn(backend.inc, "n") for _ in range(50)]
        gevent.joinall([*adds, *incs])
        result = [sum(one.value for one in adds), sorted(one.value for one in incs)]
        """
    )
    assert result == [1, list(range(1, 51))]


def test_two_apps_do_not_share(clock):
    """One Cache object on two apps keeps their values apart."""
    cache = Cache()
    apps = []
    for name in ("one", "two"):
        app = Flask(name)
        CacheStrategies(app)
        cache.init_app(app, config={"CACHE_TYPE": OURS})
        apps.append(app)
    for app in apps:
        with app.app_context():
            assert cache.add("k", app.name) is True
    for app in apps:
        with app.app_context():
            assert cache.get("k") == app.name


def test_importing_warns_of_nothing():
    """Setting it up raises no warning, Flask-Caching's of a missing backend included."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_app(OURS)
