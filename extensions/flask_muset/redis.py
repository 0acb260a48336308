"""Redis as a dependency like any other: bounded in time, and left alone while it is away.

    redis = GuardedRedis("redis://127.0.0.1:6379/0")
    redis.execute("SET", redis.key("greeting"), "hello", "PX", 1000)

Each call has one budget for everything: the wait for a connection, connecting, sending, the reply.
The first call that fails puts the link in doubt. From then on calls are refused at once, and a
greenlet or thread of its own sends PING until one is answered: callers never pay for a probe.

    up ── a call timed out or its connection failed ──> doubt ── the first PING failed ──> down
    ^                                                     |                                  |
    └───────────────────── a PING was answered ───────────┴──────────────────────────────────┘

What a caller gets, all of `flask_muset.errors`, redis-py's exception as the cause:

    OverloadedError        no connection became free in time; the link stays up
    CircuitOpenError       the link is in doubt or down; nothing was sent
    OperationTimeoutError  no reply in time; it may have been carried out
    NetworkError           no connection, or it broke; it may have been carried out
    ExternalServiceError   Redis answered with an error; the link stays up

An error that says that Redis loads its data, refuses the credentials or, being a replica, takes no
writes is a failure of the link. After the last one all connections are made anew, as the address
may lead to the new master, and the probe is a write that does nothing in place of PING. An error
that says that a master or a cluster is down is none, as PING would be answered. All of these are
`unavailable`.

The commands go to redis-py's `Connection`, because its client costs as much again. Nothing is ever
sent twice, flushed or unpickled. Needs the extra `redis`.
"""

import _socket
import hashlib
import logging
import math
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hiredis import pack_command
from redis.connection import Connection, parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    DataError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004 - redis-py's own; it is not the built-in one
)

from flask_muset import context
from flask_muset.clock import SYSTEM
from flask_muset.deadline import Expired, Scope, deadline
from flask_muset.errors import (
    CircuitOpenError,
    ExternalServiceError,
    MusetError,
    NetworkError,
    OperationTimeoutError,
    OverloadedError,
)
from flask_muset.locks import give_lock, is_patched, make_event, original, run_beside
from flask_muset.signals import LinkEvent, redis_link_changed

__all__ = ["GuardedRedis", "Script", "abandon"]

_log = logging.getLogger(__name__)

_UP, _DOUBT, _DOWN, _CLOSED = "up", "doubt", "down", "closed"

#: Seconds between two probes at first; they double, half of each is chance.
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 0.25
#: A prober that is this late is gone, killed with its greenlet for one, and replaced.
_PROBER_LATE_S = 10.0
#: A budget that ends later than this has ended while this process had no time for it.
_LATE_S = 0.005
#: Time-outs in a row that may have been this process's own slowness; the next one counts.
_BENEFITS_OF_DOUBT = 2
#: How much longer than a caller's deadline a socket waits, so that the deadline ends it.
_SLACK_S = 0.001
_DEDICATED_CONNECT_S = 1.0

#: Options of a URL that would undo the budget or change what a reply is.
_OURS = frozenset({
    "decode_responses", "health_check_interval", "max_connections", "protocol", "retry_on_error",
    "retry_on_timeout", "socket_connect_timeout", "socket_timeout", "timeout",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script.

    Attributes:
        source: Its text.
        sha: By which Redis knows it.
    """

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


class GuardedRedis:
    """A client of one Redis, for all greenlets or threads of a process.

    Opens nothing before its first use. A forked child begins anew: it shares no socket with its
    parent. Under gevent it belongs to the thread whose hub used it first.

    Under plain threads nothing can be cut off: each step of a call waits no longer than is left,
    but looking up a host name is not bounded, and connecting counts as several steps.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with credentials, database and TLS options as
            redis-py reads them. Its options for time-outs, retries and replies are ignored.
        name: Label in events, log lines and messages.
        max_connections: Calls at once, at least 1; the others wait in line within their budget.
        budget_s: Seconds that a call may take, above 0. A deadline that ends earlier holds, and
            what it cuts off says nothing about the link.
        prefix: Before every key that `key` makes.

    Raises:
        ValueError: The URL cannot be read, or a number is not allowed.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "redis",
        max_connections: int = 10,
        budget_s: float = 0.05,
        prefix: str = "muset:default:",
    ) -> None:
        if not (isinstance(max_connections, int) and max_connections >= 1):
            raise ValueError(f"max_connections must be at least 1, got {max_connections!r}.")
        if not 0 < budget_s < math.inf:
            raise ValueError(f"budget_s must be seconds above 0, got {budget_s!r}.")
        self.name = name
        self.max_connections = max_connections
        self.budget_s = budget_s
        self.prefix = prefix
        self._make = _maker(url)
        #: Never connected: it describes itself and packs pipelines.
        self._model = self._make()
        #: Is told of each call: its seconds, and `ok` or the name of the error's class.
        self.on_call: Callable[[float, str], None] | None = None
        #: Is told of each new state of the link, `up`, `doubt` or `down`; it must not raise.
        self.on_change: Callable[[str], None] | None = None
        self._link: _Link | None = None
        self._inherited: _Link | None = None
        give_lock(self)

    _lock: Any

    def __repr__(self) -> str:
        where = ",".join(f"{key}={value}" for key, value in self._model.repr_pieces())
        return f"<GuardedRedis {self.name!r} {where} {self.state}>"

    @property
    def state(self) -> str:
        """`up`, `doubt` or `down`; `up` before the first use."""
        link = self._link
        return _UP if link is None else link.state

    @property
    def in_use(self) -> int:
        """Connections in use, of `max_connections`."""
        link = self._link
        return 0 if link is None else link.pool.in_use

    @property
    def is_usable_here(self) -> bool:
        """Whether this thread may use it; under gevent one alone may."""
        return (self._link or self._begin()).is_usable_here

    def key(self, name: str) -> str:
        """The key of this deployment."""
        return self.prefix + name

    def execute(self, *command: Any) -> Any:
        """Send one command; one that blocks in Redis needs a `dedicated` connection.

        Args:
            *command: Its words: str, bytes, int or float.

        Returns:
            The reply as it came: bytes, int, None, or a list of such.

        Raises:
            MusetError: It failed; see the head of this module.
            redis.exceptions.DataError: A word has another type.
        """
        return self._call(_pack(*command), _Call.read, self.budget_s)

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands at once, without a transaction.

        Args:
            commands: The words of each.

        Returns:
            A reply for each. One that is an error is an ExternalServiceError in its place: the
            others were carried out all the same.

        Raises:
            MusetError: They failed as a whole; some may have been carried out.
            redis.exceptions.DataError: A word has another type.
        """
        if not commands:
            return []
        count = len(commands)

        def read_all(call: "_Call") -> list[Any]:
            return [self._reply_or_error(call) for _ in range(count)]

        return self._call(self._model.pack_commands(commands), read_all, self.budget_s)  # type: ignore[no-any-return]

    def script(
        self, script: Script | str, keys: Sequence[str | bytes], args: Sequence[Any] = ()
    ) -> Any:
        """Run a Lua script; where Redis has not got it, send its text within the same budget.

        Args:
            script: A `Script`, or its text.
            keys: KEYS.
            args: ARGV.

        Returns:
            The reply as it came.

        Raises:
            MusetError: It failed.
            redis.exceptions.DataError: A word has another type.
        """
        if isinstance(script, str):
            script = Script(script)
        source, words = script.source, (len(keys), *keys, *args)

        def read(call: _Call) -> Any:
            try:
                return call.read()
            except NoScriptError:
                call.send(_pack("EVAL", source, *words))
            return call.read()

        return self._call(_pack("EVALSHA", script.sha, *words), read, self.budget_s)

    def check(self, timeout_s: float) -> None:
        """Return if Redis answers; for a health probe.

        Args:
            timeout_s: Seconds to wait, above 0, in place of the budget.

        Raises:
            MusetError: It does not answer, or it is known to be away.
        """
        self._call(_pack("PING"), _Call.read, timeout_s)

    def dedicated(self, *, timeout_s: float | None = None) -> Any:
        """Make a connection of the caller's own, for pub/sub or for reading a stream.

        It is not connected yet, belongs to no pool, and says nothing about the link. It must be
        made in the process that uses it.

        Args:
            timeout_s: Seconds that it waits for a reply before it raises redis-py's TimeoutError,
                after which it may be asked again; None waits without end.

        Returns:
            A `redis.connection.Connection`; whoever asked for it disconnects it.
        """
        return self._make(socket_timeout=timeout_s, socket_connect_timeout=_DEDICATED_CONNECT_S)

    def close(self) -> None:
        """Close all connections and stop probing; the next call begins anew."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def _call(self, packed: Any, read: "Callable[[_Call], Any]", seconds: float) -> Any:
        link, tell = self._link or self._begin(), self.on_call
        if tell is None:
            return link.call(packed, read, seconds)
        began, outcome = SYSTEM.now(), "cut off"
        try:
            reply = link.call(packed, read, seconds)
            outcome = "ok"
        except MusetError as error:
            outcome = type(error).__name__
            raise
        finally:
            tell(SYSTEM.now() - began, outcome)
        return reply

    def _reply_or_error(self, call: "_Call") -> Any:
        try:
            return call.read()
        except ResponseError as error:
            answer = _error_of(self.name, error)
            answer.__cause__ = error
            if _is_read_only(error):
                call.refused = error
            return answer

    def _begin(self) -> "_Link":
        self._inherited = None
        with self._lock:
            if self._link is None:
                self._link = _Link(
                    self.name,
                    self.budget_s,
                    self.max_connections,
                    self._make,
                    self._changed,
                    self.key("probe"),
                )
            return self._link

    def _changed(self, state: str) -> None:
        if self.on_change is not None:
            self.on_change(state)

    def _forked(self) -> None:
        """In a child nothing can be closed yet."""
        self._inherited, self._link = self._link, None
        if self._inherited is not None:
            self._inherited.abandon()


def _pack(*words: Any) -> list[bytes]:
    """A command as it is sent; redis-py's way there takes three times as long."""
    if isinstance(words[0], str) and " " in words[0]:
        words = (*words[0].split(), *words[1:])  # SCRIPT FLUSH
    try:
        return [pack_command(words)]
    except TypeError as error:
        raise DataError(str(error)) from None


def _maker(url: str) -> Callable[..., Any]:
    """What makes connections to a URL."""
    try:
        found = dict(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError:
        # Neither the URL nor the parser's words about it: both may have the password.
        raise ValueError(
            "the URL of Redis cannot be read; it must be like redis://user:password@host:6379/0, "
            "rediss://… or unix:///path?db=0, with special characters of a password as %XX."
        ) from None
    options = {name: value for name, value in found.items() if name not in _OURS}
    # RESP2: nothing comes unasked. No driver_info: it costs each new connection two round trips.
    options.update(protocol=2, driver_info=None, decode_responses=False)
    make = partial(options.pop("connection_class", Connection), **options)
    try:
        make()
    except TypeError as error:
        raise ValueError(f"the URL of Redis has an option that nobody knows: {error}.") from None
    return make


def _error_of(name: str, error: BaseException) -> MusetError:
    """The error that stands for one of redis-py's."""
    text = f"{name}: {error}"
    if isinstance(error, TimeoutError | Expired):
        return OperationTimeoutError(text)
    if isinstance(error, AuthenticationError):
        return ExternalServiceError(text, unavailable=True, retryable=False)
    if isinstance(error, BusyLoadingError | ClusterDownError) or _is_read_only(error):
        return ExternalServiceError(text, unavailable=True)
    if isinstance(error, ResponseError):
        return ExternalServiceError(text)
    return NetworkError(text)


def _is_read_only(error: BaseException) -> bool:
    """Whether Redis has refused a write because it is a replica."""
    # Before version 7 what a script is answered stands within another error.
    return isinstance(error, ReadOnlyError) or (
        isinstance(error, ResponseError) and "-READONLY " in str(error)
    )


def abandon(connection: Any) -> None:
    """Leave a connection's socket to the parent process, in a forked child.

    gevent's greenlets live on there, and one may be waiting for this very socket, whose reply is
    the parent's. So its number is given to another one, which is at its end.

    Args:
        connection: Of redis-py, such as `GuardedRedis.dedicated` makes.
    """
    sock = connection._sock
    if sock is not None and sock.fileno() >= 0:
        # Of the module below `socket`, which gevent does not patch: its hub is not ready yet.
        ended, other = _socket.socketpair()
        os.dup2(ended.fileno(), sock.fileno(), inheritable=False)
        ended.close()
        other.close()


# --- One call -------------------------------------------------------------------------------------


class _Slot:
    """One connection of the pool: made once, connected when it is needed."""

    __slots__ = ("_is_limited", "_poll", "connection")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._poll: Callable[[int], list[Any]] | None = None
        self._is_limited = False

    @property
    def is_ready(self) -> bool:
        """Whether it is connected and nothing waits to be read: no rest of a reply, no end.

        That costs half a microsecond, with a poll object that lives as long as the connection, and
        keeps a connection that Redis has closed meanwhile from becoming the failure of a call.
        """
        poll = self._poll  # another thread may retire it
        return poll is not None and not poll(0)

    def connect(self, limit_s: float | None) -> None:
        """Connect, log in and select the database."""
        self.drop()
        connection = self.connection
        connection.socket_timeout = connection.socket_connect_timeout = limit_s
        connection.connect()
        self._is_limited = limit_s is not None
        poll = original("select", "poll")()
        poll.register(connection._sock, select.POLLIN)
        self._poll = poll.poll

    def limit(self, seconds: float | None) -> None:
        """Bound the waits for its socket."""
        if seconds is not None or self._is_limited:
            self.connection._sock.settimeout(seconds)
            self._is_limited = seconds is not None

    def read_arrived(self) -> Any:
        """Read a reply that is there already; redis-py's TimeoutError if it is not."""
        self._is_limited = True  # the parser sets its own idea of a time-out afterwards
        return self.connection.read_response(timeout=0, disconnect_on_error=False)

    def drop(self) -> None:
        """Disconnect: what may still come must never be read as the answer to something else."""
        self._poll = None
        self.connection.disconnect()

    def retire(self) -> None:
        """Let it be connected anew before its next use; one that is in use now goes on."""
        self._poll = None

    def abandon(self) -> None:
        """Leave the socket to the parent process."""
        abandon(self.connection)


class _Call:
    """One call: its time and its connection.

    Where gevent's hub can cut the greenlet off, a Scope does. Everywhere else, and where a deadline
    of the caller's ends first, sockets and events wait no longer than is left.
    """

    __slots__ = (
        "_is_over", "_scope", "_taken_at", "at", "began_at", "caller", "refused", "seconds",
        "sent_at", "slot",
    )  # fmt: skip

    slot: _Slot

    def __init__(self, seconds: float, *, can_cut: bool) -> None:
        self.seconds = seconds
        self.began_at = self._taken_at = SYSTEM.now()
        self.at = self.began_at + seconds
        self.sent_at: float | None = None
        self.caller: Scope | None = None
        #: What a command of several was answered that is a failure of the link.
        self.refused: ResponseError | None = None
        self._scope: Scope | None = None
        self._is_over = False
        outer = deadline.current()
        if outer is not None and outer.at <= self.at:
            self.caller, self.at = outer, outer.at
        elif can_cut and not SYSTEM.is_virtual:
            self._scope = Scope(seconds)

    def enter(self) -> None:
        """Begin to count."""
        if self._scope is not None:
            self._scope.enter()

    def leave(self) -> None:
        """End."""
        if self._scope is not None:
            self._scope.leave()

    def owns(self, error: BaseException) -> bool:
        """Whether its own time being up has cut the greenlet off."""
        return self._scope is not None and error is self._scope.expired

    def wait_s(self) -> float | None:
        """How long to wait for something at most; None where the greenlet is cut off."""
        if self._scope is not None:
            return None
        slack = 0.0 if self.caller is None else _SLACK_S
        return max(0.0, self.at + slack - SYSTEM.now())

    def begin(self, slot: _Slot, *, waited: bool) -> None:
        """Go on with a connection."""
        self.slot = slot
        if waited:
            self._taken_at = SYSTEM.now()
        if not slot.is_ready:
            self._check()
            slot.connect(self.wait_s())

    def send(self, packed: Any) -> None:
        """Send packed commands."""
        self._check()
        self.sent_at = SYSTEM.now()
        self.slot.limit(self.wait_s())
        self.slot.connection.send_packed_command(packed, check_health=False)

    def read(self) -> Any:
        """Read one reply; one that has arrived is not too late, whenever this process sees it."""
        if self._scope is None:
            self._is_over = self._is_over or SYSTEM.now() >= self.at
        if not self._is_over:
            try:
                self.slot.limit(self.wait_s())
                return self.slot.connection.read_response(disconnect_on_error=False)
            except Expired as error:
                if not self.owns(error):
                    raise
            except TimeoutError:
                pass  # the process may have been too busy to look in time
            self._is_over = True
        return self.slot.read_arrived()

    def _check(self) -> None:
        if self._is_over or (self._scope is None and SYSTEM.now() >= self.at):
            raise TimeoutError("there is no time left")

    @property
    def was_kept_waiting(self) -> bool:
        """Whether the line for a connection took more than half of the time."""
        return SYSTEM.now() - self._taken_at < self.seconds / 2

    @property
    def was_slow_itself(self) -> bool:
        """Whether Redis had too little of the time, because this process could not go on.

        A reply that had arrived was read in any case. What remains are calls of several steps,
        which go on only when this process gets to it.
        """
        now = SYSTEM.now()
        if self.sent_at is None:
            return now > self.at + _LATE_S
        return now - self.sent_at < self.seconds / 2


# --- The pool -------------------------------------------------------------------------------------


class _Waiter:
    """A call in line."""

    __slots__ = ("event", "is_refused", "slot")

    def __init__(self, event: Any) -> None:
        self.event = event
        self.slot: _Slot | None = None
        self.is_refused = False


class _Pool:
    """Connections; each that comes back goes to whoever waits longest.

    Args:
        limit: Most connections, at least 1.
        make: Makes one, not connected.
        make_event: Makes what a call waits for.
    """

    def __init__(self, limit: int, make: Callable[[], Any], make_event: Callable[[], Any]) -> None:
        self._limit = limit
        self._make = make
        self._make_event = make_event
        self.slots: list[_Slot] = []
        # The one that was used last is taken first: what is not needed stays unconnected.
        self._idle: list[_Slot] = []
        self._line: deque[_Waiter] = deque()
        self._is_closed = False
        give_lock(self)

    _lock: Any

    @property
    def in_use(self) -> int:
        """Connections that calls have now."""
        return len(self.slots) - len(self._idle)

    def take_free(self) -> _Slot | None:
        """Take a connection, None if all are in use."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if len(self.slots) == self._limit:
                return None
            slot = _Slot(self._make())
            self.slots.append(slot)
            return slot

    def wait_for_one(self, call: _Call) -> _Slot | None:
        """Stand in line; None if the line was sent away.

        Raises:
            OverloadedError: The time is up.
        """
        waiter = _Waiter(self._make_event())
        slot = self._queue(waiter)
        if slot is not None:
            return slot
        try:
            waiter.event.wait(call.wait_s())
        except BaseException as error:
            slot = self._give_up(waiter)
            if slot is not None:
                self.give(slot)
            if call.owns(error):
                raise self._overloaded() from None
            raise
        slot = self._give_up(waiter)
        if slot is None and not waiter.is_refused:
            raise self._overloaded() if call.caller is None else call.caller.error()
        return slot

    def give(self, slot: _Slot) -> None:
        """Give a connection back, whatever its state."""
        with self._lock:
            is_closed = self._is_closed
            waiter = self._line.popleft() if self._line else None
            if waiter is not None:
                waiter.slot = slot
            elif not is_closed:
                self._idle.append(slot)
        if waiter is not None:
            waiter.event.set()
        elif is_closed:
            slot.drop()

    def send_away(self) -> None:
        """Let nobody wait any longer."""
        with self._lock:
            line = list(self._line)
            self._line.clear()
        for waiter in line:
            waiter.is_refused = True
            waiter.event.set()

    def retire(self) -> None:
        """Let each connection be made anew before its next use."""
        with self._lock:
            slots = list(self.slots)
        for slot in slots:
            slot.retire()

    def close(self) -> None:
        """Disconnect all that are free, and the others when they come back."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for slot in idle:
            slot.drop()

    def _queue(self, waiter: _Waiter) -> _Slot | None:
        """Stand in line, unless a connection has come back meanwhile."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._line.append(waiter)
        return None

    def _give_up(self, waiter: _Waiter) -> _Slot | None:
        """Leave the line; what was given, at the last moment maybe."""
        with self._lock:
            if waiter in self._line:
                self._line.remove(waiter)
        return waiter.slot

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(f"all {self._limit} connections to Redis are in use")


# --- The link -------------------------------------------------------------------------------------


class _Link:
    """What one process has: connections, and whether they are worth trying.

    Args:
        name: Of the client.
        budget_s: Seconds that a probe may take.
        max_connections: At once.
        make: Makes one, not connected.
        changed: Is told of each new state.
        probe: Name of a key that nobody has.
    """

    def __init__(
        self,
        name: str,
        budget_s: float,
        max_connections: int,
        make: Callable[[], Any],
        changed: Callable[[str], None],
        probe: str,
    ) -> None:
        self.name = name
        self._changed = changed
        self.state = _UP
        self._budget_s = budget_s
        self._make = make
        self._is_patched = is_patched("socket")
        self.pool = _Pool(max_connections, make, partial(make_event, "socket"))
        self._closed = make_event("socket")
        self._get_ident = original("_thread", "get_ident")
        self._thread = self._get_ident() if self._is_patched else None
        #: Goes up with the link: a call that began before says nothing about the new time.
        self._epoch = 0
        self._slow_in_a_row = 0
        self._slow_at = -math.inf
        self._prober: object = None
        self._probe_key = probe
        #: Whether it is up only when it takes writes.
        self._must_write = False
        self._probing: _Slot | None = None
        self._due = math.inf
        give_lock(self)

    _lock: Any

    @property
    def is_usable_here(self) -> bool:
        """Whether this thread has the hub that the connections belong to."""
        return self._thread is None or self._thread == self._get_ident()

    def call(self, packed: Any, read: Callable[[_Call], Any], seconds: float) -> Any:
        """Send something and read what comes.

        Raises:
            MusetError: It failed or was refused.
        """
        if self.state != _UP:
            raise self._refusal()
        if not self.is_usable_here:
            raise RuntimeError(
                f"{self.name}: this thread is not the one whose gevent hub its connections belong "
                "to; call it there, or make a GuardedRedis in this thread."
            )
        epoch = self._epoch
        call = _Call(seconds, can_cut=self._is_patched)
        try:
            reply = self._run(call, packed, read)
        except ResponseError as error:
            raise self._refused(epoch, error) from error
        except (RedisError, OSError) as error:
            raise self._failure(call, epoch, error) from error
        except Expired as error:
            if not call.owns(error):
                raise
            raise self._failure(call, epoch, error) from error
        self._slow_in_a_row = 0
        if call.refused is not None:
            self._refused(epoch, call.refused)
        return reply

    def _run(self, call: _Call, packed: Any, read: Callable[[_Call], Any]) -> Any:
        call.enter()
        try:
            pool = self.pool
            slot = pool.take_free()
            waited = slot is None
            if slot is None:
                slot = pool.wait_for_one(call)
            if slot is None:
                raise self._refusal()
            try:
                if waited and self.state != _UP:
                    raise self._refusal()
                return _exchange(call, slot, packed, read, waited=waited)
            finally:
                pool.give(slot)
        finally:
            call.leave()

    def _failure(self, call: _Call, epoch: int, error: BaseException) -> MusetError:
        """What a caller gets; the link is in doubt if it was the link's failure."""
        if isinstance(error, TimeoutError | Expired):
            if call.caller is not None:
                return call.caller.error()
            if call.was_kept_waiting:
                return OverloadedError(f"{self.name}: a connection became free too late")
            if call.was_slow_itself and self._may_be_our_fault(call):
                return OperationTimeoutError(f"{self.name}: this process was too busy to ask")
            failure: MusetError = OperationTimeoutError(
                f"{self.name}: no answer within {call.seconds:g} s"
            )
        else:
            failure = _error_of(self.name, error)
        self._doubt(epoch, failure.message)
        return failure

    def _may_be_our_fault(self, call: _Call) -> bool:
        """Whether to believe once more that this process was too slow; one pause counts once."""
        if call.began_at > self._slow_at:
            self._slow_at = SYSTEM.now()
            self._slow_in_a_row += 1
        return self._slow_in_a_row <= _BENEFITS_OF_DOUBT

    # --- Its state

    def _refused(self, epoch: int, error: ResponseError) -> MusetError:
        """What a caller gets for an error that was answered; it may be a failure of the link."""
        answer = _error_of(self.name, error)
        if _is_read_only(error):
            self.pool.retire()
            self._doubt(epoch, answer.message, must_write=True)
        return answer

    def _doubt(self, epoch: int, reason: str, *, must_write: bool = False) -> None:
        with self._lock:
            if self.state != _UP or epoch != self._epoch:
                return
            self.state, self._must_write = _DOUBT, must_write
            self._due = SYSTEM.now()
            prober = self._prober = object()
        self.pool.send_away()
        try:
            self._tell(_DOUBT, reason)
        finally:
            self._start(prober)

    def _settle(self, prober: object, state: str, reason: str) -> None:
        """Take what a probe has found."""
        with self._lock:
            if self._prober is not prober or self.state == state:
                return
            self.state = state
            if state == _UP:
                self._epoch += 1
                self._slow_in_a_row = 0
                self._prober = None
        self._tell(state, reason)

    def _tell(self, state: str, reason: str) -> None:
        level = logging.INFO if state == _UP else logging.WARNING
        _log.log(level, "the link to %s is %s: %s", self.name, state, reason)
        context.emit(redis_link_changed, LinkEvent(self.name, state))
        # After a close the client begins anew, with a link that is taken to be up.
        if self.state != _CLOSED:
            self._changed(state)

    def _refusal(self) -> CircuitOpenError:
        now = SYSTEM.now()
        if now > self._due + _PROBER_LATE_S:
            with self._lock:
                self._due = now
                prober = self._prober = object()
            self._start(prober)
        wait_s = max(0.0, self._due - now) + self._budget_s
        error: CircuitOpenError = CircuitOpenError(
            f"{self.name}: not asked, the link is {self.state}", retry_after=wait_s
        )
        return error

    def close(self) -> None:
        """Disconnect and stop probing."""
        with self._lock:
            self.state, self._prober, self._due = _CLOSED, None, math.inf
        self._closed.set()
        self.pool.send_away()
        self.pool.close()

    def abandon(self) -> None:
        """Leave everything to the parent process."""
        self.state, self._prober, self._due = _CLOSED, None, math.inf
        for slot in (*self.pool.slots, self._probing):
            if slot is not None:
                slot.abandon()

    # --- Its prober

    def _start(self, prober: object) -> None:
        run_beside(partial(self._probe, prober), name=f"{self.name}-prober", module="socket")

    def _probe(self, prober: object) -> None:
        """Ask, at once and then from time to time, until it is answered."""
        pause_s = _FIRST_PAUSE_S
        while self._prober is prober:
            self._due = SYSTEM.now()
            error = self._ping()
            if error is None:
                self._settle(prober, _UP, f"{self._question()[0]} was answered")
                return
            self._settle(prober, _DOWN, _error_of(self.name, error).message)
            wait_s = SYSTEM.uniform(pause_s / 2, pause_s)
            self._due = SYSTEM.now() + wait_s
            self._closed.wait(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _question(self) -> tuple[str, ...]:
        return ("DEL", self._probe_key) if self._must_write else ("PING",)

    def _ping(self) -> BaseException | None:
        """Ask on a connection of its own: connecting must work as well."""
        connection = self._make()
        slot = self._probing = _Slot(connection)
        call = _Call(self._budget_s, can_cut=self._is_patched)
        call.enter()
        try:
            packed = connection.pack_command(*self._question())
            _exchange(call, slot, packed, _Call.read, waited=False)
        except (RedisError, OSError, Expired) as error:
            # A write that is refused for another reason is an answer.
            is_answer = self._must_write and isinstance(error, ResponseError)
            return None if is_answer and not _is_read_only(error) else error
        finally:
            call.leave()
            slot.drop()
        return None


def _exchange(
    call: _Call, slot: _Slot, packed: Any, read: Callable[[_Call], Any], *, waited: bool
) -> Any:
    try:
        call.begin(slot, waited=waited)
        call.send(packed)
        return read(call)
    except ResponseError:
        raise  # a whole reply, nothing is left to be read
    except BaseException:
        slot.drop()
        raise
