"""The cache of one app: values by key, in a store, through a codec."""

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

from flask_muset.cache_strategies.codec import Codec, Unreadable
from flask_muset.cache_strategies.entry import ABSENT, NEVER, Entry
from flask_muset.cache_strategies.keys import check_key
from flask_muset.cache_strategies.loading import Answer, Loader, LoadOptions, Outcome
from flask_muset.cache_strategies.patterns import compile_pattern
from flask_muset.cache_strategies.stores import Store, Tell
from flask_muset.cache_strategies.write_behind import Gone, OutOfTurn, WriteBehind
from flask_muset.cache_strategies.writers import WriteContext, Writer, takes_context
from flask_muset.clock import SYSTEM
from flask_muset.configuration import ABOVE_ZERO
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError, NotFoundError
from flask_muset.signals import Count, cache_operated

__all__ = ["Cache", "check_tags"]

_log = logging.getLogger(__name__)


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags, if they may be some.

    Raises:
        TypeError: They are one str, or not strs.
        ValueError: One of them is not allowed.
    """
    if isinstance(tags, str):
        raise TypeError(f"tags must be several, got the str {tags!r}; write [{tags!r}].")
    return tuple(map(check_key, tags))


def _nothing(_key: str) -> None:
    return None


def _none() -> None:
    return None


def _refuse_awaitable(result: Any) -> None:
    if isinstance(result, Awaitable):
        if isinstance(result, Coroutine):
            result.close()
        raise TypeError(
            "write_func has to be awaited, so nothing was written; use the awaited forms of "
            "flask_muset.aio, or a plain function."
        )


_BYPASSED = Answer(None, Outcome.BYPASS, 0.0)
_MISSED = Answer(None, Outcome.MISS, 0.0)

_MOMENT_S = 0.001

#: Who is told of operations beside those who count them; without anybody they are not timed.
_listeners = cache_operated.receivers


class Cache:
    """What `cache_manager` and the strategies do, for one app.

    Args:
        store: Where entries are.
        codec: How values become bytes.
        in_background: Runs a refresh beside the request.
        default_expire_s: Of what is kept without a time of its own; None for no end.
        tell: Tells of an operation: name, status, seconds.
        counters: Who counts what is told.
        note: Is given how each load was answered.
        is_off: Whether every load goes to its source.
        write_behind: Accepts writes, and knows what waits.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        *,
        in_background: Callable[[Callable[[], None]], None],
        default_expire_s: float | None,
        tell: Tell,
        counters: Sequence[Count] = (),
        note: Callable[[Answer], None],
        is_off: bool = False,
        write_behind: WriteBehind,
    ) -> None:
        self.store = store
        self.behind = write_behind
        self.codec = codec
        self.default_expire_s = default_expire_s
        self._tell = tell
        self._counters = counters
        #: What is known without waiting.
        self._peek: Callable[[str], Entry | None] = getattr(store, "peek", _nothing)
        self._decode = codec.decode
        self._note = note
        self._is_off = is_off
        self._loader = Loader(
            store, codec, pending=self._pending, in_background=in_background, tell=tell
        )

    # --- Values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` if there is none that is fresh."""
        began = SYSTEM.now()
        # Hits of the memory take no more steps than they must.
        entry = self._peek(key)
        if entry is None or began >= entry.fresh_until:
            entry = self._read(check_key(key))
            if entry is None or began >= entry.fresh_until or isinstance(entry, Gone):
                entry = None
        value, status = (ABSENT, "miss") if entry is None else self._value(entry)
        if _listeners or self._counters:
            self._tell("get", status, SYSTEM.now() - began)
        return default if value is ABSENT else value

    def _read(self, key: str) -> Entry | None:
        """What was written last: what waits for its source stands for what the cache has lost."""
        entry = self.store.read(key)
        if entry is None or SYSTEM.now() >= entry.fresh_until:
            return self._pending(key) or entry
        return entry

    def _pending(self, key: str) -> Entry | None:
        """What waits for its source; whether anything does is looked up in the file system."""
        return self.behind.pending(key) if self.behind.concerns(key) else None

    def get_near(self, key: str) -> Any:
        """The value that the memory of this process has; ABSENT if somebody would have to wait."""
        answer = self._near(key)
        return ABSENT if answer is None else answer.value

    def load_near(self, key: str) -> Any:
        """The same for a load, of which the response tells."""
        answer = self._near(key)
        if answer is None:
            return ABSENT
        self._note(answer)
        return answer.value

    def _near(self, key: str) -> Answer | None:
        began, entry = SYSTEM.now(), self._peek(key)
        if entry is None or entry.is_negative or began >= entry.fresh_until:
            return None
        value, status = self._value(entry)
        if value is ABSENT:
            return None
        self._tell("get", status, SYSTEM.now() - began)
        return Answer(value, Outcome.HIT, began - entry.created_at)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that have one."""
        if isinstance(keys, str):
            raise TypeError(f"keys must be several, got the str {keys!r}; write [{keys!r}].")
        began, found, wanted = SYSTEM.now(), {}, [check_key(key) for key in keys]
        for key, entry in self._read_many(wanted).items():
            if began < entry.fresh_until and not isinstance(entry, Gone):
                value, _ = self._value(entry)
                if value is not ABSENT:
                    found[key] = value
        duration_s = SYSTEM.now() - began
        for key in dict.fromkeys(wanted):
            self._tell("get", "hit" if key in found else "miss", duration_s)
        return found

    def _read_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        entries = self.store.read_many(keys)
        if self.behind.is_used:
            now = SYSTEM.now()
            lost = [
                k for k in dict.fromkeys(keys) if k not in entries or now >= entries[k].fresh_until
            ]
            entries |= self.behind.pending_of(list(filter(self.behind.concerns, lost)))
        return entries

    def _value(self, entry: Entry) -> tuple[Any, str]:
        """What an entry holds; ABSENT if that says that there is nothing, or cannot be read."""
        try:
            value = self._decode(entry.payload)
        except Unreadable:
            return ABSENT, "unreadable"
        if entry.is_negative and value is not None:
            return ABSENT, "miss"
        return value, "hit"

    def set(
        self, key: str, value: Any, expire: float | None = None, *, tags: Iterable[str] = ()
    ) -> bool:
        """Keep a value."""
        entry = self._entry(value, expire, check_tags(tags))
        return self._done("set", [key], self.store.write(check_key(key), entry))

    def set_many(
        self,
        values: Mapping[str, Any],
        expire: float | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        """Keep several values."""
        known = check_tags(tags)
        entries = {
            check_key(key): self._entry(value, expire, known) for key, value in values.items()
        }
        return self._done("set", entries, self.store.write_many(entries))

    def delete(self, key: str) -> bool:
        """Forget a key; its source forgets it too, where a writer owns it or something waits."""
        if self.behind.concerns(check_key(key)):
            is_done = self._delete_behind(key)
            if is_done is not None:
                return self._done("delete", [key], is_done)
        return self.invalidate(key)

    def _delete_behind(self, key: str) -> bool | None:
        """Let the source forget a key; None if it has not to be told."""
        writer = self.behind.writers.owner(key)
        is_accepted = self.behind.accept(key, None, writer)
        if is_accepted is None and writer is None:
            try:
                writer = self.behind.next_writer(key)
            except MusetError as error:  # the journal has gone away since it was asked
                deadline.check()
                _log.debug("%r is forgotten by the cache alone: %s", key, error)
                is_accepted = False
        if is_accepted is False:
            # The source has the value; the cache may only forget it.
            self.store.delete(key)
            return False
        if is_accepted:
            return True
        if writer is None:
            return None
        write = partial(self.behind.write_now, key, None, writer)
        return self._through_instead(key, write, _none, writer)

    def invalidate(self, key: str) -> bool:
        """Forget a key in the cache alone."""
        return self._done("delete", [key], self.store.delete(check_key(key)))

    def delete_pattern(self, pattern: str) -> int:
        """Forget the keys that match."""
        matches = compile_pattern(pattern)
        try:
            count = self.store.forget(pattern)
        finally:
            self._loader.detach_matching(matches)
        self._tell("delete_pattern", "ok", None)
        return count

    def invalidate_tag(self, tag: str, *, keep_stale: bool) -> bool:
        """Make the entries of a tag invalid."""
        try:
            is_done = self.store.invalidate_tag(check_key(tag), keep_stale=keep_stale)
        finally:
            self.detach_all()
        operation = "expire_tag" if keep_stale else "delete_tag"
        self._tell(operation, "ok" if is_done else "queued", None)
        return is_done

    def detach(self, what: str, name: str) -> None:
        """Let nobody join the loads of what another process has made invalid."""
        if what == "key":
            self._loader.detach(name)
        elif what == "pattern":
            self._loader.detach_matching(compile_pattern(name))
        else:
            self.detach_all()

    def detach_all(self) -> None:
        """Let nobody join a load that has begun."""
        self._loader.detach_matching(lambda _key: True)

    def _done(self, operation: str, keys: Iterable[str], is_done: bool) -> bool:
        for key in keys:
            self._loader.detach(key)
            self._tell(operation, "ok" if is_done else "queued", None)
        return is_done

    def _entry(self, value: Any, expire: float | None, tags: tuple[str, ...]) -> Entry:
        lifetime = self.lifetime_s(expire)
        now = SYSTEM.now()
        until = NEVER if lifetime is None else now + lifetime
        return Entry(
            self.codec.encode(value),
            created_at=now,
            fresh_until=until,
            gone_at=until,
            tags=tags,
        )

    def lifetime_s(self, expire: float | None) -> float | None:
        """Seconds that a value is fresh; None for no end.

        Raises:
            ValueError: `expire` is not above 0.
        """
        if expire is None:
            return self.default_expire_s
        if expire == math.inf:
            return None
        if not ABOVE_ZERO.allows(expire):
            raise ValueError(
                f"expire must be seconds above 0, math.inf for no end, or None for the app's "
                f"default; got {expire!r}."
            )
        return expire

    # --- Strategies

    def load(self, key: str, fetch: Callable[[], Any], options: LoadOptions) -> Any:
        """A value of the cache, or of one load."""
        if self._is_off:
            self._note(_BYPASSED)
            waiting = self._pending(key)
            if waiting is not None:
                value, _ = self._value(waiting)
                if value is not ABSENT:
                    return value
            return fetch()
        try:
            answer = self._loader.get(key, fetch, options)
        except NotFoundError:
            raise  # loaded or remembered: nobody knows here
        except Exception:
            self._note(_MISSED)
            raise
        self._note(answer)
        return answer.value

    def write_through(
        self,
        key: str,
        value: Any,
        write_func: Callable[[Any], Any],
        expire: float | None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Write the source, then the cache."""
        # Before the source is written: what cannot be kept must not leave the two apart.
        known = check_tags(tags)
        self._entry(value, expire, known)

        def write(seq: int) -> None:
            args = (WriteContext(key, seq, f"{key}:{seq}", 1, False),) if seq else ()
            wants = args and takes_context(write_func)
            _refuse_awaitable(write_func(value, *args) if wants else write_func(value))

        # As it is afterwards: it may have got its id from the source.
        is_done = self._through(check_key(key), write, lambda: self._entry(value, expire, known))
        self._tell("write_through", "ok" if is_done else "queued", None)
        return is_done

    def write_behind(
        self,
        key: str,
        value: Any,
        write_func: Callable[..., Any],
        expire: float | None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Write the cache and the journal, the source later."""
        writer = self.behind.writers.of(write_func)
        entry = self._entry(value, expire, check_tags(tags))
        if self._is_off:
            # Where nothing is kept nobody would make it invalid either.
            entry.fresh_until = entry.gone_at = min(entry.gone_at, SYSTEM.now() + _MOMENT_S)
        is_accepted = self.behind.accept(check_key(key), entry, writer)
        self._loader.detach(key)
        if is_accepted is None:
            write = partial(self.behind.write_now, key, entry, writer)
            return self._through_instead(key, write, lambda: entry, writer)
        return is_accepted

    def _through_instead(
        self,
        key: str,
        write: Callable[[int], None],
        made: Callable[[], Entry | None],
        writer: Writer,
    ) -> bool:
        """Write now what there is no room for; whether the source has it."""
        try:
            self._through(key, write, made, writer)
        except OutOfTurn as error:
            _log.debug("%r was not written: %s", key, error)
            return False
        return True

    def _through(
        self,
        key: str,
        write: Callable[[int], None],
        made: Callable[[], Entry | None],
        writer: Writer | None = None,
    ) -> bool:
        """Write the source, in the order of the key's other writes, then the cache.

        Args:
            key: Of the value.
            write: Writes the source, given the sequence of this write.
            made: The entry of what was written.
            writer: Whose write it is; None for one that takes the place of all that wait.
        """
        turn = self.behind.turn(key, writer) if self.behind.is_used else nullcontext(0)
        with turn as seq:
            began, written = self.store.begin_write(key), None
            try:
                self._loader.detach(key)
                write(seq)
                written = made()
            finally:
                is_done = self.store.end_write(began, written)
                self._loader.detach(key)
        return is_done

    def requeue(self, id: str) -> bool:  # noqa: A002 - the field's name
        """Let a dead letter be written again; whether there was one."""
        return self._settled(self.behind.requeue(id))

    def drop(self, id: str) -> bool:  # noqa: A002
        """Forget a dead letter; whether there was one."""
        return self._settled(self.behind.drop(id))

    def _settled(self, key: str | None) -> bool:
        """Forget what the cache has: what the source had meanwhile, or what is dropped."""
        if key is not None:
            with suppress(ValueError):  # of a key that others have put in and nobody can ask for
                self.invalidate(key)
        return key is not None

    def explain(self, key: str) -> dict[str, Any]:
        """What there is about a key."""
        told = self.store.explain(check_key(key))
        if self.behind.is_used:
            told["write_behind"] = self.behind.explain(key)
        # JSON has no infinity.
        return {"key": key, **{k: None if v == NEVER else v for k, v in told.items()}}
