"""Which fault it is: the same answer for the same fault on different data."""

import hashlib
import site
import sysconfig
from functools import lru_cache
from types import FrameType

__all__ = ["fingerprint_of", "type_name"]

_LIBRARIES = tuple(
    {
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
    }
)


@lru_cache(maxsize=4096)
def _is_library(filename: str, module: str) -> bool:
    return (
        filename.startswith(("<frozen", *_LIBRARIES))
        or "site-packages" in filename
        or module.partition(".")[0] == "flask_muset"
    )


def type_name(exception: BaseException) -> str:
    """Module and name of the exception's class, builtins by their bare name."""
    cls = type(exception)
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )


@lru_cache(maxsize=4096)
def _digest(kind: str, place: str) -> str:
    return hashlib.sha256(f"{kind} {place}".encode("utf-8", "replace")).hexdigest()[:12]


def fingerprint_of(exception: BaseException) -> tuple[str, str]:
    """Return the fingerprint and the place that it stands for.

    The place is the innermost frame of the application's own code, a library's only where there is
    none: module, function, and the line counted from the function's first, so that an edit above
    the function changes nothing.
    """
    own: tuple[FrameType, int] | None = None
    last: tuple[FrameType, int] | None = None
    trace = exception.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        last = (frame, trace.tb_lineno)
        if not _is_library(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
            own = last
        trace = trace.tb_next
    where = own or last
    place = "?" if where is None else _place(*where)
    return _digest(type_name(exception), place), place


def _place(frame: FrameType, line: int) -> str:
    code = frame.f_code
    module = frame.f_globals.get("__name__", "?")
    return f"{module}:{code.co_qualname}+{line - code.co_firstlineno}"
