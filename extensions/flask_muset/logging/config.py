"""What logging may be told, checked once."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from flask_muset.logging import pipeline
from flask_muset.logging.files import LogFile, StandardError
from flask_muset.logging.pipeline import Pipeline

__all__ = ["configure", "configured", "reset"]

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_FORMATS = ("json", "text")


def _level_number(level: str | int) -> int:
    if isinstance(level, int) and not isinstance(level, bool):
        return level
    name = level.strip().upper() if isinstance(level, str) else ""
    if name not in _LEVELS:
        raise ValueError(f"level must be one of {', '.join(_LEVELS)}, got {level!r}.")
    return logging.getLevelNamesMapping()[name]


def _opened(file: str | os.PathLike[str], max_bytes: int, backups: int) -> LogFile:
    try:
        return LogFile(file, max_bytes=max_bytes, backups=backups)
    except OSError as failure:
        raise ValueError(
            f"file {os.fspath(file)!r} cannot be written ({failure.strerror}); make its folder, "
            f"or let this process's user write there."
        ) from failure


def configure(
    level: str | int = "INFO",
    format: str = "json",  # noqa: A002 - the name of the setting
    file: str | os.PathLike[str] | None = None,
    *,
    file_max_bytes: int = 100_000_000,
    file_backups: int = 5,
    access_log: bool = True,
    slow_request_s: float | None = None,
) -> None:
    """Write the logs of the process: ours, loguru's and the standard library's.

    Lines always go to standard error. Call it before or after a fork, and again with other
    arguments; a call that raises leaves everything as it was.

    Args:
        level: The least that is written, DEBUG to CRITICAL.
        format: `json` for a JSON object in each line, `text` for people.
        file: Where lines go as well; many processes may write the same one.
        file_max_bytes: Size from which the file is rotated, 0 to leave that to others.
        file_backups: How many rotated files are kept, at least 1.
        access_log: Whether each request of an app that has `init_app` is one line of level INFO.
        slow_request_s: Seconds from which such a request is a warning as well, None for never.

    Raises:
        ValueError: An argument is not allowed, or the file cannot be written.
    """
    number = _level_number(level)
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {format!r}.")
    if slow_request_s is not None and not slow_request_s > 0:
        raise ValueError(
            f"slow_request_s must be above 0, or None for never, got {slow_request_s!r}."
        )
    opened = None if file is None else _opened(file, file_max_bytes, file_backups)
    pipeline.install(
        Pipeline(
            level=number,
            make=pipeline.make_of(format),
            is_text=format == "text",
            stderr=StandardError(),
            file=opened,
            access_log=access_log and number <= logging.INFO,
            slow_request_s=slow_request_s,
        )
    )


def reset() -> None:
    """Leave logging as it was before `configure`."""
    pipeline.uninstall()


@contextmanager
def configured(
    level: str | int = "INFO",
    format: str = "json",  # noqa: A002
    file: str | os.PathLike[str] | None = None,
    *,
    file_max_bytes: int = 100_000_000,
    file_backups: int = 5,
    access_log: bool = True,
    slow_request_s: float | None = None,
) -> Iterator[None]:
    """`configure` for a block, and `reset` after it; for tests."""
    configure(
        level,
        format,
        file,
        file_max_bytes=file_max_bytes,
        file_backups=file_backups,
        access_log=access_log,
        slow_request_s=slow_request_s,
    )
    try:
        yield
    finally:
        reset()
