"""A bound on the time of one call."""

from typing import Any

from flask_muset.clock import SYSTEM
from flask_muset.configuration import ABOVE_ZERO, check
from flask_muset.deadline import Scope, deadline
from flask_muset.errors import OperationTimeoutError
from flask_muset.locks import refuse_asyncio_under_gevent
from flask_muset.resilience.guards import Part
from flask_muset.signals import Decision

__all__ = ["Timeout"]


class Timeout(Part):
    """End a call with `OperationTimeoutError` when its time is up.

    It is a deadline like any other: it nests to the smaller, and what the call does inside of it
    can ask what is left. Work that waits is cut off under gevent and asyncio. Work that computes,
    and any work in a thread, is not: it is counted as an overrun when it ends, and its result is
    returned.

    Args:
        seconds: Above 0.
    """

    kind = "timeout"

    def __init__(self, seconds: float) -> None:
        self._options = {"seconds": seconds}
        check("Timeout", self._options, {"seconds": ABOVE_ZERO})
        self.seconds = seconds
        super().__init__()

    def enter(self) -> Scope:
        """Start the time."""
        scope = Scope(self.seconds)
        scope.enter()
        return scope

    def leave(self, token: Scope, error: BaseException | None) -> BaseException | None:
        """Stop the time."""
        ours, late = token.leave(error)
        if ours is not None:
            self.tell(Decision.TIMED_OUT, error=error)
            return ours
        if late:
            self.tell(Decision.OVERRUN, error=error)
        return None

    async def aenter(self) -> Any:
        """Start the time; asyncio's own time-out cuts the task off."""
        refuse_asyncio_under_gevent()
        block = deadline(self.seconds)
        return block, await block.__aenter__()

    async def aleave(self, token: Any, error: BaseException | None) -> BaseException | None:
        """Stop the time."""
        block, scope = token
        kind, trace = (type(error), error.__traceback__) if error is not None else (None, None)
        late = scope.is_running and SYSTEM.now() > scope.at
        try:
            await block.__aexit__(kind, error, trace)
        except OperationTimeoutError as ours:
            self.tell(Decision.TIMED_OUT, error=error)
            return ours
        if late:
            self.tell(Decision.OVERRUN, error=error)
        return None
