"""The process that reads one file: from standard input, within limits that it cannot lift again.

Standard output gets a line of JSON, `{"title": ...}` or `{"refused": ...}`, and then the text. Exit
code 1 is a fault of this program; a signal is a limit, or a parser that has crashed on the file.
"""

import json
import logging
import os
import resource
import sys
from collections.abc import Callable

from muset.adapters.extraction.refusal import RefusedError

__all__ = ["main"]

#: Makes text and title of the file, what its sender says of its charset, and bytes that are enough.
Read = Callable[[bytes, str | None, int], tuple[str, str]]


def _limit(cpu_s: int, memory_bytes: int) -> None:
    """No more time, memory, files or processes than this needs, and no core; others come first."""
    os.nice(10)
    for what, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(what, (most, most))


def _reader(kind: str) -> Read:
    """What reads this kind; only that is loaded, which takes longer than most files do."""
    if kind == "pdf":
        from muset.adapters.extraction.pdf import pdf_text

        return lambda data, _charset, max_bytes: (pdf_text(data, max_bytes), "")
    from muset.adapters.extraction.html import html_text

    return lambda data, charset, _max_bytes: html_text(data, charset)


def _clean(text: str) -> str:
    """Without NUL and halves of surrogate pairs, which broken files have."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "")


def _extract(read: Read, charset: str | None, max_bytes: int) -> bytes:
    text, title = map(_clean, read(sys.stdin.buffer.read(), charset, max_bytes))
    if not text.strip():
        raise RefusedError("no_text")
    # A few bytes more, so that who reads it sees that it is too long.
    return json.dumps({"title": title}).encode() + b"\n" + text.encode()[: max_bytes + 4]


def _answer(read: Read, charset: str | None, max_bytes: int) -> bytes:
    try:
        return _extract(read, charset, max_bytes)
    except RefusedError as error:
        reason = error.reason
    except (MemoryError, RecursionError):
        reason = "too_much"
    except Exception:  # noqa: BLE001 - a broken file ends in any exception of its parser
        reason = "broken"
    return json.dumps({"refused": reason}).encode() + b"\n"


def main() -> None:
    """Arguments: kind, charset (or nothing), bytes of text, seconds of CPU, bytes of memory."""
    kind, charset, max_bytes, cpu_s, memory_bytes = sys.argv[1:]
    read = _reader(kind)
    logging.disable()
    # From here on nothing is trusted.
    _limit(int(cpu_s), int(memory_bytes))
    answer = _answer(read, charset or None, int(max_bytes))
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    # What the parsers have made is not taken apart: a tree may be too deep for that.
    os._exit(0)


if __name__ == "__main__":
    main()
