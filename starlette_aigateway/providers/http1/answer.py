"""One answer while it comes in: what the parser finds, and the task that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol, Self

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from ...errors import ProviderError
from .coding import BadCoding, Decoder

WINDOW_BYTES = 2**18
HEAD_BYTES = 2**16
SWITCHING_PROTOCOLS = 101


class Line(Protocol):
    """What an answer wants of its connection. `listen` makes what a task waits for: the silence of the other side counts from now on."""

    def listen(self) -> asyncio.Future[None]: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Answer:
    """An `HTTPAnswer`: the connection feeds it, one task reads it. For a slow reader it keeps about `WINDOW_BYTES`; what has come is
    given before an error that came after it."""

    __slots__ = (
        "_barren", "_complete", "_enough", "_error", "_fields", "_headers", "_line", "_parser", "_parts", "_paused", "_persistent", "_size",
        "_tap", "_until_end", "_waiter", "_window", "on_body", "status",
    )  # fmt: skip

    def __init__(self, line: Line) -> None:
        self.status = 0
        self._line: Line | None = line
        self._fields: dict[bytes, bytes] = {}
        self._headers: Mapping[str, str] | None = None
        self._parts: list[bytes] = []
        self.on_body = self._parts.append  # for the parser, which calls it for each chunk
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._size = 0
        self._window = WINDOW_BYTES
        self._paused = False
        self._barren = 0
        self._until_end = False
        self._persistent = False
        self._complete = False
        self._error: ProviderError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._enough = 0
        self._tap: Callable[[bytes], bool] | None = None

    # -- for the one who reads

    @property
    def headers(self) -> Mapping[str, str]:
        if self._headers is None:
            self._headers = {name.decode("latin-1"): value.strip().decode("utf-8", "replace") for name, value in self._fields.items()}
        return self._headers

    async def head(self) -> None:
        """Returns when the status and the headers are there. Raises `ProviderError`."""
        await self._until(0)
        if not self.status and self._error is not None:
            raise self._error

    async def read(self, limit: int) -> bytes:
        if self._coding:
            return await self._read_decoded(limit)
        self._window = limit
        self._resume()
        await self._until(limit + 1)
        if self._size > limit:
            raise self._too_long(limit)
        if self._error is not None:
            raise self._error
        return self._taken()

    def chunks(self) -> AsyncIterator[bytes]:
        return self._decoded() if self._coding else self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not self._parts:
            await self._until(1)
            if not self._parts:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
        return self._taken()

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """As `pouring.pour`: while this waits, what comes goes to `take` as it comes in."""
        if self._parts and not take(self._taken()):
            return not self._complete
        while not self._complete and self._error is None:
            assert self._line is not None
            self._tap = take
            self._waiter = waiter = self._line.listen()
            try:
                await waiter
            finally:
                refused, self._tap, self._waiter = self._tap is None, None, None
            if refused:
                return not self._complete
        if self._error is not None:
            raise self._error
        return False

    async def _until(self, enough: int) -> None:
        """Waits for the end, and for the head and `enough` bytes of the body at the most."""
        while not (self._complete or self._error is not None or (self.status and self._size >= enough)):
            assert self._line is not None
            self._enough = enough
            self._waiter = waiter = self._line.listen()
            try:
                await waiter
            finally:
                self._waiter = None

    def _taken(self) -> bytes:
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if self._paused:
            self._resume()
        return data

    def _resume(self) -> None:
        if self._paused and self._line is not None:
            self._paused = False
            self._line.resume_reading()

    @property
    def _coding(self) -> str | None:
        coding = self._fields.get(b"content-encoding")
        return None if coding is None or coding.strip().lower() in (b"", b"identity") else coding.strip().lower().decode("latin-1")

    async def _decoded(self) -> AsyncIterator[bytes]:
        try:
            decoder = Decoder(self._coding or "")
            async for data in self:
                for piece in decoder.feed(data):
                    yield piece
            decoder.close()
        except BadCoding as error:
            raise ProviderError("the provider's answer is not in the content coding that it names", status=self.status) from error

    async def _read_decoded(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for data in self._decoded():
            size += len(data)
            if size > limit:
                raise self._too_long(limit)
            parts.append(data)
        return b"".join(parts)

    def _too_long(self, limit: int) -> ProviderError:
        return ProviderError(f"the provider's answer is longer than {limit} bytes", status=self.status)

    # -- for the connection

    @property
    def awaited(self) -> bool:
        """Whether a task waits for what comes next."""
        return self._waiter is not None

    def feed(self, data: bytes) -> None:
        if self._complete or self._parser is None:
            self._persistent = False
            return
        self._barren += len(data)
        before = len(self._parts)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._persistent = False
            self.broke(error)
        if len(self._parts) > before:
            self._barren = 0
            if self._tap is None:
                self._size += sum(map(len, self._parts[before:]))
            elif not self._tap(self._taken()):
                self._tap = None
                self._wake()
        elif self._barren > HEAD_BYTES:  # of no body: a head, or a trailer, without end
            self.broke(None)
        if self._waiter is not None and self.status and (self._complete or (self._tap is None and self._size >= self._enough)):
            self._wake()
        if self._size > self._window and self._line is not None and not self._complete and not self._paused:
            self._paused = True
            self._line.pause_reading()

    def ended(self) -> None:
        """The other side sends nothing more."""
        self._persistent = False
        if self._until_end:
            self._complete = True
            self._wake()
        else:
            self.broke(None)

    def broke(self, cause: Exception | None) -> None:
        error = ProviderError("the connection to the provider broke")
        error.__cause__ = cause
        self.fail(error)

    def fail(self, error: ProviderError) -> None:
        if not self._complete and self._error is None:
            self._error = error
            self._wake()

    def leave(self) -> bool:
        """Nothing more will be fed or waited for. Whether the connection is as it was before."""
        if not self._complete:
            self.broke(None)
        self._line = self._parser = None
        return self._complete and self._persistent and not self._paused

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- for the parser

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("bytes behind the end")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:
            self._fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        parser = self._parser
        if self.status or parser is None:
            return
        status = parser.get_status_code()
        if status < 100 or status == SWITCHING_PROTOCOLS:
            raise ValueError("a status that was not asked for")
        if status < 200:
            self._fields.clear()
            return
        coding = self._fields.get(b"transfer-encoding")
        if coding is not None and coding.strip().lower() != b"chunked":
            raise ValueError("a transfer coding that was not asked for")
        self._until_end = coding is None and b"content-length" not in self._fields
        self._persistent = parser.should_keep_alive() and parser.get_http_version() == "1.1"
        self._barren = 0
        self.status = status

    def on_message_complete(self) -> None:
        if self.status:
            self._complete = True
            self._barren = 0
