"""An answer as server-sent events, in the caller's dialect. The call is let in before the headers go out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from time import monotonic
from typing import Literal, Protocol, TypeAlias

import msgspec
from msgspec.structs import replace
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import AIGatewayError
from ..observing import ToldPipeline
from ..pipeline import Pipeline
from ..streams import AnswerStream
from ..types import CallOptions, CompletionRequest, Present, Principal, RawEvents, StreamItem, Usage
from ..wires import openai_chat, sse
from . import shapes
from .bodies import ClientLeft
from .errors import error_object, error_response, window_headers
from .pace import Pace
from .presence import StreamClient, while_taken
from .replies import Header, answer_nobody, as_text

Dialect = Literal["openai", "native"]
OpenStream: TypeAlias = Callable[[Present], AbstractAsyncContextManager[AnswerStream]]
"""Is given what tells whether the client is still there."""

HEADERS: Sequence[Header] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Writer(Protocol):
    """One dialect: what goes out for an item, at the end, and for an error in mid-stream."""

    def item(self, item: StreamItem) -> bytes: ...

    def end(self, stream: AnswerStream) -> bytes: ...

    def error(self, error: AIGatewayError) -> bytes: ...


class OpenAIWriter:
    """The Chat Completions stream. Events of a provider that speaks it go out as they came; usage only if it was asked for."""

    def __init__(self, stream: AnswerStream, model: str, include_usage: bool) -> None:
        self._id = f"chatcmpl-{stream.request_id}"
        self._model = model
        self._created = stream.created
        self._include_usage = include_usage

    def item(self, item: StreamItem) -> bytes:
        if isinstance(item, RawEvents):
            return item.data
        if not self._include_usage and openai_chat.usage_only(item):
            return b""
        return openai_chat.encode_chunk(item, id=self._id, model=self._model, created=self._created)

    def end(self, stream: AnswerStream) -> bytes:
        return openai_chat.DONE

    def error(self, error: AIGatewayError) -> bytes:
        return sse.encode_event(msgspec.json.encode(error_object(error)))


class NativeWriter:
    """Events `delta`, then `done` with the whole object, or `error`."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._answer = openai_chat.Assembly()

    def item(self, item: StreamItem) -> bytes:
        events: list[bytes] = []
        for chunk in openai_chat.chunks((item,)):
            self._answer.add(chunk)
            if chunk.delta:
                events.append(sse.encode_event(msgspec.json.encode(chunk.delta), event="delta"))
        return b"".join(events)

    def end(self, stream: AnswerStream) -> bytes:
        return sse.encode_event(msgspec.json.encode(shapes.stream_end(stream, self._answer.completion(), self._model)), event="done")

    def error(self, error: AIGatewayError) -> bytes:
        return sse.encode_event(msgspec.json.encode(error_object(error)), event="error")


class EventStreamResponse(Response):
    """Opens the stream when it is served, so that nothing is left open if it never is. `background` runs when everything was sent, or the
    client has left.

    `usage`, `cost_usd` and `finish_reason` are known when the stream has come to its end; they stay None where the client left before.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        writer: Callable[[AnswerStream], Writer],
        id_headers: Iterable[Header],
        *,
        patience: float,
        ends_with_its_caller: bool = False,
    ) -> None:
        """`patience` is how many seconds the client may take nothing. A stream that `ends_with_its_caller` is given up as soon as that one
        leaves."""
        self.status_code = 200
        self.background = None
        self.raw_headers = [*HEADERS, *id_headers]
        self.stream: AnswerStream | None = None
        self._open_stream = open_stream
        self._writer = writer
        self._patience = patience
        self._ends_with_its_caller = ends_with_its_caller

    @property
    def usage(self) -> Usage | None:
        return self.stream.usage if self.stream is not None else None

    @property
    def cost_usd(self) -> Decimal | None:
        return self.stream.cost_usd if self.stream is not None else None

    @property
    def finish_reason(self) -> str | None:
        return self.stream.finish_reason if self.stream is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes until the stream ends, or the client leaves or takes nothing more, also before its first content; leaving ends the block
        of the stream, which settles it. What is left unended the server closes."""
        pace = Pace(self._patience)
        try:
            refusal = await while_taken(receive, lambda client: self._serve(send, pace, client), pace, at_once=self._ends_with_its_caller)
        except ClientLeft:
            refusal = None
            if self.stream is None:
                await answer_nobody(send)
        if refusal is not None:
            await refusal(scope, receive, send)
        if self.background is not None:
            await self.background()

    async def _serve(self, send: Send, pace: Pace, client: StreamClient) -> Response | None:
        """What is answered instead, where the call is refused before the stream has begun. Leaving the block settles: it is not cut off."""
        begun = False
        try:
            async with self._open_stream(client.present) as stream:
                begun = True
                self.stream = stream
                try:
                    await self._write(stream, send, pace)
                finally:
                    client.end()
        except AIGatewayError as error:
            if begun:
                raise
            return self._refusal(error)
        return None

    def _refusal(self, error: AIGatewayError) -> Response:
        response = error_response(error)
        for name in ("x-request-id", "request-id"):
            if name in self.headers:
                response.headers[name] = self.headers[name]
        return response

    async def _write(self, stream: AnswerStream, send: Send, pace: Pace) -> None:
        writer = self._writer(stream)
        self._tell(stream_headers(stream))
        more = True
        try:
            pace.since = monotonic()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            pace.since = None
            while more:
                try:
                    data, more = _encoded(await stream.next_items(), stream, writer)
                except AIGatewayError as error:
                    data, more = writer.error(error), False
                if data or not more:
                    pace.since = monotonic()
                    await send({"type": "http.response.body", "body": data, "more_body": more})
                    pace.since = None
        except OSError:  # a server may also tell by a failing send that the client is gone (ASGI 2.4)
            return

    def _tell(self, told: list[Header]) -> None:
        names = {name for name, _ in told}
        self.raw_headers[:] = [header for header in self.raw_headers if header[0] not in names] + told


def _encoded(items: Sequence[StreamItem], stream: AnswerStream, writer: Writer) -> tuple[bytes, bool]:
    """What goes out, and whether more may come. An error in mid-stream is the last of it; one at its beginning is raised."""
    if not items:
        return writer.end(stream), False
    if len(items) == 1:
        return writer.item(items[0]), True
    parts: list[bytes] = []
    try:
        for item in items:
            parts.append(writer.item(item))  # noqa: PERF401  # what came before an error is kept
    except AIGatewayError as error:
        parts.append(writer.error(error))
        return b"".join(parts), False
    return b"".join(parts), True


class EventStream:
    """A stream that is open, as what a framework makes a response of: `headers`, and the body by iterating. It is closed at its end, and
    by `aclose()`; leaving it early settles the call.

    `usage`, `cost_usd` and `finish_reason` are known after its end.
    """

    def __init__(self, opened: AbstractAsyncContextManager[AnswerStream], stream: AnswerStream, writer: Writer, request_id: str) -> None:
        self.stream = stream
        self.headers = as_text([*HEADERS, *id_headers(request_id), *stream_headers(stream)])
        self._opened = opened
        self._writer = writer
        self._ended = False
        self._left = False

    @property
    def usage(self) -> Usage | None:
        return self.stream.usage

    @property
    def cost_usd(self) -> Decimal | None:
        return self.stream.cost_usd

    @property
    def finish_reason(self) -> str | None:
        return self.stream.finish_reason

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Whole events. An error in mid-stream is the last of them, as over HTTP."""
        try:
            while (data := await self._next()) is not None:
                if data:
                    yield data
        finally:
            await self.aclose()

    async def _next(self) -> bytes | None:
        if self._ended:
            return None
        try:
            data, more = _encoded(await self.stream.next_items(), self.stream, self._writer)
        except AIGatewayError as error:
            data, more = self._writer.error(error), False
        self._ended = not more
        return data

    async def aclose(self) -> None:
        if not self._left:
            self._left = True
            await self._opened.__aexit__(None, None, None)


def id_headers(request_id: str) -> list[Header]:
    minted = request_id.encode()
    return [(b"x-request-id", minted), (b"request-id", minted)]


def stream_headers(stream: AnswerStream) -> list[Header]:
    headers = window_headers(stream.windows)
    headers.append((b"x-cache", stream.cache.encode()))
    headers.append((b"x-aigateway-provider", stream.provider.encode()))
    if stream.age is not None:
        headers.append((b"age", b"%d" % stream.age))
    if stream.lowered_to is not None:
        headers.append((b"x-aigateway-max-tokens", b"%d" % stream.lowered_to))
    if stream.replayed:
        headers.append((b"idempotency-replayed", b"true"))
    return headers


def writer_of(wire: Dialect, model: str, include_usage: bool) -> Callable[[AnswerStream], Writer]:
    """`model` is the one that was asked for."""

    def writer(stream: AnswerStream) -> Writer:
        return OpenAIWriter(stream, model, include_usage) if wire == "openai" else NativeWriter(model)

    return writer


def stream_response(
    pipeline: Pipeline | ToldPipeline,
    principal: Principal,
    request: CompletionRequest,
    options: CallOptions,
    request_id: str,
    *,
    wire: Dialect,
    include_usage: bool = False,
    id_headers: Iterable[Header],
) -> EventStreamResponse:
    return EventStreamResponse(
        lambda present: pipeline.stream(principal, request, replace(options, present=present), request_id),
        writer_of(wire, request.model, include_usage),
        id_headers,
        patience=pipeline.send_seconds,
        ends_with_its_caller=pipeline.ends_with_its_caller,
    )
