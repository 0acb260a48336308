"""The cache for processes that run asyncio.

Everything is the plain cache, in a thread beside the event loop; only what loads and writes sources
is awaited on the loop. What takes as long as Redis at most is called in one of asyncio's threads; a
value that the memory has costs none.
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, overload

from flask_muset.cache_strategies.cache import Cache, check_tags
from flask_muset.cache_strategies.entry import ABSENT
from flask_muset.cache_strategies.flights import is_nested
from flask_muset.cache_strategies.keys import KeyMaker, check_key
from flask_muset.cache_strategies.loading import LoadOptions
from flask_muset.cache_strategies.manager import check_options, current, options_by_cache
from flask_muset.deadline import deadline
from flask_muset.errors import OperationTimeoutError
from flask_muset.locks import refuse_asyncio_under_gevent

__all__ = ["AsyncCacheManager", "AsyncCacheStrategy", "cache_manager", "cached"]

#: Seconds between two looks at whether the loop still runs.
_STEP_S = 1.0

P = ParamSpec("P")
R = TypeVar("R")


class AsyncCacheManager:
    """The methods of `flask_muset.cache_strategies.CacheManager`, awaited, of the current app."""

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` if there is none that is fresh."""
        cache = _current()
        value = cache.get_near(key)
        return await asyncio.to_thread(cache.get, key, default) if value is ABSENT else value

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that have one."""
        return await asyncio.to_thread(_current().get_many, list(keys))

    async def set(
        self, key: str, value: Any, expire: float | None = None, *, tags: Iterable[str] = ()
    ) -> bool:
        """Keep a value; whether Redis has it."""
        return await asyncio.to_thread(_current().set, key, value, expire, tags=tags)

    async def set_many(
        self,
        values: Mapping[str, Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Keep several values; whether Redis has them."""
        return await asyncio.to_thread(_current().set_many, values, expire, tags=tags)

    async def delete(self, key: str) -> bool:
        """Forget a key; whether it is done."""
        return await asyncio.to_thread(_current().delete, key)

    async def invalidate(self, key: str) -> bool:
        """Forget a key in the cache alone; whether it is done."""
        return await asyncio.to_thread(_current().invalidate, key)

    async def delete_pattern(self, pattern: str) -> int:
        """Forget the keys that match; exactly how many there were.

        Raises:
            CacheUnavailable: Redis is away.
        """
        return await asyncio.to_thread(_current().delete_pattern, pattern)

    async def delete_tag(self, tag: str) -> bool:
        """Forget all entries of a tag; whether it is done."""
        return await asyncio.to_thread(_current().invalidate_tag, tag, keep_stale=False)

    async def expire_tag(self, tag: str) -> bool:
        """Make all entries of a tag stale; whether it is done."""
        return await asyncio.to_thread(_current().invalidate_tag, tag, keep_stale=True)

    async def explain(self, key: str) -> dict[str, Any]:
        """What there is about a key."""
        return await asyncio.to_thread(_current().explain, key)

    def register(self, cls: type[R]) -> type[R]:
        """Let values of a dataclass or an Enum be read that another process has kept."""
        return _current().codec.register(cls)

    @overload
    async def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], Awaitable[R]],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
        **options: Any,
    ) -> R: ...

    @overload
    async def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], R],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
        **options: Any,
    ) -> R: ...

    async def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
        **options: Any,
    ) -> Any:
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
        return await _load(cache, check_key(key), fetch_func, chosen)

    async def write_through(
        self,
        key: str,
        value: R,
        write_func: Callable[[R], Awaitable[Any] | Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Write a value to its source, then to the cache; whether the cache agrees already."""
        write = _on_loop(write_func)
        return await _beside(_current().write_through, key, value, write, expire, tags)

    async def write_behind(
        self,
        key: str,
        value: R,
        write_func: Callable[..., Awaitable[Any] | Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Accept a value, and bring it to its source later; see the plain form.

        A coroutine function that was declared with `writer` is awaited in a loop of its own, any
        other one on this loop as long as that runs.
        """
        cache = _current()
        is_named = not cache.behind.writers.of(write_func).is_homely
        write = write_func if is_named else wraps(write_func)(_on_loop(write_func))
        return await _beside(cache.write_behind, key, value, write, expire, tags)

    async def flush(self, timeout: float = 30.0) -> bool:  # noqa: ASYNC109 - it raises nothing
        """Bring all that waits to its sources; whether nothing waits any more."""
        return await _beside(_current().behind.drain.flush, timeout)

    def cached(
        self, key_prefix: str | None = None, expire: float | None = None, **options: Any
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
        """Decorate a coroutine function: its results are kept by its arguments.

        The options and the two methods of the decorated function are those of the plain form;
        `invalidate` is awaited.
        """
        options["tags"] = check_tags(options.get("tags", ()))
        check_options(expire, options)

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
    options_in = options_by_cache(fn, expire, options)

    @wraps(fn)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = _current()
        key = make_key(*args, **kwargs)
        return await _load(cache, key, partial(fn, *args, **kwargs), options_in(cache))  # type: ignore[no-any-return]

    async def invalidate(*args: P.args, **kwargs: P.kwargs) -> bool:
        return await cache_manager.invalidate(make_key(*args, **kwargs))

    wrapper.cache_key = make_key  # type: ignore[attr-defined]
    wrapper.invalidate = invalidate  # type: ignore[attr-defined]
    return wrapper


def _current() -> Cache:
    refuse_asyncio_under_gevent()
    return current()


# --- Between the loop and its threads -------------------------------------------------------------


class _CutOffError(BaseException):
    """What was awaited was cancelled: nobody's failure, so who waits for it loads instead."""


#: The loop that waits for what runs in this context; absent for a refresh that nobody waits for.
_loop_of: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar(
    "flask_muset.cache_loop", default=None
)
#: Who began to load a key that others wait for now.
_first: dict[tuple[asyncio.AbstractEventLoop, Cache, str], "asyncio.Future[Any]"] = {}


async def _load(
    cache: Cache, key: str, fetch: Callable[[], Awaitable[Any] | Any], options: LoadOptions
) -> Any:
    where = asyncio.get_running_loop(), cache, key
    while True:
        value = cache.load_near(key)
        if value is not ABSENT:
            return value
        first = _first.get(where)
        if first is None or is_nested():
            break
        # One thread for all who ask at the same time.
        await asyncio.wait([first])
        if not first.cancelled() and (error := first.exception()) is not None:
            raise error
    future = asyncio.ensure_future(_beside(cache.load, key, _on_loop(fetch), options))
    if first is None:
        _first[where] = future
        future.add_done_callback(lambda _: _first.pop(where, None))
    return await future


async def _beside(fn: Callable[..., R], *args: Any) -> R:
    """Call in a thread of its own: loads wait for each other, so no pool may run out."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[R] = loop.create_future()
    variables = contextvars.copy_context()
    variables.run(_loop_of.set, loop)

    def end(settle: Callable[[], object]) -> None:
        if not done.done():
            settle()

    def work() -> None:
        settle: Callable[[], object]
        try:
            settle = partial(done.set_result, variables.run(fn, *args))
        except _CutOffError:
            settle = done.cancel
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            settle = partial(done.set_exception, error)
        # A loop that has ended waits for nothing.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(end, settle)

    threading.Thread(target=work, name="cache", daemon=True).start()
    return await done


def _on_loop(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function for a thread that awaits on the loop; a deadline cuts the coroutine off."""
    loop = asyncio.get_running_loop()

    async def call(*args: Any) -> Any:
        made = fn(*args)
        return await made if inspect.isawaitable(made) else made

    def call_there(*args: Any) -> Any:
        try:
            return _awaited(call, args, loop)
        except _CutOffError:
            if _loop_of.get() is not None:
                raise
            # A refresh that nobody waits for outlives the loop of whoever has begun it.
            return asyncio.run(call(*args))

    return call_there


def _awaited(
    call: Callable[..., Coroutine[Any, Any, Any]],
    args: tuple[Any, ...],
    loop: asyncio.AbstractEventLoop,
) -> Any:
    """The result of a coroutine on another thread's loop."""
    made = call(*args)
    try:
        future = asyncio.run_coroutine_threadsafe(made, loop)
    except RuntimeError:
        made.close()
        raise _CutOffError from None
    while True:
        left_s = deadline.remaining()
        try:
            return future.result(_STEP_S if left_s is None else min(left_s, _STEP_S))
        except concurrent.futures.CancelledError:
            raise _CutOffError from None
        except TimeoutError:
            if future.done():
                raise  # the coroutine's own
            _check_time(future, loop)


def _check_time(future: "concurrent.futures.Future[Any]", loop: asyncio.AbstractEventLoop) -> None:
    """Give up where the loop has ended or the time is up."""
    if not loop.is_running():
        future.cancel()
        raise _CutOffError
    try:
        deadline.check()
    except OperationTimeoutError:
        future.cancel()
        raise


#: The cache of the current app; outside of any, of the only app that has one.
cache_manager = AsyncCacheManager()

#: `cache_manager.cached`.
cached = cache_manager.cached


class AsyncCacheStrategy:
    """The strategies by name, on the cache of the current app."""

    cache_aside = cache_manager.cache_aside
    write_through = cache_manager.write_through
    write_behind = cache_manager.write_behind
