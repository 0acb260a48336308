"""Loggers with the standard library's methods."""

import logging
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from loguru import logger as loguru

from flask_muset.logging.fields import current_scope
from flask_muset.logging.pipeline import ENTRY, IN_USE, Entry, lost
from flask_muset.logging.values import text_of

__all__ = ["Logger", "get_logger", "unformatted"]

_NAMES = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
_RECORDS_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def unformatted(message: Any, args: Any) -> str:
    """A message and its arguments where the one is no format for the others."""
    shown = args if isinstance(args, tuple) else (args,)
    return " ".join([text_of(message), *map(text_of, shown)])


def _formatted(message: Any, args: tuple[Any, ...]) -> str:
    if not args:
        return text_of(message)
    # As in the standard library, one mapping gives the values of named places.
    values = args[0] if len(args) == 1 and args[0] and isinstance(args[0], Mapping) else args
    try:
        return text_of(message) % values
    except Exception:  # noqa: BLE001 - arguments may raise anything, or not fit the text
        return unformatted(message, args)


def _exception(exc_info: Any) -> BaseException | None:
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        found: BaseException | None = exc_info[1]
        return found
    return sys.exc_info()[1] if exc_info else None


class Logger:
    """A logger with the standard library's methods; braces in a message mean nothing.

    A message is formatted with `%` where arguments are given. Before `configure` it hands its lines
    to the standard library's logger of the same name.

    Attributes:
        name: What its lines bear as `logger`.
    """

    __slots__ = ("_bound", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        # The caller's frame, for other sinks: it called one of ours, which called another.
        self._bound = loguru.bind(**{ENTRY: Entry(name)}).opt(depth=2, raw=True)

    def __repr__(self) -> str:
        return f"<Logger {self.name}>"

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the standard library's name
        """Whether lines of a level are written."""
        state = IN_USE.pipeline
        if state is None:
            return logging.getLogger(self.name).isEnabledFor(level)
        return level >= state.level

    def debug(self, message: Any, *args: Any, **options: Any) -> None:
        """Log a line of level DEBUG; the options are those of `log`."""
        self._log(10, message, args, **options)

    def info(self, message: Any, *args: Any, **options: Any) -> None:
        """Log a line of level INFO; the options are those of `log`."""
        self._log(20, message, args, **options)

    def warning(self, message: Any, *args: Any, **options: Any) -> None:
        """Log a line of level WARNING; the options are those of `log`."""
        self._log(30, message, args, **options)

    def error(self, message: Any, *args: Any, **options: Any) -> None:
        """Log a line of level ERROR; the options are those of `log`."""
        self._log(40, message, args, **options)

    def exception(self, message: Any, *args: Any, exc_info: Any = True, **options: Any) -> None:
        """Log a line of level ERROR with the exception that is being handled."""
        self._log(40, message, args, exc_info=exc_info, **options)

    def critical(self, message: Any, *args: Any, **options: Any) -> None:
        """Log a line of level CRITICAL; the options are those of `log`."""
        self._log(50, message, args, **options)

    def log(self, level: int, message: Any, *args: Any, **options: Any) -> None:
        """Log a line.

        Args:
            level: Number of a level.
            message: Its text, a format of `%` if arguments follow.
            *args: Values for it.
            **options: `extra`, fields of this line by name; `exc_info`, an exception, or True for
                the one that is being handled; `stack_info`, True for the stack as a field `stack`.
        """
        self._log(level, message, args, **options)

    def _log(
        self,
        level: int,
        message: Any,
        args: tuple[Any, ...],
        *,
        extra: Mapping[str, Any] | None = None,
        exc_info: Any = None,
        stack_info: bool = False,
        stacklevel: int = 1,
    ) -> None:
        state = IN_USE.pipeline
        if state is None:
            self._to_standard_library(level, message, args, extra, exc_info, stack_info, stacklevel)
            return
        if level < state.level:
            return
        bound = self._bound
        try:
            if stack_info:
                extra = {**(extra or {}), "stack": "".join(traceback.format_stack()[:-2])}
            if extra or exc_info:
                bound = bound.bind(**{ENTRY: Entry(self.name, extra, _exception(exc_info))})
            text = message if type(message) is str and not args else _formatted(message, args)
            bound.log(_NAMES.get(level, level), text)
        except Exception as failure:  # noqa: BLE001 - logging must never break what logs
            lost("a line", failure)

    def _to_standard_library(
        self,
        level: int,
        message: Any,
        args: tuple[Any, ...],
        extra: Mapping[str, Any] | None,
        exc_info: Any,
        stack_info: bool,
        stacklevel: int,
    ) -> None:
        scope = current_scope.get()
        fields = {**({} if scope is None else scope.fields), **(extra or {})}
        logging.getLogger(self.name).log(
            level,
            message,
            *args,
            exc_info=exc_info,
            stack_info=stack_info,
            stacklevel=stacklevel + 3,
            extra={f"{key}_" if key in _RECORDS_OWN else key: fields[key] for key in fields},
        )


@lru_cache(maxsize=4096)
def get_logger(name: str) -> Logger:
    """Return the logger of a name, usually a module's `__name__`."""
    return Logger(name)
