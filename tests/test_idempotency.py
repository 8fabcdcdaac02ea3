"""Idempotency keys in process: what is carried out once, what is given again, and what frees a key."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    CachePolicy,
    CompletionRequest,
    Conflict,
    IdempotencyPolicy,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Principal,
    PromptRef,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    RateLimitExceeded,
    SpendCapExceeded,
    UnprocessableRequest,
    Usage,
)
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.providers import After, Die, Say, ScriptedProvider

from .idempotent_calls import DAY, both_ways, call, settled, wait_for_replay
from .test_pipeline import PRICE, USUAL_COST, ZERO, ask, capped, gateway_with, records, spent_and_held

pytestmark = pytest.mark.anyio

# -- once --------------------------------------------------------------------------------------------------------------


@both_ways
async def test_the_same_call_again_gets_the_same_answer_and_is_neither_carried_out_nor_billed_nor_recorded(stream: bool) -> None:
    provider = ScriptedProvider(Say("one two three"))
    async with gateway_with(provider) as gateway:
        first = await call(gateway, ask(), stream=stream)
        again = await call(gateway, ask(), stream=stream)
        assert (first.replayed, again.replayed) == (False, True)
        assert (again.items, again.facts) == (first.items, first.facts)
        assert again.text == "one two three"
        assert again.facts["cost_usd"] == USUAL_COST
        assert len(provider.calls) == len(await records(gateway)) == 1
        assert await spent_and_held(gateway, capped()) == (USUAL_COST, ZERO)


async def test_a_replay_takes_nothing_from_any_window() -> None:
    who = Principal("user", requests_per_minute=1, tokens_per_minute=100_000)
    async with gateway_with(ScriptedProvider("hi")) as gateway:
        await call(gateway, ask(), stream=False, who=who)
        before = await gateway.acting_as(who).budgets()
        for _ in range(3):
            assert (await call(gateway, ask(), stream=False, who=who)).replayed
        with pytest.raises(RateLimitExceeded):
            await call(gateway, ask(), stream=False, who=who, key="another")
        assert await gateway.acting_as(who).budgets() == before


async def test_a_call_without_a_key_asks_the_store_nothing() -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            def untouchable(*_: Any, **__: Any) -> None:
                raise AssertionError(f"asked for {name}")

            return untouchable

    async with gateway_with(ScriptedProvider("hi", repeat=True), idempotency=Untouchable()) as gateway:
        assert (await call(gateway, ask(), stream=False, key=None)).text == "hi"
        assert (await call(gateway, ask(), stream=True, key=None)).text == "hi"


async def test_a_caller_has_idempotency_keys_too() -> None:
    provider = ScriptedProvider("hi", "ho")
    async with gateway_with(provider) as gateway:
        caller = gateway.acting_as(capped())
        request: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        answers = [await caller.complete(**request, idempotency_key="k") for _ in range(2)]
        assert [answer.replayed for answer in answers] == [False, True]
        assert answers[0].request_id == answers[1].request_id
        texts = []
        for _ in range(2):
            async with caller.stream(**request, idempotency_key="s", cache=None) as stream:
                texts.append("".join([chunk.text async for chunk in stream]))
        assert texts == ["hi", "hi"]
        assert len(provider.calls) == 1


@both_ways
async def test_another_call_under_a_used_key_is_refused(stream: bool) -> None:
    provider = ScriptedProvider("hi")
    async with gateway_with(provider) as gateway:
        await call(gateway, ask(), stream=stream)
        for request, way in ((ask("other"), stream), (ask(), not stream)):
            with pytest.raises(UnprocessableRequest) as raised:
                await call(gateway, request, stream=way)
            assert (raised.value.code, raised.value.param) == ("idempotency_key_reused", "idempotency-key")
            assert raised.value.request_id is not None
        assert len(provider.calls) == 1


async def test_principals_do_not_meet_in_a_key() -> None:
    provider = ScriptedProvider("for a", "for b")
    async with gateway_with(provider) as gateway:
        texts = [(await call(gateway, ask(who), stream=False, who=Principal(who))).text for who in ("a", "b", "a")]
        assert texts == ["for a", "for b", "for a"]


@both_ways
async def test_a_wrong_key_or_request_is_refused_before_anything_is_claimed(stream: bool) -> None:
    provider = ScriptedProvider("hi")
    async with gateway_with(provider) as gateway:
        for key in ("", "x" * 256):
            with pytest.raises(InvalidRequest) as raised:
                await call(gateway, ask(), stream=stream, key=key)
            assert raised.value.param == "idempotency-key"
        with pytest.raises(InvalidRequest):
            await call(gateway, CompletionRequest(model="m"), stream=stream)
        assert (await call(gateway, ask(), stream=stream)).text == "hi"


@both_ways
async def test_while_the_call_runs_the_same_is_a_conflict_that_a_retry_mends(stream: bool) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("hi"), arrived))
    async with gateway_with(provider) as gateway, anyio.create_task_group() as group:
        group.start_soon(lambda: call(gateway, ask(), stream=stream))
        await arrived.wait()
        with pytest.raises(Conflict) as raised:
            await call(gateway, ask(), stream=stream)
        assert (raised.value.code, raised.value.retry_after) == ("idempotency_in_progress", 1)
        with pytest.raises(UnprocessableRequest):
            await call(gateway, ask("other"), stream=stream)
        go.set()
        await wait_for_replay(gateway, stream=stream)
        assert len(provider.calls) == 1


@both_ways
async def test_of_twenty_equal_calls_at_once_one_is_carried_out_and_billed(stream: bool) -> None:
    provider = ScriptedProvider(Say("one two"))
    outcomes: list[str] = []
    async with gateway_with(provider) as gateway:

        async def one() -> None:
            try:
                got = await call(gateway, ask(), stream=stream)
            except Conflict as conflict:
                outcomes.append(conflict.code)
            else:
                outcomes.append("replayed" if got.replayed else "carried out")
                assert got.text == "one two"

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one)
        assert len(outcomes) == 20
        assert outcomes.count("carried out") == 1
        assert set(outcomes) <= {"carried out", "replayed", "idempotency_in_progress"}
        assert len(provider.calls) == len(await records(gateway)) == 1
        assert (await spent_and_held(gateway, capped()))[0] == USUAL_COST


@both_ways
async def test_two_gateways_over_one_directory_carry_a_call_out_once(tmp_path: Path, stream: bool) -> None:
    provider = ScriptedProvider(Say("one two"))
    outcomes: list[str] = []
    async with AsyncExitStack() as stack:
        gateways = [
            await stack.enter_async_context(AIGateway(data_dir=tmp_path, providers=[provider], prices={"m": PRICE})) for _ in range(2)
        ]

        async def one(gateway: AIGateway) -> None:
            got = await settled(gateway, stream=stream)
            outcomes.append("replayed" if got.replayed else "carried out")

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(one, gateways[number % 2])
        assert sorted(outcomes) == ["carried out"] + ["replayed"] * 9
        assert len(provider.calls) == len(await records(gateways[0])) == 1


async def test_identical_calls_under_two_keys_share_a_flight_and_both_are_kept() -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("hi"), arrived))
    async with gateway_with(provider) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=False, key="one"))
            await arrived.wait()
            group.start_soon(lambda: call(gateway, ask(), stream=False, key="two"))
            await anyio.wait_all_tasks_blocked()
            go.set()
        again = [await call(gateway, ask(), stream=False, key=key) for key in ("one", "two")]
        assert [got.replayed for got in again] == [True, True]
        assert [got.facts["cost_usd"] for got in again] == [USUAL_COST, ZERO]
        assert len(provider.calls) == 1


# -- what is kept, and what frees the key ------------------------------------------------------------------------------


@both_ways
async def test_an_answer_from_the_cache_is_kept_as_the_hit_that_it_was(stream: bool) -> None:
    provider = ScriptedProvider(Say("one two"))
    async with gateway_with(provider) as gateway:
        await call(gateway, ask(), stream=not stream, key=None)
        hit = await call(gateway, ask(), stream=stream)
        again = await call(gateway, ask(), stream=stream)
        assert (hit.facts["cached"], hit.replayed, again.replayed) == (True, False, True)
        assert (again.items, again.facts) == (hit.items, hit.facts)
        assert len(await records(gateway)) == 2


BILLED: list[Any] = [
    ProviderError("gone"),
    ProviderTimeout("too slow"),
    ProviderError("late", billed=Usage(input_tokens=3, output_tokens=1), retryable=False, status=500, details={"a": 1}),
    RuntimeError("secret text"),
    ProviderRejected("no", status=400, code="content_policy", param="messages"),
]


@both_ways
@pytest.mark.parametrize("error", BILLED, ids=lambda error: type(error).__name__)
async def test_a_failure_that_may_have_been_billed_is_given_again_and_nobody_is_asked_again(error: Exception, stream: bool) -> None:
    provider = ScriptedProvider(error)
    async with gateway_with(provider) as gateway:
        raised: list[AIGatewayError] = []
        for _ in range(3):
            with pytest.raises(ProviderError) as caught:
                await call(gateway, ask(), stream=stream)
            raised.append(caught.value)
        first, again, _ = raised
        assert type(again) is type(first)
        for name in ("message", "code", "param", "status", "details"):
            assert getattr(again, name) == getattr(first, name)
        assert (first.replayed, again.replayed, again.retry_after) == (False, True, None)
        assert again.request_id not in (None, first.request_id)
        assert len(provider.calls) == len(await records(gateway)) == 1


@both_ways
async def test_an_earlier_target_that_may_have_billed_keeps_the_failure_of_a_later_one_that_did_not(stream: bool) -> None:
    first = ScriptedProvider(ProviderError("unknown"), name="first")
    second = ScriptedProvider(ProviderError("down", billed="no", status=500), name="second")
    async with gateway_with(first, second) as gateway:
        for _ in range(2):
            with pytest.raises(ProviderError, match="down"):
                await call(gateway, ask(), stream=stream)
        assert len(first.calls) == len(second.calls) == 1


async def test_a_stream_that_breaks_off_is_given_again_as_its_failure() -> None:
    provider = ScriptedProvider(Die(after=2, text="one two three"))
    async with gateway_with(provider) as gateway:
        for _ in range(2):
            with pytest.raises(ProviderError, match="cut short"):
                await call(gateway, ask(), stream=True)
        assert len(await records(gateway)) == 1


@both_ways
async def test_a_failure_that_charged_nothing_frees_the_key(stream: bool) -> None:
    provider = ScriptedProvider(ProviderError("down", billed="no", status=500), "hi")
    async with gateway_with(provider) as gateway:
        with pytest.raises(ProviderError):
            await call(gateway, ask(), stream=stream)
        assert (await call(gateway, ask(), stream=stream)).text == "hi"


@both_ways
async def test_refusals_free_the_key(stream: bool) -> None:
    provider = ScriptedProvider("hi", "hi", models=["m", "free"])
    full = Principal("full", requests_per_minute=1)
    refusals: list[tuple[type[AIGatewayError], Principal, CompletionRequest]] = [
        (SpendCapExceeded, capped("0.01"), ask(max_tokens=100)),
        (NotFound, capped(), ask(model="none")),
        (PermissionDenied, capped(allowed_models=["free"]), ask()),
        (NotFound, capped(), CompletionRequest(prompt=PromptRef(name="none"))),
        (RateLimitExceeded, full, ask()),
    ]
    async with gateway_with(provider) as gateway:
        await call(gateway, ask(), stream=stream, who=full, key=None)
        for number, (error, who, request) in enumerate(refusals):
            for _ in range(2):
                with pytest.raises(error) as raised:
                    await call(gateway, request, stream=stream, who=who, key=f"k{number}")
                assert not raised.value.replayed
        assert (await call(gateway, ask(), stream=stream, key="k0")).text == "hi"


@both_ways
@pytest.mark.parametrize(
    "answer", [Say("word " * 500), Say(message={"role": "assistant", "content": "word " * 500})], ids=["many pieces", "one piece"]
)
async def test_an_answer_that_is_too_large_is_billed_once_all_the_same(answer: Say, stream: bool) -> None:
    provider = ScriptedProvider(answer)
    async with gateway_with(
        provider, idempotency_policy=IdempotencyPolicy(max_answer_bytes=1000), cache=CachePolicy(max_entry_bytes=1000)
    ) as gateway:
        assert (await call(gateway, ask(), stream=stream)).text.startswith("word word")
        for _ in range(2):
            with pytest.raises(Conflict) as raised:
                await call(gateway, ask(), stream=stream)
            assert (raised.value.code, raised.value.retry_after) == ("idempotency_answer_not_kept", None)
        assert len(provider.calls) == len(await records(gateway)) == 1


@both_ways
async def test_after_a_day_the_key_is_free(stream: bool) -> None:
    clock = FakeClock()
    provider = ScriptedProvider("first", "second")
    async with gateway_with(provider, clock=clock, cache=CachePolicy(enabled=False)) as gateway:
        await call(gateway, ask(), stream=stream)
        clock.advance(DAY - 1)
        assert (await call(gateway, ask(), stream=stream)).text == "first"
        clock.advance(1)
        assert (await call(gateway, ask(), stream=stream)).text == "second"


@both_ways
async def test_answers_are_kept_over_a_restart(tmp_path: Path, stream: bool) -> None:
    provider = ScriptedProvider("hi")
    got = []
    for _ in range(2):
        async with AIGateway(data_dir=tmp_path, providers=[provider], prices={"m": PRICE}) as gateway:
            got.append(await call(gateway, ask(), stream=stream))
    assert [each.replayed for each in got] == [False, True]
    assert got[0].facts == got[1].facts
