"""OpenAI-compatible upstreams: what is sent, what their statuses mean, what becomes of broken answers."""

import copy
import json
import pickle
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import anyio
import pytest

from starlette_aigateway.errors import InvalidArgument, ProviderError, ProviderRejected, ProviderTimeout
from starlette_aigateway.protocols import Adapter, HTTPAnswer, HTTPRequest
from starlette_aigateway.providers import OpenAIProvider
from starlette_aigateway.providers.simple import adapt
from starlette_aigateway.providers.upstream import retry_after, status_error
from starlette_aigateway.testing.transport import PATIENCE, Exchange, Handler, RawServer, raw_server
from starlette_aigateway.types import Chunk, Completion, CompletionRequest, ProviderCall, RawEvents, StreamItem, Usage
from starlette_aigateway.wires import openai_chat, sse

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Async generator 'http.*was garbage collected:ResourceWarning"),  # as in test_transport
]

KEY = "sk-proj-very-secret"
ANSWER = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "up-2024",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
).encode()


def chunk(delta: Mapping[str, Any] | None = None, finish: str | None = None, **fields: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return sse.encode_event(json.dumps({"id": "c1", "model": "up", "choices": choices, "usage": None, **fields}).encode())


TEXT, FINISH = chunk({"content": "Hi"}), chunk({}, "stop")
USAGE = chunk(usage={"prompt_tokens": 3, "completion_tokens": 2})


def call(stream: bool = False, **fields: Any) -> ProviderCall:
    request = CompletionRequest(model="up", messages=[{"role": "user", "content": "x"}], max_tokens=9, params={"seed": 1})
    return ProviderCall(**{"request": request, "stream": stream, "timeout": PATIENCE, "request_id": "req_1", **fields})


@asynccontextmanager
async def upstream(handle: Handler, **options: Any) -> AsyncIterator[tuple[OpenAIProvider, RawServer]]:
    async with raw_server(handle) as server, OpenAIProvider(KEY, f"{server.url}/v1", **options) as provider:
        yield provider, server


async def complete(provider: OpenAIProvider, **fields: Any) -> Completion:
    with anyio.fail_after(PATIENCE):
        async with provider.open(call(**fields)) as answer:
            return await answer.completion()


async def stream(provider: OpenAIProvider) -> list[StreamItem]:
    with anyio.fail_after(PATIENCE):
        async with provider.open(call(stream=True)) as answer:
            return [item async for item in answer.events()]


def answering(body: bytes, status: str = "200 OK", headers: bytes = b"") -> Handler:
    async def handle(exchange: Exchange) -> None:
        await exchange.answer(body, status=status, headers=headers)

    return handle


def streaming(*events: bytes, cut: bool = False) -> Handler:
    async def handle(exchange: Exchange) -> None:
        await exchange.start_chunked()
        for event in events:
            await exchange.chunk(event)
        if cut:
            await exchange.stream.aclose()
        else:
            await exchange.stream.send(b"0\r\n\r\n")

    return handle


def sent(exchange: Exchange) -> tuple[dict[str, str], Any]:
    lines = exchange.head.decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}, json.loads(exchange.body)


async def test_an_answer_comes_back_with_its_usage_and_its_body() -> None:
    async with upstream(answering(ANSWER)) as (provider, _):
        completion = await complete(provider)
    assert completion == openai_chat.decode_completion(ANSWER)
    assert completion.usage == Usage(input_tokens=3, output_tokens=2)


async def test_the_request_carries_the_key_and_the_bound_and_what_is_safe_to_send_on() -> None:
    options: dict[str, Any] = {"organization": "org", "project": "proj", "headers": {"X-Host": "1", "User-Agent": "mine"}}
    async with upstream(answering(ANSWER), **options) as (provider, server):
        await complete(provider, headers={"X-Trace": "t", "Authorization": "Bearer of-the-caller"})
    headers, body = sent(server.exchanges[0])
    assert server.exchanges[0].head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert server.exchanges[0].head.lower().count(b"authorization:") == 1
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["content-type"] == "application/json"
    assert (headers["openai-organization"], headers["openai-project"]) == ("org", "proj")
    assert (headers["x-host"], headers["user-agent"], headers["x-trace"]) == ("1", "mine", "t")
    assert body == {"model": "up", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "seed": 1}


async def test_a_stream_asks_for_its_usage_and_forwards_events_as_they_came() -> None:
    async with upstream(streaming(TEXT, TEXT + FINISH, USAGE, openai_chat.DONE), max_tokens_field="max_completion_tokens") as (
        provider,
        server,
    ):
        items = await stream(provider)
    _, body = sent(server.exchanges[0])
    assert (body["stream"], body["stream_options"], body["max_completion_tokens"]) == (True, {"include_usage": True}, 9)
    assert "max_tokens" not in body
    assert b"".join(item.data for item in items if isinstance(item, RawEvents)) == TEXT + TEXT
    assert [(item.finish_reason, item.usage) for item in items if isinstance(item, Chunk)] == [
        ("stop", None),
        (None, Usage(input_tokens=3, output_tokens=2)),
    ]


async def test_connections_are_used_again_after_streams() -> None:
    async with upstream(streaming(TEXT, FINISH, openai_chat.DONE)) as (provider, server):
        for _ in range(3):
            await stream(provider)
    assert server.connections == 1


async def test_a_stream_whose_upstream_does_not_hang_up_ends_with_done() -> None:
    async def handle(exchange: Exchange) -> None:
        await exchange.start_chunked()
        await exchange.chunk(TEXT + FINISH + openai_chat.DONE)
        await exchange.wait_closed()

    async with upstream(handle) as (provider, _):
        assert len(await stream(provider)) == 2


async def test_a_stream_without_done_is_complete_once_it_has_a_finish_reason() -> None:
    async with upstream(streaming(TEXT, FINISH)) as (provider, _):
        assert len(await stream(provider)) == 2


@pytest.mark.parametrize("cut", [True, False])
async def test_a_stream_that_is_cut_short_is_an_error_after_what_was_said(cut: bool) -> None:
    async with upstream(streaming(TEXT, cut=cut)) as (provider, _), provider.open(call(stream=True)) as answer:
        events = answer.events()
        assert isinstance(await anext(events), RawEvents)
        with pytest.raises(ProviderError) as caught:
            await anext(events)
    assert caught.value.billed == "unknown"


async def test_an_error_event_is_an_error_of_the_provider() -> None:
    async with upstream(streaming(TEXT, b'data: {"error": {"message": "' + KEY.encode() + b'", "code": "server_error"}}\n\n')) as (
        provider,
        _,
    ):
        with pytest.raises(ProviderError) as caught:
            await stream(provider)
    assert (caught.value.billed, caught.value.details) == ("unknown", {"code": "server_error"})
    assert KEY not in str(caught.value)


async def test_leaving_a_stream_early_closes_its_connection() -> None:
    closed = anyio.Event()

    async def handle(exchange: Exchange) -> None:
        await exchange.start_chunked()
        await exchange.chunk(TEXT)
        await exchange.wait_closed()
        closed.set()

    with anyio.fail_after(PATIENCE):
        async with upstream(handle) as (provider, _):
            async with provider.open(call(stream=True)) as answer:
                await anext(answer.events())
            await closed.wait()


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", ANSWER[:-9], b'{"error": {"message": "sk-proj-very-secret"}}'])
async def test_a_success_with_garbage_may_have_been_billed(body: bytes) -> None:
    async with upstream(answering(body)) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await complete(provider)
    assert (caught.value.billed, caught.value.code, caught.value.status) == ("unknown", "provider_error", 200)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind", "retryable", "billed"),
    [
        (302, ProviderError, True, "no"),
        (400, ProviderRejected, False, "no"),
        (401, ProviderError, True, "no"),
        (402, ProviderError, True, "no"),
        (403, ProviderError, True, "no"),
        (404, ProviderError, True, "no"),
        (408, ProviderTimeout, True, "unknown"),
        (409, ProviderError, True, "no"),
        (413, ProviderRejected, False, "no"),
        (422, ProviderRejected, False, "no"),
        (429, ProviderError, True, "no"),
        (500, ProviderError, True, "no"),
        (502, ProviderError, True, "no"),
        (503, ProviderError, True, "no"),
        (504, ProviderTimeout, True, "unknown"),
        (524, ProviderTimeout, True, "unknown"),
        (529, ProviderError, True, "no"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_each_status_says_what_it_means_for_retries_and_money(
    status: int, kind: type[ProviderError], retryable: bool, billed: str, streamed: bool
) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key: {KEY}", "type": KEY, "code": "some_code", "param": "messages"}}).encode()
    async with upstream(answering(body, f"{status} X")) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await (stream(provider) if streamed else complete(provider))
    error = caught.value
    assert (type(error), error.retryable, error.billed, error.status) == (kind, retryable, billed, status)
    assert error.details == {"code": "some_code", "param": "messages"}
    assert KEY not in f"{error} {error.details} {error.__cause__}"


def test_an_unknown_model_goes_on_to_the_next_provider_whatever_its_status() -> None:
    error = status_error("p", 400, {}, {"code": "model_not_found"}, now=0)
    assert (type(error), error.retryable, error.billed) == (ProviderError, True, "no")


async def test_an_error_with_an_endless_body_is_still_the_error() -> None:
    async def handle(exchange: Exchange) -> None:
        await exchange.stream.send(b"HTTP/1.1 429 X\r\ntransfer-encoding: chunked\r\nretry-after: 3\r\n\r\n")
        while True:
            await exchange.chunk(b"x" * 10_000)

    async with upstream(handle) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await complete(provider)
    assert (caught.value.status, caught.value.retry_after, caught.value.billed) == (429, 3.0, "no")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "9999999999"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "7", "retry-after-ms": "x"}, 7.0),
        ({"retry-after": formatdate(1060, usegmt=True)}, 60.0),
        ({"retry-after": formatdate(900, usegmt=True)}, 0.0),
        ({"retry-after": formatdate(5060, usegmt=True), "date": formatdate(5000, usegmt=True)}, 60.0),
        ({"retry-after": "Fri, 99 Foo 2026 99:00:00 GMT"}, None),
    ],
)
def test_the_wait_is_read_from_the_headers(headers: Mapping[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=1000.0) == seconds


async def test_a_date_without_a_date_of_the_answer_is_measured_by_our_clock() -> None:
    later = formatdate(time.time() + 100, usegmt=True).encode()
    async with upstream(answering(b"", "503 X", b"retry-after: " + later + b"\r\n")) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await complete(provider)
    assert caught.value.retry_after is not None
    assert 90 < caught.value.retry_after <= 100


async def test_a_silent_upstream_is_a_timeout_by_the_shorter_of_read_and_the_attempts_timeout() -> None:
    for fields in ({"timeout": 0.1}, {"read": 0.1}):
        async with upstream(Exchange.wait_closed) as (provider, _):
            with pytest.raises(ProviderTimeout) as caught:
                await complete(provider, **fields)
        assert caught.value.billed == "unknown"


def test_openais_own_address_serves_openais_names() -> None:
    provider = OpenAIProvider(KEY)
    for name in (
        "gpt-4o-mini",
        "gpt-5",
        "o1",
        "o3-mini",
        "o4-mini",
        "chatgpt-4o-latest",
        "codex-mini-latest",
        "ft:gpt-4o:org::id",
        "ft:o4-mini:x",
    ):
        assert provider.serves(name), name
    for name in ("claude-3", "ollama", "omni-moderation", "o", "opus", "llama", "xgpt-4"):
        assert not provider.serves(name), name


def test_another_address_serves_every_name_unless_it_lists_them() -> None:
    assert adapt(OpenAIProvider(base_url="http://localhost:11434/v1")).serves("llama3") == "llama3"
    listed = adapt(OpenAIProvider(base_url="http://localhost/v1", models=["a"]))
    assert (listed.serves("a"), listed.serves("b")) == ("a", None)
    mapped = adapt(OpenAIProvider(KEY, models={"fast": "gpt-4o-mini"}))
    assert (mapped.serves("fast"), mapped.serves("gpt-4o-mini")) == ("gpt-4o-mini", None)
    assert adapt(OpenAIProvider(KEY)).serves("claude-3") is None


def test_it_is_an_adapter_with_its_capabilities() -> None:
    provider = OpenAIProvider(KEY, name="eu", timeout=7, max_output_tokens=100)
    assert isinstance(provider, Adapter)
    registered = adapt(provider)
    assert registered.adapter is provider
    assert (registered.name, registered.timeout, registered.max_output_tokens, registered.bounds_output) == ("eu", 7.0, 100, True)


def test_the_bound_goes_where_the_address_expects_it() -> None:
    assert OpenAIProvider(KEY)._max_tokens_field == "max_completion_tokens"
    assert OpenAIProvider(KEY, "https://api.openai.com/v1/")._max_tokens_field == "max_completion_tokens"
    assert OpenAIProvider(base_url="http://localhost/v1")._max_tokens_field == "max_tokens"


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (OpenAIProvider, "api_key"),
        (lambda: OpenAIProvider(""), "api_key"),
        (lambda: OpenAIProvider("a\r\nb: c"), "api_key"),
        (lambda: OpenAIProvider("ключ"), "api_key"),
        (lambda: OpenAIProvider(KEY, "api.openai.com/v1"), "base_url"),
        (lambda: OpenAIProvider(KEY, "ftp://x/v1"), "base_url"),
        (lambda: OpenAIProvider(KEY, "https://"), "base_url"),
        (lambda: OpenAIProvider(KEY, "https://u:p@x/v1"), "base_url"),
        (lambda: OpenAIProvider(KEY, "https://x/v1?api-version=1"), "base_url"),
        (lambda: OpenAIProvider(KEY, "https://x:99999/v1"), "base_url"),
        (lambda: OpenAIProvider(KEY, "https://x/a b"), "base_url"),
        (lambda: OpenAIProvider(KEY, 5), "base_url"),  # type: ignore[arg-type]  # what hosts get wrong
        (lambda: OpenAIProvider(KEY, max_tokens_field="max"), "max_tokens_field"),
        (lambda: OpenAIProvider(KEY, headers={"a b": "c"}), "headers"),
        (lambda: OpenAIProvider(KEY, headers={"a": "b\nc"}), "headers"),
        (lambda: OpenAIProvider(KEY, organization="\n"), "organization"),
    ],
)
def test_a_wrong_argument_is_named_and_its_value_is_not(make: Callable[[], OpenAIProvider], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.param == param


def test_a_key_in_a_header_will_do() -> None:
    assert OpenAIProvider(headers={"Authorization": f"Bearer {KEY}"}).serves("gpt-4o")


def test_the_key_shows_nowhere() -> None:
    provider = OpenAIProvider(KEY, headers={"api-key": KEY})
    assert KEY not in f"{provider!r} {provider} {adapt(provider)!r}"
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="credential"):
            leak(provider)


class Recorded:
    """A transport of the host's own, without generators."""

    def __init__(self) -> None:
        self.requests: list[HTTPRequest] = []
        self.closed = False

    @asynccontextmanager
    async def send(self, request: HTTPRequest, *, connect: float, read: float) -> AsyncIterator[HTTPAnswer]:
        self.requests.append(request)
        yield RecordedAnswer()

    async def aclose(self) -> None:
        self.closed = True


class RecordedAnswer:
    status = 200
    headers: Mapping[str, str] = {}

    async def read(self, limit: int) -> bytes:
        return ANSWER

    def chunks(self) -> AsyncIterator[bytes]:
        return Pieces([TEXT, FINISH, openai_chat.DONE])


class Pieces:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop(0)


async def test_a_transport_of_the_hosts_is_used_and_stays_the_hosts_to_close() -> None:
    transport = Recorded()
    async with OpenAIProvider(KEY, transport=transport) as provider:
        assert (await complete(provider)).message["content"] == "Hi"
        assert len(await stream(provider)) == 2
    assert [request.url for request in transport.requests] == ["https://api.openai.com/v1/chat/completions"] * 2
    assert not transport.closed
