"""The applications under test, each made by the function of its name.

All have GET /api/ping -> {"status": "ok", "n": 1}; those with an error path GET /api/fail too,
bare and ours also /api/fail/<number>, for errors of which no two are the same.
REDIS_PORT stands in the environment where Redis is needed.
"""

import json
import os

PAYLOAD = {"status": "ok", "n": 1}


def error_handler():
    """Ours: bare Flask with ErrorHandler and nothing else."""
    from flask_muset import ErrorHandler

    app = _flask(before=ErrorHandler)

    @app.get("/api/fail")
    @app.get("/api/fail/<int:_number>")
    def fail(_number=0):
        raise ValueError("no")

    return app


def muset_four(**settings):
    """Ours, all four: errors, deadline, concurrency and rate limit, a cached view, metrics."""
    from flask_muset import CacheStrategies, ErrorHandler, Metrics, Resilience

    cache = CacheStrategies()

    def before(app):
        app.config.update(RESILIENCE_RATE_LIMIT_REQUESTS_PER_MINUTE=60_000, **settings)
        for extension in (ErrorHandler(), Resilience(), cache, Metrics()):
            extension.init_app(app)

    return _flask(before=before, view_wrap=lambda _app: cache.cached("ping", expire=600))


def muset_four_redis():
    """The same with Redis: the view is answered by the memory, hits of the limit are lent."""
    names = ("CACHE_STRATEGIES", "RESILIENCE", "ERROR_HANDLER")
    return muset_four(**{f"{name}_REDIS_URL": _redis_url() for name in names})


def _off(prefix, extension, view_wrap=None):
    def before(app):
        app.config[f"{prefix}_ENABLED"] = False
        extension.init_app(app)

    return _flask(before=before, view_wrap=view_wrap)


def errors_off():
    """Bare Flask with one of ours that is switched off."""
    from flask_muset import ErrorHandler

    return _off("ERROR_HANDLER", ErrorHandler())


def resilience_off():
    from flask_muset import Resilience

    return _off("RESILIENCE", Resilience())


def cache_off():
    from flask_muset import CacheStrategies

    return _off("CACHE_STRATEGIES", CacheStrategies())


def cached_view_off():
    """A view that says with each response that it was loaded past the cache."""
    from flask_muset import CacheStrategies

    cache = CacheStrategies()
    return _off("CACHE_STRATEGIES", cache, view_wrap=lambda _app: cache.cached("ping"))


def metrics_off():
    from flask_muset import Metrics

    return _off("METRICS", Metrics())


def _redis_url():
    return f"redis://127.0.0.1:{os.environ.get('REDIS_PORT', '6379')}/0"


def _flask(view_wrap=None, before=None):
    from flask import Flask, jsonify

    app = Flask("bench")
    if before:
        before(app)

    def ping():
        return jsonify(PAYLOAD)

    if view_wrap:
        ping = view_wrap(app)(ping)
    app.add_url_rule("/api/ping", "ping", ping)
    return app


def _exporter(app):
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from prometheus_flask_exporter.multiprocess import GunicornInternalPrometheusMetrics as M
    else:
        from prometheus_flask_exporter import PrometheusMetrics as M
    M(app)


def _limiter(app, uri):
    from flask_limiter import Limiter
    from flask_limiter.util import get_remote_address

    Limiter(
        get_remote_address,
        app=app,
        default_limits=["1000000000 per hour"],
        storage_uri=uri,
        strategy="fixed-window",
    )


def _cache(app, kind):
    from flask_caching import Cache

    conf = {"CACHE_TYPE": kind, "CACHE_DEFAULT_TIMEOUT": 600}
    if kind == "RedisCache":
        conf["CACHE_REDIS_URL"] = _redis_url()
    return Cache(app, config=conf).cached(timeout=600)


def wsgi():
    body = json.dumps(PAYLOAD).encode()
    head = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]

    def app(environ, start_response):
        start_response("200 OK", head)
        return [body]

    return app


def bare():
    from flask import jsonify

    app = _flask()

    @app.errorhandler(Exception)
    def on_error(e):
        return jsonify({"status": "error", "code": "internal", "message": "internal error"}), 500

    @app.get("/api/fail")
    @app.get("/api/fail/<int:_number>")
    def fail(_number=0):
        raise ValueError("no")

    return app


def bare_redis():
    """What memory redis-py's import takes."""
    import redis  # noqa: F401

    return bare()


def hooks():
    """Floor of any extension: one empty before, after and teardown hook."""

    def before(app):
        app.before_request(lambda: None)
        app.after_request(lambda r: r)
        app.teardown_request(lambda e: None)

    return _flask(before=before)


def floor_four():
    """What the work of all four extensions costs when written by hand.

    Request id and error handler, a token bucket per client, a cached view in a dict with expiry,
    counter and histogram of prometheus_client (multiprocess files) with bound children.
    """
    import time

    from flask import Response, g, jsonify, request
    from prometheus_client import CollectorRegistry, Counter, Histogram

    reg, clock = CollectorRegistry(), time.monotonic
    cnt = Counter("requests", "x", ["endpoint", "status"], registry=reg)
    his = Histogram("latency_seconds", "x", ["endpoint"], registry=reg)
    bound, buckets, cache = {}, {}, {}
    ids = iter(range(1, 10**12))

    def before(app):
        @app.before_request
        def enter():
            now = g.t0 = clock()
            g.request_id = request.headers.get("X-Request-ID") or f"{next(ids):016x}"
            b = buckets.setdefault(request.remote_addr, [1e9, now])
            tokens = min(1e9, b[0] + (now - b[1]) * 1e6)
            if tokens < 1:
                return Response("slow down", 429)
            b[0], b[1] = tokens - 1, now

        @app.after_request
        def leave(r):
            k = (request.endpoint, r.status_code)
            m = bound.get(k)
            if m is None:
                m = bound[k] = (cnt.labels(*map(str, k)).inc, his.labels(str(k[0])).observe)
            m[0]()
            m[1](clock() - g.t0)
            r.headers["X-Request-ID"] = g.request_id
            return r

        @app.errorhandler(Exception)
        def on_error(e):
            return jsonify({"status": "error", "code": "internal", "id": g.request_id}), 500

    def wrap(app):
        def deco(view):
            def cached():
                hit = cache.get(request.path)
                if hit is None or hit[0] < clock():
                    hit = cache[request.path] = (clock() + 600, view().get_data())
                return Response(hit[1], mimetype="application/json")

            return cached

        return deco

    return _flask(before=before, view_wrap=wrap)


def exporter():
    return _flask(before=_exporter)


exporter_mp = exporter  # PROMETHEUS_MULTIPROC_DIR is set by the runner


def limiter_mem():
    return _flask(before=lambda a: _limiter(a, "memory://"))


def limiter_redis():
    return _flask(before=lambda a: _limiter(a, _redis_url()))


def caching_simple():
    return _flask(view_wrap=lambda a: _cache(a, "SimpleCache"))


def caching_redis():
    return _flask(view_wrap=lambda a: _cache(a, "RedisCache"))


def otel():
    from opentelemetry.instrumentation.flask import FlaskInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Null(SpanExporter):
        def export(self, spans):
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Null()))
    app = _flask()
    FlaskInstrumentor().instrument_app(app, tracer_provider=provider)
    return app


def trio_local():
    """All three, nothing leaves the process."""

    def before(a):
        _exporter(a)
        _limiter(a, "memory://")

    return _flask(before=before, view_wrap=lambda a: _cache(a, "SimpleCache"))


def trio():
    """All three: exporter (multiprocess dir), limiter on redis, cached view on redis."""

    def before(a):
        _exporter(a)
        _limiter(a, _redis_url())

    return _flask(before=before, view_wrap=lambda a: _cache(a, "RedisCache"))


def falcon_app():
    import falcon

    class Ping:
        def on_get(self, req, resp):
            resp.media = PAYLOAD

    app = falcon.App()
    app.add_route("/api/ping", Ping())
    return app


def fastapi_app():
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/api/ping")
    async def ping():
        return PAYLOAD

    return app


def apiflask_app():
    from apiflask import APIFlask

    app = APIFlask("bench")

    @app.get("/api/ping")
    def ping():
        return PAYLOAD

    @app.get("/api/fail")
    def fail():
        from apiflask import HTTPError

        raise HTTPError(400, "no")

    return app


def smorest_app():
    from flask import Flask
    from flask.views import MethodView
    from flask_smorest import Api, Blueprint

    app = Flask("bench")
    app.config.update(API_TITLE="b", API_VERSION="1", OPENAPI_VERSION="3.0.2")
    blp = Blueprint("b", "b", url_prefix="/api")

    @blp.route("/ping")
    class Ping(MethodView):
        @blp.response(200)
        def get(self):
            return PAYLOAD

    @blp.route("/fail")
    class Fail(MethodView):
        @blp.response(200)
        def get(self):
            from flask_smorest import abort

            abort(400, message="no")

    Api(app).register_blueprint(blp)
    return app
