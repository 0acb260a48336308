"""Time and chance, in one place, so that a test can take both over.

Algorithms ask a `Clock` that they are given; without one they take `SYSTEM`, which
`flask_muset.testing.virtual_clock` turns into a virtual one for a while.
"""

import os
import random
import time
from collections.abc import Callable

__all__ = ["SYSTEM", "Clock"]


def _sleep(seconds: float) -> None:
    # Looked up at each call: gevent may have replaced it after this module was imported.
    time.sleep(seconds)


#: A generator of our own, seeded by the system, so that no caller's seed makes all processes wait
#: alike; a forked worker must not go on with its parent's draws.
_random = random.Random()  # noqa: S311 - waits are no secrets
os.register_at_fork(after_in_child=_random.seed)


class Clock:
    """What an algorithm may know of time and chance.

    Attributes:
        now: Seconds that never go back.
        now_ns: The same in whole nanoseconds.
        sleep: Waits for some seconds.
        uniform: Draws a float from [low, high].
        wall: Seconds since the epoch, for people.
        is_virtual: Whether time stands still unless somebody sleeps.
    """

    __slots__ = ("is_virtual", "now", "now_ns", "sleep", "uniform", "wall")

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = _sleep,
        uniform: Callable[[float, float], float] | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.now = now
        self.now_ns = now_ns
        self.wall = wall
        self.sleep = sleep
        self.uniform = _random.uniform if uniform is None else uniform
        self.is_virtual = False


#: What holds where no clock is given.
SYSTEM = Clock()
