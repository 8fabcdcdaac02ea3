"""Server-sent events on bytes (WHATWG HTML, section 9.2.6 "Interpreting an event stream").

Lines end with LF, CR or CRLF and with nothing else: JSON may hold U+2028 raw, which line iterators of HTTP clients split at. Line
ends are turned into LF as the bytes come in, so that all else here looks for one byte; JSON text never holds a raw CR.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

MAX_EVENT_BYTES = 16 * 2**20
CR, LF = b"\r\n"  # a byte is looked for as a number: for bytes, `in` first tries that and fails, which costs as much as a long search
BOM = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """A stream that cannot be read on: an event longer than the bound."""


class SSEEvent(Struct, frozen=True, gc=False):
    """One dispatched event. `data` has its lines joined by LF, `raw` are the bytes to send it on with, blank line included."""

    event: str | None
    data: bytes
    raw: bytes


class BlockReader:
    """Cuts a stream into blocks: `feed` gives the bytes up to the last blank line seen, with LF as line ends.

    The result is empty or ends with a blank line, and does not depend on where the stream was split. Raises `SSEError` as soon as one
    block is longer than `max_event_bytes`.
    """

    __slots__ = ("_after_cr", "_buffer", "_max", "_start", "_started")

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._buffer = bytearray()
        self._after_cr = False
        self._start = b""
        self._started = False

    def feed(self, data: bytes) -> bytes:
        whole = data.endswith(b"\n\n") and CR not in data and len(data) <= self._max
        if whole and self._started and not self._buffer and not self._after_cr:
            return data  # as most reads are: nothing is to be turned, and nothing left over
        if not self._started:
            data = self._without_bom(data)
        if self._after_cr or CR in data:
            data = self._with_lf(data)
        if not self._buffer:
            complete, rest = split_complete(data)
            self._buffer += rest
        else:
            seen = max(0, len(self._buffer) - 1)
            self._buffer += data
            end = self._buffer.rfind(b"\n\n", seen) + 2
            complete = bytes(self._buffer[:end]) if end >= 2 else b""
            del self._buffer[: len(complete)]
        self._check_size(complete)
        return complete

    def close(self) -> bytes:
        """What came after the last blank line, as a block. The standard drops it; servers that end without one do exist."""
        rest = self._start + bytes(self._buffer)
        self._start, self._buffer = b"", bytearray()
        return rest + b"\n\n" if rest.strip(b"\n") else b""

    def _without_bom(self, data: bytes) -> bytes:
        data = self._start + data
        if len(data) < len(BOM) and BOM.startswith(data):
            self._start = data
            return b""
        self._started, self._start = True, b""
        return data.removeprefix(BOM)

    def _with_lf(self, data: bytes) -> bytes:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _check_size(self, complete: bytes) -> None:
        if len(self._buffer) > self._max or (
            len(complete) > self._max and any(len(block) > self._max for block in complete.split(b"\n\n"))
        ):
            raise SSEError(f"an event of the stream is longer than {self._max} bytes")


class SSEDecoder:
    """An incremental decoder: the events are the same wherever the bytes are split. Raises `SSEError`."""

    __slots__ = ("_blocks",)

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._blocks = BlockReader(max_event_bytes=max_event_bytes)

    def feed(self, data: bytes) -> list[SSEEvent]:
        return decode_events(self._blocks.feed(data))

    def close(self) -> list[SSEEvent]:
        """The event that the stream ended in, if its blank line is missing."""
        return decode_events(self._blocks.close())


def split_complete(buffer: bytes) -> tuple[bytes, bytes]:
    """Whole events and the rest of `buffer`, whose line ends are LF."""
    end = buffer.rfind(b"\n\n")
    return (b"", buffer) if end < 0 else (buffer[: end + 2], buffer[end + 2 :])


def decode_events(blocks: bytes) -> list[SSEEvent]:
    """The events of whole blocks with LF as line ends, in order. Blocks without a `data` field dispatch nothing."""
    return [event for block in blocks.split(b"\n\n") if (event := decode_block(block)) is not None]


def events_of(blocks: bytes) -> Iterator[SSEEvent]:
    """The same one by one, each decoded when it is asked for."""
    start = 0
    while start < len(blocks):
        end = blocks.find(b"\n\n", start)
        end = len(blocks) if end < 0 else end
        event = decode_block(blocks[start:end])
        if event is not None:
            yield event
        start = end + 2


def decode_block(block: bytes) -> SSEEvent | None:
    block = block.strip(b"\n")
    if block.startswith(b"data: ") and LF not in block:
        return SSEEvent(None, block[6:], block + b"\n\n")
    first, _, second = block.partition(b"\n")
    if first.startswith(b"event: ") and second.startswith(b"data: ") and LF not in second:
        return SSEEvent(first[7:].decode("utf-8", "replace") or None, second[6:], block + b"\n\n")
    name: str | None = None
    data: list[bytes] = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace") or None
    return SSEEvent(name, b"\n".join(data), block + b"\n\n") if data else None


def encode_event(data: bytes, event: str | None = None) -> bytes:
    """One event as it goes out. `event` must be one line."""
    if event is not None and ("\n" in event or "\r" in event):
        raise ValueError("the name of an event must be one line")
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    if LF not in data and CR not in data:
        return head + b"data: " + data + b"\n\n"
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return head + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


def encode_comment(text: str = "") -> bytes:
    """A comment, which clients ignore: it keeps a silent connection open. `text` must be one line."""
    return b": " + text.replace("\r", " ").replace("\n", " ").encode() + b"\n\n"
