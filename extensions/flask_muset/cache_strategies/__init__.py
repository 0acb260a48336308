"""Cache strategies for Flask: tiers, single flight, staleness, tags.

    cache = CacheStrategies(app)

    @cached(key_prefix="user", expire=300)
    def get_user(user_id: int) -> User: ...

Without a Redis each process has a memory of its own; with one, the memories stand before what all
processes share, and hear within 100 ms of what any of them writes or deletes. Needs the extra
`cache`, and `redis` for the second level.
"""

from flask_muset.cache_strategies.codec import UnsupportedType
from flask_muset.cache_strategies.extension import CacheStrategies
from flask_muset.cache_strategies.manager import (
    CacheManager,
    CacheStrategy,
    cache_manager,
    cached,
)
from flask_muset.cache_strategies.writers import WriteContext

__all__ = [
    "CacheManager",
    "CacheStrategies",
    "CacheStrategy",
    "UnsupportedType",
    "WriteContext",
    "cache_manager",
    "cached",
]
