"""The application factory."""

import logging as stdlib_logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flask import Flask
from sqlalchemy import Engine

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
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import (
    Bulkhead,
    CircuitBreaker,
    Policy,
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
from muset.ports import Cache, Document, Probe, ScoredPassage, TrackCall, User
from muset.providers.config import Configured, load_providers
from muset.providers.extractive import ExtractiveProvider
from muset.services.answering import Answer, Answering, Source
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
            _answering(resilience, providers, track),
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
    )


def _answering(
    resilience: Resilience, providers: Sequence[Configured], track: TrackCall | None
) -> Answering:
    """The models, each under a policy of its name; the documents themselves are the last resort."""
    extractive = ExtractiveProvider()
    models = [
        Source(each.provider, _provider_policy(resilience, each.provider.name, each.policy))
        for each in _models(providers)
    ]
    resort = Source(extractive, resilience.policy(extractive.name))
    if not models:
        return Answering([resort], None, lambda: SYSTEM.now(), track)
    return Answering(models, resort, lambda: SYSTEM.now(), track)


def _models(providers: Sequence[Configured]) -> list[Configured]:
    """Without the documents themselves: they are the last resort, listed or not."""
    return [each for each in providers if not isinstance(each.provider, ExtractiveProvider)]


def _provider_policy(
    resilience: Resilience, name: str, overrides: Mapping[str, Mapping[str, Any]]
) -> Policy:
    """Retries and a breaker as the settings have them; a bulkhead and a time-out if they are asked.

    What else is asked of the parts stands in RESILIENCE_POLICIES.
    """
    limits = [part for part in (Bulkhead(1), Timeout(1.0)) if part.kind in overrides]
    return resilience.policy(
        name, RetryStrategy, CircuitBreaker, *(part.like(**overrides[part.kind]) for part in limits)
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


def _redis(app: Flask, settings: Settings) -> GuardedRedis | None:
    """One client for all that use Redis, where it is set: the service works without it."""
    if settings.redis_url is None:
        return None
    client = GuardedRedis(
        settings.redis_url,
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
    app = _App("muset")
    app.json = StrictJSON(app)
    # JSON may write a character of two bytes as an escape of six.
    app.config["MAX_CONTENT_LENGTH"] = 3 * settings.max_document_bytes + 65_536
    app.config["MAX_FORM_PARTS"] = 16
    app.config.update(settings.resilience, **settings.metrics)
    providers = load_providers(settings) if providers is None else providers
    app.config["RESILIENCE_POLICIES"] = {
        each.provider.name: each.policy for each in _models(providers) if each.policy
    }
    tracing.init_app(app)
    logging.init_app(app)
    Metrics(app, authorize=auth.is_admin)
    redis = _redis(app, settings)
    ErrorHandler(app, redis=redis)
    resilience = Resilience(rate_limit_key=auth.rate_limit_key, redis=redis)
    if redis is None and settings.web_concurrency > 1:
        app.config["CACHE_STRATEGIES_ENABLED"] = False
        _log.warning(
            "nothing is cached, because %d worker processes without REDIS_URL could not tell each "
            "other of changes; set REDIS_URL, or WEB_CONCURRENCY=1",
            settings.web_concurrency,
        )
    if settings.journal_path is not None:
        app.config["CACHE_STRATEGIES_JOURNAL_PATH"] = str(settings.journal_path)
    cache = CacheStrategies(app, redis=redis)
    for kept in (Answer, Document, ScoredPassage, User):
        cache.register(kept)
    app.extensions["muset"] = make_services(
        settings,
        resilience,
        cache,
        instrument=partial(_within, app, instrument_sqlalchemy),
        track=track_ai_request,
        probes=[
            *([] if redis is None else [RedisProbe(redis)]),
            StateProbe(partial(sharing_state, app), has_redis=redis is not None),
            JournalProbe(cache.pending),
        ],
        providers=providers,
        times=times,
    )
    resilience.init_app(app)
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
    return app
