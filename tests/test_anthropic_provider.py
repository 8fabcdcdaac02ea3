"""Anthropic as an upstream: over a real socket, against a server whose answers the official types find nothing wrong with."""

import copy
import json
import pickle
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import anthropic.types as official
import anyio
import openai
import pytest
from anthropic.types.shared import ErrorResponse
from anyio.from_thread import start_blocking_portal
from pydantic import TypeAdapter
from starlette.applications import Starlette

from starlette_aigateway import (
    AIGateway,
    AIGatewayMiddleware,
    CostUnbounded,
    Price,
    Principal,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    RetryPolicy,
)
from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.protocols import Adapter
from starlette_aigateway.providers import AnthropicProvider
from starlette_aigateway.providers.simple import adapt
from starlette_aigateway.testing.providers import ScriptedProvider
from starlette_aigateway.testing.transport import PATIENCE, Exchange, Handler, RawServer, raw_server
from starlette_aigateway.types import Chunk, Completion, CompletionRequest, ProviderCall, StreamItem, Usage
from starlette_aigateway.wires import sse

from .serving import serve

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Async generator 'http.*was garbage collected:ResourceWarning"),  # as in test_transport
]

EVENTS: TypeAdapter[Any] = TypeAdapter(official.RawMessageStreamEvent)
KEY = "sk-ant-very-secret"
MODEL = "claude-x"
USED = Usage(input_tokens=130, output_tokens=7, cache_read_input_tokens=100, cache_creation_input_tokens=20)
PRICE = Price("3", "15", cache_read="0.30", cache_write="3.75")
COST = Decimal(10 * 3 * 1000 + 100 * 300 + 20 * 3750 + 7 * 15 * 1000) / 10**9
"""Ten plain input tokens, a hundred read, twenty written, seven of output."""


@dataclass
class FakeAnthropic:
    """Answers as the Messages API does: whole, or as a stream where the body asks for one; offered tools, it uses the first of them.
    `fails` are statuses that come first."""

    words: Sequence[str] = ("Hel", "lo")
    fails: list[int] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)

    async def __call__(self, exchange: Exchange) -> None:
        body = json.loads(exchange.body)
        self.seen.append(body)
        if self.fails:
            await exchange.answer(error_body(), status=f"{self.fails.pop(0)} X")
        elif body.get("stream"):
            await exchange.start_chunked()
            for event in self.events(body["model"], body.get("tools", ())):
                await exchange.chunk(event)
            await exchange.stream.send(b"0\r\n\r\n")
        else:
            await exchange.answer(self.message(body["model"], body.get("tools", ())))

    def message(self, model: str, tools: Sequence[Any] = ()) -> bytes:
        uses = [{"type": "tool_use", "id": "t1", "name": tool["name"], "input": {"city": "Bern"}} for tool in tools[:1]]
        body = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": "".join(self.words)}, *uses],
            "stop_reason": "tool_use" if uses else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 10, "output_tokens": 7, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 100},
        }
        official.Message.model_validate(body)
        return json.dumps(body).encode()

    def events(self, model: str, tools: Sequence[Any] = ()) -> Sequence[bytes]:
        start = json.loads(self.message(model, tools))
        stop_reason, uses = start["stop_reason"], start["content"][1:]
        start |= {"content": [], "stop_reason": None, "usage": {**start["usage"], "output_tokens": 1}}
        return [
            event("message_start", message=start),
            event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            event("ping"),
            *(event("content_block_delta", index=0, delta={"type": "text_delta", "text": word}) for word in self.words),
            event("content_block_stop", index=0),
            *(event("content_block_start", index=1, content_block={**use, "input": {}}) for use in uses),
            *(
                event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": piece})
                for _ in uses
                for piece in ("", '{"city": ', '"Bern"}')
            ),
            *(event("content_block_stop", index=1) for _ in uses),
            event("message_delta", delta={"stop_reason": stop_reason, "stop_sequence": None}, usage={"output_tokens": 7}),
            event("message_stop"),
        ]


def event(kind: str, **fields: Any) -> bytes:
    body = {"type": kind, **fields}
    if kind == "error":
        ErrorResponse.model_validate(body)
    elif kind != "ping":
        EVENTS.validate_python(body)
    return sse.encode_event(json.dumps(body).encode(), kind)


def error_body(kind: str = "api_error") -> bytes:
    body = {"type": "error", "error": {"type": kind, "message": f"x-api-key: {KEY}"}, "request_id": "req_1"}
    ErrorResponse.model_validate(body)
    return json.dumps(body).encode()


OVERLOADED = event("error", error={"type": "overloaded_error", "message": KEY})


def call(stream: bool = False, **fields: Any) -> ProviderCall:
    request = CompletionRequest(model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=9)
    return ProviderCall(**{"request": request, "stream": stream, "timeout": PATIENCE, "request_id": "req_1", **fields})


@asynccontextmanager
async def upstream(handle: Handler, **options: Any) -> AsyncIterator[tuple[AnthropicProvider, RawServer]]:
    async with raw_server(handle) as server, AnthropicProvider(KEY, server.url, **options) as provider:
        yield provider, server


async def complete(provider: AnthropicProvider, **fields: Any) -> Completion:
    with anyio.fail_after(PATIENCE):
        async with provider.open(call(**fields)) as answer:
            return await answer.completion()


async def stream(provider: AnthropicProvider) -> list[StreamItem]:
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
        for sent in events:
            await exchange.chunk(sent)
        if cut:
            await exchange.stream.aclose()
        else:
            await exchange.stream.send(b"0\r\n\r\n")

    return handle


def sent_headers(exchange: Exchange) -> Mapping[str, str]:
    lines = exchange.head.decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


# -- what is sent ------------------------------------------------------------------------------------------------------


async def test_a_call_goes_to_the_messages_api_with_key_and_version() -> None:
    fake = FakeAnthropic()
    options: dict[str, Any] = {"beta": ["a-2026", "b-2026"], "headers": {"X-Host": "1", "User-Agent": "mine"}}
    async with upstream(fake, **options) as (provider, server):
        completion = await complete(provider, headers={"X-Trace": "t", "X-Api-Key": "of-the-caller"})
    assert (completion.message["content"], completion.usage, completion.model) == ("Hello", USED, MODEL)
    headers = sent_headers(server.exchanges[0])
    assert server.exchanges[0].head.startswith(b"POST /v1/messages HTTP/1.1\r\n")
    assert server.exchanges[0].head.lower().count(b"x-api-key:") == 1
    assert (headers["x-api-key"], headers["anthropic-version"], headers["anthropic-beta"]) == (KEY, "2023-06-01", "a-2026,b-2026")
    assert (headers["content-type"], headers["x-host"], headers["user-agent"]) == ("application/json", "1", "mine")
    assert headers["x-trace"] == "t"
    assert "authorization" not in headers
    assert fake.seen == [{"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}]


async def test_without_a_bound_the_models_own_is_sent() -> None:
    fake = FakeAnthropic()
    unbounded = CompletionRequest(model=MODEL, messages=[{"role": "user", "content": "x"}])
    async with raw_server(fake) as server:
        for bound in (None, 1000):
            async with AnthropicProvider(KEY, server.url, max_output_tokens=bound) as provider:
                await complete(provider, request=unbounded)
    assert [body["max_tokens"] for body in fake.seen] == [4096, 1000]


async def test_what_the_wire_cannot_say_is_refused_before_anything_is_sent() -> None:
    fake = FakeAnthropic()
    request = CompletionRequest(model=MODEL, messages=[{"role": "user", "content": "x"}], n=2)
    async with upstream(fake) as (provider, _):
        with pytest.raises(ProviderRejected) as caught:
            await complete(provider, request=request)
    assert (caught.value.param, caught.value.billed, caught.value.retryable, fake.seen) == ("n", "no", True, [])


# -- what comes back ---------------------------------------------------------------------------------------------------


async def test_a_stream_comes_as_it_is_sent_and_ends_with_its_usage() -> None:
    fake = FakeAnthropic()
    async with upstream(fake) as (provider, server):
        for _ in range(3):
            chunks = [item for item in await stream(provider) if isinstance(item, Chunk)]
    assert "".join(chunk.text for chunk in chunks) == "Hello"
    assert [(chunk.finish_reason, chunk.usage) for chunk in chunks[-2:]] == [("stop", None), (None, USED)]
    assert fake.seen[0]["stream"] is True
    assert sent_headers(server.exchanges[0])["accept"] == "text/event-stream"
    assert server.connections == 1, "connections are used again"


async def test_a_word_arrives_before_the_next_is_said() -> None:
    heard = anyio.Event()
    *first, last = FakeAnthropic().events(MODEL)

    async def handle(exchange: Exchange) -> None:
        await exchange.start_chunked()
        await exchange.chunk(b"".join(first))
        await heard.wait()
        await exchange.chunk(last)
        await exchange.wait_closed()

    with anyio.fail_after(PATIENCE):
        async with upstream(handle) as (provider, _), provider.open(call(stream=True)) as answer:
            async for item in answer.events():
                if isinstance(item, Chunk) and item.text == "lo":
                    heard.set()


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("spoken", [1, 5, 7])
async def test_a_stream_without_its_end_is_an_error_and_may_have_been_billed(cut: bool, spoken: int) -> None:
    async with upstream(streaming(*FakeAnthropic().events(MODEL)[:spoken], cut=cut)) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await stream(provider)
    assert (caught.value.billed, caught.value.retryable) == ("unknown", True)


async def test_an_error_event_is_an_error_of_the_provider_after_what_was_said() -> None:
    items: list[StreamItem] = []

    async def listen(provider: AnthropicProvider) -> None:
        async with provider.open(call(stream=True)) as answer:
            async for item in answer.events():
                items.append(item)  # noqa: PERF401  # what came before the error has to be kept

    async with upstream(streaming(*FakeAnthropic().events(MODEL)[:5], OVERLOADED)) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await listen(provider)
    assert len(items) == 4
    assert (caught.value.billed, caught.value.details) == ("unknown", {"type": "overloaded_error"})
    assert KEY not in str(caught.value)


async def test_leaving_a_stream_early_closes_its_connection() -> None:
    closed = anyio.Event()

    async def handle(exchange: Exchange) -> None:
        await exchange.start_chunked()
        await exchange.chunk(FakeAnthropic().events(MODEL)[0])
        await exchange.wait_closed()
        closed.set()

    with anyio.fail_after(PATIENCE):
        async with upstream(handle) as (provider, _):
            async with provider.open(call(stream=True)) as answer:
                await anext(answer.events())
            await closed.wait()


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", FakeAnthropic().message(MODEL)[:-9], error_body("api_error")])
async def test_a_success_with_garbage_may_have_been_billed(body: bytes) -> None:
    async with upstream(answering(body)) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await complete(provider)
    assert (caught.value.billed, caught.value.code, caught.value.status) == ("unknown", "provider_error", 200)
    assert KEY not in f"{caught.value} {caught.value.details}"


@pytest.mark.parametrize(
    ("status", "kind", "error_type", "retryable", "billed"),
    [
        (400, "invalid_request_error", ProviderRejected, False, "no"),
        (401, "authentication_error", ProviderError, True, "no"),
        (402, "billing_error", ProviderError, True, "no"),
        (403, "permission_error", ProviderError, True, "no"),
        (404, "not_found_error", ProviderError, True, "no"),
        (408, "timeout_error", ProviderTimeout, True, "unknown"),
        (413, "invalid_request_error", ProviderRejected, False, "no"),
        (422, "invalid_request_error", ProviderRejected, False, "no"),
        (429, "rate_limit_error", ProviderError, True, "no"),
        (500, "api_error", ProviderError, True, "no"),
        (503, "api_error", ProviderError, True, "no"),
        (504, "timeout_error", ProviderTimeout, True, "unknown"),
        (524, "timeout_error", ProviderTimeout, True, "unknown"),
        (529, "overloaded_error", ProviderError, True, "no"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_each_status_says_what_it_means_for_retries_and_money(
    status: int, kind: str, error_type: type[ProviderError], retryable: bool, billed: str, streamed: bool
) -> None:
    async with upstream(answering(error_body(kind), f"{status} X", b"retry-after: 7\r\n")) as (provider, _):
        with pytest.raises(ProviderError) as caught:
            await (stream(provider) if streamed else complete(provider))
    error = caught.value
    assert (type(error), error.retryable, error.billed, error.status) == (error_type, retryable, billed, status)
    assert error.retry_after == (None if error_type is ProviderRejected else 7.0)
    assert error.details == {"type": kind}
    assert KEY not in f"{error} {error.details} {error.__cause__}"


# -- the provider as an object -----------------------------------------------------------------------------------------


def test_anthropics_own_address_serves_claude_and_another_one_every_name() -> None:
    provider = AnthropicProvider(KEY)
    assert provider.serves("claude-sonnet-4-5")
    assert not any(provider.serves(name) for name in ("gpt-4o", "claude", "my-claude-3", "o3"))
    assert AnthropicProvider(base_url="http://localhost:8080").serves("llama3")
    listed = AnthropicProvider(KEY, models=["a"])
    assert (listed.serves("a"), listed.serves("claude-x")) == (True, False)
    mapped = adapt(AnthropicProvider(KEY, models={"smart": "claude-x"}))
    assert (mapped.serves("smart"), mapped.serves("claude-x")) == ("claude-x", None)


def test_it_is_an_adapter_with_its_capabilities() -> None:
    provider = AnthropicProvider(KEY, name="eu", timeout=7, max_output_tokens=100)
    assert isinstance(provider, Adapter)
    registered = adapt(provider)
    assert registered.adapter is provider
    assert (registered.name, registered.timeout, registered.max_output_tokens, registered.bounds_output) == ("eu", 7.0, 100, True)
    assert AnthropicProvider(KEY).name == "anthropic"


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/messages"])
def test_the_address_may_be_given_with_its_path(ending: str) -> None:
    assert AnthropicProvider(KEY, f"https://api.anthropic.com{ending}").base_url == "https://api.anthropic.com"
    assert AnthropicProvider(KEY, f"https://host/anthropic{ending}").base_url == "https://host/anthropic"


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (AnthropicProvider, "api_key"),
        (lambda: AnthropicProvider(""), "api_key"),
        (lambda: AnthropicProvider("a\r\nb: c"), "api_key"),
        (lambda: AnthropicProvider(KEY, "api.anthropic.com"), "base_url"),
        (lambda: AnthropicProvider(KEY, "https://u:p@x"), "base_url"),
        (lambda: AnthropicProvider(KEY, 5), "base_url"),  # type: ignore[arg-type]  # what hosts get wrong
        (lambda: AnthropicProvider(KEY, version=""), "version"),
        (lambda: AnthropicProvider(KEY, beta=["a\n"]), "beta"),
        (lambda: AnthropicProvider(KEY, beta={"a"}), "beta"),  # type: ignore[arg-type]  # what hosts get wrong
        (lambda: AnthropicProvider(KEY, headers={"a b": "c"}), "headers"),
    ],
)
def test_a_wrong_argument_is_named_and_its_value_is_not(make: Callable[[], AnthropicProvider], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.param == param
    assert KEY not in str(caught.value)


async def test_a_key_in_a_header_and_a_version_of_ones_own_will_do() -> None:
    assert AnthropicProvider(headers={"Authorization": f"Bearer {KEY}"}).serves("claude-x")
    async with raw_server(FakeAnthropic()) as server:
        async with AnthropicProvider(base_url=server.url, headers={"X-Api-Key": KEY}, version="2099-01-01", beta="b") as provider:
            await complete(provider)
        headers = sent_headers(server.exchanges[0])
    assert (headers["x-api-key"], headers["anthropic-version"], headers["anthropic-beta"]) == (KEY, "2099-01-01", "b")


def test_the_key_shows_nowhere() -> None:
    provider = AnthropicProvider(KEY, headers={"x-other": KEY})
    assert KEY not in f"{provider!r} {provider} {adapt(provider)!r}"
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="credential"):
            leak(provider)


# -- through the whole gateway -----------------------------------------------------------------------------------------


@asynccontextmanager
async def gateway_over(fake: FakeAnthropic, *others: ScriptedProvider, **settings: Any) -> AsyncIterator[AIGateway]:
    settings.setdefault("prices", {MODEL: PRICE})
    settings.setdefault("retries", RetryPolicy(rounds=1))
    async with raw_server(fake) as server:
        gateway = AIGateway.in_memory(providers=[AnthropicProvider(KEY, server.url), *others], **settings)
        with anyio.fail_after(PATIENCE):
            async with gateway:
                yield gateway
                assert await gateway.check_ledger() == []


def ask(text: str = "hello", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model=MODEL, messages=[{"role": "user", "content": text}], **fields)


CAPPED = Principal("user", hard_cap_usd=1)


async def spent(gateway: AIGateway) -> Decimal:
    return next(budget.spent_usd for budget in await gateway.budgets(CAPPED) if budget.window == "total")


async def test_reads_and_writes_of_the_cache_are_billed_at_their_own_rates_whole_and_streamed() -> None:
    async with gateway_over(FakeAnthropic()) as gateway:
        answer = await gateway.complete(CAPPED, ask("whole"))
        assert (answer.message["content"], answer.usage, answer.cost_usd) == ("Hello", USED, COST)
        async with gateway.stream(CAPPED, ask("streamed")) as answers:
            said = "".join([chunk.text async for chunk in answers])
        assert (said, answers.usage, answers.cost_usd) == ("Hello", USED, COST)
        assert await spent(gateway) == 2 * COST
        assert {record.outcome for record in (await gateway.usage()).data} == {"completed"}


@pytest.mark.parametrize("streamed_first", [False, True])
async def test_an_answer_is_cached_and_given_again_either_way(streamed_first: bool) -> None:
    fake = FakeAnthropic()
    async with gateway_over(fake) as gateway:
        for streamed in (streamed_first, not streamed_first):
            if streamed:
                async with gateway.stream(CAPPED, ask()) as answers:
                    assert "".join([chunk.text async for chunk in answers]) == "Hello"
            else:
                assert (await gateway.complete(CAPPED, ask())).message["content"] == "Hello"
    assert len(fake.seen) == 1


async def test_the_bound_that_the_hold_was_made_for_is_sent() -> None:
    fake = FakeAnthropic()
    async with gateway_over(fake, default_max_tokens=500) as gateway:
        await gateway.complete(CAPPED, ask("a"))
        await gateway.complete(CAPPED, ask("b", max_tokens=30))
    assert [body["max_tokens"] for body in fake.seen] == [500, 30]


async def test_a_refused_parameter_goes_to_the_next_provider_and_costs_nothing_here() -> None:
    fake, other = FakeAnthropic(), ScriptedProvider("other", repeat=True)
    async with gateway_over(fake, other) as gateway:
        assert (await gateway.complete(CAPPED, ask(params={"seed": 1}))).message["content"] == "other"
        assert fake.seen == []
        assert [record.outcome for record in (await gateway.usage()).data] == ["completed", "released"]


async def test_refusals_of_requests_are_final_say_why_and_do_not_open_the_circuit() -> None:
    fake = FakeAnthropic()
    async with gateway_over(fake, retries=RetryPolicy(rounds=3, backoff=60)) as gateway:
        for _ in range(6):
            with pytest.raises(ProviderRejected) as caught:
                await gateway.complete(CAPPED, ask(temperature=1.5))
        assert (caught.value.param, caught.value.code) == ("temperature", "provider_rejected")
        assert await spent(gateway) == 0
        assert (await gateway.complete(CAPPED, ask())).message["content"] == "Hello"


async def test_an_overloaded_upstream_is_asked_again_and_billed_once() -> None:
    fake = FakeAnthropic(fails=[529, 429])
    async with gateway_over(fake, retries=RetryPolicy(rounds=3, backoff=0.001)) as gateway:
        await gateway.complete(CAPPED, ask())
        assert len(fake.seen) == 3
        assert await spent(gateway) == COST


async def test_writes_to_the_cache_have_no_bound_for_an_account_with_a_cap_unless_the_host_allows_them() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    part = CompletionRequest(model=MODEL, messages=[{"role": "user", "content": [{"type": "text", "text": "x", **mark}]}])
    tool = ask(params={"tools": [{"type": "function", "function": {"name": "f"}, **mark}]})
    fake = FakeAnthropic()
    async with gateway_over(fake, allow_unbounded={"cache_control"}) as gateway:
        for request, param in ((part, "messages[0].content[0].cache_control"), (tool, "tools[0].cache_control")):
            with pytest.raises(CostUnbounded) as caught:
                await gateway.complete(CAPPED, request)
            assert caught.value.param == param
            await gateway.complete(Principal("free"), request)
        await gateway.complete(CAPPED, ask(params=mark))
    assert fake.seen[-1]["cache_control"] == {"type": "ephemeral"}


def test_the_official_openai_client_talks_to_claude_with_tools_whole_and_streamed() -> None:
    fake = FakeAnthropic()
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    turns: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "weather?"}]
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(raw_server(fake)) as server:
        gateway = AIGateway.in_memory(providers=[AnthropicProvider(KEY, server.url)], prices={MODEL: PRICE}, resolve_principal=everybody)
        app = AIGatewayMiddleware(Starlette(), gateway, path="/ai")
        with serve(app) as base, openai.OpenAI(api_key="login", base_url=f"{base}/ai/v1", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=turns, tools=tools).choices[0]
            assert (whole.finish_reason, whole.message.content) == ("tool_calls", "Hello")
            turns += [whole.message, {"role": "tool", "tool_call_id": "t1", "content": "sunny"}]
            with client.chat.completions.stream(model=MODEL, messages=turns, tools=tools, stream_options={"include_usage": True}) as events:
                streamed = events.get_final_completion()
    final = streamed.choices[0]
    assert final.message.tool_calls is not None
    assert (final.finish_reason, final.message.content) == ("tool_calls", "Hello")
    assert (final.message.tool_calls[0].id, final.message.tool_calls[0].function.arguments) == ("t1", '{"city": "Bern"}')
    assert streamed.usage is not None
    assert (streamed.usage.prompt_tokens, streamed.usage.completion_tokens) == (USED.input_tokens, USED.output_tokens)
    assert fake.seen[1]["system"] == "be brief"
    assert [turn["role"] for turn in fake.seen[1]["messages"]] == ["user", "assistant", "user"]
    assert fake.seen[1]["messages"][1]["content"][1] == {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}


async def everybody(connection: Any) -> Principal:
    return CAPPED
