"""CacheStrategies: binds the cache to a Flask app."""

import logging
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import flask_caching
from flask import Flask, Response, after_this_request, has_request_context, request

from flask_muset import context
from flask_muset.cache_strategies.attempts import Attempts
from flask_muset.cache_strategies.cache import Cache
from flask_muset.cache_strategies.codec import Codec
from flask_muset.cache_strategies.commands import make_commands
from flask_muset.cache_strategies.config import PREFIX, Config, read_config
from flask_muset.cache_strategies.drain import Drain
from flask_muset.cache_strategies.flask_caching_backend import StoreBackend
from flask_muset.cache_strategies.journal import Journal, State
from flask_muset.cache_strategies.loading import Answer, Outcome
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.manager import KEY, WHAT, CacheManager, cache_manager
from flask_muset.cache_strategies.sqlite_journal import SqliteJournal
from flask_muset.cache_strategies.stores import Store, Tell
from flask_muset.cache_strategies.write_behind import WriteBehind
from flask_muset.cache_strategies.writers import Writers
from flask_muset.configuration import redis_client
from flask_muset.errors import MusetError
from flask_muset.locks import run_beside
from flask_muset.signals import (
    CacheEvent,
    Count,
    WriteBehindEvent,
    cache_counters,
    cache_operated,
    write_behind_measured,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from flask_muset.redis import GuardedRedis

__all__ = ["CacheStrategies"]

C = TypeVar("C", bound=type)

_log = logging.getLogger(__name__)

_NOTED = "flask_muset.cache"
#: The outcome that a response names, of several: the one that tells most.
_ORDER = [Outcome.HIT, Outcome.STALE, Outcome.BYPASS, Outcome.MISS]
#: Those whose value was kept, and so has an age.
_KEPT = (Outcome.HIT, Outcome.STALE)


@dataclass(slots=True)
class _State:
    """What one app owns."""

    cache: Cache
    store: Store
    codec: Codec
    redis: "GuardedRedis | None"
    tell: Tell
    detach: Callable[[str, str], None]
    flask_cache: flask_caching.Cache | None = None


class CacheStrategies(CacheManager):
    """A cache of one or two levels for an app, under its own methods and under Flask-Caching's.

    It has the methods of `cache_manager`. Without a Redis each process keeps what it needs in its
    memory; with one, the memories stand before what all processes share.

    Config:
        CACHE_STRATEGIES_ENABLED: False keeps nothing: every load is one. Default True.
        CACHE_STRATEGIES_REDIS_URL: Where the second level is. Default None: there is none.
        CACHE_STRATEGIES_JOURNAL_REDIS_URL: A second Redis for the writes that wait, and for the
            entries of all keys that the patterns of a writer match; nothing else is written behind
            then. Default None: they are where the second level is.
        CACHE_STRATEGIES_REDIS_MAX_CONNECTIONS: Calls of one process to it at once. Default 10.
        CACHE_STRATEGIES_REDIS_BUDGET: Seconds that a call may take. Default 0.05.
        CACHE_STRATEGIES_NAMESPACE: Tells apps that share a Redis apart. Default "default".
        CACHE_STRATEGIES_L1_MAX_BYTES: Of the memory of one process; 0 for none. Default 32 MiB.
        CACHE_STRATEGIES_L1_UNLINKED: Seconds for which an entry of the memory is served while
            nobody can tell that it is invalid. Default 5.
        CACHE_STRATEGIES_DEFAULT_EXPIRE: Seconds, where none are named; 0 for no end. Default 300.
        CACHE_STRATEGIES_RESPONSE_HEADERS: Whether a response says `X-Cache: HIT | MISS | STALE |
            BYPASS` and `Age` where its view has loaded something. Default True.
        CACHE_STRATEGIES_JOURNAL_PATH: The file in which writes wait for their source where no Redis
            is used. Default None: `write-behind.db` in the app's instance folder.
        CACHE_STRATEGIES_MAX_PENDING: Writes that may wait, of all processes; the next one is
            written by who asks for it. Default 10000.
        CACHE_STRATEGIES_MAX_PENDING_BYTES: Bytes of their values. Default 256 MiB.
        CACHE_STRATEGIES_REQUIRE_DURABLE: True refuses to write behind where Redis is set so that
            an accepted write could be lost. Default False: it is warned about.
        CACHE_STRATEGIES_WRITERS: References such as `shop.writers:save_order` to functions that a
            journal may name beside those under `writer`. Default none.
        CACHE_STRATEGIES_WRITE_DELAY: Seconds for which a write waits for newer ones of its key.
            Default 0.1.
        CACHE_STRATEGIES_WRITE_TIMEOUT: Seconds that one attempt to write may take. Default 30.
        CACHE_STRATEGIES_WRITES_AT_ONCE: Writers that run at once in one process. Default 8.
        CACHE_STRATEGIES_DRAIN: False lets this process accept writes and leave them to others.
            Default True.
        CACHE_STRATEGIES_DRAIN_AT_EXIT: Seconds that the end of a process waits for what it can
            still write; the rest stays in the journal. Default 5; 0 for none.

    Args:
        app: Is set up at once; else call `init_app`.
        cache: A `flask_caching.Cache` that is set up on the app: its backend is used instead. Other
            processes then learn nothing of loads, writes and deletes before they read.
        redis: Is used instead of a client made of the configuration.
        journal_redis: The same for that of the journal; the one is given with the other.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        cache: flask_caching.Cache | None = None,
        redis: "GuardedRedis | None" = None,
        journal_redis: "GuardedRedis | None" = None,
    ) -> None:
        super().__init__()
        self._given_cache = cache
        self._given_redis = redis
        self._given_journal_redis = journal_redis
        self._registered: list[type] = []
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        #: The cache of the only app, as long as there is that app.
        self._only: Callable[[], Cache | None] = _no_cache
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the configuration once and make the app's cache; nothing is connected yet.

        Raises:
            RuntimeError: It is set up on this app already.
            ValueError: A setting is not allowed.
        """
        config = read_config(app.config)
        codec = Codec(response_class=app.response_class)
        for cls in self._registered:
            codec.register(cls)
        counters = cache_counters(app.extensions)
        tell = _teller(app, counters)
        redis = None
        if self._given_cache is None:
            redis = redis_client(self._given_redis, config, PREFIX, "cache")
        journal_redis = self._journal_redis(config, redis)
        writers = Writers((self._declared, cache_manager._declared), config.writers)
        store = self._store(app, config, redis, journal_redis, writers, tell)
        journal = _journal(app, config, journal_redis, store)
        if config.require_durable:
            _refuse_risks(journal, store, journal_redis)
        behind = self._write_behind(
            app, config, journal, writers, codec, tell, is_split=journal_redis is not redis
        )
        cache = Cache(
            store,
            codec,
            write_behind=behind,
            in_background=partial(_in_background, app),
            default_expire_s=config.default_expire_s,
            tell=tell,
            counters=counters,
            note=_note_of(config),
            is_off=not config.enabled,
        )
        if hasattr(store, "on_invalid"):
            store.on_invalid = cache.detach
        state = _State(cache, store, codec, redis, tell, cache.detach)
        context.attach(app, KEY, WHAT, state)
        state.flask_cache = self._given_cache or _flask_cache(app)
        self._apps.add(app)
        self._only = weakref.ref(cache) if len(self._apps) == 1 else _no_cache
        if config.response_headers and config.enabled:
            context.install(app).describe(_describe)
        app.wsgi_app = partial(_serve, behind, app.wsgi_app)  # type: ignore[method-assign]
        app.cli.add_command(make_commands(cache))

    def _journal_redis(self, config: Config, redis: "GuardedRedis | None") -> "GuardedRedis | None":
        """Where writes wait: the Redis of the cache, unless they have one of their own."""
        given, url = self._given_journal_redis, config.journal_redis_url
        if given is None and url is None:
            return redis
        if redis is None or (given is None) != (self._given_redis is None):
            raise ValueError(
                f"a Redis of the journal is one beside that of the cache; set {PREFIX}REDIS_URL "
                f"with {PREFIX}JOURNAL_REDIS_URL, or give redis with journal_redis."
            )
        return redis_client(given, replace(config, redis_url=url), f"{PREFIX}JOURNAL_", "journal")

    def _store(
        self,
        app: Flask,
        config: Config,
        redis: "GuardedRedis | None",
        journal_redis: "GuardedRedis | None",
        writers: Writers,
        tell: Tell,
    ) -> Store:
        if not config.enabled:
            return LocalStore(0)
        if self._given_cache is not None:
            from flask_muset.cache_strategies.backend_store import BackendStore

            backend = app.extensions.get("cache", {}).get(self._given_cache)
            if backend is None:
                raise RuntimeError(
                    f"the given flask_caching.Cache is not set up on app {app.name!r}; call its "
                    "init_app before that of CacheStrategies."
                )
            return BackendStore(backend, tell=tell)
        if redis is None or journal_redis is None:
            return LocalStore(config.l1_max_bytes)
        # Only here, because they need redis-py.
        from flask_muset.cache_strategies.split_store import SplitStore
        from flask_muset.cache_strategies.tiered_store import TieredStore

        make = partial(TieredStore, unlinked_s=config.l1_unlinked_s, tell=tell)
        if journal_redis is redis:
            return make(redis, max_bytes=config.l1_max_bytes)
        half = config.l1_max_bytes // 2
        return SplitStore(make(redis, max_bytes=half), make(journal_redis, max_bytes=half), writers)

    def _write_behind(
        self,
        app: Flask,
        config: Config,
        journal: Journal,
        writers: Writers,
        codec: Codec,
        tell: Tell,
        *,
        is_split: bool,
    ) -> WriteBehind:
        attempts = Attempts(
            writers, codec, run=partial(_within, app), tell=tell, timeout_s=config.write_timeout_s
        )
        drain = Drain(
            journal,
            attempts,
            publish=partial(_publish, app),
            at_once=config.writes_at_once,
            exit_s=config.drain_at_exit_s,
        )
        return WriteBehind(
            journal,
            writers,
            drain,
            codec,
            tell=tell,
            delay_s=config.write_delay_s,
            drains=config.drain,
            require_durable=config.require_durable,
            owned_only=is_split,
        )

    def _cache(self) -> Cache:
        """Of the current app; a single app's is used without a look."""
        return self._only() or super()._cache()

    def register(self, cls: C) -> C:
        """Let values of a dataclass or an Enum be read; a declaration for all apps of this one."""
        self._registered.append(cls)
        for app in self._apps:
            app.extensions[KEY].codec.register(cls)
        return cls

    @property
    def flask_cache(self) -> flask_caching.Cache | None:
        """Flask-Caching's object for the current app, over the same store."""
        state: _State = context.state(KEY, WHAT)
        return state.flask_cache


def _no_cache() -> None:
    return None


def _journal(app: Flask, config: Config, redis: "GuardedRedis | None", store: Store) -> Journal:
    limits = {"max_pending": config.max_pending, "max_pending_bytes": config.max_pending_bytes}
    if redis is not None:
        from flask_muset.cache_strategies.redis_journal import RedisJournal
        from flask_muset.cache_strategies.split_store import SplitStore
        from flask_muset.cache_strategies.tiered_store import TieredStore

        store = store.owned if isinstance(store, SplitStore) else store
        # What waits in Redis is written and read also where the cache is off.
        shared = store if isinstance(store, TieredStore) else TieredStore(redis, max_bytes=0)
        return RedisJournal(shared, redis, **limits)
    path = config.journal_path or os.path.join(app.instance_path, "write-behind.db")
    return SqliteJournal(path, store, **limits)


def _refuse_risks(journal: Journal, store: Store, redis: "GuardedRedis | None") -> None:
    """Refuse to start; a Redis that does not answer now is asked before the first write."""
    try:
        risks = journal.risks()
    except MusetError as error:
        _log.warning("whether writes would be durable is not known yet: %s", error)
        return
    finally:
        if redis is not None:
            redis.close()
            store.close()
    if risks:
        raise RuntimeError(f"{PREFIX}REQUIRE_DURABLE is set, and: {' '.join(risks)}")


def _flask_cache(app: Flask) -> flask_caching.Cache:
    """One more beside an app's own, which then keeps its template fragments."""
    has_own = bool(app.extensions.get("cache"))
    cache = flask_caching.Cache(with_jinja2_ext=not has_own)
    backend = f"{StoreBackend.__module__}.{StoreBackend.__qualname__}"
    # Options and arguments in the app's configuration are for a backend of its own.
    cache.init_app(app, config={"CACHE_TYPE": backend, "CACHE_OPTIONS": {}, "CACHE_ARGS": []})
    return cache


# --- What the cache tells -------------------------------------------------------------------------


def _teller(app: Flask, counters: list[Count]) -> Tell:
    receivers = cache_operated.receivers

    def tell(operation: str, status: str, duration_s: float | None) -> None:
        for count in counters:
            count(operation, status, duration_s)
        if receivers:
            context.tell(cache_operated, app, CacheEvent(operation, status, duration_s))

    return tell


def _note(answer: Answer) -> None:
    """Remember for the response how a load was answered, the most telling one of a request."""
    if not has_request_context():
        return  # loaded beside any request, where the error would cost more than the hit
    # The request itself: what its proxy does for an attribute costs three times as much.
    environ = request._get_current_object().environ  # type: ignore[attr-defined]
    noted = environ.get(_NOTED)
    if noted is None or _ORDER.index(answer.outcome) > _ORDER.index(noted[0]):
        environ[_NOTED] = answer.outcome, answer.age_s
    elif noted[0] is answer.outcome and answer.age_s > noted[1]:
        environ[_NOTED] = noted[0], answer.age_s


def _note_nothing(_answer: Answer) -> None:
    pass


def _note_bypass(_answer: Answer) -> None:
    """Of a cache that is off, which has no part in any other request."""
    if has_request_context():
        after_this_request(_say_bypass)


def _say_bypass(response: Response) -> Response:
    if not response.headers.getlist("X-Cache"):
        response.headers.add("X-Cache", Outcome.BYPASS.value)
    return response


def _note_of(config: Config) -> Callable[[Answer], None]:
    if not config.response_headers:
        return _note_nothing
    return _note if config.enabled else _note_bypass


def _describe(environ: "WSGIEnvironment", fields: list[tuple[str, str]]) -> None:
    """Say what the cache did, unless the view has said it.

    Age is RFC 9111's. It takes from what a view's own Cache-Control allows: there it is left out.
    """
    noted = environ.get(_NOTED)
    if noted is None:
        return
    names = [name.lower() for name, _ in fields]
    if "x-cache" not in names:
        outcome, age_s = noted
        fields.append(("X-Cache", str(outcome)))
        if outcome in _KEPT and "cache-control" not in names:
            fields.append(("Age", str(max(0, int(age_s)))))


def _publish(app: Flask, state: State) -> None:
    if write_behind_measured.receivers:
        event = WriteBehindEvent(state.pending, state.oldest_s, state.dead_letters)
        context.tell(write_behind_measured, app, event)


# --- Work beside the request ----------------------------------------------------------------------


def _in_background(app: Flask, run: Callable[[], Any]) -> None:
    """Run beside the request, with the app alone: no request, no deadline, no log fields."""
    run_beside(partial(_within, app, run), name="cache-refresh")


def _within(app: Flask, run: Callable[[], Any]) -> None:
    with app.app_context():
        run()


def _serve(
    behind: WriteBehind,
    inner: "WSGIApplication",
    environ: "WSGIEnvironment",
    start_response: "StartResponse",
) -> Iterable[bytes]:
    """With the first request, in the process that serves it: what was left is written."""
    behind.begin()
    return inner(environ, start_response)
