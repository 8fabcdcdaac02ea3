"""What is held and what is estimated for a whole call: images, parameters that have no bound, tokens that nobody sees."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway import (
    AIGateway,
    CachePolicy,
    CompletionRequest,
    ConfigurationError,
    CostUnbounded,
    ImageTokens,
    InvalidRequest,
    Price,
    PriceTier,
    Principal,
    RetryPolicy,
    SpendCapExceeded,
    Timeouts,
    Usage,
    UsageRecord,
)
from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.http import shapes
from starlette_aigateway.policy import estimate
from starlette_aigateway.providers import AnthropicProvider, OpenAIProvider
from starlette_aigateway.providers.simple import adapt
from starlette_aigateway.testing import Hang, Say, ScriptedProvider
from starlette_aigateway.wires import openai_chat

pytestmark = pytest.mark.anyio

PRICE = Price("1", "2")
"""A thousand nano-USD for an input token, two thousand for an output token."""

PICTURE = "data:image/png;base64," + "A" * 1_000_000
NOBODY = Principal("nobody")


def ask(*parts: Mapping[str, Any], max_tokens: int | None = 10, **params: Any) -> CompletionRequest:
    return CompletionRequest(
        model="m", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}, *parts]}], max_tokens=max_tokens, params=params
    )


def picture(detail: str | None = None, url: str = PICTURE) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} if detail is None else {"url": url, "detail": detail}}


def capped(usd: str = "100") -> Principal:
    return Principal("user", hard_cap_usd=usd)


@asynccontextmanager
async def gateway_with(*providers: object, **settings: Any) -> AsyncIterator[AIGateway]:
    settings = {"prices": {"m": PRICE}, "retries": RetryPolicy(rounds=1), **settings}
    async with AIGateway.in_memory(providers=providers, **settings) as gateway:
        yield gateway
        assert await gateway.check_ledger() == []


async def left_after_the_first_word(gateway: AIGateway, request: CompletionRequest, who: Principal) -> UsageRecord:
    async with gateway.stream(who, request) as stream:
        async for _ in stream:
            break
    with anyio.fail_after(10):
        while not (data := (await gateway.usage()).data):
            await anyio.sleep(0.005)
    return data[0]


@pytest.mark.parametrize(("detail", "tokens"), [("low", 1_000), ("high", 20_000), ("auto", 30_000), (None, 30_000), ("original", 30_000)])
async def test_an_image_is_held_at_the_bound_of_its_detail_and_not_at_its_bytes(detail: str | None, tokens: int) -> None:
    bounds = ImageTokens(low=1_000, high=20_000, auto=30_000)
    async with gateway_with(ScriptedProvider("a", "b"), image_tokens=bounds) as gateway:
        dollars = Decimal(tokens) / 10**6
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(capped(str(dollars)), ask(picture(detail)))
        await gateway.complete(capped(str(dollars + Decimal("0.001"))), ask(picture(detail)))


async def test_images_in_the_answers_of_tools_are_held_too() -> None:
    messages: Any = [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "t", "content": [picture("low"), picture("low")]},
    ]
    request = CompletionRequest(model="m", messages=messages, max_tokens=10)
    async with gateway_with(ScriptedProvider("a"), image_tokens=ImageTokens(low=1_000)) as gateway:
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(capped("0.002"), request)
        await gateway.complete(capped("0.003"), request)


async def test_a_window_of_tokens_takes_a_picture_for_what_it_usually_is_and_not_for_its_bytes() -> None:
    who = Principal("user", tokens_per_minute=10_000)
    async with gateway_with(ScriptedProvider("a", "b")) as gateway:
        await gateway.complete(who, ask(picture(), picture("low")))
        with pytest.raises(InvalidRequest):
            await gateway.complete(who, ask({"type": "text", "text": PICTURE}))


@pytest.mark.parametrize(
    "wrong", [{"low": 0.5}, {"high": -1}, {"auto": 10}, {"low": True}, {"high": "many"}, {"low": 60_000, "high": 1, "auto": 50_000}]
)
def test_bounds_of_images_are_whole_tokens_and_auto_is_the_dearest(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ImageTokens(**wrong)
    assert caught.value.param in wrong


def test_the_bounds_of_images_are_an_image_tokens() -> None:
    with pytest.raises(ConfigurationError) as caught:
        AIGateway.in_memory(image_tokens=5_000)  # type: ignore[arg-type]  # what is wrong with it is the test
    assert caught.value.param == "image_tokens"


async def test_what_a_host_allows_hides_nothing_else_and_is_named_without_its_place() -> None:
    remote = picture(url="https://x/y.png")
    async with gateway_with(ScriptedProvider("a"), allow_unbounded={"messages.content.image_url", "web_search_options"}) as gateway:
        for request, param in (
            (ask(remote, best_of=3), "best_of"),
            (ask(remote, tools=["web_search"], web_search_options={}), "tools[0]"),
            (ask(remote, {"type": "file", "file": {"file_id": "f"}}), "messages[0].content[2].file"),
        ):
            with pytest.raises(CostUnbounded) as caught:
                await gateway.complete(capped(), request)
            assert caught.value.param == param
        await gateway.complete(capped(), ask(remote, remote, web_search_options={}))


async def test_the_error_says_how_a_host_allows_it() -> None:
    async with gateway_with(ScriptedProvider("a")) as gateway:
        with pytest.raises(CostUnbounded) as caught:
            await gateway.complete(capped(), ask(picture(url="https://x/y.png")))
        assert caught.value.param == "messages[0].content[1].image_url"
    async with gateway_with(ScriptedProvider("a"), allow_unbounded={str(caught.value).split("{'")[1].split("'}")[0]}) as gateway:
        await gateway.complete(capped(), ask(picture(url="https://x/y.png")))


async def test_a_hold_pays_for_the_dearest_tier_that_a_call_may_be_in_and_the_bill_is_at_its_own() -> None:
    price = Price(3, 15, tiers=[PriceTier(1_000, 6, 30)])
    used = Usage(input_tokens=1_001, output_tokens=10)
    async with gateway_with(ScriptedProvider(Say("a", used), Say("b")), prices={"m": price}, cache=CachePolicy(enabled=False)) as gateway:
        long = CompletionRequest(model="m", messages=[{"role": "user", "content": "x" * 1_001}], max_tokens=10)
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(capped("0.006"), long)
        assert (await gateway.complete(capped(), long)).cost_usd == Decimal(1_001 * 6 + 10 * 30) / 10**6
        assert (await gateway.complete(capped(), long)).cost_usd == Decimal(10 * 3 + 5 * 15) / 10**6


@pytest.mark.parametrize(
    ("reasons", "price", "params", "hidden"),
    [
        (False, PRICE, {}, False),
        (False, PRICE, {"reasoning_effort": "none"}, False),
        (True, PRICE, {}, True),
        (True, PRICE, {"reasoning_effort": "none"}, True),  # models do not always obey it
        (False, PRICE, {"reasoning_effort": "low"}, True),
        (False, PRICE, {"thinking": {"type": "adaptive"}}, True),
        (False, Price(1, 2, reasoning=3), {}, True),
    ],
)
@pytest.mark.parametrize("who", [NOBODY, capped()])
async def test_a_stream_of_a_model_that_may_think_is_estimated_at_its_bound_when_it_is_left(
    reasons: bool, price: Price, params: dict[str, Any], hidden: bool, who: Principal
) -> None:
    provider = ScriptedProvider(Hang(after=1, text="one two"), reasons=reasons)
    async with gateway_with(provider, prices={"m": price}, timeouts=Timeouts(drain=0.01)) as gateway:
        record = await left_after_the_first_word(gateway, ask(max_tokens=3_000, **params), who)
        assert record.outcome == "estimated"
        assert (record.usage.output_tokens == 3_000) == hidden
        assert record.cost >= record.usage.output_tokens * (3_000 if price.reasoning > price.output else 2_000)


async def test_without_any_bound_what_nobody_saw_is_estimated_at_what_was_held_for() -> None:
    provider = ScriptedProvider(Hang(after=1, text="one two"), reasons=True)
    async with gateway_with(provider, timeouts=Timeouts(drain=0.01), default_max_tokens=1_234) as gateway:
        record = await left_after_the_first_word(gateway, ask(max_tokens=None), NOBODY)
        assert record.usage.output_tokens == 1_234


async def test_an_answer_without_usage_of_a_model_that_may_think_is_estimated_at_its_bound() -> None:
    async with gateway_with(ScriptedProvider(Say("a", usage=None), reasons=True)) as gateway:
        await gateway.complete(capped(), ask(max_tokens=700))
        (record,) = (await gateway.usage()).data
        assert (record.outcome, record.usage.output_tokens) == ("estimated", 700)


@pytest.mark.parametrize(
    ("model", "upstream", "reasons"),
    [
        ("o3", "o3", True),
        ("gpt-5-mini", "gpt-5-mini", True),
        ("gpt-6", "gpt-6", True),
        ("gpt-5", "my-deployment", True),
        ("smart", "openai/o4-mini", True),
        ("ft:gpt-5:acme", "ft:gpt-5:acme", True),
        ("gemini-3-pro", "gemini-3-pro", True),
        ("deepseek-reasoner", "deepseek-reasoner", True),
        ("gpt-4o-mini", "gpt-4o-mini", False),
        ("gpt-4.1", "gpt-4.1", False),
        ("llama3", "llama3", False),
        ("proto1", "proto1", False),
    ],
)
def test_models_of_openai_that_think_unasked_are_known_by_either_name(model: str, upstream: str, reasons: bool) -> None:
    assert adapt(OpenAIProvider("key", models={model: upstream})).reasons(model, upstream) is reasons


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        ("claude-3-5-haiku-latest", False),
        ("claude-sonnet-4-5", False),
        ("claude-opus-4-7", False),
        ("claude-opus-5", True),
        ("claude-mythos-preview", True),
        ("anything", False),
    ],
)
def test_models_of_anthropic_that_think_unasked_are_known_by_name(model: str, reasons: bool) -> None:
    assert adapt(AnthropicProvider("key")).reasons(model, model) is reasons


@pytest.mark.parametrize(
    ("said", "expected"), [(True, True), (False, False), (None, False), ("yes", False), (lambda model: model == "b", True)]
)
def test_a_provider_of_the_hosts_own_may_say_whether_its_models_think(said: Any, expected: bool) -> None:
    provider = ScriptedProvider()
    provider.reasons = said
    assert adapt(provider).reasons("a", "b") is expected


async def test_a_provider_that_does_not_obey_is_held_at_its_own_maximum_whatever_bound_is_asked_for() -> None:
    most = Usage(input_tokens=10, output_tokens=300)
    provider = ScriptedProvider(Say("a", most), Say("b", most), bounds_output=False, max_output_tokens=300)
    async with gateway_with(provider, default_max_tokens=20) as gateway:
        for asked in (10, None):
            with pytest.raises(SpendCapExceeded):
                await gateway.complete(capped("0.0006"), ask(max_tokens=asked))
            await gateway.complete(capped(), ask(max_tokens=asked))
        assert [record.outcome for record in (await gateway.usage()).data] == ["completed", "completed"]
        assert [call.max_tokens for call in provider.calls] == [10, 300]


@pytest.mark.parametrize(("maximum", "estimated"), [(300, 300), (None, 900)])
async def test_what_a_provider_that_does_not_obey_said_is_no_less_because_less_was_asked_for(maximum: int | None, estimated: int) -> None:
    provider = ScriptedProvider(Say("x" * 900, usage=None), bounds_output=False, max_output_tokens=maximum)
    async with gateway_with(provider) as gateway:
        await gateway.complete(NOBODY, ask(max_tokens=10))
        (record,) = (await gateway.usage()).data
        assert record.usage.output_tokens >= estimated
        assert record.cost >= record.usage.output_tokens * 2_000


text_parts = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=30)})
picture_parts = st.builds(picture, st.sampled_from([None, "low", "high", "auto"]), st.just("data:image/png;base64," + "A" * 400))
contents = st.lists(text_parts | picture_parts, min_size=1, max_size=4)
said = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": contents}), min_size=1, max_size=4)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": st.text("abc", max_size=20)})})
)


@given(said=said, tools=tools, low=st.integers(0, 5_000), high=st.integers(0, 50_000))
def test_no_request_has_more_tokens_than_its_bytes_its_images_and_its_frames(said: Any, tools: Any, low: int, high: int) -> None:
    bounds = ImageTokens(low=low, high=high)
    request = CompletionRequest(model="m", messages=said, params={"tools": tools} if tools else {})
    assert list(openai_chat.unbounded_parameters(request)) == []
    images = openai_chat.images(request, bounds)
    parts = [part for message in said for part in message["content"]]
    text = sum(len(part["text"].encode()) for part in parts if part["type"] == "text")
    text += sum(len(tool["function"]["name"]) for tool in tools)
    seen = sum(bounds.at(part["image_url"].get("detail")) for part in parts if part["type"] == "image_url")
    frames = 4 * len(said) + 3 + (530 + 12 * len(tools) if tools else 0)
    assert estimate.input_bound(request, extra=images.tokens - images.bytes) >= text + seen + frames


async def test_every_kind_of_token_is_billed_at_its_rate_kept_in_the_record_and_shown() -> None:
    price = Price(3, 15, cache_read="0.3", cache_write="3.75", cache_write_1h=6, reasoning=20)
    told = {"cache_read_input_tokens": 100, "cache_creation_input_tokens": 50, "cache_creation_1h_input_tokens": 20}
    used = Usage(input_tokens=200, output_tokens=30, reasoning_output_tokens=10, **told)
    async with gateway_with(ScriptedProvider(Say("a", used)), prices={"m": price}) as gateway:
        answer = await gateway.complete(capped(), ask(max_tokens=30))
        micros = 50 * 3 + 100 * Decimal("0.3") + 30 * Decimal("3.75") + 20 * 6 + 20 * 15 + 10 * 20
        assert answer.cost_usd == micros / 10**6
        (record,) = (await gateway.usage()).data
        assert (record.usage, record.price, record.outcome) == (used, price, "completed")
        shown = shapes.record(record)
        assert list(shown) == list(shapes.RECORD_FIELDS)
        assert {name: shown[name] for name in shapes.TOKEN_FIELDS} == {
            "input_tokens": 200, "output_tokens": 30, "reasoning_output_tokens": 10, **told,
        }  # fmt: skip
