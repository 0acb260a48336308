"""The application factory."""

import logging as stdlib_logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flask import Flask
from sqlalchemy import Engine

from flask_muset import CacheStrategies, ErrorHandler, Metrics, Resilience, logging, tracing
from flask_muset.clock import SYSTEM
from flask_muset.locks import run_beside
from flask_muset.metrics import instrument_redis, instrument_sqlalchemy, track_ai_request
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import CircuitBreaker, Policy, RetryBudget, RetryStrategy
from muset.adapters import postgresql, sqlite
from muset.adapters.cache import JournalProbe, NoCache
from muset.adapters.database import Database, is_outage, may_repeat
from muset.adapters.documents import SqlDocumentStore
from muset.adapters.keys import SqlKeyStore
from muset.adapters.passages import Index
from muset.adapters.postgresql_index import PostgresqlIndex
from muset.adapters.preferences import SqlPreferenceStore
from muset.adapters.redis import RedisProbe
from muset.adapters.sqlite_index import SqliteIndex
from muset.adapters.usage import SqlUsageStore
from muset.blueprints import admin, ask, auth, documents, health, openapi, users
from muset.blueprints.strict_json import StrictJSON
from muset.ports import Cache, Document, Probe, TrackCall
from muset.providers.extractive import ExtractiveProvider
from muset.services.ask import Answer, AskService
from muset.services.dead_letters import DeadLetterService
from muset.services.documents import DocumentService
from muset.services.keys import KeyService
from muset.services.preferences import PreferenceService
from muset.services.usage import UsageService
from muset.settings import Settings, load_settings

__all__ = ["Services", "create_app", "make_services"]

_log = stdlib_logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What the blueprints call."""

    database: Database
    keys: KeyService
    documents: DocumentService
    ask: AskService
    preferences: PreferenceService
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
) -> Services:
    """Wire the adapters into the services, each under its policy; nothing is opened yet.

    Args:
        settings: What holds.
        resilience: Where the policies are declared.
        cache: Where documents and answers are kept, and writes accepted; None for nowhere.
        instrument: Is given each database engine, to count its queries.
        track: Counts the calls of models.
        probes: Of what is used beside the database.
    """
    database, index = _database(settings, _database_policy(resilience), instrument)
    store = SqlDocumentStore(database, index)
    cache = NoCache() if cache is None else cache
    provider = ExtractiveProvider()
    return Services(
        database=database,
        keys=KeyService(SqlKeyStore(database)),
        documents=DocumentService(store, cache, settings.max_document_bytes),
        ask=AskService(
            store,
            cache,
            provider,
            resilience.policy(provider.name),
            time.monotonic,
            track,
            UsageService(SqlUsageStore(database), cache, lambda: SYSTEM.wall(), run_beside),
        ),
        preferences=PreferenceService(SqlPreferenceStore(database), cache),
        dead_letters=DeadLetterService(cache),
        probes=(database, *probes),
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


def create_app(settings: Settings | None = None) -> Flask:
    """Make the service.

    Args:
        settings: None reads the environment.

    Raises:
        SettingsError: A variable is not allowed.
    """
    settings = load_settings() if settings is None else settings
    app = Flask("muset")
    app.json = StrictJSON(app)
    # JSON may write a character of two bytes as an escape of six.
    app.config["MAX_CONTENT_LENGTH"] = 3 * settings.max_document_bytes + 65_536
    app.config["MAX_FORM_PARTS"] = 16
    app.config.update(settings.resilience, **settings.metrics)
    tracing.init_app(app)
    logging.init_app(app)
    Metrics(app, authorize=auth.is_admin)
    ErrorHandler(app)
    resilience = Resilience(rate_limit_key=auth.rate_limit_key)
    redis = _redis(app, settings)
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
    for kept in (Answer, Document):
        cache.register(kept)
    app.extensions["muset"] = make_services(
        settings,
        resilience,
        cache,
        instrument=partial(_within, app, instrument_sqlalchemy),
        track=track_ai_request,
        probes=[*([] if redis is None else [RedisProbe(redis)]), JournalProbe(cache.pending)],
    )
    resilience.init_app(app)
    for blueprint in (
        documents.blueprint,
        ask.blueprint,
        users.blueprint,
        admin.blueprint,
        health.blueprint,
        openapi.make_blueprint(app),
        openapi.make_docs(),
    ):
        app.register_blueprint(blueprint)
    return app
