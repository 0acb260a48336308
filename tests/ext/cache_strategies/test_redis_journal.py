"""The journal in Redis: what every journal must do, and what can happen to a Redis."""

import itertools

import pytest
from flask_muset.cache_strategies.journal_conformance import JournalSuite
from flask_muset.cache_strategies.redis_journal import RedisJournal
from flask_muset.cache_strategies.tiered_store import TieredStore
from flask_muset.redis import GuardedRedis


class TestRedisJournal(JournalSuite):
    """The same over a real server."""

    @pytest.fixture
    def make_beside(self, redis_server):
        """A function that makes a journal on the records of a namespace."""
        made = []

        def make(name, **options):
            # A budget that a busy machine keeps: what is late is another test's concern.
            client = GuardedRedis(redis_server.url, budget_s=2.0, prefix=f"muset:{name}:")
            store = TieredStore(client, max_bytes=2**20)
            made.append((client, store))
            return RedisJournal(store, client, **{"lease_s": self.lease_s, **options})

        yield make
        for client, store in made:
            store.close()
            client.close()

    @pytest.fixture
    def make_journal(self, make_beside):
        names = itertools.count()
        return lambda **options: make_beside(next(names), **options)

    @pytest.fixture
    def journal(self, make_beside):
        return make_beside("both")

    @pytest.fixture
    def other_journal(self, make_beside):
        return make_beside("both")
