"""What every provider promises, over those that come with the gateway, simple ones, and the scripted one; a bad one is found out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from starlette_aigateway import Chunk, Completion, CompletionRequest, ProviderError, Usage
from starlette_aigateway.providers import AnthropicProvider, EchoProvider, OpenAIProvider
from starlette_aigateway.testing import Hang, ProviderContract, Say, ScriptedProvider, Stuck
from starlette_aigateway.testing.transport import Exchange, Handler, raw_server
from starlette_aigateway.wires import sse

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Async generator 'http.*was garbage collected:ResourceWarning"),  # as in test_transport
]

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


# -- the echo ------------------------------------------------------------------------------------------------------------


class StuckEcho(EchoProvider):
    """Stops after its first piece."""

    def __init__(self) -> None:
        super().__init__()
        self.stuck = Stuck(self)

    async def complete(self, request: CompletionRequest) -> Completion:
        await self._stop()
        raise AssertionError

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        try:
            yield Chunk(delta={"content": "one"})
            await self._stop()
        finally:
            self.stuck.released.set()

    async def _stop(self) -> None:
        self.stuck.arrived.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.stuck.released.set()


class BrokenEcho(EchoProvider):
    async def complete(self, request: CompletionRequest) -> Completion:
        raise RuntimeError(f"cannot say {request.messages}")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "one"})
        raise RuntimeError(f"cannot say {request.messages}")


class TestEcho(ProviderContract):
    @pytest.fixture
    def provider(self) -> object:
        return EchoProvider()

    @pytest.fixture
    def broken(self) -> object:
        return BrokenEcho()

    @pytest.fixture
    def stuck(self) -> Stuck:
        return StuckEcho().stuck


class TestWithoutStreams(TestEcho):
    """A provider of one method, whose streams the gateway makes."""

    @pytest.fixture
    def provider(self) -> object:
        return WholeOnly(EchoProvider())

    @pytest.fixture
    def broken(self) -> object:
        return WholeOnly(BrokenEcho())

    @pytest.fixture
    def stuck(self) -> Stuck:
        echo = StuckEcho()
        echo.stuck.provider = WholeOnly(echo)
        return echo.stuck

    async def test_a_stream_that_is_left_is_closed(self, stuck: Stuck, ask: CompletionRequest) -> None:
        """It has no stream that could be left: the whole answer is waited for."""
        await self.test_a_call_that_is_cancelled_lets_go_of_what_it_held(stuck, ask, stream=True)


class WholeOnly:
    name = "whole"

    def __init__(self, provider: EchoProvider) -> None:
        self._provider = provider

    async def complete(self, request: CompletionRequest) -> Completion:
        return await self._provider.complete(request)


# -- the scripted one ----------------------------------------------------------------------------------------------------


class StuckScript(ScriptedProvider):
    def __init__(self) -> None:
        self.stuck = Stuck(self)
        super().__init__(Hang(self.stuck.arrived, after=1, text="one two"))

    async def complete(self, request: CompletionRequest) -> Completion:
        try:
            return await super().complete(request)
        finally:
            self.stuck.released.set()

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        source = super().stream(request)
        try:
            async for chunk in source:
                yield chunk
        finally:
            await source.aclose()  # type: ignore[attr-defined]  # an async generator
            assert self.closed == 1
            self.stuck.released.set()


class TestScripted(ProviderContract):
    @pytest.fixture
    def provider(self) -> object:
        return ScriptedProvider(Say("one", usage=Usage(input_tokens=10, output_tokens=1)), repeat=True)

    @pytest.fixture
    def broken(self) -> object:
        return ScriptedProvider(ProviderError("no", billed="no"), ProviderError("no"))

    @pytest.fixture
    def stuck(self) -> Stuck:
        return StuckScript().stuck


# -- adapters over a socket ----------------------------------------------------------------------------------------------

Reply = Callable[[Sequence[str], str], bytes]


def openai_whole(words: Sequence[str], finish: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": " ".join(words)}, "finish_reason": finish}
    return json.dumps({"id": "c", "model": "m", "choices": [choice], "usage": openai_usage(words)}).encode()


def openai_usage(words: Sequence[str]) -> dict[str, int]:
    return {"prompt_tokens": 11, "completion_tokens": len(words)}


def openai_stream(words: Sequence[str], finish: str) -> list[bytes]:
    def chunk(delta: Any, finish: str | None = None) -> dict[str, Any]:
        return {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    chunks = [*(chunk({"content": word}) for word in words), chunk({}, finish), {"id": "c", "choices": [], "usage": openai_usage(words)}]
    return [*(sse.encode_event(json.dumps(chunk).encode()) for chunk in chunks), b"data: [DONE]\n\n"]


def anthropic_whole(words: Sequence[str], finish: str) -> bytes:
    return json.dumps(
        {
            "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": " ".join(words)}],
            "stop_reason": {"stop": "end_turn", "length": "max_tokens"}[finish], "stop_sequence": None,
            "usage": {"input_tokens": 11, "output_tokens": len(words)},
        }
    ).encode()  # fmt: skip


def anthropic_stream(words: Sequence[str], finish: str) -> list[bytes]:
    whole = json.loads(anthropic_whole(words, finish))
    start = whole | {"content": [], "stop_reason": None, "usage": {"input_tokens": 11, "output_tokens": 1}}

    def event(name: str, **fields: Any) -> bytes:
        return sse.encode_event(json.dumps({"type": name, **fields}).encode(), event=name)

    return [
        event("message_start", message=start),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(event("content_block_delta", index=0, delta={"type": "text_delta", "text": word}) for word in words),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": whole["stop_reason"], "stop_sequence": None}, usage={"output_tokens": len(words)}),
        event("message_stop"),
    ]


def answering(whole: Callable[..., bytes], events: Callable[..., list[bytes]]) -> Handler:
    """An upstream that obeys its bound, a word for a token."""

    async def handle(exchange: Exchange) -> None:
        asked = json.loads(exchange.body)
        words = WORDS[: asked["max_tokens"]]
        finish = "stop" if words == WORDS else "length"
        if not asked.get("stream"):
            await exchange.answer(whole(words, finish))
            return
        await exchange.start_chunked()
        for event in events(words, finish):
            await exchange.chunk(event)
        await exchange.stream.send(b"0\r\n\r\n")

    return handle


async def failing(exchange: Exchange) -> None:
    """Repeats the prompt in its error, as some do."""
    await exchange.answer(json.dumps({"error": {"message": exchange.body.decode(), "type": "x"}}).encode(), status="500 Broken")


def sticking(stuck: Stuck, events: Callable[..., list[bytes]]) -> Handler:
    async def handle(exchange: Exchange) -> None:
        try:
            if json.loads(exchange.body).get("stream"):
                await exchange.start_chunked()
                for event in events(WORDS, "stop")[:3]:
                    await exchange.chunk(event)
            stuck.arrived.set()
            await exchange.wait_closed()
        finally:  # the client may be gone before everything was sent
            stuck.released.set()

    return handle


@asynccontextmanager
async def served(handle: Handler, make: Callable[[str], object]) -> AsyncIterator[object]:
    async with raw_server(handle) as server:
        yield make(server.url)


class OverASocket(ProviderContract):
    whole: Callable[..., bytes]
    events: Callable[..., list[bytes]]

    def make(self, url: str) -> object:
        raise NotImplementedError

    @pytest.fixture
    async def provider(self, anyio_backend: str) -> AsyncIterator[object]:
        async with served(answering(type(self).whole, type(self).events), self.make) as provider:
            yield provider

    @pytest.fixture
    async def broken(self, anyio_backend: str) -> AsyncIterator[object]:
        async with served(failing, self.make) as provider:
            yield provider

    @pytest.fixture
    async def stuck(self, anyio_backend: str) -> AsyncIterator[Stuck]:
        stuck = Stuck(None)
        async with served(sticking(stuck, type(self).events), self.make) as provider:
            stuck.provider = provider
            yield stuck


class TestOpenAI(OverASocket):
    whole, events = staticmethod(openai_whole), staticmethod(openai_stream)

    def make(self, url: str) -> object:
        return OpenAIProvider("sk-x", f"{url}/v1")


class TestAnthropic(OverASocket):
    whole, events = staticmethod(anthropic_whole), staticmethod(anthropic_stream)

    def make(self, url: str) -> object:
        return AnthropicProvider("sk-x", url)


# -- what it finds out ---------------------------------------------------------------------------------------------------

ASK = CompletionRequest(model="m", messages=[{"role": "user", "content": "one two three four five six"}], max_tokens=100)
CONTRACT = ProviderContract()


class Unbounded(EchoProvider):
    async def complete(self, request: CompletionRequest) -> Completion:
        return await super().complete(CompletionRequest(model=request.model, messages=request.messages))


class Meddling(EchoProvider):
    async def complete(self, request: CompletionRequest) -> Completion:
        request.messages[0]["content"] = "something else"
        return await super().complete(request)


class Uncounted(EchoProvider):
    async def complete(self, request: CompletionRequest) -> Completion:
        return Completion(message={"role": "assistant", "content": "hi"})


class Endless(EchoProvider):
    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        for _ in range(2):
            async for chunk in super().stream(request):
                yield chunk


class Leaking(StuckEcho):
    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "one"})
        self.stuck.arrived.set()
        await anyio.sleep_forever()


ONE_ERROR = ProviderError("always the same")


class Remembering(EchoProvider):
    async def complete(self, request: CompletionRequest) -> Completion:
        raise ONE_ERROR


class Gossiping(EchoProvider):
    async def complete(self, request: CompletionRequest) -> Completion:
        raise ProviderError(f"upstream said: cannot say {request.messages}")


MARKED = CompletionRequest(model="m", messages=[{"role": "user", "content": "xyzzy"}])
FOUND: list[tuple[str, Callable[[], Awaitable[None]]]] = [
    ("bound", lambda: CONTRACT.test_the_bound_of_the_output_is_obeyed(Unbounded(), ASK, stream=False)),
    ("request", lambda: CONTRACT.test_a_request_is_left_as_it_was(Meddling(), ASK, stream=False)),
    ("usage", lambda: CONTRACT.test_a_whole_answer_is_a_message_that_says_how_it_ended_and_what_it_took(Uncounted(), ASK)),
    ("end", lambda: CONTRACT.test_a_stream_gives_content_then_says_once_how_it_ended_and_what_it_took(Endless(), ASK)),
    ("error", lambda: CONTRACT.test_the_error_of_one_call_is_not_that_of_the_next(Remembering(), ASK)),
    ("prompt", lambda: CONTRACT.test_a_failure_is_an_error_that_says_what_is_known_and_repeats_nothing(Gossiping(), MARKED, stream=False)),
    ("stuck", lambda: CONTRACT.test_a_call_that_is_cancelled_lets_go_of_what_it_held(Leaking().stuck, ASK, stream=True)),
    ("left", lambda: CONTRACT.test_a_stream_that_is_left_is_closed(Leaking().stuck, ASK)),
]


@pytest.mark.parametrize(("name", "check"), FOUND, ids=[name for name, _ in FOUND])
async def test_a_provider_that_breaks_a_promise_is_found_out(
    name: str, check: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starlette_aigateway.testing.provider_contract.PATIENCE", 0.2)
    ASK.messages[0]["content"] = "one two three four five six"
    with pytest.raises((AssertionError, TimeoutError)):
        await check()
