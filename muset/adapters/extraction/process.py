"""Reads a file in a process of its own: no file can block, fill or end the worker."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, cast

from flask_muset.deadline import deadline
from flask_muset.errors import InternalError, ValidationError
from muset.ports import Extracted

__all__ = ["CPU_S", "MEMORY_BYTES", "REASONS", "ProcessExtractor"]

#: Seconds of computing, seconds in all, and bytes that one file may take: a refusal comes before
#: the deadline of a request, which is 30 s unless REQUEST_TIMEOUT says otherwise.
CPU_S, WALL_S, MEMORY_BYTES = 10, 20.0, 512 * 1024 * 1024
#: What people are told, by reason.
REASONS: Mapping[str, str] = {
    "broken": "cannot be read: it is damaged, or no file of this kind",
    "encrypted": "is encrypted; save it without a password",
    "no_text": "has no visible text; pages that are pictures must be recognised (OCR) first",
    "too_many_pages": "has more than 5,000 pages; split it",
    "too_much": "takes too much time or memory to read; split it, or save it as plain text",
}
#: What may be the name of a charset; a client may send anything.
_CHARSET = re.compile(r"[A-Za-z0-9._:-]{1,40}")
#: Limits of the process, and crashes of a parser that are due to the file.
_LIMITS = (signal.SIGXCPU, signal.SIGKILL)
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class ProcessExtractor:
    """Implements `muset.ports.Extractor`.

    Args:
        max_bytes: Enough of a text, in UTF-8; what is longer is cut behind it.
        cpu_s: Seconds of computing.
        wall_s: Seconds in all, within the deadline.
        memory_bytes: Of address space.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        cpu_s: int = CPU_S,
        wall_s: float = WALL_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._max_bytes = max_bytes
        self._limits = (str(cpu_s), str(memory_bytes))
        self._wall_s = wall_s

    def extract(self, data: bytes, kind: str, charset: str | None = None) -> Extracted:
        """The text of a file.

        Args:
            data: The file.
            kind: `html` or `pdf`.
            charset: What its sender says.

        Raises:
            ValidationError: It cannot be read, and why.
            OperationTimeoutError: The deadline has passed.
            InternalError: The program that reads it has failed.
        """
        module = "muset.adapters.extraction.child"
        known = charset if charset and _CHARSET.fullmatch(charset) else ""
        arguments = [kind, known, str(self._max_bytes), *self._limits]
        # -P: what lies in the working directory is no module. No variable of ours goes along, so
        # that no secret is within reach of what may be wrong with a parser.
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", module, *arguments],
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            out, err = process.communicate(data, timeout=self._seconds())
        except subprocess.TimeoutExpired:
            deadline.check()
            raise _refused("too_much") from None
        finally:
            # Whatever has ended the wait: a greenlet that is killed leaves no process behind.
            if process.returncode is None:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with suppress(OSError):  # what could not be written is lost, as it should be
                    cast(IO[bytes], pipe).close()
        return _result(process.returncode, out, err)

    def _seconds(self) -> float:
        left = deadline.remaining()
        # Timers may fire early: a little later the deadline has passed for certain.
        return self._wall_s if left is None else min(left + 0.05, self._wall_s)


def _result(code: int, out: bytes, err: bytes) -> Extracted:
    if -code in _LIMITS:
        raise _refused("too_much")
    if -code in _CRASHES:
        raise _refused("broken")
    if code != 0:
        text = err[-1000:].decode("utf-8", "replace")
        raise InternalError(f"the process that reads files has ended with {code}: {text}")
    head, _, text_bytes = out.partition(b"\n")
    answer = json.loads(head)
    if "refused" in answer:
        raise _refused(answer["refused"])
    return Extracted(text_bytes.decode("utf-8", "ignore"), answer["title"])


def _refused(reason: str) -> ValidationError:
    return ValidationError(REASONS[reason], field="file", code=reason)
