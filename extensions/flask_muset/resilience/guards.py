"""What all building blocks share: how they are put round a call, whatever its colour.

A part that only looks at the beginning and the end of a call has `enter` and `leave`; the same two
serve plain functions, coroutine functions, generators and `with`. Layers hand on `(function, args,
kwargs)`, so that a call is packed and unpacked once however many parts guard it.
"""

import _thread
import functools
import inspect
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
)
from contextlib import aclosing, closing
from contextvars import ContextVar
from types import FunctionType, TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from flask_muset import context
from flask_muset.errors import MusetError
from flask_muset.locks import refuse_asyncio_under_gevent
from flask_muset.signals import Decision, PolicyEvent, policy_decided
from flask_muset.translate import translate

__all__ = [
    "AsyncCall",
    "Call",
    "Guard",
    "Part",
    "call_directly",
    "current_outcome",
    "error_of",
    "is_coroutine_function",
    "is_plain",
]

F = TypeVar("F", bound=Callable[..., Any])
#: A guarded call: `(function, args, kwargs) -> result`.
Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
AsyncCall = Callable[
    [Callable[..., Awaitable[Any]], tuple[Any, ...], dict[str, Any]], Awaitable[Any]
]

_NOTHING = object()


def call_directly(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The innermost layer."""
    return fn(*args, **kwargs)


def error_of(exception: BaseException) -> MusetError:
    """The exception in the words of the error table, the current app's own translations used."""
    if isinstance(exception, MusetError):
        return exception
    return translate(exception, context.translations())


def is_coroutine_function(fn: Callable[..., Any]) -> bool:
    """Whether calling it gives an awaitable; of an object its `__call__` is looked at."""
    if type(fn) is FunctionType:
        return bool(fn.__code__.co_flags & inspect.CO_COROUTINE)
    call = getattr(type(fn), "__call__", None)  # noqa: B004 - the method itself is meant
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(call)


def is_plain(fn: Callable[..., Any]) -> bool:
    """Whether it is no coroutine function and no generator."""
    if type(fn) is FunctionType:
        return not fn.__code__.co_flags & _COLOURED
    return not (
        is_coroutine_function(fn)
        or inspect.isgeneratorfunction(fn)
        or inspect.isasyncgenfunction(fn)
    )


class Guard:
    """Something that can be put round calls: a part, or a policy of several."""

    _chain: Call
    _async_chain: AsyncCall
    #: The `with` blocks that are entered now: by whom, and what is given back.
    _blocks: "list[tuple[Any, list[tuple[Part, Any]]]]"

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function; of a coroutine function return an awaitable, of a generator an iterator.

        Args:
            fn: What is guarded.
            *args: Its arguments.
            **kwargs: Its keyword arguments.
        """
        if is_plain(fn):
            return self._chain(fn, args, kwargs)
        return self(fn)(*args, **kwargs)

    def __call__(self, fn: F) -> F:
        """Decorate a function, coroutine function, generator or asynchronous generator.

        Generators are guarded until their first item; after it they are never repeated, and what
        fails then is the caller's to see.
        """
        wrapper: Callable[..., Any]
        if is_coroutine_function(fn):

            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                refuse_asyncio_under_gevent()
                return await self._async_chain(fn, args, kwargs)

        elif inspect.isgeneratorfunction(fn):

            def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                return (yield from self._generate(fn, args, kwargs))

        elif inspect.isasyncgenfunction(fn):

            async def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                async with aclosing(self._agenerate(fn, args, kwargs)) as items:
                    async for item in items:
                        yield item

        else:
            wrapper = self._plain(fn)

        return functools.wraps(fn)(wrapper)  # type: ignore[return-value]

    def _plain(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self._chain(fn, args, kwargs)

        return wrapper

    def _generate(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Generator[Any, Any, Any]:
        def first() -> _Started:
            items = fn(*args, **kwargs)
            return _Started(items, next(items, _NOTHING))

        started = self._chain(first, (), {})
        if not isinstance(started, _Started):  # a fallback's
            return (yield from started)
        if started.item is _NOTHING:
            return None
        with closing(started.items):
            yield started.item
            return (yield from started.items)

    async def _agenerate(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        async def first() -> _Started:
            items = fn(*args, **kwargs)
            return _Started(items, await anext(items, _NOTHING))

        refuse_asyncio_under_gevent()
        started = await self._async_chain(first, (), {})
        if not isinstance(started, _Started):  # a fallback's
            if isinstance(started, AsyncIterable):
                async for item in started:
                    yield item
                return
            for item in started:
                yield item
        elif started.item is not _NOTHING:
            async with aclosing(started.items):
                yield started.item
                async for item in started.items:
                    yield item

    def _parts(self) -> "tuple[Part, ...]":
        """The parts, the outermost first."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        parts = self._parts()
        for part in parts:
            if part.repeats:
                raise TypeError(
                    f"{type(part).__name__} cannot guard a `with` block, which cannot be run "
                    "again or have its value replaced; use a decorator or .call(function)."
                )
        entered: list[tuple[Part, Any]] = []
        try:
            for part in parts:
                entered.append((part, part.enter()))  # noqa: PERF401 - what was entered is left
        except BaseException as error:
            _leave(entered, error)
            raise
        self._blocks.append((_who(), entered))
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        raised = _leave(self._take_block(), error)
        if raised is not None and raised is not error:
            try:
                raise raised from error
            finally:
                del raised

    def _take_block(self) -> "list[tuple[Part, Any]]":
        """The newest block of whoever runs; a generator may be closed by somebody else."""
        who, blocks = _who(), self._blocks
        for i in range(len(blocks) - 1, -1, -1):
            if blocks[i][0] == who:
                return blocks.pop(i)[1]
        return blocks.pop()[1]


_COLOURED = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Started(NamedTuple):
    """A generator and its first item."""

    items: Any
    item: Any


def _leave(entered: "list[tuple[Part, Any]]", error: BaseException | None) -> BaseException | None:
    """Leave all parts, whatever happens while one is left."""
    for part, token in reversed(entered):
        try:
            error = part.leave(token, error) or error
        except BaseException as newer:  # noqa: BLE001 - raised by the caller when all are left
            error = newer
    return error


def _who() -> tuple[int, int]:
    """The greenlet or thread, and the task of asyncio, that runs."""
    greenlet, loops = sys.modules.get("greenlet"), sys.modules.get("asyncio.events")
    runs = _thread.get_ident() if greenlet is None else id(greenlet.getcurrent())
    if loops is None or loops._get_running_loop() is None:
        return runs, 0
    return runs, id(sys.modules["asyncio"].current_task())


class Part(Guard):
    """One building block.

    Attributes:
        kind: Its name in configuration, events and outcomes.
        repeats: Whether it may run the call again or replace its value.
        name: Of the policy it belongs to; a breaker has its own.
        owner: The part of the policy that it is a part of, where that is not itself.
    """

    kind: ClassVar[str]
    repeats: ClassVar[bool] = False
    #: What it was made with, to make another one like it.
    _options: dict[str, Any]
    name: str = ""
    owner: "Part | None" = None

    def __init__(self) -> None:
        self._blocks = []
        self._chain = self.layer(call_directly)
        self._async_chain = self.async_layer(call_directly)

    def _parts(self) -> "tuple[Part, ...]":
        return (self,)

    def _plain(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        chain = self._chain  # a part's never changes

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return chain(fn, args, kwargs)

        return wrapper

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with, by argument."""
        return dict(self._options)

    def like(self, **changes: Any) -> Self:
        """Another one with the same arguments, some changed, and a state of its own."""
        return type(self)(**{**self._options, **changes})

    def enter(self) -> Any:
        """Let a call begin, or raise; what is returned belongs to the call."""

    def leave(self, token: Any, error: BaseException | None) -> BaseException | None:
        """A call has ended, whatever `error` is: give back what it held.

        Returns:
            What is to be raised in place of `error`, or None for `error` itself.
        """
        return None

    async def aenter(self) -> Any:
        """`enter` where asyncio runs."""
        return self.enter()

    async def aleave(self, token: Any, error: BaseException | None) -> BaseException | None:
        """`leave` where asyncio runs."""
        return self.leave(token, error)

    def layer(self, inner: Call) -> Call:
        """Put the part round plain calls."""
        enter, leave = self.enter, self.leave

        def guarded(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            token = enter()
            try:
                result = inner(fn, args, kwargs)
            except BaseException as error:
                raised = leave(token, error)
                if raised is None or raised is error:
                    raise
                try:
                    raise raised from error
                finally:
                    del raised  # its traceback has this frame: a cycle that only gc would free
            leave(token, None)
            return result

        return guarded

    def async_layer(self, inner: AsyncCall) -> AsyncCall:
        """Put the part round awaited calls."""
        aenter, aleave = self.aenter, self.aleave

        async def guarded(
            fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            token = await aenter()
            try:
                result = await inner(fn, args, kwargs)
            except BaseException as error:
                raised = await aleave(token, error)
                if raised is None or raised is error:
                    raise
                try:
                    raise raised from error
                finally:
                    del raised
            await aleave(token, None)
            return result

        return guarded

    def tell(
        self,
        decision: Decision,
        *,
        wait_s: float = 0.0,
        error: BaseException | None = None,
    ) -> None:
        """Send what was decided, and note it in the outcome that somebody asked for."""
        outcome = current_outcome.get()
        if outcome is not None:
            outcome.note(self, decision, wait_s)
        if policy_decided.receivers:
            context.emit(policy_decided, PolicyEvent(self.name, self.kind, decision, wait_s, error))


#: The outcome that is asked for in this context; see `flask_muset.resilience.policy`.
current_outcome: ContextVar[Any] = ContextVar("flask_muset.outcome", default=None)
