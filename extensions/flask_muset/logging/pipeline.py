"""The way of a line through the process: loguru, standard error, a file; and the way back."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loguru import logger as loguru

from flask_muset.logging.files import LogFile, StandardError, say
from flask_muset.logging.lines import coloured, json_line, text_line

__all__ = [
    "ENTRY",
    "IN_USE",
    "Entry",
    "Intercept",
    "Pipeline",
    "install",
    "lost",
    "lost_lines",
    "make_of",
    "uninstall",
]

#: Under this name in a record's `extra`: what loguru need not know.
ENTRY = "flask_muset"


class Entry(NamedTuple):
    """What a sender knows of its line beside level and message.

    Attributes:
        name: Of the logger.
        extra: Fields.
        exception: What is logged with it.
    """

    name: str
    extra: Mapping[str, Any] | None = None
    exception: BaseException | None = None


@dataclass(slots=True)
class Pipeline:
    """What `configure` set up.

    Attributes:
        level: The least that is written, as a number of `logging`.
        make: Makes a line.
        access_log: Whether each request is one line.
        slow_request_s: Seconds from which a request is also a warning, None for never.
    """

    level: int
    make: Callable[..., str]
    is_text: bool
    stderr: StandardError
    file: LogFile | None
    access_log: bool
    slow_request_s: float | None
    undo: list[Callable[[], object]] = field(default_factory=list)

    def write(self, line: str, level: str) -> None:
        """Write a line everywhere; what cannot be written is counted and said once."""
        try:
            if self.is_text and self.stderr.is_terminal:
                self.stderr.write(coloured(line, level))
            else:
                self.stderr.write(line)
        except (OSError, ValueError) as failure:
            lost("standard error", failure)
        if self.file is not None:
            try:
                self.file.write(line)
            except OSError as failure:
                lost(self.file.path, failure)

    def take(self, record: Any) -> bool:
        """Make and write the line of a record of loguru, as the filter of a handler without a sink.

        A handler's formatter makes a template of each line anew, and its lock is gevent's where
        gevent has patched: real threads that meet in it may wait for ever.
        """
        extra = record["extra"]
        level = record["level"].name
        entry: Entry = extra.get(ENTRY) or _foreign(record)
        try:
            line = self.make(level, entry.name, record["message"], entry.extra, entry.exception)
        except Exception as failure:  # noqa: BLE001 - what is logged may raise anything
            lost("a line", failure)
            line = self.make(level, entry.name, f"(not loggable: {type(failure).__name__})")
        self.write(line, level)
        return False


def _nowhere(_message: Any) -> None: ...


def _foreign(record: Any) -> Entry:
    """What was logged with loguru itself."""
    exception = record["exception"]
    return Entry(
        record["name"] or "",
        record["extra"],
        None if exception is None else exception.value,
    )


# --- What could not be logged ---------------------------------------------------------------------


class _Losses:
    count = 0


def lost_lines() -> int:
    """How many lines this process could not make or write; each kind was said on stderr once."""
    return _Losses.count


def lost(what: str, failure: BaseException) -> None:
    """Count a line that is lost, and say the first of its kind; it never raises."""
    _Losses.count += 1
    say(f"{what} cannot be written", failure)


# --- Set up and undone ----------------------------------------------------------------------------


class _InUse:
    """What is set up, None where nothing is; an object, because others look at it at each line."""

    __slots__ = ("pipeline",)
    pipeline: Pipeline | None

    def __init__(self) -> None:
        self.pipeline = None


IN_USE = _InUse()
_lock = threading.Lock()
#: Of the handler that loguru adds by itself; a number that may be gone.
_default_handler = 0


def make_of(form: str) -> Callable[..., str]:
    """The function that makes a line of a form."""
    return text_line if form == "text" else json_line


def install(pipeline: Pipeline) -> None:
    """Set it up in place of the one before."""
    with _lock:
        if IN_USE.pipeline is not None:
            _undo(IN_USE.pipeline)
        _take_loguru(pipeline)
        _take_standard_library(pipeline)
        IN_USE.pipeline = pipeline


def uninstall() -> None:
    """Leave logging as it was before `install`."""
    with _lock:
        if IN_USE.pipeline is not None:
            _undo(IN_USE.pipeline)
        IN_USE.pipeline = None


def _undo(pipeline: Pipeline) -> None:
    for step in reversed(pipeline.undo):
        step()
    if pipeline.file is not None:
        pipeline.file.close()


def _take_loguru(pipeline: Pipeline) -> None:
    with contextlib.suppress(ValueError):
        loguru.remove(_default_handler)
        pipeline.undo.append(_add_default)
    # Errors are caught by the senders: loguru's own report would show the record as it is.
    number = loguru.add(
        _nowhere,
        filter=pipeline.take,
        format="",
        level=pipeline.level,
        colorize=False,
        backtrace=False,
        diagnose=False,
        enqueue=False,
        catch=False,
    )

    def remove() -> None:
        with contextlib.suppress(ValueError):  # somebody removed all
            loguru.remove(number)

    pipeline.undo.append(remove)


def _add_default() -> None:
    global _default_handler
    if sys.stderr is not None:
        _default_handler = loguru.add(sys.stderr, diagnose=False)


def _take_standard_library(pipeline: Pipeline) -> None:
    root = logging.getLogger()
    old_level = root.level
    root.setLevel(pipeline.level)
    pipeline.undo.append(lambda: root.setLevel(old_level))
    _replace(root, _writes_to_terminal, pipeline)
    handler = Intercept()
    root.addHandler(handler)
    pipeline.undo.append(lambda: root.removeHandler(handler))
    for logger in _named_loggers():
        _replace(logger, _is_a_servers, pipeline)
    # Remembered, because somebody else may have captured them before.
    if not _captures_warnings():
        logging.captureWarnings(capture=True)
        pipeline.undo.append(lambda: logging.captureWarnings(capture=False))


def _captures_warnings() -> bool:
    return getattr(logging, "_warnings_showwarning", None) is not None


def _named_loggers() -> list[logging.Logger]:
    known = list(logging.Logger.manager.loggerDict.values())
    return [logger for logger in known if isinstance(logger, logging.Logger)]


def _writes_to_terminal(handler: logging.Handler) -> bool:
    """Whether it would write each line once more; what collects lines elsewhere is left."""
    return isinstance(handler, Intercept) or (
        type(handler) is logging.StreamHandler
        and handler.stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    )


def _is_a_servers(handler: logging.Handler) -> bool:
    """The handlers of gunicorn itself, and the one that Flask adds where it finds none."""
    flask = sys.modules.get("flask.logging")
    return getattr(handler, "_gunicorn", False) is True or (
        flask is not None and handler is flask.default_handler
    )


def _replace(
    logger: logging.Logger, condition: Callable[[logging.Handler], bool], pipeline: Pipeline
) -> None:
    """Remove a logger's handlers, so that the root's get its records."""
    removed = [handler for handler in logger.handlers if condition(handler)]
    if not removed:
        return
    propagate = logger.propagate
    for handler in removed:
        logger.removeHandler(handler)
    logger.propagate = True

    def put_back() -> None:
        logger.propagate = propagate
        for handler in removed:
            logger.addHandler(handler)

    pipeline.undo.append(put_back)


# --- From the standard library --------------------------------------------------------------------

#: What every record has; what it has beside them came as `extra`.
_STANDARD = frozenset(
    vars(logging.LogRecord("", 0, "", 0, "", (), None)).keys()
    | {"message", "asctime", "taskName", "stack_info"}
)
_LEVELS = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})


class Intercept(logging.Handler):
    """Hands the records of the standard library on."""

    def createLock(self) -> None:  # noqa: N802 - the standard library's name
        """It needs none: loguru's handler has its own."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on one record."""
        try:
            extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
            if record.stack_info:
                extra["stack"] = record.stack_info
            entry = Entry(record.name, extra, _exception_of(record))
            level = record.levelname if record.levelname in _LEVELS else record.levelno
            loguru.bind(**{ENTRY: entry}).opt(depth=6, raw=True).log(level, _message_of(record))
        except Exception as failure:  # noqa: BLE001 - logging must never break what logs
            lost("a line", failure)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - arguments may raise anything, or not fit the text
        from flask_muset.logging.loggers import unformatted

        return unformatted(record.msg, record.args)


def _exception_of(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if isinstance(record.exc_info, tuple) else None
