"""The application factory."""

import logging as stdlib_logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask
from sqlalchemy import Engine
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_muset import (
    CacheStrategies,
    ErrorHandler,
    Metrics,
    Resilience,
    context,
    logging,
    tracing,
)
from flask_muset.clock import SYSTEM
from flask_muset.locks import run_beside
from flask_muset.metrics import instrument_redis, instrument_sqlalchemy, track_ai_request
from flask_muset.resilience import (
    Bulkhead,
    CircuitBreaker,
    Policy,
    RateLimit,
    RetryBudget,
    RetryStrategy,
    Timeout,
    sharing_state,
)
from muset.adapters import sqlite
from muset.adapters.cache import JournalProbe, NoCache
from muset.adapters.database import Database, is_outage, may_repeat
from muset.adapters.documents import SqlDocumentStore
from muset.adapters.extraction.process import ProcessExtractor
from muset.adapters.keys import SqlKeyStore
from muset.adapters.passages import Index
from muset.adapters.preferences import SqlPreferenceStore
from muset.adapters.redis import RedisProbe, StateProbe
from muset.adapters.sqlite_index import SqliteIndex
from muset.adapters.usage import SqlUsageStore
from muset.adapters.usage_sums import UsageSumStore
from muset.adapters.users import UserStore
from muset.blueprints import admin, ask, auth, documents, health, openapi, search, usage, users
from muset.blueprints.strict_json import StrictJSON
from muset.headers import SecurityHeaders
from muset.ports import Cache, Document, Probe, ScoredPassage, TrackCall, User
from muset.providers.config import Configured, load_providers
from muset.providers.extractive import ExtractiveProvider
from muset.services.answering import Answer, Answering, Source, is_declined
from muset.services.ask import AskService
from muset.services.dead_letters import DeadLetterService
from muset.services.documents import DocumentService
from muset.services.files import FileService
from muset.services.keys import KeyService
from muset.services.preferences import PreferenceService
from muset.services.search import SearchService
from muset.services.streaming import Times
from muset.services.usage import UsageService
from muset.services.usage_report import UsageReport
from muset.services.users import UserService
from muset.settings import Settings, load_settings

if TYPE_CHECKING:
    from flask_muset.redis import GuardedRedis

__all__ = ["Services", "create_app", "make_services"]

_log = stdlib_logging.getLogger(__name__)

#: Processes that read files at once in one worker, and seconds that a file waits for one.
_READERS, _READER_WAIT_S = 2, 10.0


@dataclass(frozen=True, slots=True)
class Services:
    """What the blueprints call."""

    database: Database
    keys: KeyService
    documents: DocumentService
    files: FileService
    ask: AskService
    users: UserService
    preferences: PreferenceService
    search: SearchService
    usage: UsageReport
    dead_letters: DeadLetterService
    probes: Sequence[Probe]
    wrong_keys: RateLimit | None


def make_services(
    settings: Settings,
    resilience: Resilience,
    cache: Cache | None = None,
    *,
    instrument: Callable[[Engine], None] | None = None,
    track: TrackCall | None = None,
    probes: Sequence[Probe] = (),
    providers: Sequence[Configured] = (),
    times: Times | None = None,
    wrong_keys: RateLimit | None = None,
) -> Services:
    """Wire the adapters into the services, each under its policy; nothing is opened yet.

    Args:
        settings: What holds.
        resilience: Where the policies are declared.
        cache: Where documents and answers are kept, and writes accepted; None for nowhere.
        instrument: Is given each database engine, to count its queries.
        track: Counts the calls of models.
        probes: Of what is used beside the database.
        providers: Models that answer, in order; without any the documents answer themselves.
        times: Of streams; None for the usual ones.
        wrong_keys: How many of them may come from one address; None for any number.
    """
    database, index = _database(settings, _database_policy(resilience), instrument)
    store = SqlDocumentStore(database, index)
    cache = NoCache() if cache is None else cache
    usage = UsageService(SqlUsageStore(database), cache, lambda: SYSTEM.wall(), run_beside)
    return Services(
        database=database,
        keys=KeyService(SqlKeyStore(database)),
        documents=DocumentService(store, cache, settings.max_document_bytes),
        ask=AskService(
            store,
            cache,
            _answering(settings, resilience, providers, track),
            usage,
            spawn=context.spawn,
            times=times,
            is_draining=health.is_draining,
        ),
        files=FileService(
            ProcessExtractor(settings.max_document_bytes),
            resilience.policy("extraction", Bulkhead(_READERS, max_wait=_READER_WAIT_S)),
            settings.max_document_bytes,
        ),
        users=UserService(UserStore(database), cache),
        search=SearchService(store, cache),
        usage=UsageReport(UsageSumStore(database), cache, SYSTEM),
        preferences=PreferenceService(SqlPreferenceStore(database), cache),
        dead_letters=DeadLetterService(cache),
        probes=(database, *probes),
        wrong_keys=wrong_keys,
    )


def _answering(
    settings: Settings,
    resilience: Resilience,
    providers: Sequence[Configured],
    track: TrackCall | None,
) -> Answering:
    """The models, each under a policy of its name; the documents themselves are the last resort."""
    extractive = ExtractiveProvider()
    models = [
        Source(each.provider, _provider_policy(settings, resilience, each))
        for each in _models(providers)
    ]
    resort = Source(extractive, resilience.policy(extractive.name))
    if not models:
        return Answering([resort], None, lambda: SYSTEM.now(), track)
    return Answering(models, resort, lambda: SYSTEM.now(), track)


def _models(providers: Sequence[Configured]) -> list[Configured]:
    """Without the documents themselves: they are the last resort, listed or not."""
    return [each for each in providers if not isinstance(each.provider, ExtractiveProvider)]


def _provider_policy(settings: Settings, resilience: Resilience, configured: Configured) -> Policy:
    """Retries and a breaker as the settings have them; a bulkhead and a time-out if they are asked.

    What else is asked of the parts stands in RESILIENCE_POLICIES.
    """
    name, overrides = configured.provider.name, configured.policy
    breaker = CircuitBreaker(
        name,
        failure_threshold=settings.values["CIRCUIT_BREAKER_THRESHOLD"],
        recovery_timeout=settings.values["CIRCUIT_BREAKER_TIMEOUT"],
        ignore=is_declined,
    )
    limits = [part for part in (Bulkhead(1), Timeout(1.0)) if part.kind in overrides]
    return resilience.policy(
        name, RetryStrategy, breaker, *(part.like(**overrides[part.kind]) for part in limits)
    )


def _within(app: Flask, instrument: Callable[[Any], None], made: Any) -> None:
    # Clients are made when they are first used, which may be outside of a request.
    with app.app_context():
        instrument(made)


def _database(
    settings: Settings, policy: Policy, instrument: Callable[[Engine], None] | None
) -> tuple[Database, Index]:
    """The database that DATABASE_URL names, and its index over passages."""
    url = settings.database_url
    if url.startswith("sqlite:"):
        return sqlite.Database(url, policy, instrument), SqliteIndex()
    # Only here: the driver is a quarter of what the embedded default would take to start.
    from muset.adapters import postgresql
    from muset.adapters.postgresql_index import PostgresqlIndex

    size = settings.database_pool_size
    return postgresql.Database(url, policy, instrument, pool_size=size), PostgresqlIndex()


def _database_policy(resilience: Resilience) -> Policy:
    """Wait for locks and a restart in short steps, and stop asking a database that is away.

    What the database refuses for any other reason is the statement's fault: tried again it would be
    refused again, and it says nothing about the next one.
    """
    return resilience.policy(
        "database",
        RetryStrategy(
            max_retries=10,
            initial_delay=0.05,
            max_delay=0.5,
            retry_on=may_repeat,
            budget=RetryBudget(ratio=0.2, floor=5.0),
        ),
        CircuitBreaker(
            "database",
            failure_threshold=50,
            # A probe is one connection at most, so it may come soon.
            recovery_timeout=2.0,
            ignore=lambda error: not is_outage(error),
        ),
    )


def _wrong_keys(settings: Settings, redis: "GuardedRedis | None") -> RateLimit | None:
    """The limit on wrong keys of one address, shared by all workers like any other."""
    if settings.wrong_keys_per_minute == 0:
        return None
    limit = RateLimit(settings.wrong_keys_per_minute, 60.0)
    limit.name = "wrong_keys"
    if redis is not None:
        limit.share(redis, limit.name)
    return limit


def _redis(app: Flask, settings: Settings, url: str | None, name: str) -> "GuardedRedis | None":
    """One client for all that use a Redis, where it is set: the service works without it."""
    if url is None:
        return None
    # Only here, because redis-py takes a tenth of the memory of a service without it.
    from flask_muset.redis import GuardedRedis

    client = GuardedRedis(
        url,
        name=name,
        max_connections=settings.redis_max_connections,
        prefix=f"muset:{settings.deployment}:",
    )
    _within(app, instrument_redis, client)
    return client


class _App(Flask):
    """No view is a coroutine function, so none is looked at once more for each request."""

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is."""
        return func


def _bare_app(settings: Settings, providers: Sequence[Configured]) -> Flask:
    """An app with its configuration, before any extension."""
    app = _App("muset")
    app.json = StrictJSON(app)
    # JSON may write a character of two bytes as an escape of six.
    app.config["MAX_CONTENT_LENGTH"] = 3 * settings.max_document_bytes + 65_536
    app.config["MAX_FORM_PARTS"] = 16
    app.config.update(settings.resilience, **settings.metrics)
    app.config["RESILIENCE_POLICIES"] = {
        each.provider.name: each.policy for each in _models(providers) if each.policy
    }
    return app


def _cache(
    app: Flask,
    settings: Settings,
    redis: "GuardedRedis | None",
    journal_redis: "GuardedRedis | None",
) -> CacheStrategies:
    if journal_redis is None and settings.web_concurrency > 1:
        app.config["CACHE_STRATEGIES_ENABLED"] = False
        _log.warning(
            "nothing is cached, because %d worker processes without REDIS_URL could not tell each "
            "other of changes; set REDIS_URL, or WEB_CONCURRENCY=1",
            settings.web_concurrency,
        )
    if settings.journal_path is not None:
        app.config["CACHE_STRATEGIES_JOURNAL_PATH"] = str(settings.journal_path)
    cache = CacheStrategies(app, redis=redis, journal_redis=journal_redis)
    for kept in (Answer, Document, ScoredPassage, User):
        cache.register(kept)
    return cache


def _register_blueprints(app: Flask) -> None:
    for blueprint in (
        documents.blueprint,
        ask.blueprint,
        users.blueprint,
        search.blueprint,
        usage.blueprint,
        admin.blueprint,
        health.blueprint,
        openapi.make_blueprint(app),
        openapi.make_docs(),
    ):
        app.register_blueprint(blueprint)


def create_app(
    settings: Settings | None = None,
    *,
    providers: Sequence[Configured] | None = None,
    times: Times | None = None,
) -> Flask:
    """Make the service.

    Args:
        settings: None reads the environment.
        providers: Models that answer; None for those of the settings.
        times: Of streams; None for the usual ones.

    Raises:
        SettingsError: A variable is not allowed.
    """
    settings = load_settings() if settings is None else settings
    providers = load_providers(settings) if providers is None else providers
    app = _bare_app(settings, providers)
    tracing.init_app(app)
    logging.init_app(app)
    Metrics(app, authorize=auth.is_admin)
    redis = _redis(app, settings, settings.redis_url, "redis")
    # Evicts what it likes: what waits, breakers, limits and errors are in the other one.
    cache_redis = _redis(app, settings, settings.cache_redis_url, "cache_redis") or redis
    ErrorHandler(app, redis=redis)
    resilience = Resilience(rate_limit_key=auth.rate_limit_key, redis=redis)
    cache = _cache(app, settings, cache_redis, redis)
    app.extensions["muset"] = make_services(
        settings,
        resilience,
        cache,
        instrument=partial(_within, app, instrument_sqlalchemy),
        track=track_ai_request,
        probes=[
            *(RedisProbe(one) for one in dict.fromkeys((redis, cache_redis)) if one is not None),
            StateProbe(partial(sharing_state, app), has_redis=redis is not None),
            JournalProbe(cache.pending),
        ],
        providers=providers,
        times=times,
        wrong_keys=_wrong_keys(settings, redis),
    )
    resilience.init_app(app)
    _register_blueprints(app)
    for path in settings.exposed_files:
        _log.warning("%s has a secret and can be read by everybody here; chmod o-r it", path)
    _wrap(app, settings.trusted_proxies)
    return app


def _wrap(app: Flask, proxies: int) -> None:
    """Put the layers round the app that see each request first and each answer last."""
    app.wsgi_app = SecurityHeaders(app.wsgi_app).__call__  # type: ignore[method-assign]
    if proxies:
        # Outermost, so that all that look at an address see the client's. What the client says of
        # itself stands further to the left in X-Forwarded-For than what the proxies say.
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=0, x_port=0, x_prefix=0
        )
