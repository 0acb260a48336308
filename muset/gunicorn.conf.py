"""gunicorn's configuration: the only place that monkey-patches, and all hooks.

Patching comes first, so that nothing keeps an unpatched lock or socket, preloaded or not. It stands
in the package, so that an installed Muset serves in any folder; its name cannot be imported.
"""

from gevent import monkey

monkey.patch_all()

import gc  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

from flask_muset import logging  # noqa: E402
from muset.settings import load_settings  # noqa: E402

# SQLite works in native threads, which need Python's lock for each statement and each row. A busy
# hub keeps it until it is made to let go, by default after 5 ms, and meanwhile questions queue up.
sys.setswitchinterval(0.001)

_settings = load_settings()
logging.configure(
    _settings.log_level,
    _settings.log_format,
    _settings.log_file,
    file_max_bytes=_settings.log_file_max_bytes,
    slow_request_s=_settings.slow_request_s,
)
if _settings.enable_metrics:
    from flask_muset.metrics.gunicorn import *  # noqa: F403
    from flask_muset.metrics.gunicorn import on_starting as _prepare_metrics

bind = [f"{_settings.host}:{_settings.port}"]
workers = _settings.web_concurrency
worker_class = "flask_muset.worker.FairGeventWorker"
worker_connections = 1000
preload_app = True
backlog = 2048
# The most that gunicorn takes: a long question that is no ASCII has three letters a byte.
limit_request_line = 8190
# Not all at once.
max_requests = _settings.max_requests
max_requests_jitter = max_requests // 10
# nginx's 15 s < this < graceful_timeout: a worker that ends waits for connections that nginx keeps.
keepalive = 20
graceful_timeout = 30
# A heartbeat of the hub, no limit on a request.
timeout = 60
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
# Whom to believe is the app's to decide, by MUSET_TRUSTED_PROXIES. gunicorn would let each client
# of this machine say which path it meant.
forwarded_allow_ips = ""
# gunicorn would open a socket below the home directory, which may be read-only.
control_socket_disable = True
logger_class = "flask_muset.logging.gunicorn.Logger"
loglevel = _settings.log_level.lower()


def on_starting(server):
    """Ctrl-C stops like SIGTERM: running requests end, the exit code is 0.

    What the app is made of is there by now and stays. A worker's garbage collector need not look
    at it, which would give each worker a copy of its own.
    """
    gc.collect()
    gc.freeze()
    server.handle_int = server.handle_term
    if _settings.enable_metrics:
        _prepare_metrics(server)
