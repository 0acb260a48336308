"""How many users there are at what time. LOAD_SHAPE says which; without it Locust's own options do.

The shape `fault` breaks what stands behind the service while the users go on. It can do so only
where it is told what to break: LOAD_UPSTREAM is the address of a scripted model server
(`muset.testing.upstream`), LOAD_REDIS_PID the process of a Redis of this machine.
"""

import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from urllib.parse import urlsplit

from locust import LoadTestShape

__all__ = ["SHAPES", "Event", "Stage", "make_shape"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a shape.

    Attributes:
        until_s: When it ends, from the start.
        users: How many there are.
        rate: How many come or go in a second.
    """

    until_s: float
    users: int
    rate: float = 10.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens once.

    Attributes:
        at_s: When, from the start.
        title: For people.
        act: Does it; False if it cannot be done here.
    """

    at_s: float
    title: str
    act: Callable[[], bool]


def _script(faults: Sequence[Mapping[str, object]]) -> bool:
    address = os.environ.get("LOAD_UPSTREAM")
    if not address:
        return False
    connection = HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        connection.request("POST", "/_control/script", json.dumps({"faults": faults}))
        return connection.getresponse().status == 200
    finally:
        connection.close()


def _fail_some() -> bool:
    return _script([{"kind": "server_error", "times": 0, "rate": 0.3}])


def _fail_none() -> bool:
    return _script([])


def _signal_redis(number: signal.Signals) -> bool:
    pid = int(os.environ.get("LOAD_REDIS_PID") or 0)
    if pid <= 0:
        return False
    os.kill(pid, number)
    return True


def _freeze() -> bool:
    return _signal_redis(signal.SIGSTOP)


def _thaw() -> bool:
    return _signal_redis(signal.SIGCONT)


_SOAK_S = 60.0 * float(os.environ.get("LOAD_SOAK_MINUTES") or 30)

#: Stages and events by name.
SHAPES: Mapping[str, tuple[Sequence[Stage], Sequence[Event]]] = {
    "smoke": ([Stage(20, 10)], ()),
    "ramp": ([Stage(20, 10), Stage(50, 100), Stage(80, 200, 20)], ()),
    "spike": ([Stage(20, 20, 20), Stage(30, 100, 100), Stage(60, 20, 100)], ()),
    "soak": ([Stage(_SOAK_S, 50)], ()),
    "fault": (
        [Stage(70, 50)],
        (
            Event(10, "the model fails 30 % of the time", _fail_some),
            Event(30, "the model is well again", _fail_none),
            Event(40, "Redis is frozen", _freeze),
            Event(50, "Redis goes on", _thaw),
        ),
    ),
}


def make_shape(name: str) -> type[LoadTestShape]:
    """The class that Locust looks for.

    Raises:
        ValueError: There is no shape of this name.
    """
    if name not in SHAPES:
        raise ValueError(f"LOAD_SHAPE must be one of {', '.join(SHAPES)}, got {name!r}.")
    stages, events = SHAPES[name]

    class Shape(LoadTestShape):
        """The stages one after the other, and what happens meanwhile."""

        def reset_time(self) -> None:
            """Begin; the web page may do so again."""
            super().reset_time()
            self._left = list(events)

        def tick(self) -> tuple[int, float] | None:
            """Users and how fast they come; None at the end."""
            now = self.get_run_time()
            while self._left and self._left[0].at_s <= now:
                event = self._left.pop(0)
                _log.info("%s%s", event.title, "" if event.act() else ": cannot be done here")
            for stage in stages:
                if now < stage.until_s:
                    return stage.users, stage.rate
            return None

    Shape.has_faults = bool(events)
    Shape.times_decide = not events and name != "smoke"
    return Shape


def restore() -> None:
    """Undo what a shape that was cut off may have left behind."""
    with suppress(OSError):
        _fail_none()
    with suppress(ProcessLookupError):
        _thaw()
