"""Server-sent events, read as their bytes come.

Source: the HTML standard, "Server-sent events", "Interpreting an event stream". Ids and `retry` are
left out: nobody here connects again.
"""

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Event", "EventReader"]

_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event; its data is bytes, as a character may have come in two pieces."""

    name: bytes
    data: bytes


class EventReader:
    """Makes events of the pieces of a stream, wherever it was cut into pieces.

    Args:
        max_event_bytes: Length of a line, and of all data of an event, at most.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._name = b""
        self._is_after_cr = False
        self._is_first = True

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that end in the next piece.

        Raises:
            ValueError: An event is too long.
        """
        for line in self._lines(piece):
            if line:
                self._take(line)
            elif event := self._end_event():
                yield event
        if len(self._line) + self._data_bytes > self._max_event_bytes:
            raise ValueError(f"an event is longer than {self._max_event_bytes} bytes")

    def end(self) -> Iterator[Event]:
        """The last event, which some servers do not close with an empty line."""
        yield from self.feed(b"\n\n")

    def _lines(self, piece: bytes) -> Iterator[bytes]:
        if not piece:
            return
        if self._is_after_cr:
            piece = piece.removeprefix(b"\n")
        self._is_after_cr = piece.endswith(b"\r")
        first, *others = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line += first
        for following in others:
            line, self._line = bytes(self._line), bytearray(following)
            yield line

    def _take(self, line: bytes) -> None:
        if self._is_first:
            line, self._is_first = line.removeprefix(_BOM), False
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif field == b"event":
            self._name = value

    def _end_event(self) -> Event | None:
        event = Event(self._name, b"\n".join(self._data)) if self._data else None
        self._data, self._data_bytes, self._name = [], 0, b""
        return event
