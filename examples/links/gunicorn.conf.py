"""As it was, two processes with four threads each, and the import for Metrics."""

from flask_muset.metrics.gunicorn import *  # noqa: F403 - gunicorn's hooks

worker_class = "gthread"
workers = 2
threads = 4
