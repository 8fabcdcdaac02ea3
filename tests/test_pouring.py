"""Reading without a task that wakes for every piece: nothing is lost, doubled or held back, and what goes wrong reaches who reads."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import AIGateway, CompletionRequest, Price, Principal
from starlette_aigateway.errors import ProviderError
from starlette_aigateway.pouring import pour
from starlette_aigateway.providers import OpenAIProvider
from starlette_aigateway.providers.http1.answer import Answer
from starlette_aigateway.providers.http_adapter import Events
from starlette_aigateway.testing.transport import Exchange, raw_server
from starlette_aigateway.types import Chunk, RawEvents, StreamItem
from starlette_aigateway.wires import openai_chat, sse

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
FINISH = sse.encode_event(b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')
DONE = openai_chat.DONE


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def text(word: str) -> bytes:
    return sse.encode_event(json.dumps({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}).encode())


class Line:
    """A connection that another one feeds."""

    def listen(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Body:
    """An `HTTPAnswer` of pieces, as any transport gives it."""

    status = 200
    headers: Mapping[str, str] = {}

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    async def read(self, limit: int) -> bytes:
        return b"".join(self._pieces)

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            await anyio.lowlevel.checkpoint()
            yield piece


class Taker:
    """Says no at the items that are numbered in `no`."""

    def __init__(self, *no: int) -> None:
        self.items: list[StreamItem] = []
        self._no = no

    def __call__(self, item: StreamItem) -> bool:
        self.items.append(item)
        return len(self.items) - 1 not in self._no

    @property
    def words(self) -> str:
        return "".join(chunk.text for chunk in openai_chat.chunks(self.items))


def events(answer: Any) -> Events:
    return Events("up", answer, openai_chat.EventReader())


async def to_the_end(source: AsyncIterator[Any], take: Any) -> int:
    """How often it was asked for more."""
    asked = 1
    with anyio.fail_after(5):
        while await pour(source, take):
            asked += 1
    return asked


@pytest.mark.parametrize("no", [(), (0,), (1,), (0, 1, 2), (3,), (0, 1, 2, 3)])
async def test_all_items_come_once_and_in_order_however_often_somebody_says_no(no: Sequence[int]) -> None:
    take = Taker(*no)
    pieces = text("a"), text("b") + text("c") + FINISH + text("d"), DONE
    assert await to_the_end(events(Body(*pieces)), take) == len(no) + 1
    assert take.words == "abcd"
    assert [type(item) for item in take.items] == [RawEvents, RawEvents, Chunk, RawEvents]


async def test_after_a_no_nothing_more_is_taken_until_it_is_asked_for() -> None:
    take, source = Taker(0), events(Body(text("a") + FINISH + text("b") + DONE))
    assert await pour(source, take)
    assert take.words == "a"
    assert not await pour(source, take)
    assert take.words == "ab"


async def test_an_iterator_that_cannot_pour_is_read_one_by_one() -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(5):
            yield number

    taken: list[int] = []

    def take(number: int) -> bool:
        taken.append(number)
        return number != 2

    source = numbers()
    assert await pour(source, take)
    assert taken == [0, 1, 2]
    assert not await pour(source, take)
    assert taken == [0, 1, 2, 3, 4]


async def test_what_is_wrong_with_the_bytes_is_raised_after_what_came_before_it() -> None:
    take = Taker()
    with pytest.raises(ProviderError, match="not a chat completion chunk"):
        await to_the_end(events(Body(text("a"), text("b") + b'data: "finish_reason"\n\n')), take)
    assert take.words == "ab"


async def test_a_stream_that_is_cut_short_is_told() -> None:
    take = Taker()
    with pytest.raises(ProviderError, match="cut short"):
        await to_the_end(events(Body(text("a"))), take)
    assert take.words == "a"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
class TestOnAConnection:
    async def test_what_comes_is_handed_on_before_any_task_wakes(self) -> None:
        answer, take = Answer(Line()), Taker()
        answer.feed(HEAD)
        reading = asyncio.create_task(to_the_end(events(answer), take))
        await asyncio.sleep(0)
        answer.feed(chunked(text("a")))
        assert take.words == "a"
        answer.feed(chunked(text("b")) + chunked(text("c")))
        assert take.words == "abc"
        assert not reading.done()
        answer.feed(chunked(FINISH + DONE) + END)
        assert await reading == 1

    async def test_after_a_no_what_comes_waits_for_the_task(self) -> None:
        answer, take = Answer(Line()), Taker(0)
        answer.feed(HEAD)
        source = events(answer)
        reading = asyncio.create_task(source.pour(take))
        await asyncio.sleep(0)
        answer.feed(chunked(text("a")))
        answer.feed(chunked(text("b")))
        assert take.words == "a"
        assert await reading
        answer.feed(chunked(text("c") + FINISH + DONE) + END)
        assert await to_the_end(source, take) == 1
        assert take.words == "abc"

    @pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt()])
    async def test_what_goes_wrong_with_an_item_is_raised_by_who_reads(self, error: BaseException) -> None:
        answer = Answer(Line())
        answer.feed(HEAD)

        def take(item: StreamItem) -> bool:
            raise error

        source = events(answer)
        waiting = source.pour(take)
        waiting.send(None)
        answer.feed(chunked(text("a")))
        with pytest.raises(type(error)):
            waiting.send(None)

    async def test_a_connection_that_breaks_is_told_after_what_came_before(self) -> None:
        answer, take = Answer(Line()), Taker()
        answer.feed(HEAD)
        reading = asyncio.create_task(to_the_end(events(answer), take))
        await asyncio.sleep(0)
        answer.feed(chunked(text("a")))
        answer.broke(None)
        with pytest.raises(ProviderError, match="broke"):
            await reading
        assert take.words == "a"

    async def test_nobody_takes_for_a_reader_that_was_cancelled(self) -> None:
        answer, take = Answer(Line()), Taker()
        answer.feed(HEAD)
        reading = asyncio.create_task(to_the_end(events(answer), take))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        answer.feed(chunked(text("a")))
        assert take.items == []

    async def test_a_slow_reader_holds_up_the_provider_and_gets_everything(self, tmp_path: Path) -> None:
        word, words = "x" * 100_000, 400
        sent = 0

        async def handle(exchange: Exchange) -> None:
            nonlocal sent
            await exchange.start_chunked()
            for _ in range(words):
                await exchange.chunk(text(word))
                sent += 1
            await exchange.chunk(FINISH + DONE)
            await exchange.stream.send(END)

        prices = {"m": Price("1", "1")}
        async with raw_server(handle) as server, OpenAIProvider("key", f"{server.url}/v1", models=["m"]) as provider:
            gateway = AIGateway(providers=[provider], prices=prices, data_dir=tmp_path)
            request = CompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])
            async with gateway.lifespan(), gateway.stream(Principal(id="who"), request) as stream:
                got = len((await anext(stream)).text)
                for _ in range(100):
                    await anyio.wait_all_tasks_blocked()
                assert sent < words / 2
                async for chunk in stream:
                    got += len(chunk.text)
        assert (got, sent) == (words * len(word), words)
