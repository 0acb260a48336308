"""Which fault it is: the same answer for the same fault on different data."""

import hashlib
import os
import site
import sysconfig
from functools import lru_cache
from types import TracebackType

__all__ = ["fingerprint_of", "type_name"]

_LIBRARIES = tuple(
    {
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
    }
)


_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


@lru_cache(maxsize=4096)
def _is_library(filename: str) -> bool:
    return filename.startswith(("<frozen", _OURS, *_LIBRARIES)) or "site-packages" in filename


def type_name(exception: BaseException) -> str:
    """Module and name of the exception's class, builtins by their bare name."""
    return _name_of(type(exception))  # type: ignore[arg-type] # mypy doubts that classes hash


@lru_cache(maxsize=1024)
def _name_of(cls: type) -> str:
    name = cls.__qualname__
    return name if cls.__module__ == "builtins" else f"{cls.__module__}.{name}"


def fingerprint_of(exception: BaseException) -> tuple[str, str]:
    """Return the fingerprint, 12 hexadecimal digits, and the place that it stands for.

    The place is the innermost frame of the application's own code, a library's only where there is
    none: module, function, and the line counted from the function's first, so that an edit above
    the function changes nothing.
    """
    own: TracebackType | None = None
    last: TracebackType | None = None
    trace = exception.__traceback__
    while trace is not None:
        last = trace
        if not _is_library(trace.tb_frame.f_code.co_filename):
            own = trace
        trace = trace.tb_next
    where = own or last
    if where is None:
        return _digest(type(exception), "?"), "?"
    code = where.tb_frame.f_code
    module = where.tb_frame.f_globals.get("__name__", "?")
    line = where.tb_lineno - code.co_firstlineno
    return _fault(type(exception), module, code.co_qualname, line)  # type: ignore[arg-type] # same


@lru_cache(maxsize=4096)
def _fault(cls: type, module: str, function: str, line: int) -> tuple[str, str]:
    place = f"{module}:{function}+{line}"
    return _digest(cls, place), place


def _digest(cls: type, place: str) -> str:
    text = f"{_name_of(cls)} {place}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
