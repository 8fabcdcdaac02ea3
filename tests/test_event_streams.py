"""A stream as it is written out: what waits goes out at once, and what came before an error goes out before it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
from starlette.types import Message

from starlette_aigateway.errors import ProviderError
from starlette_aigateway.http.sse import Dialect, EventStreamResponse, id_headers, writer_of
from starlette_aigateway.streams import AnswerStream
from starlette_aigateway.types import Chunk, Present, RawEvents, StreamItem

pytestmark = pytest.mark.anyio

HELLO = RawEvents("openai_chat", b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\n', 1)
GARBAGE = RawEvents("openai_chat", b"data: {garbage\n\n", 1)
END = Chunk(finish_reason="stop")


class Given(AnswerStream):
    """Comes in the `portions` that it is given, and then ends, or breaks off with an error."""

    def __init__(self, portions: Sequence[Sequence[StreamItem]], error: ProviderError | None = None) -> None:
        super().__init__(request_id="req_1", created=1, windows=(), provider="p", cache="miss")
        self._portions = [*portions]
        self._error = error

    async def next_items(self) -> Sequence[StreamItem]:
        if self._portions:
            return self._portions.pop(0)
        if self._error is not None:
            raise self._error
        return ()


async def served(stream: Given, wire: Dialect) -> tuple[EventStreamResponse, list[Message]]:
    @asynccontextmanager
    async def opened(present: Present) -> AsyncIterator[AnswerStream]:
        yield stream

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    response = EventStreamResponse(opened, writer_of(wire, "m", True), id_headers("req_1"), patience=60)
    response.headers["x-cache"] = "the host's own"
    response.headers["x-own"] = "kept"
    await response({"type": "http"}, receive, send)
    return response, sent


def bodies(sent: list[Message]) -> list[bytes]:
    return [message["body"] for message in sent if message["type"] == "http.response.body"]


async def test_what_came_meanwhile_goes_out_in_one_piece() -> None:
    _, sent = await served(Given([[HELLO], [HELLO, HELLO, END]]), "openai")
    first, second, last = bodies(sent)
    assert first == HELLO.data
    assert second.startswith(HELLO.data * 2)
    assert b'"finish_reason":"stop"' in second
    assert last == b"data: [DONE]\n\n"
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]


async def test_what_came_before_an_item_that_cannot_be_read_goes_out_before_the_error() -> None:
    _, sent = await served(Given([[HELLO, GARBAGE, HELLO]]), "native")
    (body,) = bodies(sent)
    assert body.startswith(b'event: delta\ndata: {"content":"Hel"}\n\nevent: error\n')
    assert sent[-1]["more_body"] is False


async def test_a_stream_that_breaks_off_ends_with_the_error() -> None:
    _, sent = await served(Given([[HELLO]], ProviderError("it broke")), "openai")
    assert bodies(sent)[0] == HELLO.data
    assert b"it broke" in bodies(sent)[1]
    assert sent[-1]["more_body"] is False


async def test_headers_of_the_host_are_kept_and_those_of_the_gateway_are_told_once() -> None:
    response, sent = await served(Given([[HELLO]]), "openai")
    headers = sent[0]["headers"]
    assert [value for name, value in headers if name == b"x-cache"] == [b"miss"]
    assert (b"x-own", b"kept") in headers
    assert response.headers["x-request-id"] == response.headers["request-id"] == "req_1"


async def test_items_are_read_one_by_one_all_the_same() -> None:
    stream = Given([[HELLO], [HELLO, END]])
    assert [await stream.next_item() for _ in range(4)] == [HELLO, HELLO, END, None]


async def test_iterating_gives_what_came_before_a_chunk_that_cannot_be_read() -> None:
    stream = Given([[HELLO, GARBAGE]])
    assert (await anext(stream)).text == "Hel"
    with pytest.raises(ProviderError):
        await anext(stream)
