"""Cache-aside: a value of the cache, or of exactly one load, and a stale one where that is allowed.

    fresh_until          + stale_while_revalidate        + stale_if_error
    ────┴──────────────────────────┴───────────────────────────┴──────────>
    HIT   STALE at once,              a load; STALE if it fails    a load
          a load beside it            or is not done in time

Both windows begin at `fresh_until` and may overlap in any way. In a process one load serves all
callers of a key; among processes the store's lease sees to that. Whoever loads and is cut off, by
his own deadline or because he is killed, fails nobody else: one of those who wait loads instead.
"""

import contextvars
import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from flask_muset.cache_strategies.asking import (
    Answer,
    Ask,
    LoadOptions,
    Outcome,
    age_of,
    describe,
    error_of,
    is_of_use,
    not_found,
)
from flask_muset.cache_strategies.codec import Codec, Unreadable, UnsupportedType
from flask_muset.cache_strategies.entry import ABSENT, NEVER, Busy, Entry, Lease
from flask_muset.cache_strategies.flights import Flight, Flights, Pauses, is_nested, wait_for
from flask_muset.cache_strategies.stores import Store
from flask_muset.clock import SYSTEM
from flask_muset.configuration import AT_LEAST_ZERO, COUNT, Key, check
from flask_muset.deadline import Scope, deadline
from flask_muset.errors import CircuitOpenError, NotFoundError

__all__ = ["Answer", "LoadOptions", "Loader", "Outcome"]

_log = logging.getLogger(__name__)

#: How long a load within another one waits for a third process: they may wait for each other.
_NESTED_WAIT_S = 3.0
#: Pauses between two questions whether another process has loaded, as a share of the wait so far.
_POLL_SHARE, _SHORTEST_POLL_S, _LONGEST_POLL_S = 0.1, 0.005, 0.25
#: For how long a refresh that another process is at, or backs off from, is not asked for again.
_SHORT_PAUSE_S = 0.25

_HIT: Final = Outcome.HIT


class Loader:
    """Answers from a store, or by loading once.

    Args:
        store: Where entries are.
        codec: How values become bytes.
        in_background: Runs a function beside the caller, without his request and his deadline.
        tell: Counts an operation: its name, how it went, its seconds or None. They are `get` with
            `hit`, `miss`, `stale` or `bypass` (its seconds are without those of the load) and with
            `unreadable`; `load` with `ok` or `error`; `refresh`, which is a load beside a caller,
            with `ok`, `error` or `skipped`.
        pending: Gives what waits for its source in place of what the store has lost; None for
            nothing.
        jitter: By which share of it a lifetime may be shortened, at least 0 and below 1, so that
            what was loaded together does not expire together.
        max_refreshes: Most refreshes at once, at least 1.

    Raises:
        ValueError: A number is not allowed.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        *,
        in_background: Callable[[Callable[[], None]], Any],
        tell: Callable[[str, str, float | None], None],
        pending: Callable[[str], Entry | None] | None = None,
        jitter: float = 0.1,
        max_refreshes: int = 32,
    ) -> None:
        share = Key(None, lambda v: AT_LEAST_ZERO.allows(v) and v < 1, "at least 0 and below 1")
        given = {"jitter": jitter, "max_refreshes": max_refreshes}
        check("Loader", given, {"jitter": share, "max_refreshes": COUNT})
        self._store = store
        self._read = store.read
        self._pending = pending
        self._codec = codec
        self._decode = codec.decode
        self._in_background = in_background
        self._tell = tell
        self._jitter = jitter
        self._flights = Flights(max_refreshes)
        self._pauses = Pauses()

    def __repr__(self) -> str:
        return f"<Loader with {len(self._flights)} loads going on>"

    def get(self, key: str, fetch: Callable[[], Any], options: LoadOptions) -> Answer:
        """Answer one key.

        Args:
            key: Of the entry.
            fetch: Loads the value; called at most once.
            options: How it is kept and loaded.

        Raises:
            NotFoundError: It is known that there is nothing.
            OperationTimeoutError: `hard_timeout` has passed, or the caller's deadline.
            UnsupportedType: The value cannot be kept as bytes.
            Exception: What `fetch` has raised.
        """
        began = SYSTEM.now()
        entry = self._read(key)
        now, value = SYSTEM.now(), ABSENT
        if self._pending is not None and (entry is None or now >= entry.fresh_until):
            entry = self._pending(key) or entry
        if entry is not None:
            is_fresh = now < entry.fresh_until
            if is_fresh or is_of_use(entry, options, now):
                try:
                    value = self._open(entry, options)
                except Unreadable:
                    self._tell("get", "unreadable", None)
                    is_fresh = False
                except NotFoundError:
                    self._tell("get", "hit", now - began)
                    raise
            if is_fresh:
                self._tell("get", "hit", now - began)
                # `age_of`, written out: its call would show in each hit.
                age_s = now - entry.created_at
                return Answer(value, _HIT, age_s if age_s > 0 else 0.0)
        return self._get_slowly(Ask(key, fetch, options, entry, value, began))

    def detach(self, key: str) -> None:
        """Let nobody join a load that has begun; call it after the store has made the key invalid.

        Those who wait already may still get what it brings.
        """
        self._flights.detach(key)
        self._pauses.end(key)

    def detach_matching(self, predicate: Callable[[str], bool]) -> None:
        """The same for all keys of which a function says so."""
        self._flights.detach_matching(predicate)

    # --- Values and entries

    def _open(self, entry: Entry, options: LoadOptions) -> Any:
        """The value of an entry, the caller's own unless he has said that he will not change it.

        Raises:
            Unreadable: The bytes are none of ours.
            NotFoundError: It says that there is nothing.
        """
        if options.immutable and entry.shared is not ABSENT:
            return entry.shared
        value = self._decode(entry.payload)
        if entry.is_negative and value is not None:
            raise not_found(value)
        if options.immutable:
            entry.shared = value
        return value

    def _entry(
        self, payload: bytes, ask: Ask, lease: Lease | None, *, is_negative: bool = False
    ) -> Entry:
        """What is kept of something that was loaded just now."""
        options, now = ask.options, SYSTEM.now()
        expire = options.negative_expire if is_negative else options.expire
        fresh_until = NEVER
        if expire is not None:
            fresh_until = now + expire * (1 - SYSTEM.uniform(0, self._jitter))
        return Entry(
            payload,
            created_at=now,
            fresh_until=fresh_until,
            gone_at=fresh_until + (0 if is_negative else options.stale_s),
            tags=options.tags,
            is_negative=is_negative,
            began_us=0 if lease is None else lease.began_us,
        )

    # --- Without a fresh value

    def _get_slowly(self, ask: Ask) -> Answer:
        status = "miss"
        try:
            answer = self._answer(ask)
            status = answer.outcome.lower()
        except Exception as error:
            if not ask.may_hide(error):
                raise
            _log.debug("%r is served stale", ask.key, exc_info=error)
            answer, status = ask.stale_answer(), "stale"
        finally:
            self._tell("get", status, max(0.0, SYSTEM.now() - ask.began - ask.loading_s))
        return answer

    def _answer(self, ask: Ask) -> Answer:
        if self._flights.is_loading(ask.key):
            return self._bypass(ask)
        patience_s = ask.patience_s()
        if patience_s is None:
            return self._wait_or_load(ask)
        return self._answer_meanwhile(ask, patience_s)

    def _bypass(self, ask: Ask) -> Answer:
        return Answer(self._fetch(ask, "load"), Outcome.BYPASS, 0.0)

    def _answer_meanwhile(self, ask: Ask, patience_s: float) -> Answer:
        """Serve stale, unless a load that goes on beside the caller is done in time."""
        flight = self._refresh(ask, patience_s)
        answer = None
        if flight is not None and patience_s > 0:
            began = SYSTEM.now()
            wait_for(flight, min([patience_s, *_given(ask.wait_s())]))
            ask.loading_s += SYSTEM.now() - began
            answer = self._brought(flight, ask)
        return ask.stale_answer() if answer is None else answer

    def _refresh(self, ask: Ask, patience_s: float) -> Flight | None:
        """Let a load go on beside the caller; None if there is none and none is to be begun."""
        if self._pauses.holds(ask.key):
            return None
        flight, is_new = self._flights.join_beside(ask.key)
        if flight is None:
            self._tell("refresh", "skipped", None)
        elif is_new:
            beside = copy.copy(ask)
            beside.gives_way = patience_s == 0
            self._start(flight, beside)
        return flight

    def _start(self, flight: Flight, ask: Ask) -> None:
        try:
            self._in_background(partial(self._load_beside, flight, ask))
        except BaseException:
            self._flights.end(flight)
            _log.warning("no refresh of %r could be started", ask.key, exc_info=True)
            raise

    def _load_beside(self, flight: Flight, ask: Ask) -> None:
        """Runs without the caller: nobody may be there to see an error."""
        if not self._flights.begin(flight):
            return
        try:
            self._lead(flight, ask)
        except Exception:  # noqa: BLE001 - whatever the source raises
            _log.warning("%r could not be refreshed", ask.key, exc_info=True)

    def _wait_or_load(self, ask: Ask) -> Answer:
        while True:
            if self._pauses.holds(ask.key) and ask.may_be_stale():
                return ask.stale_answer()
            flight, is_new = self._flights.join(ask.key)
            answer = self._lead(flight, ask) if is_new else self._follow(flight, ask)
            if answer is not None:
                return answer

    # --- Waiting for somebody else of this process

    def _follow(self, flight: Flight, ask: Ask) -> Answer | None:
        """What somebody else brings; None if he was cut off."""
        began = SYSTEM.now()
        try:
            has_ended = self._has_ended(flight, ask)
        finally:
            ask.loading_s += SYSTEM.now() - began
        return self._brought(flight, ask) if has_ended else self._bypass(ask)

    def _has_ended(self, flight: Flight, ask: Ask) -> bool:
        """Wait for a load; False if it may never end before the caller's own one has.

        Raises:
            OperationTimeoutError: The caller can wait no longer.
        """
        limits = [_NESTED_WAIT_S] if is_nested() else []
        while not flight.is_over:
            if not wait_for(flight, min([*limits, *_given(ask.wait_s())], default=None)):
                return False
            if limits and flight.is_polling and not flight.is_over:
                return False
        return True

    def _brought(self, flight: Flight, ask: Ask) -> Answer | None:
        """What a load has brought so far."""
        error, entry = flight.error, flight.entry
        if error is not None:
            # As it came: each who raises it would add his own frames otherwise.
            raise error.with_traceback(flight.traceback)
        if entry is None:
            return None
        outcome = Outcome.BYPASS if flight.is_unkept else Outcome.MISS
        return Answer(self._open(entry, ask.options), outcome, age_of(entry, SYSTEM.now()))

    # --- Loading

    def _lead(self, flight: Flight, ask: Ask) -> Answer:
        """Load for all who wait."""
        token = flight.enter()
        try:
            lease = self._obtain(flight, ask)
            return lease if isinstance(lease, Answer) else self._load(flight, ask, lease)
        finally:
            flight.leave(token)

    def _obtain(self, flight: Flight, ask: Ask) -> Lease | Answer | None:
        """The right to load; or an answer without; or None: load, but put nothing in."""
        began, anyway = SYSTEM.now(), False
        while True:
            got = self._asked(flight, ask, anyway=anyway)
            if not isinstance(got, Busy):
                return got
            if got.is_write:
                return None
            if ask.gives_way or (got.is_backoff and ask.may_be_stale()):
                self._pauses.begin(ask.key, _SHORT_PAUSE_S)
                return ask.stale_answer()
            if got.is_backoff and not anyway:
                anyway = True
            elif not self._has_paused(flight, ask, began):
                return None

    def _asked(self, flight: Flight, ask: Ask, *, anyway: bool) -> Lease | Answer | Busy:
        while True:
            got = self._store.lease(ask.key, ask.known, anyway=anyway)
            if not isinstance(got, Entry):
                return got
            answer = self._taken(got, flight, ask)
            if answer is not None:
                return answer

    def _taken(self, entry: Entry, flight: Flight, ask: Ask) -> Answer | None:
        """What somebody else has put in meanwhile; None if it is of no use."""
        ask.known, ask.stale = entry, ABSENT
        now = SYSTEM.now()
        # What was loaded after he had asked is good enough, however short it lasts.
        is_good = now < entry.fresh_until or entry.created_at >= ask.began
        if not is_good and not is_of_use(entry, ask.options, now):
            return None
        if is_good:
            flight.entry = entry
        try:
            ask.stale = self._open(entry, ask.options)
        except Unreadable:
            flight.entry = None
            self._tell("get", "unreadable", None)
            return None
        return Answer(ask.stale, Outcome.MISS, age_of(entry, now)) if is_good else None

    def _has_paused(self, flight: Flight, ask: Ask, began: float) -> bool:
        """Give another process a moment; False if it has had enough.

        Raises:
            OperationTimeoutError: The caller can wait no longer.
        """
        limits = _given(ask.wait_s())
        waited_s = SYSTEM.now() - began
        if waited_s >= _NESTED_WAIT_S and is_nested(flight):
            return False
        pause_s = max(_POLL_SHARE * waited_s, _SHORTEST_POLL_S) * SYSTEM.uniform(1, 1.2)
        flight.is_polling = True
        try:
            SYSTEM.sleep(min(pause_s, _LONGEST_POLL_S, *limits))
        finally:
            ask.loading_s += SYSTEM.now() - began - waited_s
        return True

    def _load(self, flight: Flight, ask: Ask, lease: Lease | None) -> Answer:
        """Fetch, bring it to those who wait, and put it in."""
        entry, backoff_s = None, 0.0
        caller = deadline.current()
        flight.is_polling, flight.is_unkept = False, lease is None
        try:
            value = self._fetch(ask, "refresh" if flight.is_beside else "load")
            entry = flight.entry = self._kept(value, ask, lease)
            self._pauses.end(ask.key)
        except Exception as error:
            # Where it was the caller's own time that was up, another caller may have more.
            if not _is_up(caller):
                entry, backoff_s = self._failed(error, flight, ask, lease)
            raise
        finally:
            if lease is not None:
                self._settle(lease, entry, backoff_s)
        return Answer(value, Outcome.BYPASS if lease is None else Outcome.MISS, 0.0)

    def _fetch(self, ask: Ask, operation: str) -> Any:
        began, status, hard_s = SYSTEM.now(), "error", ask.options.hard_timeout
        try:
            if hard_s is None:
                value = ask.fetch()
            else:
                with deadline(hard_s):
                    value = ask.fetch()
            status = "ok"
        finally:
            took_s = SYSTEM.now() - began
            ask.loading_s += took_s
            self._tell(operation, status, took_s)
        return value

    def _kept(self, value: Any, ask: Ask, lease: Lease | None) -> Entry:
        is_negative = value is None and ask.options.negative_expire is not None
        entry = self._entry(self._codec.encode(value), ask, lease, is_negative=is_negative)
        if ask.options.immutable:
            # Before it is put in: a store weighs it then.
            entry.shared = value
        return entry

    def _failed(
        self, error: Exception, flight: Flight, ask: Ask, lease: Lease | None
    ) -> tuple[Entry | None, float]:
        """What is put in after a load that failed, and for how long no other one is tried."""
        if isinstance(error, NotFoundError):
            flight.entry = self._nothing(error, ask, lease)
            if flight.entry is not None:
                return flight.entry, 0.0
        flight.fail(error)
        known = error_of(error)
        if isinstance(known, NotFoundError):
            if ask.known is not None and lease is not None:
                # Else what is gone would come back with the next failure.
                self._store.delete(ask.key)
            return None, 0.0
        if not (flight.is_beside or ask.may_hide(error)):
            return None, 0.0
        if not flight.is_beside:
            _log.warning("%r is served stale: its load has failed", ask.key, exc_info=error)
        backoff_s = ask.options.backoff_s
        if isinstance(known, CircuitOpenError):
            backoff_s = max(backoff_s, known.retry_after_s or 0.0)
        self._pauses.begin(ask.key, backoff_s)
        return None, backoff_s

    def _nothing(self, error: NotFoundError, ask: Ask, lease: Lease | None) -> Entry | None:
        """What is kept of the news that there is nothing."""
        if ask.options.negative_expire is None:
            return None
        try:
            payload = self._codec.encode(describe(error))
        except UnsupportedType:
            _log.warning("it is not kept that there is no %r", ask.key, exc_info=True)
            return None
        return self._entry(payload, ask, lease, is_negative=True)

    def _settle(self, lease: Lease, entry: Entry | None, backoff_s: float) -> None:
        """End a lease, also where the caller has no time left."""
        settle = partial(_without_deadline, self._store.settle, lease, entry, backoff_s=backoff_s)
        try:
            settle()
        except BaseException:
            # Cut off in the middle, so nobody knows whether it was carried out. Once more, and
            # where whoever cuts this one off cannot reach it.
            self._in_background(settle)
            raise


def _given(seconds: float | None) -> list[float]:
    return [] if seconds is None else [seconds]


def _is_up(scope: Scope | None) -> bool:
    return scope is not None and SYSTEM.now() >= scope.at


def _without_deadline(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call something that has a bound of its own."""
    if deadline.current() is None:
        return fn(*args, **kwargs)

    def call() -> Any:
        deadline.anew()  # which takes the inherited one away
        return fn(*args, **kwargs)

    return contextvars.copy_context().run(call)
