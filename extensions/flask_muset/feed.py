"""What other processes tell all others, as Redis publishes it.

One greenlet or thread per process listens on a connection of its own, and asks from time to time
whether it is still heard. What it has missed while it was not, nobody can tell it: so its listener
is told whenever the link begins anew, and up to when all that was published is known.
"""

import contextlib
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from redis.exceptions import RedisError, TimeoutError  # noqa: A004 - redis-py's own

from flask_muset.clock import SYSTEM
from flask_muset.locks import run_beside
from flask_muset.redis import GuardedRedis, abandon

__all__ = ["Feed", "Listener"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
#: Length of the sender's name before each message.
SENDER_BYTES = 8


class Listener(Protocol):
    """Who is told. It must not wait and must not raise."""

    def linked(self, *, was_away: bool) -> None:
        """The link has begun; what was published before it is not known.

        Args:
            was_away: Whether Redis did not answer for a while, which others may have noticed too.
        """
        ...

    def confirmed(self, since: float) -> None:
        """Everything that was published before this moment of `SYSTEM.now()` has been told."""
        ...

    def heard(self, kind: str, text: str) -> None:
        """A message of another process."""
        ...


class Feed:
    """Listens as long as it is not closed.

    Args:
        redis: To which Redis.
        channel: On which channel.
        sender: Whose messages are its own and not told.
        listener: Who is told.
        name: What it is for, in log lines and names of threads.
        beat_s: Seconds between two questions whether the link still holds, and for an answer.
        lost_level: Of the log line that says that the link is lost.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        channel: str,
        sender: bytes,
        listener: Listener,
        *,
        name: str,
        beat_s: float = 1.0,
        lost_level: int = logging.INFO,
    ) -> None:
        self._redis = redis
        self._channel = channel
        self._sender = sender
        #: Weak: an app that is gone needs no feed any more.
        self._listener = weakref.ref(listener)
        self._name = name
        self._beat_s = beat_s
        self._lost_level = lost_level
        self._is_closed = False
        self._was_away = False
        self._connection: Any = None
        #: Whether it is heard.
        self.is_linked = False
        run_beside(self._run, name=f"{name}-feed")
        weakref.finalize(listener, self.close).atexit = False

    def abandon(self) -> None:
        """Leave the connection to the parent process, of which this is a copy."""
        self._is_closed = True
        self.is_linked = False
        connection, self._connection = self._connection, None
        if connection is not None:
            abandon(connection)

    def close(self) -> None:
        """Listen no more."""
        self._is_closed = True
        self._let_go()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._is_closed:
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001 - a message of nobody's making among them
                # A link that breaks may be made anew at once; one that cannot, or that falls
                # silent, has nobody at its end.
                self._was_away = not self.is_linked or isinstance(error, TimeoutError)
                if not isinstance(error, RedisError | OSError):
                    _log.warning("a message to %s cannot be read", self._name, exc_info=error)
                if self.is_linked and not self._is_closed:
                    pause_s = _FIRST_PAUSE_S
                    _log.log(self._lost_level, "%s hears nothing: %s", self._name, error)
            finally:
                self.is_linked = False
                self._let_go()
            if not self._is_closed:
                # Real time, whatever a test has made of the clock.
                time.sleep(SYSTEM.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                connection.disconnect()

    def _listen(self) -> None:
        connection = self._connection = self._redis.dedicated(timeout_s=self._beat_s)
        connection.connect()
        asked_at = SYSTEM.now()
        connection.send_command("SUBSCRIBE", self._channel)
        connection.read_response(disconnect_on_error=False)
        self._tell(lambda listener: listener.linked(was_away=self._was_away))
        self.is_linked = True
        self._tell(lambda listener: listener.confirmed(asked_at))
        while not self._is_closed:
            asked_at = SYSTEM.now()
            connection.send_command("PING")
            self._read_until_answered(connection)
            self._tell(lambda listener: listener.confirmed(asked_at))  # noqa: B023 - called now
            self._read_for(connection, asked_at + self._beat_s)

    def _tell(self, tell: Callable[[Listener], None]) -> None:
        listener = self._listener()
        if listener is not None:
            tell(listener)

    def _read_until_answered(self, connection: Any) -> None:
        while not self._take(connection.read_response(disconnect_on_error=False)):
            pass

    def _read_for(self, connection: Any, until: float) -> None:
        """Read what comes until it is time to ask again."""
        with contextlib.suppress(TimeoutError):
            while SYSTEM.now() < until:
                self._take(connection.read_response(disconnect_on_error=False))

    def _take(self, reply: Any) -> bool:
        """Tell a message; True for the answer to PING."""
        if reply[0] == b"pong":
            return True
        if reply[0] == b"message":
            data: bytes = reply[2]
            if data[:SENDER_BYTES] != self._sender:
                text = data[SENDER_BYTES:].decode("utf-8", "surrogateescape")
                self._tell(lambda listener: listener.heard(text[:1], text[1:]))
        return False
