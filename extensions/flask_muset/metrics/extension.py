"""Metrics: binds the parts of this folder to a Flask app."""

import logging
import os
import platform
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

from flask import Flask, Request, Response, abort, request
from prometheus_client import CollectorRegistry

from flask_muset import context
from flask_muset.load import GATE, Gate, connections
from flask_muset.metrics.access import may_read
from flask_muset.metrics.clients import measure_httpx, measure_redis, measure_sqlalchemy
from flask_muset.metrics.config import Config, read_config
from flask_muset.metrics.exposition import (
    FolderCollector,
    StoreCollector,
    labels_in_archive,
    process_registry,
    render,
)
from flask_muset.metrics.http import HttpObserver, method_label
from flask_muset.metrics.listeners import Listeners
from flask_muset.metrics.port import keep_open
from flask_muset.metrics.runtime import Sampled, resident_bytes
from flask_muset.metrics.series import Families
from flask_muset.metrics.store import Store
from flask_muset.signals import BREAKERS, cache_counters

__all__ = [
    "Metrics",
    "exporter",
    "folder",
    "instrument_httpx",
    "instrument_redis",
    "instrument_sqlalchemy",
    "states",
    "track_ai_request",
    "track_cache_operation",
    "track_database_query",
    "track_error",
    "track_request",
]

_KEY = "metrics"
_PATH = "/metrics"
_logger = logging.getLogger(__name__)

Authorize = Callable[[Request], Any]


class State:
    """What one app owns.

    Args:
        app: Whose it is; kept weakly.
        config: What it is set to.
    """

    def __init__(self, app: Flask, config: Config) -> None:
        self.config = config
        self._app = weakref.ref(app)
        self._port_pid = 0
        self._exporter: Any = None
        self.own_registry = CollectorRegistry()
        #: Database engines whose pools can say how much of them is used.
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        #: Whose links are shown from the start.
        self.redis_clients: weakref.WeakSet[Any] = weakref.WeakSet()
        self.folder = folder()
        store = Store() if self.folder is None else _shared_store(self.folder)
        self.families = Families(store, config.namespace, config.max_series, self._archived)
        self.listeners = Listeners(self.families, self._concerns)
        cache_counters(app.extensions).append(self.listeners.count_cache)
        self.sampled = Sampled(self._sample)
        states.add(self)

    def _concerns(self, sender: Any) -> bool:
        """None sends what happened outside of any app, which is the only app's if there is one."""
        return sender is self._app() if sender is not None else context.find(_KEY) is self

    def _archived(self, name: str) -> frozenset[tuple[str, ...]]:
        if self.folder is None:
            return frozenset()
        return frozenset(labels_in_archive(self.folder).get(name, ()))

    def on_request(self, _now: float) -> None:
        """Called as a request begins, at most once a second."""
        self.sampled.take()
        if self.config.port and self._port_pid != os.getpid() and self.folder is None:
            self.open_port()

    def open_port(self) -> None:
        """Serve the port from this process."""
        self._port_pid = os.getpid()
        registry = CollectorRegistry()
        for collector in self.collectors():
            registry.register(collector)
        keep_open(self.config.host, self.config.port, registry)

    def collectors(self) -> list[Any]:
        """All that the metrics page shows."""
        if self.folder is not None:
            return [FolderCollector(self.folder)]
        return [StoreCollector(self.families.store), self.own_registry, process_registry()]

    def touch(self) -> None:
        """Show this process's gauges, before its first request too."""
        self.families["http_requests_active"].get().set(0.0)
        self.sampled.take()

    def _sample(self, hub_delay_s: float | None) -> None:
        families, app = self.families, self._app()
        families["connections_open"].get().set(float(connections.open))
        used = sum(engine.pool.checkedout() for engine in self.engines)
        families["database_connections_used"].get().set(float(used))
        families["worker_memory_bytes"].get().set(float(resident_bytes()))
        families["workers"].get().set(1.0)
        families["build_info"].get(_version(), platform.python_version()).set(1.0)
        if hub_delay_s is not None:
            families["hub_delay_seconds"].get().set(hub_delay_s)
        gate: Gate | None = None if app is None else app.extensions.get(GATE)
        if gate is not None:
            families["requests_in_flight"].get().set(float(gate.in_flight))
        self._show_states(app)

    def _show_states(self, app: Flask | None) -> None:
        """Changes are told as well; this is for what has not changed, or by time alone."""
        for client in self.redis_clients:
            self.listeners.show_link(client.name, client.state)
        if app is not None:
            for name, state in app.extensions.get(BREAKERS, tuple)():
                self.listeners.show_breaker(name, state)

    def exporter(self) -> Any:
        """See the function of this name."""
        if self._exporter is None:
            from prometheus_flask_exporter import (  # type: ignore[import-untyped]
                PrometheusMetrics,
            )

            self._exporter = PrometheusMetrics(
                None, path=None, export_defaults=False, registry=self.own_registry
            )
        return self._exporter


#: Of all apps of this process.
states: "weakref.WeakSet[State]" = weakref.WeakSet()
_stores: dict[str, Store] = {}


def folder() -> str | None:
    """The folder of the files of all workers, None for metrics in memory."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") or None


def _shared_store(path: str) -> Store:
    """One for each process: a file has one writer."""
    store = _stores.get(path)
    if store is None:
        store = _stores[path] = Store(path)
    return store


@lru_cache(maxsize=1)
def _version() -> str:
    try:
        return metadata.version("flask-muset")
    except metadata.PackageNotFoundError:
        return "unknown"


class Metrics:
    """Measure an app's requests and what it tells, and show it to Prometheus.

    The instance keeps nothing about an app but `authorize`, so one instance may serve several apps;
    each has metrics of its own.

    Args:
        app: Set up at once; else call `init_app`.
        authorize: A function of the request that says whether it may read `/metrics`, asked where
            its address is not enough.

    Config:
        METRICS_ENABLED: False measures nothing and shows nothing. Default True.
        METRICS_NAMESPACE: Stands before all names. Default "muset".
        METRICS_PORT: A port of its own for Prometheus, 0 for none. Default 0.
        METRICS_HOST: Address of that port. Default "127.0.0.1".
        METRICS_ALLOW: Addresses and networks that may read `/metrics`, beside this machine.
            Default none.
        METRICS_MAX_SERIES: Series of each metric in a process; what exceeds them shares one more.
            Default 1000.
    """

    def __init__(self, app: Flask | None = None, *, authorize: Authorize | None = None) -> None:
        self._authorize = authorize
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the configuration once, and measure the app from now on.

        Raises:
            RuntimeError: It is set up on this app already.
            ValueError: A setting is not allowed.
        """
        config = read_config(app.config)
        if not config.enabled:
            context.attach(app, _KEY, "Metrics", _Off())
            return
        state = State(app, config)
        context.attach(app, _KEY, "Metrics", state)
        context.install(app).observe(HttpObserver(state.families, state.on_request))
        app.add_url_rule(_PATH, "metrics", partial(_page, state, self._authorize))
        # Under gunicorn this may be its master, which serves nothing; there the first request does.
        if config.port and state.folder is None and "gunicorn.arbiter" not in sys.modules:
            state.open_port()


class _Off:
    """Stands for the state of an app that measures nothing."""

    def __init__(self) -> None:
        self.families = None


def _page(state: State, authorize: Authorize | None) -> Response:
    """The metrics, for those who may read them."""
    allowed = may_read(request.environ, state.config.allow)
    if not allowed and authorize is not None:
        allowed = bool(authorize(request._get_current_object()))  # type: ignore[attr-defined]
    if not allowed:
        abort(403)
    state.sampled.take()
    text, content_type = render(state.collectors(), request.headers.get("Accept"))
    response = Response(text, content_type=content_type)
    response.headers["Cache-Control"] = "no-store"
    return response


# --- What an app tells ----------------------------------------------------------------------------


def _families() -> Families | None:
    found: Families | None = context.state(_KEY, "Metrics").families
    return found


def track_request(method: str, endpoint: str, status_code: int, duration: float) -> None:
    """Count a request that is not served by the app itself, such as a job's.

    Args:
        method: Of HTTP; another one counts as `_OTHER`.
        endpoint: A route, not a path: each is a series.
        status_code: Of its response.
        duration: Seconds.
    """
    families = _families()
    if families is not None:
        method = method_label(method)
        families["http_requests_total"].add(1, method, endpoint, str(status_code))
        families["http_request_duration_seconds"].observe(duration, method, endpoint)


def track_ai_request(
    model: str, duration: float, status: str, input_tokens: int = 0, output_tokens: int = 0
) -> None:
    """Count a request to an AI model.

    Args:
        model: Its name.
        duration: Seconds.
        status: Such as `success` or `error`.
        input_tokens: Tokens that were sent.
        output_tokens: Tokens that came back.
    """
    families = _families()
    if families is not None:
        families["ai_requests_total"].add(1, model, status)
        families["ai_request_duration_seconds"].observe(duration, model)
        families["ai_tokens_total"].add(input_tokens, model, "input")
        families["ai_tokens_total"].add(output_tokens, model, "output")


def track_database_query(operation: str, table: str, duration: float) -> None:
    """Count a database query.

    Args:
        operation: Such as `select`.
        table: Its first table.
        duration: Seconds.
    """
    families = _families()
    if families is not None:
        families["database_queries_total"].add(1, operation, table)
        families["database_query_duration_seconds"].observe(duration, operation, table)


def track_cache_operation(operation: str, status: str) -> None:
    """Count a cache operation.

    Args:
        operation: Such as `get`.
        status: Such as `hit` or `miss`.
    """
    families = _families()
    if families is not None:
        families["cache_operations_total"].add(1, operation, status)


def track_error(category: str, severity: str) -> None:
    """Count an error. Those that ErrorHandler handles are counted already.

    Args:
        category: Such as `authentication`.
        severity: Such as `high`.
    """
    families = _families()
    if families is not None:
        families["errors_total"].add(1, str(category), str(severity))


# --- What it uses ---------------------------------------------------------------------------------


def instrument_sqlalchemy(engine: Any) -> None:
    """Count the queries of a SQLAlchemy engine for the current app, in whatever thread they run.

    Args:
        engine: An Engine, or an AsyncEngine's `sync_engine`.
    """
    state = context.state(_KEY, "Metrics")
    if state.families is not None:
        from sqlalchemy import event

        measure_sqlalchemy(state.families, engine, event.listen)
        if hasattr(engine.pool, "checkedout"):
            state.engines.add(engine)


def instrument_redis(client: Any) -> None:
    """Count the calls of a guarded Redis client for the current app.

    redis-py's own client has no hook that is told of every command, so it is not counted.

    Args:
        client: A `flask_muset.redis.GuardedRedis`.
    """
    state = context.state(_KEY, "Metrics")
    if state.families is not None:
        measure_redis(state.families, client)
        state.redis_clients.add(client)


def instrument_httpx(client: Any) -> None:
    """Count the requests of an httpx client for the current app, failures too.

    Args:
        client: A Client or an AsyncClient.
    """
    families = _families()
    if families is not None:
        import httpx

        measure_httpx(families, client, isinstance(client, httpx.AsyncClient))


def exporter() -> Any:
    """The current app's `prometheus_flask_exporter.PrometheusMetrics`, for metrics of its own.

    Its decorators (`counter`, `gauge`, `histogram`, `summary`) are there; it adds neither a route
    nor hooks, and what they count stands on the same page.

    Raises:
        RuntimeError: Metrics is off or not set up.
    """
    state = context.state(_KEY, "Metrics")
    if isinstance(state, _Off):
        raise RuntimeError("exporter: METRICS_ENABLED is False on this app; ask before you use it.")
    return state.exporter()
