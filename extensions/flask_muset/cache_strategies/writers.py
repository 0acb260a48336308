"""Writers: the functions that bring a value to its source, and how a journal refers to them.

A journal outlives the process, a function does not. So a record has a name, and a name is looked up
among the writers that were declared and the references that the configuration allows: nothing else
that stands in a journal is ever imported or called.
"""

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

from flask_muset.cache_strategies.patterns import compile_pattern
from flask_muset.deadline import deadline
from flask_muset.locks import refuse_asyncio_under_gevent

__all__ = ["Declarations", "UnknownWriter", "WriteContext", "Writer", "Writers", "takes_context"]

_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

#: What the name of a function begins with that only its own process has.
_HOMELY = "~"
_MAX_ATTEMPTS = 5
_LARGEST_BATCH = 10_000
_MOST_WARNINGS = 1000
_is_name = re.compile(r"[A-Za-z0-9._-]{1,100}").fullmatch


class UnknownWriter(LookupError):  # noqa: N818 - says what is wrong, not that something is
    """Nobody here writes what a record says.

    Attributes:
        is_final: Whether no newer version of the app could change that.
    """

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class WriteContext:
    """What a writer is told beside the value.

    Attributes:
        key: Of the value in the cache.
        seq: Grows from write to write of a key: a source that has a greater one has something
            newer, and is to be left as it is.
        token: The same each time that this write is tried, and of no other write: whoever adds
            something up adds what has this token once.
        attempt: The how many-th this is, from 1.
        deleted: Whether the value is gone; then None stands for it.
    """

    key: str
    seq: int
    token: str
    attempt: int
    deleted: bool


class Writer:
    """A function that writes to a source.

    Args:
        name: What journals call it.
        fn: Called as `fn(value)`; as `fn(value, context)` if it has a second parameter that is
            needed, named `context` or annotated with WriteContext; with `batch` as
            `fn([(value, context), ...])`.
        coalesces: Whether only the last of several writes of a key matters.
        max_attempts: After how many a record becomes a dead letter.
        batch: How many writes it takes at once at most; None for one, not in a list.
        patterns: Keys that it writes: deletes of those are its too.
    """

    __slots__ = (
        "_takes_context",
        "batch",
        "coalesces",
        "fn",
        "matchers",
        "max_attempts",
        "name",
        "patterns",
    )

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        *,
        coalesces: bool = True,
        max_attempts: int = _MAX_ATTEMPTS,
        batch: int | None = None,
        patterns: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.fn = fn
        self.coalesces = coalesces
        self.max_attempts = max_attempts
        self.batch = batch
        self.patterns = list(patterns)
        self.matchers = [compile_pattern(pattern) for pattern in self.patterns]
        self._takes_context = batch is None and takes_context(fn)

    def __repr__(self) -> str:
        return f"<Writer {self.name!r}>"

    @property
    def is_homely(self) -> bool:
        """Whether no other process can find the function by its name."""
        return self.name.startswith(_HOMELY)

    def write(self, writes: Sequence[tuple[Any, WriteContext]]) -> None:
        """Call the function.

        Args:
            writes: The values and their contexts; one, unless it takes batches.

        Raises:
            Exception: What it raises.
        """
        if self.batch is not None:
            _await(self.fn(list(writes)))
            return
        for value, context in writes:
            _await(self.fn(value, context) if self._takes_context else self.fn(value))


def takes_context(fn: Callable[..., Any]) -> bool:
    """Whether a function asks for a WriteContext beside the value."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # of C, most of which take one
        return False
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(named) < 2:
        return False
    second = named[1]
    is_told = second.annotation in (WriteContext, "WriteContext") or second.name == "context"
    return is_told or second.default is second.empty


def _await(result: Any) -> None:
    """Let a coroutine function run to its end, in a loop of its own."""
    if not isinstance(result, Awaitable):
        return
    try:
        refuse_asyncio_under_gevent()
    except RuntimeError:
        if isinstance(result, Coroutine):
            result.close()
        raise
    import asyncio  # only where it is used: it takes a worker 1.3 MB

    async def run() -> None:
        # Nothing cuts a thread off that waits for a loop.
        async with asyncio.timeout(deadline.remaining()):
            await result

    asyncio.run(run())


def _path(fn: Any) -> str:
    """Where a function is from. Never its repr: it may show what the function was given."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}:{named.__qualname__}"


def _given(fn: Any) -> Any:
    """What tells functions of one line of code apart: what they were given.

    Objects by their number: those of a function that a record still needs are alive.
    """
    fn = inspect.unwrap(fn)
    if isinstance(fn, functools.partial):
        given = [_told(one) for one in (*fn.args, *fn.keywords.values())]
        return _given(fn.func), given, list(fn.keywords)
    cells = [_told(cell.cell_contents) for cell in _filled(getattr(fn, "__closure__", None))]
    defaults = [_told(one) for one in getattr(fn, "__defaults__", None) or ()]
    line = getattr(getattr(fn, "__code__", None), "co_firstlineno", id(fn))
    return line, id(getattr(fn, "__self__", None)), cells, defaults


def _told(value: Any) -> Any:
    is_plain = type(value) in (str, bytes, int, float, bool, type(None))
    return (type(value).__name__, value) if is_plain else id(value)


def _filled(cells: Any) -> Iterator[Any]:
    for cell in cells or ():
        try:
            cell.cell_contents  # noqa: B018 - raises if there is nothing
        except ValueError:
            continue
        yield cell


# --- By name --------------------------------------------------------------------------------------


class Declarations:
    """Writers that were declared, in their order. Valid for every app that uses them."""

    def __init__(self) -> None:
        self._by_name: dict[str, Writer] = {}

    def __iter__(self) -> Iterator[Writer]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Writer | None:
        """The one of this name."""
        return self._by_name.get(name)

    def declare(
        self,
        name: str,
        *,
        coalesce: bool = True,
        max_attempts: int = _MAX_ATTEMPTS,
        batch: int | None = None,
        patterns: Iterable[str] = (),
    ) -> Callable[[F], F]:
        """What decorates a function; it stays what it is.

        Raises:
            TypeError: An argument has another type.
            ValueError: An argument is not allowed, or the name is taken.
        """
        _check_declaration(name, coalesce, max_attempts, batch)
        if isinstance(patterns, str):
            raise TypeError(f"patterns must be several, got {patterns!r}; write [{patterns!r}].")
        chosen = list(patterns)

        def decorate(fn: F) -> F:
            known = self._by_name.get(name)
            if known is not None and _path(known.fn) != _path(fn):
                raise ValueError(
                    f"a writer is called {name!r} already, {_path(known.fn)}; records in a journal "
                    "know it by its name, so each needs one of its own."
                )
            self._by_name[name] = Writer(
                name,
                fn,
                coalesces=coalesce,
                max_attempts=max_attempts,
                batch=batch,
                patterns=chosen,
            )
            return fn

        return decorate


def _check_declaration(name: Any, coalesce: Any, max_attempts: Any, batch: Any) -> None:
    if callable(name):
        raise TypeError('writer needs a name; write @cache.writer("users.save") above it.')
    if not (isinstance(name, str) and _is_name(name)):
        raise ValueError(
            f"the name of a writer must be 1 to 100 letters, digits, dots, underscores or hyphens, "
            f"got {name!r}."
        )
    if not isinstance(coalesce, bool):
        raise TypeError(f"coalesce must be True or False, got {coalesce!r}.")
    if not _is_count(max_attempts):
        raise ValueError(f"max_attempts must be a whole number from 1, got {max_attempts!r}.")
    if batch is not None and not (_is_count(batch) and batch <= _LARGEST_BATCH):
        raise ValueError(
            f"batch must be a whole number from 1 to {_LARGEST_BATCH}, or None; got {batch!r}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Writers:
    """Whom one app knows.

    Args:
        declared: Where writers are declared; the first that has a name or a pattern is it.
        allowed: References `module:qualname` of module-level functions that a journal may name.
    """

    def __init__(self, declared: Sequence[Declarations], allowed: Iterable[str] = ()) -> None:
        self._declared = declared
        self._tables = [declarations._by_name for declarations in declared]
        self._allowed = frozenset(allowed)
        self._referred: dict[str, Writer] = {}
        self._warned: set[str] = set()

    def __iter__(self) -> Iterator[Writer]:
        for declarations in self._declared:
            yield from declarations

    def __bool__(self) -> bool:
        # Asked with each request.
        return bool(self._allowed) or any(self._tables)

    def of(self, fn: Callable[..., Any]) -> Writer:
        """The writer that a function is; one that `is_homely` if no journal can refer to it.

        Raises:
            TypeError: It cannot be called.
        """
        if not callable(fn):
            raise TypeError(f"write_func must be a function of the value, got {fn!r}.")
        for writer in self:
            # Equal, not the same: a method is bound anew each time that it is named.
            if writer.fn == fn:
                return writer
        path = _path(fn)
        if path in self._allowed and self._imported(path).fn == fn:
            return self._imported(path)
        if path not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(path)
            _log.warning(
                "%s has no name that a journal could refer to: what it has not written when this "
                "process ends goes to the writer whose patterns match the key, else to the dead "
                'letters; decorate it with @cache.writer("a.name").',
                path,
            )
        # Those that one line makes of the same things again and again coalesce, others do not.
        mark = blake2b(repr(_given(fn)).encode("utf-8", "replace"), digest_size=6).hexdigest()
        return Writer(f"{_HOMELY}{path}:{mark}", fn)

    def owner(self, key: str) -> Writer | None:
        """The writer one of whose patterns matches a key."""
        # Plain loops: where there are two Redis, each hit of the memory asks this.
        for declarations in self._declared:
            for writer in declarations:
                for matches in writer.matchers:
                    if matches(key):
                        return writer
        return None

    def patterns(self) -> Iterator[str]:
        """Those of all writers."""
        for writer in self:
            yield from writer.patterns

    def named(self, name: str) -> Writer:
        """The writer of a record.

        Raises:
            UnknownWriter: There is none, or it may not be looked for.
        """
        for declarations in self._declared:
            writer = declarations.get(name)
            if writer is not None:
                return writer
        if name.startswith(_HOMELY):
            raise UnknownWriter(
                f"the function {name[1:]} is gone with its process, and no writer's patterns match "
                "the key",
                is_final=True,
            )
        if ":" not in name:
            raise UnknownWriter(f"no writer is called {name!r} here", is_final=False)
        if name not in self._allowed:
            raise UnknownWriter(
                f"{name!r} is not in CACHE_STRATEGIES_WRITERS, so it is not imported", is_final=True
            )
        return self._imported(name)

    def _imported(self, path: str) -> Writer:
        """A function of the configuration's list; never of anything else."""
        known = self._referred.get(path)
        if known is not None:
            return known
        module, _, name = path.partition(":")
        try:
            fn: Any = importlib.import_module(module)
            for part in name.split("."):
                fn = getattr(fn, part)
        except Exception as error:  # a module may raise anything while it is imported
            why = f"{type(error).__name__}: {error}"
            raise UnknownWriter(f"{path!r} cannot be imported: {why}", is_final=False) from error
        writer = self._referred[path] = Writer(path, fn)
        return writer
