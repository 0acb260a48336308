"""The cache for processes that run asyncio.

Everything is the plain cache, in a thread beside the event loop; only what loads and writes sources
is awaited on the loop. A value that the memory has costs no thread.
"""

import asyncio
import contextvars
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from flask_muset.cache_strategies.cache import Cache, check_tags
from flask_muset.cache_strategies.entry import ABSENT
from flask_muset.cache_strategies.flights import is_nested
from flask_muset.cache_strategies.keys import KeyMaker, check_key
from flask_muset.cache_strategies.loading import LoadOptions
from flask_muset.cache_strategies.manager import current
from flask_muset.deadline import deadline
from flask_muset.locks import refuse_asyncio_under_gevent

__all__ = ["AsyncCacheManager", "AsyncCacheStrategy", "cache_manager", "cached"]

P = ParamSpec("P")
R = TypeVar("R")


class AsyncCacheManager:
    """The methods of `flask_muset.cache_strategies.CacheManager`, awaited, of the current app."""

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` if there is none that is fresh."""
        cache = _current()
        value = cache.peek(key)
        return await _beside(cache.get, key, default) if value is ABSENT else value

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that have one."""
        return await _beside(_current().get_many, list(keys))  # type: ignore[no-any-return]

    async def set(
        self, key: str, value: Any, expire: float | None = None, *, tags: Iterable[str] = ()
    ) -> bool:
        """Keep a value; whether Redis has it."""
        return await _beside(_current().set, key, value, expire, tags=tags)  # type: ignore[no-any-return]

    async def set_many(
        self,
        values: Mapping[str, Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Keep several values; whether Redis has them."""
        return await _beside(_current().set_many, values, expire, tags=tags)  # type: ignore[no-any-return]

    async def delete(self, key: str) -> bool:
        """Forget a key; whether it is done."""
        return await _beside(_current().delete, key)  # type: ignore[no-any-return]

    async def delete_pattern(self, pattern: str) -> int:
        """Forget the keys that match; exactly how many there were.

        Raises:
            CacheUnavailable: Redis is away.
        """
        return await _beside(_current().delete_pattern, pattern)  # type: ignore[no-any-return]

    async def delete_tag(self, tag: str) -> bool:
        """Forget all entries of a tag; whether it is done."""
        return await _beside(_current().invalidate_tag, tag, keep_stale=False)  # type: ignore[no-any-return]

    async def expire_tag(self, tag: str) -> bool:
        """Make all entries of a tag stale; whether it is done."""
        return await _beside(_current().invalidate_tag, tag, keep_stale=True)  # type: ignore[no-any-return]

    async def explain(self, key: str) -> dict[str, Any]:
        """What there is about a key."""
        return await _beside(_current().explain, key)  # type: ignore[no-any-return]

    async def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], Awaitable[R] | R],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
        **options: Any,
    ) -> R:
        """A value of the cache, or of one load for all who ask at the same time.

        Args:
            key: Of the value.
            fetch_func: A coroutine function, or a plain one.
            expire: Seconds above 0; None for the app's default, `math.inf` for no end.
            tags: By which it may be made invalid.
            **options: As of the plain form.
        """
        cache = _current()
        chosen = LoadOptions(expire=cache.lifetime_s(expire), tags=check_tags(tags), **options)
        return await _load(cache, check_key(key), fetch_func, chosen)  # type: ignore[no-any-return]

    async def write_through(
        self,
        key: str,
        value: R,
        write_func: Callable[[R], Awaitable[Any] | Any],
        expire: float | None = None,
    ) -> bool:
        """Write a value to its source, then to the cache; whether the cache agrees already."""
        write = _on_loop(write_func)
        return await _beside(_current().write_through, key, value, write, expire)  # type: ignore[no-any-return]

    def cached(
        self, key_prefix: str | None = None, expire: float | None = None, **options: Any
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
        """Decorate a coroutine function: its results are kept by its arguments.

        The options and the two methods of the decorated function are those of the plain form;
        `invalidate` is awaited.
        """
        options["tags"] = check_tags(options.get("tags", ()))
        LoadOptions(expire=1.0, **options)

        def decorate(fn: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
            if not inspect.iscoroutinefunction(fn):
                raise TypeError(
                    f"{fn!r} is no coroutine function; use flask_muset.cache_strategies.cached."
                )
            return _decorated(fn, KeyMaker(fn, key_prefix), expire, options)

        return decorate


def _decorated(
    fn: Callable[P, Awaitable[R]],
    make_key: KeyMaker,
    expire: float | None,
    options: Mapping[str, Any],
) -> Callable[P, Awaitable[R]]:
    made: weakref.WeakKeyDictionary[Cache, LoadOptions] = weakref.WeakKeyDictionary()

    @wraps(fn)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = _current()
        chosen = made.get(cache)
        if chosen is None:
            chosen = LoadOptions(expire=cache.lifetime_s(expire), **options)
            made[cache] = chosen
            cache.codec.register_returned(fn)
        key = make_key(*args, **kwargs)
        return await _load(cache, key, partial(fn, *args, **kwargs), chosen)  # type: ignore[no-any-return]

    async def invalidate(*args: P.args, **kwargs: P.kwargs) -> bool:
        return await cache_manager.delete(make_key(*args, **kwargs))

    wrapper.cache_key = make_key  # type: ignore[attr-defined]
    wrapper.invalidate = invalidate  # type: ignore[attr-defined]
    return wrapper


def _current() -> Cache:
    refuse_asyncio_under_gevent()
    return current()


# --- Between the loop and its threads -------------------------------------------------------------


async def _load(
    cache: Cache, key: str, fetch: Callable[[], Awaitable[Any] | Any], options: LoadOptions
) -> Any:
    loop = asyncio.get_running_loop()
    first = _first.get((loop, cache, key))
    if first is not None and not is_nested():
        # One thread for all who ask at the same time; it may fail, or keep nothing.
        await asyncio.wait([first])
    load = partial(cache.load, key, _on_loop(fetch), options)
    if cache.peek(key) is not ABSENT:
        return load()
    future = asyncio.ensure_future(_beside(load))
    if first is None:
        _first[loop, cache, key] = future
        future.add_done_callback(lambda _: _first.pop((loop, cache, key), None))
    return await future


#: Who began to load a key that others wait for now.
_first: dict[tuple[asyncio.AbstractEventLoop, Cache, str], "asyncio.Future[Any]"] = {}


async def _beside(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call in a thread of its own: loads wait for each other, so no pool may run out."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    run = partial(contextvars.copy_context().run, fn, *args, **kwargs)

    def tell(settle: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            settle(outcome)

    def work() -> None:
        try:
            result = run()
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            outcome: tuple[Any, Any] = done.set_exception, error
        else:
            outcome = done.set_result, result
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=work, name="cache", daemon=True).start()
    return await done


def _on_loop(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function for a thread that awaits on the loop; a deadline cuts the coroutine off."""
    loop = asyncio.get_running_loop()

    async def call(*args: Any) -> Any:
        made = fn(*args)
        return await made if inspect.isawaitable(made) else made

    def call_there(*args: Any) -> Any:
        made = call(*args)
        try:
            future = asyncio.run_coroutine_threadsafe(made, loop)
        except RuntimeError:
            made.close()  # the loop has ended
            raise
        try:
            return future.result(deadline.remaining())
        except TimeoutError:
            if not future.done():
                future.cancel()
                deadline.check()
            raise

    return call_there


#: The cache of the current app; outside of any, of the only app that has one.
cache_manager = AsyncCacheManager()

#: `cache_manager.cached`.
cached = cache_manager.cached


class AsyncCacheStrategy:
    """The strategies by name, on the cache of the current app."""

    cache_aside = cache_manager.cache_aside
    write_through = cache_manager.write_through
