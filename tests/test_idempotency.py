"""Idempotency keys in process: what is carried out once, what is given again, what frees a key, and what goes wrong in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    Answer,
    CachePolicy,
    Chunk,
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
    StorageUnavailable,
    Timeouts,
    UnprocessableRequest,
    Usage,
)
from starlette_aigateway.policy import idempotency as policy
from starlette_aigateway.policy.caching import CachedCompletion
from starlette_aigateway.protocols import Claim
from starlette_aigateway.stores.sqlite.idempotency import SQLiteIdempotencyStore
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.providers import After, Die, Hang, Say, ScriptedProvider
from starlette_aigateway.types import CallOptions, Native, RawEvents, StreamItem

from .faults.kit import CancelAt, FaultyLedger
from .test_pipeline import PRICE, USUAL_COST, ZERO, ask, capped, gateway_with, records, spent_and_held

pytestmark = pytest.mark.anyio

DAY = 86_400
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Got:
    """An answer as its reader saw it, either way."""

    def __init__(self, *, items: list[Any], facts: dict[str, Any], replayed: bool) -> None:
        self.items = items
        self.facts = facts
        self.replayed = replayed

    @property
    def text(self) -> str:
        return "".join(item.text for item in self.items)


async def call(gateway: AIGateway, request: CompletionRequest, *, stream: bool, key: str | None = "k", who: Principal | None = None) -> Got:
    who = who or capped()
    names = ("usage", "model", "finish_reason", "cost_usd", "cached", "request_id", "provider")
    if stream:
        async with gateway.stream(who, request, idempotency_key=key) as answer:
            items: list[Any] = [chunk async for chunk in answer]
        return Got(items=items, facts={name: getattr(answer, name) for name in names}, replayed=answer.replayed)
    whole: Answer = await gateway.complete(who, request, idempotency_key=key)
    text = Chunk(delta={"content": whole.message["content"]})
    facts = {name: getattr(whole, name) for name in names} | {"message": whole.message, "id": whole.id}
    return Got(items=[text], facts=facts, replayed=whole.replayed)


# -- the rules ---------------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255))
def test_any_printable_ascii_of_up_to_255_characters_is_a_key(key: str) -> None:
    assert policy.check_key(key) == key


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\t", "line\n", "ümlaut", "\x7f", None, 7, b"bytes"])
def test_anything_else_is_no_key(key: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        policy.check_key(key)
    assert raised.value.param == "idempotency-key"


def slot_of(
    request: CompletionRequest, who: str = "user", route: str = "/complete", key: str = "k", *, stream: bool = False
) -> policy.Slot:
    return policy.slot(Principal(who), request, CallOptions(idempotency_key=key, route=route), stream=stream)


def test_a_slot_is_of_one_principal_one_route_and_one_key_and_names_none_of_them() -> None:
    slots = [slot_of(ask()), slot_of(ask(), who="other"), slot_of(ask(), route="/v1/chat/completions"), slot_of(ask(), key="other")]
    assert len({slot.key for slot in slots}) == 4
    assert len({slot.fingerprint for slot in slots}) == 1
    assert slot_of(ask()) == slots[0]
    assert slot_of(ask(), who="a/complete", route="") .key != slot_of(ask(), who="a", route="/complete").key  # fmt: skip


def test_a_fingerprint_is_of_everything_that_is_asked_for_in_any_order() -> None:
    requests = [
        ask(),
        ask("other"),
        ask(model="other"),
        ask(temperature=0.5),
        ask(max_tokens=5),
        ask(n=2),
        ask(prompt=PromptRef(name="p")),
        ask(params={"seed": 1}),
        ask(params={"seed": 2}),
    ]
    fingerprints = {policy.fingerprint(request, stream=stream) for request in requests for stream in (False, True)}
    assert len(fingerprints) == 2 * len(requests)
    one, two = ask(params={"a": 1, "b": {"c": 2, "d": 3}}), ask(params={"b": {"d": 3, "c": 2}, "a": 1})
    assert policy.fingerprint(one, stream=False) == policy.fingerprint(two, stream=False)


def test_a_request_that_no_json_can_carry_is_refused_with_a_key() -> None:
    with pytest.raises(InvalidRequest) as raised:
        slot_of(ask(params={"tool": object()}))
    assert raised.value.param == "idempotency-key"


def kept(content: Any) -> policy.KeptAnswer:
    return policy.KeptAnswer(request_id="req_1", created=1, provider="p", cost=5, cache="miss", content=content)


def test_what_is_kept_comes_back_as_it_was() -> None:
    items: list[StreamItem] = [
        RawEvents("openai_chat", b"data: {}\n\n", 1),
        Chunk(delta={"content": "hi", "x": [1, {"y": None}]}, index=1, model="m", id="i"),
        Chunk(finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=2), native=Native("openai_chat", b"data: 7\n\n")),
    ]
    answer = policy.decode(policy.encode(kept(policy.kept_stream(items)), max_bytes=10_000))
    assert isinstance(answer, policy.KeptAnswer)
    assert isinstance(answer.content, policy.KeptStream)
    assert policy.stream_items(answer.content) == items


@pytest.mark.parametrize("content", [{"content": "x" * 2000}, {"content": object()}])
def test_of_what_is_too_large_or_no_data_only_the_fact_is_kept(content: Any) -> None:
    value = policy.encode(kept(CachedCompletion(message=content)), max_bytes=1000)
    assert policy.decode(value) == policy.NotKept()


@given(st.binary(max_size=200))
def test_bytes_that_cannot_be_read_still_say_that_the_call_was_carried_out(value: bytes) -> None:
    policy.decode(b"\x02" + value)
    assert isinstance(policy.decode(b"\x01" + value), policy.Outcome)
    assert policy.decode(b"\x02" + value) == policy.NotKept()


def test_a_policy_may_keep_no_answer_at_all() -> None:
    bound = IdempotencyPolicy(max_answer_bytes=1).max_answer_bytes
    assert policy.decode(policy.encode(kept(CachedCompletion()), max_bytes=bound)) == policy.NotKept()


@pytest.mark.parametrize("wrong", [{"keep_seconds": 0}, {"keep_seconds": "1"}, {"max_answer_bytes": 1.5}, {"max_answer_bytes": True}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest):
        IdempotencyPolicy(**wrong)


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


async def wait_for_replay(gateway: AIGateway, *, stream: bool) -> Got:
    got = await settled(gateway, stream=stream)
    assert got.replayed
    return got


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


# -- callers that leave ------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_caller_that_is_cancelled_finds_its_answer_when_it_asks_again(stream: bool, lifespan: bool) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("hi"), arrived))
    async with gateway_with(provider, lifespan=lifespan) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=stream))
            await arrived.wait()
            group.cancel_scope.cancel()
            go.set()
        got = await wait_for_replay(gateway, stream=stream)
        assert got.text == "hi"
        assert len(provider.calls) == len(await records(gateway)) == 1


async def test_a_stream_that_is_left_early_is_read_on_and_given_again_whole() -> None:
    provider = ScriptedProvider(Say("one two three"))
    async with gateway_with(provider) as gateway:
        async with gateway.stream(capped(), ask(), idempotency_key="k") as answer:
            await anext(answer)
        got = await wait_for_replay(gateway, stream=True)
        assert (got.text, got.facts["cost_usd"]) == ("one two three", USUAL_COST)
        assert len(provider.calls) == 1


@both_ways
async def test_a_call_that_is_given_up_after_its_caller_left_was_billed_and_stays_so(store: FaultyStore, stream: bool) -> None:
    arrived = anyio.Event()
    provider = ScriptedProvider(Hang(arrived))
    store.failing = {"keep": 1}
    async with gateway_with(provider, timeouts=Timeouts(drain=0.02), idempotency=store) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=stream))
            await arrived.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(10):
            while not await records(gateway):
                await anyio.sleep(0.005)
        with pytest.raises(Conflict) as raised:
            await settled(gateway, stream=stream)
        assert raised.value.code == "idempotency_answer_not_kept"
        assert len(provider.calls) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("owned", [True, False])
async def test_a_reader_cancelled_at_any_await_and_calling_again_is_billed_once(tmp_path: Path, owned: bool) -> None:
    at = 0
    survived = False
    while not survived:
        at += 1
        assert at < 300, "the walk does not end"
        provider = ScriptedProvider(Say("one two three"))
        gateway = AIGateway(data_dir=tmp_path / str(at), providers=[provider], prices={"m": PRICE})
        lifespan = gateway.lifespan() if owned else None
        if lifespan is not None:
            await lifespan.__aenter__()
        else:
            await gateway.ready()
        walk = CancelAt(call(gateway, ask(), stream=True), at)

        async def walker(walk: CancelAt = walk) -> None:
            await walk

        try:
            await asyncio.ensure_future(walker())
            survived = walk.waits < at
        except asyncio.CancelledError:
            pass
        if lifespan is not None:
            await lifespan.__aexit__(None, None, None)
        async with gateway:
            got = await call(gateway, ask(), stream=True)
            assert got.text == "one two three", f"cancelled at await {at}"
            assert len(provider.calls) == 1
            assert [record.cost_usd for record in await records(gateway) if record.cost] == [USUAL_COST]
            assert [budget.held for budget in await gateway.budgets(capped())] == [0, 0, 0]
            assert await gateway.check_ledger() == []
    assert at > 3


# -- a store that fails ------------------------------------------------------------------------------------------------


class FaultyStore(SQLiteIdempotencyStore):
    """The real one, with verbs that fail or hang as often as a test says."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.failing: dict[str, int] = {}
        self.hanging: set[str] = set()
        self.asked: list[str] = []
        self.renewed = anyio.Event()
        self.at: Callable[[str], None] = lambda verb: None

    async def _fault(self, verb: str) -> None:
        self.asked.append(verb)
        self.at(verb)
        await anyio.lowlevel.checkpoint()  # as a store over a network, whose verb is lost when it is cancelled
        if verb in self.hanging:
            await anyio.sleep_forever()
        if self.failing.get(verb, 0) > 0:
            self.failing[verb] -= 1
            raise StorageUnavailable("away")

    async def claim(self, key: str, fingerprint: str, *, holder: str, until: float, now: float) -> Claim:
        await self._fault("claim")
        return await super().claim(key, fingerprint, holder=holder, until=until, now=now)

    async def renew(self, key: str, *, holder: str, until: float) -> bool:
        await self._fault("renew")
        renewed = await super().renew(key, holder=holder, until=until)
        self.renewed.set()
        return renewed

    async def keep(self, key: str, outcome: bytes, *, holder: str, until: float) -> bool:
        await self._fault("keep")
        return await super().keep(key, outcome, holder=holder, until=until)

    async def release(self, key: str, *, holder: str) -> None:
        await self._fault("release")
        await super().release(key, holder=holder)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FaultyStore]:
    async with FaultyStore(tmp_path / "answers.db") as store:
        yield store


@both_ways
async def test_a_store_that_is_away_or_never_answers_lets_nothing_through(store: FaultyStore, stream: bool) -> None:
    provider = ScriptedProvider("hi")
    async with gateway_with(provider, idempotency=store, timeouts=Timeouts(storage=0.02)) as gateway:
        store.failing = {"claim": 1}
        with pytest.raises(StorageUnavailable):
            await call(gateway, ask(), stream=stream)
        store.hanging = {"claim"}
        with anyio.fail_after(10), pytest.raises(StorageUnavailable) as raised:
            await call(gateway, ask(), stream=stream)
        assert raised.value.code == "storage_unavailable"
        store.hanging = set()
        assert provider.calls == []
        assert await records(gateway) == []


async def test_a_file_that_is_damaged_lets_nothing_through_and_calls_without_a_key_go_on(tmp_path: Path) -> None:
    (tmp_path / "answers.db").write_bytes(b"this is no database" * 100)
    provider = ScriptedProvider("hi")
    async with AIGateway(data_dir=tmp_path, providers=[provider], prices={"m": PRICE}) as gateway:
        with pytest.raises(StorageUnavailable):
            await call(gateway, ask(), stream=False)
        assert provider.calls == []
        assert (await call(gateway, ask(), stream=False, key=None)).text == "hi"


@both_ways
@pytest.mark.parametrize("verb", ["keep", "release"])
async def test_a_claim_is_concluded_once_the_store_is_back(store: FaultyStore, stream: bool, verb: str) -> None:
    provider = ScriptedProvider(*([ProviderError("down", billed="no", status=500)] if verb == "release" else []), "hi")
    async with gateway_with(provider, idempotency=store) as gateway:
        store.failing = {verb: 1}
        if verb == "release":
            with pytest.raises(ProviderError):
                await call(gateway, ask(), stream=stream)
        assert (await call(gateway, ask(), stream=stream)).text == "hi"
        assert (await call(gateway, ask(), stream=stream)).replayed
        assert store.asked.count(verb) == 2


@both_ways
@pytest.mark.parametrize("fault", ["failing", "hanging"])
async def test_an_answer_that_cannot_be_kept_is_given_all_the_same(store: FaultyStore, stream: bool, fault: str) -> None:
    async with gateway_with(ScriptedProvider("hi"), idempotency=store, timeouts=Timeouts(settle=0.05)) as gateway:
        setattr(store, fault, {"keep": 10**6})
        assert (await call(gateway, ask(), stream=stream)).text == "hi"
        with pytest.raises(Conflict):
            await call(gateway, ask(), stream=stream)


async def test_the_claim_of_a_running_call_is_renewed_also_when_the_store_is_away_once(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starlette_aigateway.idempotency.LEASE", 0.03)
    clock = FakeClock()
    provider = ScriptedProvider(After(store.renewed, Say("hi")))
    async with gateway_with(provider, idempotency=store, clock=clock) as gateway:
        store.failing = {"renew": 1}
        with anyio.fail_after(10):
            assert (await call(gateway, ask(), stream=False)).text == "hi"
        assert store.asked.count("renew") >= 2


async def test_a_call_that_outlives_its_lease_does_not_overwrite_the_outcome_of_the_one_that_took_over(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("slow"), arrived), Say("quick"))
    async with gateway_with(provider, idempotency=store, clock=clock, cache=CachePolicy(enabled=False)) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=False))
            await arrived.wait()
            clock.advance(61)
            assert (await call(gateway, ask(), stream=False)).text == "quick"
            go.set()
        assert (await call(gateway, ask(), stream=False)).text == "quick"
    assert "another one has it now" in caplog.text


class WatchedLedger(FaultyLedger):
    """Tells a test of each verb that it is asked for."""

    at: Callable[[str], None] = staticmethod(lambda verb: None)

    async def _fault(self, verb: str) -> None:
        self.at(verb)


class Watched(ScriptedProvider):
    at: Callable[[str], None] = staticmethod(lambda verb: None)

    async def _next(self, request: CompletionRequest) -> Any:
        self.at("provider")
        return await super()._next(request)


@both_ways
@pytest.mark.parametrize("lifespan", [True, False])
@pytest.mark.parametrize("moment", ["claim", "reserve", "provider", "settle", "keep"])
async def test_a_caller_cancelled_at_any_step_and_calling_again_is_billed_once(
    tmp_path: Path, store: FaultyStore, moment: str, stream: bool, lifespan: bool
) -> None:
    provider = Watched("hi")
    async with (
        WatchedLedger(tmp_path / "ledger.db") as ledger,
        gateway_with(provider, idempotency=store, ledger=ledger, lifespan=lifespan) as gateway,
    ):
        seen: list[str] = []
        async with anyio.create_task_group() as group:

            def leave(verb: str) -> None:
                seen.append(verb)
                if verb == moment:
                    group.cancel_scope.cancel()

            store.at = ledger.at = provider.at = leave
            group.start_soon(lambda: call(gateway, ask(), stream=stream))
        assert moment in seen
        with anyio.fail_after(10):
            while "keep" not in store.asked and "release" not in store.asked:
                await anyio.sleep(0.005)
        got = await settled(gateway, stream=stream)
        assert (got.text, len(provider.calls)) == ("hi", 1)
        assert await spent_and_held(gateway, capped()) == (USUAL_COST, ZERO)


async def settled(gateway: AIGateway, *, stream: bool) -> Got:
    """Asks again until the call before has come to its end."""
    with anyio.fail_after(10):
        while True:
            try:
                return await call(gateway, ask(), stream=stream)
            except Conflict as conflict:
                if conflict.code != "idempotency_in_progress":
                    raise
                await anyio.sleep(0.005)
