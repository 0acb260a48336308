"""Processes of their own that share limits."""

from code_worker import CodeWorker

_SETUP = """
from flask_muset.redis import GuardedRedis
from flask_muset.resilience import RateLimit
"""


class LimitWorker(CodeWorker):
    """Has what limits are made of."""

    def __init__(self):
        super().__init__(_SETUP)


def run_all(workers, code):
    """Run code in all at once; their results."""
    for worker in workers:
        worker.start(code)
    return [worker.end() for worker in workers]
