"""The application factory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flask import Flask

from flask_muset import ErrorHandler
from muset.adapters.documents import SqliteDocumentStore
from muset.adapters.keys import SqliteKeyStore
from muset.adapters.sqlite import Database
from muset.blueprints import admin, ask, documents, health, openapi
from muset.ports import Probe
from muset.providers.extractive import ExtractiveProvider
from muset.services.ask import AskService
from muset.services.documents import DocumentService
from muset.services.keys import KeyService
from muset.settings import Settings, load_settings

__all__ = ["Services", "create_app", "make_services"]


@dataclass(frozen=True, slots=True)
class Services:
    """What the blueprints call."""

    database: Database
    keys: KeyService
    documents: DocumentService
    ask: AskService
    probes: Sequence[Probe]


def make_services(settings: Settings) -> Services:
    """Wire the adapters into the services; nothing is opened yet."""
    database = Database(settings.database_url)
    store = SqliteDocumentStore(database)
    return Services(
        database=database,
        keys=KeyService(SqliteKeyStore(database)),
        documents=DocumentService(store, settings.max_document_bytes),
        ask=AskService(store, ExtractiveProvider(), time.monotonic),
        probes=(database,),
    )


def create_app(settings: Settings | None = None) -> Flask:
    """Make the service.

    Args:
        settings: None reads the environment.

    Raises:
        SettingsError: A variable is not allowed.
    """
    settings = load_settings() if settings is None else settings
    app = Flask("muset")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    # JSON may write a character of two bytes as an escape of six.
    app.config["MAX_CONTENT_LENGTH"] = 3 * settings.max_document_bytes + 65_536
    app.config["MAX_FORM_PARTS"] = 16
    ErrorHandler(app)
    app.extensions["muset"] = make_services(settings)
    for blueprint in (
        documents.blueprint,
        ask.blueprint,
        admin.blueprint,
        health.blueprint,
        openapi.make_blueprint(app),
        openapi.make_docs(),
    ):
        app.register_blueprint(blueprint)
    return app
