"""What applications call: the manager, the strategies and the decorator."""

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

from flask_muset import context
from flask_muset.cache_strategies.cache import Cache, check_tags
from flask_muset.cache_strategies.journal import DeadLetter
from flask_muset.cache_strategies.keys import KeyMaker, check_key
from flask_muset.cache_strategies.loading import LoadOptions
from flask_muset.cache_strategies.writers import Declarations

__all__ = [
    "KEY",
    "WHAT",
    "CacheManager",
    "CacheStrategy",
    "cache_manager",
    "cached",
    "check_options",
    "current",
    "described",
    "options_by_cache",
]

KEY = "cache_strategies"
WHAT = "CacheStrategies"

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def current() -> Cache:
    """The cache of the current app.

    Raises:
        RuntimeError: There is none; the text says what to do.
    """
    found: Cache = context.state(KEY, WHAT).cache
    return found


class CacheManager:
    """Values by key, of the current app.

    A key is a str of 1 to 1024 characters. Values are None, bool, numbers, str, bytes, lists,
    tuples, dicts, sets, dates and times, Decimal, UUID, Enum, dataclasses, Markup and Responses, in
    each other; what comes back is a copy of its own for each caller. While Redis is away, reads are
    answered by the memory of the process or find nothing.

    Where a method returns whether it is done, False means: not in Redis yet. It is made up for, by
    deleting the key there, as soon as Redis is back and before this process reads there again.
    """

    def __init__(self) -> None:
        self._declared = Declarations()

    def _cache(self) -> Cache:
        return current()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key.

        Args:
            key: Of the value.
            default: What stands for a value that is not there or not fresh any more; None is a
                value like any other.
        """
        return self._cache().get(key, default)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that have one."""
        return self._cache().get_many(keys)

    def set(
        self, key: str, value: Any, expire: float | None = None, *, tags: Iterable[str] = ()
    ) -> bool:
        """Keep a value, whatever was there.

        Args:
            key: Of the value.
            value: Anything that the class describes.
            expire: Seconds above 0; None for the app's default, `math.inf` for no end.
            tags: By which it may be made invalid.

        Returns:
            Whether it is done.

        Raises:
            UnsupportedType: Something in the value cannot be kept; the text has the path to it.
            ValueError: `expire`, the key or a tag is not allowed.
        """
        return self._cache().set(key, value, expire, tags=tags)

    def set_many(
        self,
        values: Mapping[str, Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Keep several values; see `set`."""
        return self._cache().set_many(values, expire, tags=tags)

    def delete(self, key: str) -> bool:
        """Forget a key, in all processes within 100 ms; a load that has begun is not kept.

        The delete is written behind where a writer's patterns match the key, or a write of it still
        waits: its writer is called with None and `deleted`, and until then the key reads as absent.
        What makes a key invalid without a word to its source are `delete_pattern`, `delete_tag` and
        the `invalidate` of a decorated function.

        Returns:
            Whether it is done, or durable in the journal. False where it is to be written behind
            and the journal is away: the cache forgets the key, its source is not told.

        Raises:
            Exception: The journal has no room, and the writer has raised this.
        """
        return self._cache().delete(key)

    def invalidate(self, key: str) -> bool:
        """Forget a key in the cache alone, whoever owns it; what waits for its source still reads.

        Returns:
            Whether it is done.
        """
        return self._cache().invalidate(key)

    def delete_pattern(self, pattern: str) -> int:
        r"""Forget the keys that match, in all processes.

        Args:
            pattern: Such as `user:*`. `*` stands for any text and `\*` for an asterisk; every
                other character stands for itself.

        Returns:
            Exactly how many there were.

        Raises:
            CacheUnavailable: Redis is away; some may have been deleted.
        """
        return self._cache().delete_pattern(pattern)

    def delete_tag(self, tag: str) -> bool:
        """Forget all entries of a tag, also as stale ones; takes as long for one as for a million.

        Returns:
            Whether it is done.
        """
        return self._cache().invalidate_tag(tag, keep_stale=False)

    def expire_tag(self, tag: str) -> bool:
        """Make all entries of a tag stale: they may be served while a new value is loaded.

        Returns:
            Whether it is done.
        """
        return self._cache().invalidate_tag(tag, keep_stale=True)

    def register(self, cls: type[R]) -> type[R]:
        """Let values of a dataclass or an Enum be read that another process has kept.

        The classes of what is kept here are known, and those that the annotations of functions
        under `cached` name. Also a class decorator.
        """
        return self._cache().codec.register(cls)

    def explain(self, key: str) -> dict[str, Any]:
        """What there is about a key, for people: its level, age, times, tags and lease."""
        return self._cache().explain(key)

    def cache_aside(
        self,
        key: str,
        fetch_func: Callable[[], R],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
        stale_while_revalidate: float = 0,
        stale_if_error: float = 0,
        refresh_backoff: float | None = None,
        soft_timeout: float | None = None,
        hard_timeout: float | None = None,
        negative_expire: float | None = None,
        immutable: bool = False,
    ) -> R:
        """A value of the cache, or of one load for all who ask at the same time.

        Args:
            key: Of the value.
            fetch_func: Gets the value from its source.
            expire: Seconds above 0 for which it is fresh, shortened by chance by up to a tenth;
                None for the app's default, `math.inf` for no end.
            tags: By which it may be made invalid.
            stale_while_revalidate: Seconds after that for which it is served at once, while one
                load goes on beside the request, without it (RFC 5861).
            stale_if_error: Seconds after that for which it is served when the load fails, other
                than by an error that the caller has caused (RFC 5861).
            refresh_backoff: Seconds after a failed load for which a stale value is served without
                another try; None for a tenth of `expire`, from 1 to 30.
            soft_timeout: Seconds to wait for a load when there is a stale value to serve instead;
                the load goes on.
            hard_timeout: Seconds that a load may take.
            negative_expire: Seconds for which None and NotFoundError are kept; without it None is
                a value like any other, and NotFoundError is not kept.
            immutable: Whether callers share one object and promise not to change it.

        Raises:
            OperationTimeoutError: `hard_timeout` has passed.
            UnsupportedType: Something in the value cannot be kept.
            Exception: What `fetch_func` has raised.
        """
        cache = self._cache()
        options = _load_options(
            expire=cache.lifetime_s(expire),
            tags=check_tags(tags),
            stale_while_revalidate=stale_while_revalidate,
            stale_if_error=stale_if_error,
            refresh_backoff=refresh_backoff,
            soft_timeout=soft_timeout,
            hard_timeout=hard_timeout,
            negative_expire=negative_expire,
            immutable=immutable,
        )
        return cache.load(check_key(key), fetch_func, options)  # type: ignore[no-any-return]

    def write_through(
        self,
        key: str,
        value: R,
        write_func: Callable[[R], Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Write a value to its source, then to the cache.

        The value is gone from the cache while its source is written. A load that has begun before
        or meanwhile is not kept, and of two writes at once none: the next load has the last.

        Args:
            key: Of the value.
            value: Is given to `write_func`, and kept as it is afterwards.
            write_func: Writes the source. Where writes are also written behind it is called as
                their writers are, with a WriteContext second if it asks for one.
            expire: Seconds above 0; None for the app's default, `math.inf` for no end.
            tags: By which it may be made invalid.

        Returns:
            True: the source has the value, and the cache agrees with it. False: the source has it,
            and the cache is made to agree as soon as Redis is back.

        Raises:
            UnsupportedType: The value cannot be kept; nothing was written.
            Exception: What `write_func` has raised; the cache has no value.
        """
        return self._cache().write_through(key, value, write_func, expire, tags)

    def write_behind(
        self,
        key: str,
        value: R,
        write_func: Callable[..., Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Accept a value at the speed of the cache, and bring it to its source later.

        Until the source has it, the key reads as this value, whatever the cache has lost. It is
        written at least once, in the order of the key's writes, by any process of the app; see
        `writer`. Where as many writes wait as may, this call writes the source itself.

        Args:
            key: Of the value.
            value: Anything that the class describes; `write_func` gets a copy.
            write_func: A function that was declared with `writer`, or a module-level one that
                CACHE_STRATEGIES_WRITERS names. Any other one works as long as this process lives;
                what it leaves goes to the writer whose patterns match the key, else to the dead
                letters. Called as `write_func(value)` or `write_func(value, context)`.
            expire: Seconds above 0 for which it is kept once it is written; None for the app's
                default, `math.inf` for no end.
            tags: By which it may be made invalid in the cache.

        Returns:
            True: the value and its record are durable, or the source has the value. False: the
            journal is away, and nothing has changed; where the connection broke on the way back
            nobody knows.

        Raises:
            CacheUnavailable: CACHE_STRATEGIES_REQUIRE_DURABLE, and what was accepted could be lost.
            OperationTimeoutError: There was no room, and no time to write.
            TypeError: `write_func` cannot be called.
            UnsupportedType: The value cannot be kept; nothing has changed.
            Exception: There was no room, and the writer has raised this.
        """
        return self._cache().write_behind(key, value, write_func, expire, tags)

    def writer(
        self,
        name: str,
        *,
        coalesce: bool = True,
        max_attempts: int = 5,
        batch: int | None = None,
        patterns: Iterable[str] = (),
    ) -> Callable[[F], F]:
        """Declare a function that writes values behind; it stays what it is.

        It is called as `fn(value)`; as `fn(value, context)` if its second parameter has no default,
        is called `context` or is annotated with `WriteContext`; with `batch` as
        `fn([(value, context), ...])`. It may be called again with what it has written already, so
        it must do no harm twice: see WriteContext.

        Args:
            name: What journals call it: keep it as long as something may wait.
            coalesce: Whether only the last of several writes of a key matters. False for ledgers.
            max_attempts: After how many a write becomes a dead letter. Attempts while the source
                is away for all do not count.
            batch: How many writes it takes at once at most, of several keys.
            patterns: Keys that it writes, such as `user:*`: it also gets their deletes, and what
                functions without a name have left.

        Raises:
            TypeError: An argument has another type.
            ValueError: An argument is not allowed, or another function has the name.
        """
        return self._declared.declare(
            name, coalesce=coalesce, max_attempts=max_attempts, batch=batch, patterns=patterns
        )

    def flush(self, timeout: float = 30.0) -> bool:
        """Bring all that waits to its sources.

        Args:
            timeout: Seconds after which it gives up.

        Returns:
            Whether nothing waits any more.

        Raises:
            MusetError: The journal cannot be reached.
        """
        return self._cache().behind.drain.flush(timeout)

    def pending(self) -> dict[str, Any]:
        """What waits: `pending`, `pending_bytes`, `oldest_s`, `dead_letters`.

        Raises:
            MusetError: The journal cannot be reached.
        """
        return asdict(self._cache().behind.journal.state())

    def dead_letters(self, limit: int = 1000, *, after: str = "") -> list[dict[str, Any]]:
        """Writes that were given up, in the order of when.

        Args:
            limit: How many at most.
            after: The id behind which to begin.

        Returns:
            For each its `id`, `key`, `writer`, `error`, `attempts`, `first_failed` and
            `last_failed` in unix seconds, and `superseded`: whether a newer value was accepted.

        Raises:
            MusetError: The journal cannot be reached.
        """
        found = self._cache().behind.journal.dead_letters(limit, after=after)
        return [described(letter) for letter in found]

    def requeue(self, id: str) -> bool:  # noqa: A002 - the field's name
        """Let a dead letter be written again, at its place in the order of its key.

        Returns:
            Whether there was one.

        Raises:
            ConflictError: A newer value was accepted since: this one would bring the old one back.
        """
        return self._cache().requeue(id)

    def drop(self, id: str) -> bool:  # noqa: A002
        """Forget a dead letter: its write is lost. Whether there was one."""
        return self._cache().drop(id)

    def cached(
        self, key_prefix: str | None = None, expire: float | None = None, **options: Any
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function: its results are kept by its arguments.

        With `key_prefix="user"`, the result of `get_user(42)` has the key `user:42`. The decorated
        function has two more, called with its arguments: `cache_key`, and `invalidate`, which
        deletes the key. Those of a method take the object first: `Shop.price.invalidate(shop, 1)`.

        Args:
            key_prefix: What the keys begin with; None for the function's module and name.
            expire: As for `cache_aside`.
            **options: As for `cache_aside`.

        Raises:
            TypeError: An option has no such name; an argument of a call cannot be part of a key.
            ValueError: An option is not allowed.
        """
        options["tags"] = check_tags(options.get("tags", ()))
        check_options(expire, options)
        if callable(key_prefix):
            raise TypeError("cached has to be called; write @cached() above the function.")

        def decorate(fn: Callable[P, R]) -> Callable[P, R]:
            if inspect.iscoroutinefunction(fn):
                raise TypeError(
                    f"{fn.__qualname__} is a coroutine function; use flask_muset.aio.cached."
                )
            return _decorated(self, fn, KeyMaker(fn, key_prefix), expire, options)

        return decorate


def _decorated(
    manager: CacheManager,
    fn: Callable[P, R],
    make_key: KeyMaker,
    expire: float | None,
    options: Mapping[str, Any],
) -> Callable[P, R]:
    find, options_in = manager._cache, options_by_cache(fn, expire, options)

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = find()
        key = make_key(*args, **kwargs)
        return cache.load(key, partial(fn, *args, **kwargs), options_in(cache))  # type: ignore[no-any-return]

    def invalidate(*args: P.args, **kwargs: P.kwargs) -> bool:
        return find().invalidate(make_key(*args, **kwargs))

    wrapper.cache_key = make_key  # type: ignore[attr-defined]
    wrapper.invalidate = invalidate  # type: ignore[attr-defined]
    return wrapper


def options_by_cache(
    fn: Callable[..., Any], expire: float | None, options: Mapping[str, Any]
) -> Callable[[Cache], LoadOptions]:
    """What gives the options of a decorated function in each app's cache.

    Before a cache is asked for the first time, it learns of the classes that the function returns.
    """
    made: weakref.WeakKeyDictionary[Cache, LoadOptions] = weakref.WeakKeyDictionary()
    # The last one is found without a look into the dictionary: most processes have one app.
    last: tuple[Callable[[], Cache | None], LoadOptions] | None = None

    def options_in(cache: Cache) -> LoadOptions:
        nonlocal last
        found = last
        if found is None or found[0]() is not cache:
            found = last = weakref.ref(cache), made.get(cache) or make(cache)
        return found[1]

    def make(cache: Cache) -> LoadOptions:
        cache.codec.register_returned(fn)
        chosen = made[cache] = LoadOptions(expire=cache.lifetime_s(expire), **options)
        return chosen

    return options_in


def described(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter for people and JSON."""
    record = letter.record
    return {
        "id": letter.id,
        "key": record.key,
        "writer": record.writer,
        "error": letter.error,
        "attempts": record.attempts,
        "first_failed": letter.first_failed,
        "last_failed": letter.last_failed,
        "superseded": letter.is_superseded,
    }


def check_options(expire: float | None, options: Mapping[str, Any]) -> None:
    """Refuse wrong options where a function is decorated, whatever the app's default is."""
    LoadOptions(**{**options, "expire": 1.0 if expire in (None, math.inf) else expire})


#: Checked options, made once for calls that are alike: a check costs more than a hit.
_load_options = lru_cache(maxsize=1024)(LoadOptions)

#: The cache of the current app; outside of any, of the only app that has one.
cache_manager = CacheManager()

#: `cache_manager.cached`: for functions that are decorated where no app is known yet.
cached = cache_manager.cached


class CacheStrategy:
    """The strategies by name, on the cache of the current app."""

    cache_aside = cache_manager.cache_aside
    write_through = cache_manager.write_through
    write_behind = cache_manager.write_behind
