"""Our store as a backend of Flask-Caching: its decorators and template fragments over our tiers.

    app.config["CACHE_TYPE"] = "flask_muset.cache_strategies.flask_caching_backend.StoreBackend"
    CacheStrategies(app)
    cache = flask_caching.Cache(app)

A backend sees `get` and `set` alone: single flight and staleness need our own decorators. What it
brings are the store's tiers, bytes that run no code when they are read, and misses instead of
errors while the store is away. Every hit is decoded anew, so each caller may change what it gets.

What is stale, unreadable or stands for something that was not found counts as absent here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flask_caching import CachedResponse
from flask_caching.backends.base import BaseCache
from werkzeug.exceptions import HTTPException, default_exceptions

from flask_muset.cache_strategies.codec import Codec, Unreadable
from flask_muset.cache_strategies.entry import ABSENT, NEVER, Entry, Lease
from flask_muset.cache_strategies.stores import Store
from flask_muset.clock import SYSTEM

__all__ = ["StoreBackend"]

_KEY = "cache_strategies"

_RESPONSE: Any = CachedResponse.__base__

#: A timeout of 300 years is none: moments must fit into the store's microseconds.
_AGES_S = 10**10
#: How long `add` and `inc` wait for somebody else's turn at the same key.
_PATIENCE_S = 1.0
#: The pause between two looks is drawn from these, so that callers do not meet again.
_PAUSE_S = (0.0005, 0.002)
#: How often `inc` begins anew when the key was changed meanwhile.
_TRIES = 5

Timeout = int | timedelta | None


def _tell_nobody(_operation: str, _status: str, _duration_s: float | None) -> None:
    pass


def _detach_nothing(_what: str, _name: str) -> None:
    pass


class StoreBackend(BaseCache):
    """A backend of Flask-Caching, also of cachelib, over any Store.

    Timeouts are cachelib's: None is the default, 0 is never, below 0 is gone at once. A timedelta
    is rounded up to whole seconds.

    `add`, `inc` and `dec` take the store's lease of the key: of several callers that add a key at
    once exactly one is told True, and no increment is lost, in all processes that share the leases
    of the store; while a shared store is away each process decides and counts alone. They give up,
    with False or None, when others are at the key for a second. As in cachelib's SimpleCache, `inc`
    and `dec` begin the default timeout anew.

    `delete` says whether the key was there; two callers at once may both be told so.

    Args:
        store: Where entries are kept.
        codec: How values become bytes.
        default_timeout: Seconds, for calls that name none.
        ignore_delete_many_errors: Whether `delete_many` returns although keys are still there.
        tell: Counts an operation: name, status, and for a `get` its seconds.
        detach: Is told of each key that is written or deleted, `key` and its name, and of a
            `clear`, `all` and nothing, so that nobody joins a load that has begun before.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        *,
        default_timeout: int = 300,
        ignore_delete_many_errors: bool = False,
        tell: Callable[[str, str, float | None], None] = _tell_nobody,
        detach: Callable[[str, str], None] = _detach_nothing,
    ) -> None:
        super().__init__(default_timeout, ignore_delete_many_errors)
        self._store = store
        self._codec = codec
        self._tell = tell
        self._detach = detach
        codec.register(_Aborted)

    @classmethod
    def factory(
        cls, app: Any, config: dict[str, Any], args: list[Any], kwargs: dict[str, Any]
    ) -> "StoreBackend":
        """Make the backend of an app, as Flask-Caching asks for it.

        Args:
            app: On which CacheStrategies is set up. What that keeps in `app.extensions` has `store`
                and `codec`, and may have `tell` and `detach`.
            config: Flask-Caching's; not used.
            args: CACHE_ARGS.
            kwargs: CACHE_OPTIONS and the default timeout.

        Raises:
            RuntimeError: The app has no CacheStrategies.
        """
        made = app.extensions.get(_KEY)
        if made is None:
            raise RuntimeError(
                f"StoreBackend found no CacheStrategies on app {app.name!r};"
                " set up CacheStrategies(app) first, then Cache(app)."
            )
        for name in ("tell", "detach"):
            if hasattr(made, name):
                kwargs.setdefault(name, getattr(made, name))
        return cls(made.store, made.codec, *args, **kwargs)

    # --- One key ----------------------------------------------------------------------------------

    def get(self, key: str) -> Any:
        """The value, None if there is none."""
        began = SYSTEM.now()
        value, status = self._value(self._store.read(key))
        self._tell("get", status, SYSTEM.now() - began)
        return _or_none(value)

    def has(self, key: str) -> bool:
        """Whether there is a value that `get` would return; costs the same."""
        return self._is_there(self._store.read(key))

    def set(self, key: str, value: Any, timeout: Timeout = None) -> bool:
        """Keep a value, whatever was there.

        Returns:
            False if the store could not; the old value is not served either.

        Raises:
            UnsupportedType: The value cannot be encoded.
        """
        entry = self._entry(value, timeout)
        is_done = self._store.delete(key) if entry is None else self._store.write(key, entry)
        return self._done("set", [key], is_done)

    def add(self, key: str, value: Any, timeout: Timeout = None) -> bool:
        """Keep a value unless there is one.

        Returns:
            Whether it was kept.

        Raises:
            UnsupportedType: The value cannot be encoded.
        """
        entry = self._entry(value, timeout)
        if entry is None:
            return not self.has(key)
        until, known = SYSTEM.now() + _PATIENCE_S, None
        while True:
            got = self._lease(key, known, until)
            if isinstance(got, Lease):
                return self._put_in(got, known, entry)
            if got is None or self._is_there(got):
                return False
            known = got

    def delete(self, key: str) -> bool:
        """Forget a value; whether it was there and is deleted."""
        was_there = self.has(key)
        return self._done("delete", [key], self._store.delete(key)) and was_there

    def inc(self, key: str, delta: int = 1) -> int | None:
        """Add to a number, which is 0 where there is none; the new number, None if it failed.

        Raises:
            TypeError: The value is no number.
        """
        until, known = SYSTEM.now() + _PATIENCE_S, self._store.read(key)
        tries = 0
        while tries < _TRIES:
            got = self._lease(key, known, until)
            if got is None:
                break
            if isinstance(got, Lease):
                number = self._add_up(got, known, delta)
                if number is not None:
                    return number
                tries += 1
            known = got if isinstance(got, Entry) else None
        return None

    def dec(self, key: str, delta: int = 1) -> int | None:
        """Subtract from a number; see `inc`."""
        return self.inc(key, -delta)

    # --- Several keys -----------------------------------------------------------------------------

    def get_many(self, *keys: str) -> list[Any]:
        """The values in the order of their keys, None where there is none."""
        began = SYSTEM.now()
        found = self._store.read_many(keys)
        values = []
        for key in keys:
            value, status = self._value(found.get(key))
            self._tell("get", status, SYSTEM.now() - began)
            values.append(_or_none(value))
        return values

    def set_many(self, mapping: dict[str, Any], timeout: Timeout = None) -> list[str]:
        """Keep several values.

        Returns:
            Their keys; none if the store could not keep them all.

        Raises:
            UnsupportedType: A value cannot be encoded; none of them is kept then.
        """
        entries = {key: self._entry(value, timeout) for key, value in mapping.items()}
        kept = {key: entry for key, entry in entries.items() if entry is not None}
        is_done = self._store.write_many(kept) if kept else self._store.delete_many(list(entries))
        return list(mapping) if self._done("set", mapping, is_done) else []

    def delete_many(self, *keys: str) -> list[str]:
        """Forget several values.

        Returns:
            The keys that have no value now.

        Raises:
            RuntimeError: Some still have one, and `ignore_delete_many_errors` is not set.
        """
        if self._done("delete", keys, self._store.delete_many(keys)):
            return list(keys)
        remaining = self._store.read_many(keys)
        if remaining and not self.ignore_delete_many_errors:
            raise RuntimeError(f"these keys could not be deleted: {sorted(remaining)}.")
        return [key for key in keys if key not in remaining]

    def clear(self) -> bool:
        """Make everything in the store invalid, what was put in by other ways too."""
        is_done = self._store.invalidate_tag("", keep_stale=False)
        self._detach("all", "")
        self._tell("clear", "ok" if is_done else "queued", None)
        return is_done

    # --- Within -----------------------------------------------------------------------------------

    def _value(self, entry: Entry | None) -> tuple[Any, str]:
        """The decoded value, ABSENT if there is none to serve, and how that is counted."""
        if entry is None or entry.is_negative or entry.fresh_until <= SYSTEM.now():
            return ABSENT, "miss"
        try:
            value = self._codec.decode(entry.payload)
            return (value.again() if type(value) is _Aborted else value), "hit"
        except Unreadable:
            return ABSENT, "unreadable"

    def _is_there(self, entry: Entry | None) -> bool:
        return self._value(entry)[0] is not ABSENT

    def _entry(self, value: Any, timeout: Timeout) -> Entry | None:
        """An entry for a value, None if it would be gone at once."""
        payload = self._codec.encode(_kept_as(value))
        seconds = self._normalize_timeout(timeout)
        if seconds < 0:
            return None
        now = SYSTEM.now()
        end = now + seconds if 0 < seconds < _AGES_S else NEVER
        return Entry(payload, created_at=now, fresh_until=end, gone_at=end)

    def _lease(self, key: str, known: Entry | None, until: float) -> Entry | Lease | None:
        """What `lease` of the store gives, None if the key was busy up to a moment."""
        while SYSTEM.now() < until:
            got = self._store.lease(key, known, anyway=True)
            if isinstance(got, Entry | Lease):
                return got
            SYSTEM.sleep(SYSTEM.uniform(*_PAUSE_S))
        return None

    def _current(self, lease: Lease, known: Entry | None) -> Entry | None:
        """What is there now that we have the lease, which ends when it changes.

        A shared store tells it by `lease` alone: what it reads may come from a memory that has not
        heard yet of a delete.
        """
        if not lease.token:
            return self._store.read(lease.key)
        got = None if known is None else self._store.lease(lease.key, None, anyway=True)
        if isinstance(got, Lease):
            # Ours has ended, so this one is of no use either.
            self._store.settle(got, None)
        return got if isinstance(got, Entry) else None

    def _put_in(self, lease: Lease, known: Entry | None, entry: Entry) -> bool:
        """Put in an entry unless there is a value now; whether it did."""
        kept = None
        try:
            if not self._is_there(self._current(lease, known)):
                kept = entry
        finally:
            is_kept = self._store.settle(lease, kept)
        return is_kept and self._done("set", [lease.key], is_kept)

    def _add_up(self, lease: Lease, known: Entry | None, delta: int) -> int | None:
        """Put in the sum; None if the store has not, because the key was changed, or at all."""
        entry = None
        try:
            number: int = (self._value(self._current(lease, known))[0] or 0) + delta
            entry = self._entry(number, None)
        finally:
            is_kept = self._store.settle(lease, entry)
        return number if is_kept and self._done("set", [lease.key], is_kept) else None

    def _done(self, operation: str, keys: Iterable[str], is_done: bool) -> bool:
        for key in keys:
            self._detach("key", key)
            self._tell(operation, "ok" if is_done else "queued", None)
        return is_done


def _or_none(value: Any) -> Any:
    return None if value is ABSENT else value


# --- What Flask-Caching keeps beside values -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Aborted:
    """What a cached view has raised by `abort`; a hit raises it again.

    Attributes:
        code: Of the class, None for one that has a response alone.
        state: Its attributes.
    """

    code: int | None
    state: dict[str, Any]

    def again(self) -> HTTPException:
        kind = _werkzeug_s(self.code)
        if kind is None:
            raise Unreadable(f"an exception with the unknown code {self.code!r}")
        error = kind()
        vars(error).update(self.state)
        return error


def _werkzeug_s(code: int | None) -> type[HTTPException] | None:
    return HTTPException if code is None else default_exceptions.get(code)


def _kept_as(value: Any) -> Any:
    """What stands for a value of a view that the codec does not know."""
    if isinstance(value, CachedResponse):
        # The other way round than it was made: both have one state.
        plain = object.__new__(_RESPONSE)
        plain.__dict__ = value.__dict__
        return plain
    if isinstance(value, HTTPException) and type(value) is _werkzeug_s(value.code):
        return _Aborted(value.code, vars(value))
    return value
