"""An answer as server-sent events, in the caller's dialect. The call is let in before the headers go out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import AIGatewayError
from ..observing import ToldPipeline
from ..pipeline import Pipeline
from ..streams import AnswerStream
from ..types import CallOptions, CompletionRequest, Principal, RawEvents, StreamItem
from ..wires import openai_chat, sse
from . import shapes
from .bodies import ClientLeft
from .errors import error_object, error_response, window_headers
from .pace import Pace
from .presence import while_present

Dialect = Literal["openai", "native"]
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


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
        self._items: list[StreamItem] = []

    def item(self, item: StreamItem) -> bytes:
        self._items.append(item)
        return b"".join(
            sse.encode_event(msgspec.json.encode(chunk.delta), event="delta") for chunk in openai_chat.chunks((item,)) if chunk.delta
        )

    def end(self, stream: AnswerStream) -> bytes:
        completion = openai_chat.assemble(self._items)
        return sse.encode_event(msgspec.json.encode(shapes.stream_end(stream, completion, self._model)), event="done")

    def error(self, error: AIGatewayError) -> bytes:
        return sse.encode_event(msgspec.json.encode(error_object(error)), event="error")


class EventStreamResponse(Response):
    """Opens the stream when it is served, so that nothing is left open if it never is."""

    def __init__(
        self, open_stream: Callable[[], Any], writer: Callable[[AnswerStream], Writer], id_headers: Mapping[str, str], *, patience: float
    ) -> None:
        """`patience` is how many seconds the client may take nothing."""
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS | dict(id_headers))
        self._open_stream = open_stream
        self._writer = writer
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes until the stream ends, or the client leaves or takes nothing more, also before its first content; leaving ends the block
        of the stream, which settles it. What is left unended the server closes."""
        pace = Pace(send, self._patience)
        try:
            refusal = await while_present(receive, lambda: self._serve(pace.send), pace.stalled)
        except ClientLeft:
            return
        if refusal is not None:
            await refusal(scope, receive, send)

    async def _serve(self, send: Send) -> Response | None:
        """What is answered instead, where the call is refused before the stream has begun."""
        begun = False
        try:
            async with self._open_stream() as stream:
                begun = True
                with suppress(OSError):  # a server may also tell by a failing send that the client is gone (ASGI 2.4)
                    await self._write(stream, send)
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

    async def _write(self, stream: AnswerStream, send: Send) -> None:
        writer = self._writer(stream)
        self.headers.update(stream_headers(stream))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while (item := await stream.next_item()) is not None:
                if data := writer.item(item):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            last = writer.end(stream)
        except AIGatewayError as error:
            last = writer.error(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def stream_headers(stream: AnswerStream) -> dict[str, str]:
    headers = window_headers(stream.windows) | {"x-cache": stream.cache, "x-aigateway-provider": stream.provider}
    if stream.age is not None:
        headers["age"] = str(int(stream.age))
    if stream.lowered_to is not None:
        headers["x-aigateway-max-tokens"] = str(stream.lowered_to)
    if stream.replayed:
        headers["idempotency-replayed"] = "true"
    return headers


def stream_response(
    pipeline: Pipeline | ToldPipeline,
    principal: Principal,
    request: CompletionRequest,
    options: CallOptions,
    request_id: str,
    *,
    wire: Dialect,
    include_usage: bool = False,
    id_headers: Mapping[str, str] | None = None,
) -> Response:
    def writer(stream: AnswerStream) -> Writer:
        return OpenAIWriter(stream, request.model, include_usage) if wire == "openai" else NativeWriter(request.model)

    return EventStreamResponse(
        lambda: pipeline.stream(principal, request, options, request_id),
        writer,
        id_headers or {"x-request-id": request_id, "request-id": request_id},
        patience=pipeline.send_seconds,
    )
