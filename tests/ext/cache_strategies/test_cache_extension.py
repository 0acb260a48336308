"""CacheStrategies as an app uses it: set-up, configuration, methods, decorator, headers."""

import asyncio
import dataclasses
import gc
import math
import threading
import time

import flask_caching
import pytest
from flask import Flask, jsonify
from waiting import until

from flask_muset import CacheStrategies, aio
from flask_muset.cache_strategies import CacheStrategy, UnsupportedType, cache_manager, cached
from flask_muset.clock import SYSTEM
from flask_muset.errors import NotFoundError, OperationTimeoutError
from flask_muset.signals import cache_operated
from flask_muset.testing import virtual_clock


@dataclasses.dataclass(frozen=True)
class User:
    """What a cached function returns."""

    id: int
    name: str


def make_app(name="app", **config):
    app = Flask(name)
    app.config.update({f"CACHE_STRATEGIES_{key}": value for key, value in config.items()})
    return app


@pytest.fixture
def app():
    return make_app()


@pytest.fixture
def cache(app):
    cache = CacheStrategies(app)
    with app.app_context():
        yield cache


@pytest.fixture
def events():
    seen = []

    def listen(_sender, event):
        seen.append((event.operation, event.status))

    cache_operated.connect(listen)
    yield seen
    cache_operated.disconnect(listen)


class Source:
    """Something that is asked, and counts how often."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = 0

    def __call__(self, *_args):
        self.calls += 1
        answer = self.answers[min(self.calls, len(self.answers)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer


# --- Set-up ---------------------------------------------------------------------------------------


def test_two_apps_of_one_instance_share_nothing():
    """One instance on two apps: each has its own values, its own times and its own off switch."""
    cache, on, off = CacheStrategies(), make_app("on", DEFAULT_EXPIRE=10), make_app(ENABLED=False)
    cache.init_app(on)
    cache.init_app(off)
    with on.app_context():
        assert cache.set("k", 1)
        assert cache.get("k") == cache_manager.get("k") == 1
        with virtual_clock():
            cache.set("k", 1)
            SYSTEM.sleep(9.9)
            assert cache.get("k") == 1
            SYSTEM.sleep(0.2)
            assert cache.get("k") is None
    with off.app_context():
        assert cache.set("k", 2)
        assert cache.get("k") is None
    gc.collect()  # the apps of other tests
    with pytest.raises(RuntimeError, match="2 apps in this process use it"):
        cache.get("k")


def test_a_second_set_up_is_refused(app):
    """init_app twice on one app is an error with the cure."""
    CacheStrategies(app)
    with pytest.raises(RuntimeError, match="already set up on app 'app'; call init_app once"):
        CacheStrategies(app)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("REDIS_URL", "127.0.0.1", "REDIS_URL must be the URL of a Redis"),
        ("REDIS_URL", "redis://x:port/0", "CACHE_STRATEGIES_REDIS_URL: the URL of Redis cannot"),
        ("NAMESPACE", "a*b", "NAMESPACE must be 1 to 64 letters"),
        ("L1_MAX_BYTES", -1, "L1_MAX_BYTES must be a whole number"),
        ("L1_MAX_BYTES", 0, "nothing can be kept; set one of them"),
        ("DEFAULT_EXPIRE", -5, "DEFAULT_EXPIRE must be seconds"),
        ("TYPO", 1, "CACHE_STRATEGIES_TYPO is not a setting of CacheStrategies"),
    ],
)
def test_a_wrong_setting_stops_the_start(key, value, text):
    """The message names the setting, the value or the reason, and the cure."""
    with pytest.raises(ValueError, match=text):
        CacheStrategies(make_app(**{key: value}))


def test_without_an_app_there_is_a_cure():
    """Outside of any app the error says what to do."""
    make_app()
    with (
        pytest.raises(RuntimeError, match="CacheStrategies is not set up on app"),
        make_app("other").app_context(),
    ):
        cache_manager.get("k")


def test_a_given_flask_caching_cache_is_used(app):
    """Over another backend of Flask-Caching the strategies work all the same."""
    given = flask_caching.Cache(app, config={"CACHE_TYPE": "SimpleCache"})
    cache = CacheStrategies(app, cache=given)
    with app.app_context():
        source = Source({"n": 1})
        assert cache.cache_aside("k", source, 60) == {"n": 1}
        assert cache.cache_aside("k", source, 60) == {"n": 1}
        assert source.calls == 1
        assert len(given.cache._cache) >= 1
        assert cache.flask_cache is given


def test_flask_caching_shares_the_store(cache):
    """What Flask-Caching's object keeps is what the manager reads, and the other way round."""
    cache.flask_cache.set("k", {"n": 1}, timeout=60)
    assert cache.get("k") == {"n": 1}
    cache.set("l", [1], 60)
    assert cache.flask_cache.get("l") == [1]


# --- Values ---------------------------------------------------------------------------------------


def test_the_guides_four_lines(cache):
    """set, get, delete and delete_pattern do what their names say."""
    assert cache_manager.set("user:123", {"name": "Ada"}, expire=300) is True
    assert cache_manager.get("user:123") == {"name": "Ada"}
    assert cache_manager.delete("user:123") is True
    assert cache_manager.get("user:123") is None
    cache_manager.set_many({"user:1": 1, "user:2": 2, "other": 3}, expire=300)
    assert cache_manager.delete_pattern("user:*") == 2
    assert cache_manager.get_many(["user:1", "other"]) == {"other": 3}


def test_none_is_a_value(cache):
    """A kept None is told from nothing by the default."""
    cache.set("k", None)
    assert cache.get("k", "absent") is None
    assert cache.get("l", "absent") == "absent"
    assert cache.get_many(["k", "l"]) == {"k": None}


def test_each_caller_has_a_copy_of_its_own(cache):
    """What one caller does to a value no other sees."""
    kept = {"list": [1]}
    cache.set("k", kept)
    kept["list"].append(2)
    cache.get("k")["list"].append(3)
    assert cache.get("k") == {"list": [1]}


def test_what_cannot_be_kept_is_refused_with_its_path(cache):
    """At set, before anything is written, and in write_through before the source is."""
    with pytest.raises(UnsupportedType, match=r'value\["user"\]\[1\]'):
        cache.set("k", {"user": [1, object()]})
    source = Source(None)
    with pytest.raises(UnsupportedType):
        cache.write_through("k", object(), source, 60)
    assert source.calls == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda cache: cache.set("", 1), "1 to 1024 characters"),
        (lambda cache: cache.get(1), "must be a str, got int"),
        (lambda cache: cache.set("k", 1, 0), "expire must be seconds above 0"),
        (lambda cache: cache.set("k", 1, "5"), "expire must be seconds above 0"),
        (lambda cache: cache.set("k", 1, tags="t"), "tags must be several"),
        (lambda cache: cache.cache_aside("k", lambda: 1, 5, soft_timeout=-1), "soft_timeout"),
        (lambda cache: cache.cached("p", stale_if_error=-1), "stale_if_error"),
        (lambda cache: cache.cached("p", unknown=1), "unknown"),
        (lambda cache: cache.delete_tag(""), "1 to 1024 characters"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(cache, call, text):
    """Bad input is refused with its name, its value and the cure."""
    with pytest.raises((TypeError, ValueError), match=text):
        call(cache)


def test_tags(cache):
    """delete_tag forgets, expire_tag lets the stale value stand in where that is allowed."""
    cache.set("a", 1, tags=["t", "u"])
    cache.set("b", 2, tags=["u"])
    assert cache.delete_tag("t")
    assert cache.get_many(["a", "b"]) == {"b": 2}
    source = Source(1, OSError("away"))
    assert cache.cache_aside("c", source, 60, tags=["v"], stale_if_error=60) == 1
    assert cache.expire_tag("v")
    assert cache.get("c") is None
    assert cache.cache_aside("c", source, 60, tags=["v"], stale_if_error=60) == 1
    assert source.calls == 2


def test_explain_says_what_there_is(cache):
    """The level, the times and the lease of a key."""
    cache.set("k", [1, 2], 60, tags=["t"])
    told = cache.explain("k")
    assert told["key"] == "k"
    assert told["level"] == "memory"
    assert 59 < told["fresh_for_s"] <= 60
    assert told["tags"] == ["t"] or told["tags"] == ("t",)
    assert cache.explain("absent")["level"] is None


# --- Strategies -----------------------------------------------------------------------------------


def test_cache_aside_of_the_guide(cache):
    """The source is asked once; an infinite time is none; an app's default holds without one."""
    source = Source({"n": 1}, {"n": 2})
    for expire in (300, None, math.inf):
        assert CacheStrategy.cache_aside(key="user:1", fetch_func=source, expire=expire) == {"n": 1}
    assert source.calls == 1


def test_not_found_is_remembered_where_asked_for(cache):
    """A NotFoundError is raised anew, alike, without asking the source again."""
    error = NotFoundError("no user", resource_type="user", details={"id": 7})
    source = Source(error)
    for _ in range(3):
        with pytest.raises(NotFoundError) as raised:
            cache.cache_aside("k", source, 60, negative_expire=5)
        assert raised.value.details == {"id": 7, "resource_type": "user"} or (
            raised.value.details == {"id": 7}
        )
    assert source.calls == 1
    assert cache.get("k", "absent") == "absent"


def test_write_through_of_the_guide(cache):
    """The source first, then the cache; the value is kept as the source has left it."""
    written = []

    def save(user):
        user["id"] = 7
        written.append(dict(user))

    assert CacheStrategy.write_through("user:7", {"name": "Ada"}, save, 300) is True
    assert written == [{"name": "Ada", "id": 7}]
    assert cache.get("user:7") == {"name": "Ada", "id": 7}


def test_a_write_that_fails_leaves_no_value(cache):
    """The exception propagates, and nobody knows what the source has."""
    cache.set("k", "old")
    with pytest.raises(OSError, match="disk full"):
        cache.write_through("k", "new", Source(OSError("disk full")), 60)
    assert cache.get("k") is None
    assert cache.cache_aside("k", lambda: "loaded", 60) == "loaded"
    assert cache.get("k") == "loaded"


def test_a_load_during_a_write_is_not_kept(cache):
    """What is read while the source is written may be the old value."""
    seen = []

    def save(_value):
        seen.append(cache.cache_aside("k", lambda: "old", 60))

    assert cache.write_through("k", "new", save, 60) is True
    assert seen == ["old"]
    assert cache.get("k") == "new"


# --- The decorator --------------------------------------------------------------------------------


def test_cached_of_the_guide(cache):
    """A function's results by its arguments, under a key that people can read."""
    source = Source({"id": 42})

    @cached(key_prefix="user", expire=300)
    def get_user(user_id: int):
        """Docs stay."""
        return source(user_id)

    assert get_user(42) == get_user(user_id=42) == {"id": 42}
    assert source.calls == 1
    assert get_user.__doc__ == "Docs stay."
    assert get_user.cache_key(42) == "user:42"
    assert cache.get("user:42") == {"id": 42}
    assert get_user.invalidate(42)
    get_user(42)
    assert source.calls == 2
    assert cache.delete_pattern("user:*") == 1


def test_a_cached_method_is_keyed_by_what_its_object_says(cache):
    """`self` has a key of its own, or the cure is told."""

    class Shop:
        def __init__(self, name):
            self.name = name

        def __cache_key__(self):
            return self.name

        @cached("price", 60)
        def price(self, item):
            return f"{self.name} {item}"

    class Nameless:
        @cached("price", 60)
        def price(self):
            return 1

    assert [Shop(name).price("tea") for name in ("a", "b", "a")] == ["a tea", "b tea", "a tea"]
    with pytest.raises(TypeError, match="__cache_key__"):
        Nameless().price()


def test_a_class_in_the_annotation_can_be_read_by_another_process(app):
    """What a function is said to return is known before anything of it was kept here."""
    writer, reader = CacheStrategies(app), CacheStrategies()
    other = make_app("other")
    reader.init_app(other)
    source = Source(User(1, "Ada"))

    @cached("user", 60)
    def get_user(_user_id: int) -> User:
        return source()

    with app.app_context():
        get_user(1)
        entry = app.extensions["cache_strategies"].store.read("user:1")
    with other.app_context():
        other.extensions["cache_strategies"].store.write("user:1", entry)
        assert get_user(1) == User(1, "Ada")
    assert source.calls == 1
    assert writer is not reader


def test_register_is_a_declaration_for_all_apps():
    """A class registered before or after init_app can be read."""
    cache, app = CacheStrategies(), make_app()
    assert cache.register(User) is User
    cache.init_app(app)
    codec = app.extensions["cache_strategies"].codec
    assert codec.decode(codec.encode(User(1, "x"))) == User(1, "x")


def test_the_off_switch_loads_each_time():
    """With ENABLED off nothing is kept, and writes still reach their source."""
    app = make_app(ENABLED=False)
    cache = CacheStrategies(app)
    source = Source(1, 2)
    with app.test_request_context():
        assert [cache.cache_aside("k", source, 60) for _ in range(2)] == [1, 2]
        written = []
        assert cache.write_through("k", 3, written.append, 60) is True
        assert written == [3]
        assert cache.get("k") is None
        assert cache.delete_pattern("*") == 0


def test_immutable_values_are_shared(cache):
    """Callers that promise not to change a value get one object."""
    source = Source({"n": 1})
    cache.cache_aside("k", source, 60, immutable=True)
    first = cache.cache_aside("k", source, 60, immutable=True)
    assert first is cache.cache_aside("k", source, 60, immutable=True)
    assert first is not cache.cache_aside("k", source, 60)


# --- Responses and events -------------------------------------------------------------------------


def test_a_response_says_what_the_cache_did(app):
    """MISS, HIT with its age, STALE, BYPASS; of several the one that tells most."""
    cache = CacheStrategies(app)
    source = Source(1, 2, OSError("away"), OSError("away"))

    @app.get("/one")
    def one():
        return jsonify(cache.cache_aside("k", source, 10, stale_if_error=100))

    @app.get("/two")
    def two():
        cache.cache_aside("k", source, 10, stale_if_error=100)
        return jsonify(cache.cache_aside("new", lambda: 1, 10))

    @app.get("/none")
    def none():
        return "none"

    client = app.test_client()
    with virtual_clock():

        def answer(path):
            got = client.get(path)
            return got.headers.get("X-Cache"), got.headers.get("Age")

        assert answer("/none") == (None, None)
        assert answer("/one") == ("MISS", None)
        SYSTEM.sleep(3.5)
        assert answer("/one") == ("HIT", "3")
        assert answer("/two") == ("MISS", None)
        assert answer("/two") == ("HIT", "3")
        SYSTEM.sleep(10)
        assert answer("/one") == ("MISS", None)
        SYSTEM.sleep(15)
        assert answer("/one") == ("STALE", "15")


def test_the_headers_can_be_switched_off(app):
    """RESPONSE_HEADERS off leaves responses as they are."""
    app.config["CACHE_STRATEGIES_RESPONSE_HEADERS"] = False
    cache = CacheStrategies(app)
    app.get("/")(lambda: cache.cache_aside("k", lambda: "x", 10))
    assert "X-Cache" not in app.test_client().get("/").headers


def test_an_open_breaker_serves_stale_without_waiting(app):
    """While the source's breaker is open, the stale value comes at once and says so."""
    from flask_muset.resilience import CircuitBreaker

    cache = CacheStrategies(app)
    breaker = CircuitBreaker("source", failure_threshold=1)
    source = Source("kept")

    @app.get("/")
    def view():
        return cache.cache_aside("k", breaker(source), 0.05, stale_if_error=60)

    client = app.test_client()
    assert client.get("/").headers["X-Cache"] == "MISS"
    breaker.force_open()
    time.sleep(0.06)
    for _ in range(3):
        began = time.monotonic()
        got = client.get("/")
        assert time.monotonic() - began < 5
        assert (got.text, got.headers["X-Cache"]) == ("kept", "STALE")
        assert 0 <= int(got.headers["Age"]) < 20
    assert source.calls == 1


def test_events_are_few_and_right(cache, events):
    """Each operation is told once, by name and status."""
    cache.get("k")
    cache.set("k", 1)
    cache.get("k")
    cache.delete("k")
    cache.delete_pattern("*")
    cache.cache_aside("k", lambda: 1, 60)
    cache.cache_aside("k", lambda: 1, 60)
    assert events == [
        ("get", "miss"),
        ("set", "ok"),
        ("get", "hit"),
        ("delete", "ok"),
        ("delete_pattern", "ok"),
        ("load", "ok"),
        ("get", "miss"),
        ("get", "hit"),
    ]


def test_a_refresh_runs_in_the_app_without_the_request(app):
    """What is loaded beside a request has the app, and no request that may be over."""
    from flask import current_app, has_request_context

    cache = CacheStrategies(app)
    seen, refreshed = [], threading.Event()

    def fetch():
        seen.append((current_app.name, has_request_context()))
        if len(seen) == 2:
            refreshed.set()
        return len(seen)

    @app.get("/")
    def view():
        return str(cache.cache_aside("k", fetch, 0.02, stale_while_revalidate=60))

    client = app.test_client()
    assert client.get("/").text == "1"
    time.sleep(0.03)
    got = client.get("/")
    assert (got.text, got.headers["X-Cache"]) == ("1", "STALE")
    assert refreshed.wait(5)
    assert seen == [("app", True), ("app", False)]


# --- asyncio --------------------------------------------------------------------------------------


def test_the_guides_awaited_lines(cache):
    """The asynchronous names take coroutine functions and plain ones."""
    calls = []

    async def fetch():
        calls.append("fetch")
        await asyncio.sleep(0.01)
        return {"n": 1}

    async def save(value):
        calls.append(value)

    async def main():
        assert await aio.cache_manager.set("user:1", 1, expire=300)
        assert await aio.cache_manager.get("user:1") == 1
        assert await aio.cache_manager.get("none", "absent") == "absent"
        assert await aio.cache_manager.delete("user:1")
        got = await asyncio.gather(
            *(aio.CacheStrategy.cache_aside("k", fetch, 300) for _ in range(50))
        )
        assert got == [{"n": 1}] * 50
        assert len({id(value) for value in got}) == 50
        assert await aio.CacheStrategy.write_through("w", 5, save, 300)
        assert await aio.cache_manager.get_many(["w", "k"]) == {"w": 5, "k": {"n": 1}}
        assert await aio.cache_manager.delete_pattern("*") == 2

    asyncio.run(main())
    assert calls == ["fetch", 5]


def test_an_awaited_function_is_cached(cache):
    """The decorator keeps the colour; its own key asked for within a load is no deadlock."""
    calls = []

    @aio.cached(key_prefix="user", expire=300)
    async def get_user(user_id: int) -> User:
        calls.append(user_id)
        if len(calls) == 1:
            return await get_user(user_id)
        await asyncio.sleep(0)
        return User(user_id, "Ada")

    async def main():
        assert await get_user(1) == await get_user(1) == User(1, "Ada")
        assert await get_user.invalidate(1)
        assert await get_user(1) == User(1, "Ada")

    asyncio.run(asyncio.wait_for(main(), 10))
    assert calls == [1, 1, 1]
    with pytest.raises(TypeError, match="no coroutine function"):
        aio.cached("x")(lambda: 1)
    with pytest.raises(TypeError, match=r"flask_muset\.aio\.cached"):
        cached("x")(get_user)


def test_a_hard_timeout_cuts_a_coroutine_off(cache):
    """An awaited load that takes too long is cancelled and is a time-out."""
    ended = []

    async def slow():
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main():
        with pytest.raises(OperationTimeoutError):
            await aio.cache_manager.cache_aside("k", slow, 60, hard_timeout=0.1)
        await asyncio.sleep(0.05)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 5
    assert ended == ["cancelled"]


def test_a_shared_value_is_not_given_to_others(cache):
    """Who did not promise to leave a value as it is gets a copy of his own."""
    cache.cache_aside("k", lambda: {"n": 1}, 60, immutable=True)
    shared = cache.cache_aside("k", lambda: {"n": 2}, 60, immutable=True)
    cache.get("k")["n"] = 5
    assert shared == {"n": 1}


# --- What must not be mixed up --------------------------------------------------------------------


def test_a_given_cache_on_two_apps_has_two_backends():
    """The backend is that of the app, whichever was set up last; one that is none has a cure."""
    given, apps = flask_caching.Cache(), [make_app("a"), make_app("b")]
    cache = CacheStrategies(cache=given)
    with pytest.raises(RuntimeError, match="not set up on app 'a'; call its init_app before"):
        cache.init_app(apps[0])
    for app in apps:
        given.init_app(app, config={"CACHE_TYPE": "SimpleCache"})
        cache.init_app(app)
    with apps[0].app_context():
        cache.set("k", "a")
    with apps[1].app_context():
        assert cache.get("k") is None


def test_options_of_another_backend_do_no_harm():
    """CACHE_OPTIONS and CACHE_ARGS of an app's own Flask-Caching are not taken for ours."""
    app = make_app()
    app.config.update(CACHE_OPTIONS={"mode": 0o600}, CACHE_ARGS=["/tmp"])
    cache = CacheStrategies(app)
    with app.app_context():
        cache.flask_cache.set("k", 1)
        assert cache.get("k") == 1


def test_a_given_client_has_its_own_prefix(app):
    """A namespace beside a client that is given would be ignored, so it is refused."""
    from flask_muset.redis import GuardedRedis

    app.config["CACHE_STRATEGIES_NAMESPACE"] = "mine"
    with pytest.raises(ValueError, match="NAMESPACE: the keys of a Redis client that is given"):
        CacheStrategies(app, redis=GuardedRedis("redis://127.0.0.1:1/0"))


def test_a_writer_that_would_have_to_be_awaited_is_refused(cache):
    """A coroutine function under the plain names has done nothing, and says so."""

    async def save(value):
        raise AssertionError(value)

    with pytest.raises(TypeError, match=r"nothing was written; use .* flask_muset\.aio"):
        cache.write_through("k", 1, save, 60)
    assert cache.get("k") is None
    made = save(1)
    with pytest.raises(TypeError, match=r"flask_muset\.aio"):
        cache.cache_aside("k", lambda: made, 60)
    made.close()


def test_functions_that_differ_by_what_is_around_them_need_a_prefix(cache):
    """Two closures of one name would share their results."""

    def make(table):
        def load(number):
            return f"{table} {number}"

        return load

    with pytest.raises(TypeError, match="give each a key_prefix of its own"):
        cache.cached()(make("users"))
    users, posts = (cache.cached(table)(make(table)) for table in ("users", "posts"))
    assert [users(1), posts(1)] == ["users 1", "posts 1"]


def test_a_dataclass_that_is_more_than_its_fields_is_no_key(cache):
    """What tells two objects apart and is no field would be left out of the key."""

    @dataclasses.dataclass
    class Tenant:
        name: str

        def __post_init__(self):
            self.secret = self.name.upper()

    @cached("tenant", 60)
    def load(tenant):
        return tenant.secret

    with pytest.raises(TypeError, match="__cache_key__"):
        load(Tenant("a"))


def test_the_decorator_without_a_call_has_a_cure():
    """`@cached` without parentheses is told apart from a prefix."""
    with pytest.raises(TypeError, match=r"write @cached\(\) above the function"):
        cached(lambda: 1)


def test_keys_of_many_are_many(cache):
    """A str is no list of keys."""
    with pytest.raises(TypeError, match=r"write \['user:1'\]"):
        cache.get_many("user:1")


def test_tags_of_a_write(cache):
    """What was written through is made invalid by its tags."""
    cache.write_through("k", 1, lambda _value: None, 60, tags=["t"])
    assert cache.get("k") == 1
    cache.delete_tag("t")
    assert cache.get("k") is None


def test_a_views_own_cache_control_gets_no_age(app):
    """Age would take from the time that the view allows browsers."""
    cache = CacheStrategies(app)

    @app.get("/")
    def view():
        response = jsonify(cache.cache_aside("k", lambda: 1, 60))
        response.cache_control.max_age = 1
        return response

    client = app.test_client()
    client.get("/")
    answer = client.get("/")
    assert answer.headers["X-Cache"] == "HIT"
    assert "Age" not in answer.headers


def test_an_app_that_is_gone_leaves_nothing(redis_server):
    """Its cache, its thread and its connection go with it."""
    import gc
    import weakref

    cache, before = CacheStrategies(), set(threading.enumerate())

    def use():
        app = make_app(REDIS_URL=redis_server.url, REDIS_BUDGET=2.0)
        cache.init_app(app)
        with app.app_context():
            cache.set("k", 1)
            assert cache.get("k") == 1
        return weakref.ref(app)

    def is_gone():
        gc.collect()
        feeds = [t for t in set(threading.enumerate()) - before if t.name == "cache-feed"]
        return not feeds and all(app() is None for app in gone)

    gone = [use() for _ in range(3)]
    until(is_gone)


# --- asyncio, where it ends in other ways ---------------------------------------------------------


def test_a_value_that_ends_while_it_is_asked_for_hangs_nobody(cache):
    """The loop never waits for itself, whenever a value of the memory expires."""

    async def fetch():
        return 1

    async def main():
        for _ in range(300):
            assert await aio.cache_manager.cache_aside("k", fetch, 0.0004) == 1

    asyncio.run(asyncio.wait_for(main(), 20))


def test_many_who_wait_for_a_failure_share_it(cache):
    """One awaited load fails for all who asked at the same time."""
    calls = []

    async def fails():
        calls.append(1)
        await asyncio.sleep(0.05)
        raise OSError("away")

    async def main():
        return await asyncio.gather(
            *(aio.cache_manager.cache_aside("k", fails, 60) for _ in range(200)),
            return_exceptions=True,
        )

    failures = asyncio.run(main())
    assert len(calls) == 1
    assert all(isinstance(failure, OSError) for failure in failures)


def test_a_cancelled_load_fails_nobody_else(cache):
    """Who is cancelled is cancelled; who waits for him loads."""
    calls = []

    async def fetch():
        calls.append(1)
        await asyncio.sleep(0.1)
        return len(calls)

    async def main():
        first = asyncio.create_task(aio.cache_manager.cache_aside("k", fetch, 60))
        await asyncio.sleep(0.02)
        others = [
            asyncio.create_task(aio.cache_manager.cache_aside("k", fetch, 60)) for _ in range(20)
        ]
        await asyncio.sleep(0.02)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await asyncio.gather(*others)

    assert set(asyncio.run(asyncio.wait_for(main(), 10))) <= {1, 2}


def test_a_loop_that_ends_leaves_no_load_behind(cache):
    """The next caller of the key, on another loop or on none, loads."""

    async def slow():
        await asyncio.sleep(60)

    async def begin():
        asyncio.ensure_future(aio.cache_manager.cache_aside("k", slow, 60))  # noqa: RUF006
        await asyncio.sleep(0.05)

    asyncio.run(begin())
    began = time.monotonic()
    assert cache.cache_aside("k", lambda: "loaded", 60) == "loaded"
    assert time.monotonic() - began < 20


def test_a_refresh_outlives_the_loop_of_its_request(cache):
    """With a loop for each request, a stale value is still refreshed."""
    calls = []

    async def fetch():
        await asyncio.sleep(0.02)
        calls.append(1)
        return len(calls)

    def ask():
        return asyncio.run(
            aio.cache_manager.cache_aside("k", fetch, 0.05, stale_while_revalidate=60)
        )

    assert ask() == 1
    time.sleep(0.06)
    assert ask() == 1
    until(lambda: ask() != 1)
