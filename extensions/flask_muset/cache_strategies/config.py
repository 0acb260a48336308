"""The configuration of CacheStrategies, read and checked once."""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from flask_muset.configuration import REDIS_KEYS, Key, flag, number, read, whole

__all__ = ["KEYS", "PREFIX", "Config", "read_config"]

PREFIX = "CACHE_STRATEGIES_"
_MIB = 1 << 20


def _are_references(value: Any) -> bool:
    is_several = isinstance(value, list | tuple | set | frozenset)
    return is_several and all(isinstance(one, str) and _is_reference(one) for one in value)


_is_reference = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*").fullmatch


KEYS = {
    "ENABLED": flag(True),
    **REDIS_KEYS,
    "JOURNAL_REDIS_URL": REDIS_KEYS["REDIS_URL"],
    "L1_MAX_BYTES": whole(32 * _MIB, 0, 1 << 40),
    "L1_UNLINKED": number(5.0, 0, 3600),
    "DEFAULT_EXPIRE": number(300.0, 0, 10 * 365 * 86_400, zero="no end"),
    "RESPONSE_HEADERS": flag(True),
    "JOURNAL_PATH": Key(
        None,
        lambda value: value is None or (isinstance(value, str | os.PathLike) and bool(str(value))),
        "the path of a file, or None for one in the app's instance folder",
    ),
    "MAX_PENDING": whole(10_000, 1, 100_000_000),
    "MAX_PENDING_BYTES": whole(256 * _MIB, 1, 1 << 50),
    "REQUIRE_DURABLE": flag(False),
    "WRITERS": Key((), _are_references, "several references such as 'shop.writers:save_order'"),
    "WRITE_DELAY": number(0.1, 0, 3600, zero="none"),
    "WRITE_TIMEOUT": number(30.0, 0, 3600),
    "WRITES_AT_ONCE": whole(8, 1, 1000),
    "DRAIN": flag(True),
    "DRAIN_AT_EXIT": number(5.0, 0, 3600, zero="none"),
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one app is set to.

    Attributes:
        enabled: False keeps nothing: every load is one.
        redis_url: Where the second level is; None for a memory alone.
        journal_redis_url: Where writes wait; None for where the second level is.
        redis_max_connections: Calls of one process to one of them at once.
        redis_budget_s: Seconds that one call may take.
        namespace: Tells apps apart that share a Redis.
        l1_max_bytes: Of the memory of one process; 0 for none.
        l1_unlinked_s: Seconds for which an entry of the memory is served while nobody can tell that
            it is invalid.
        default_expire_s: Of entries that are kept without a time of their own; None for no end.
        response_headers: Whether responses say what the cache did.
        journal_path: Of the file in which writes wait, where there is no Redis; None for one in the
            app's instance folder.
        max_pending: Writes that may wait, of all processes.
        max_pending_bytes: Bytes of their values.
        require_durable: Whether writes are refused where an accepted one could be lost.
        writers: References to functions that a journal may name.
        write_delay_s: Seconds for which a write waits for newer ones of its key.
        write_timeout_s: Seconds that one attempt to write may take.
        writes_at_once: Writers that run at the same time in one process.
        drain: Whether this process writes what waits.
        drain_at_exit_s: Seconds that the end of the process waits for what can still be written.
    """

    enabled: bool
    redis_url: str | None
    journal_redis_url: str | None
    redis_max_connections: int
    redis_budget_s: float
    namespace: str
    l1_max_bytes: int
    l1_unlinked_s: float
    default_expire_s: float | None
    response_headers: bool
    journal_path: str | None
    max_pending: int
    max_pending_bytes: int
    require_durable: bool
    writers: tuple[str, ...]
    write_delay_s: float
    write_timeout_s: float
    writes_at_once: int
    drain: bool
    drain_at_exit_s: float


def read_config(config: MutableMapping[str, Any]) -> Config:
    """Set the defaults in an app's configuration and check it.

    Raises:
        ValueError: A key is unknown or its value is not allowed.
    """
    values = read(config, "CacheStrategies", PREFIX, KEYS)
    if values["L1_MAX_BYTES"] == 0 and values["REDIS_URL"] is None and values["ENABLED"]:
        raise ValueError(
            f"{PREFIX}L1_MAX_BYTES is 0 and {PREFIX}REDIS_URL is not set, nothing can be kept; "
            f"set one of them, or {PREFIX}ENABLED to False."
        )
    return Config(
        enabled=values["ENABLED"],
        redis_url=values["REDIS_URL"],
        journal_redis_url=values["JOURNAL_REDIS_URL"],
        redis_max_connections=values["REDIS_MAX_CONNECTIONS"],
        redis_budget_s=values["REDIS_BUDGET"],
        namespace=values["NAMESPACE"],
        l1_max_bytes=values["L1_MAX_BYTES"],
        l1_unlinked_s=values["L1_UNLINKED"],
        default_expire_s=values["DEFAULT_EXPIRE"] or None,
        response_headers=values["RESPONSE_HEADERS"],
        journal_path=None if values["JOURNAL_PATH"] is None else os.fspath(values["JOURNAL_PATH"]),
        max_pending=values["MAX_PENDING"],
        max_pending_bytes=values["MAX_PENDING_BYTES"],
        require_durable=values["REQUIRE_DURABLE"],
        writers=tuple(values["WRITERS"]),
        write_delay_s=values["WRITE_DELAY"],
        write_timeout_s=values["WRITE_TIMEOUT"],
        writes_at_once=values["WRITES_AT_ONCE"],
        drain=values["DRAIN"],
        drain_at_exit_s=values["DRAIN_AT_EXIT"],
    )
