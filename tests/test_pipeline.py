"""The way of one call, in process: what is booked, what is refused, what is answered from the cache, and who is asked next."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    CacheControl,
    CachePolicy,
    CompletionRequest,
    CostUnbounded,
    InvalidRequest,
    Limits,
    NoProviderAvailable,
    NotFound,
    PermissionDenied,
    Price,
    PriceUnknown,
    Principal,
    PromptRef,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    RateLimitExceeded,
    RetryPolicy,
    SpendCapExceeded,
    SpendCapHeld,
    Tenant,
    Timeouts,
    UsageRecord,
)
from starlette_aigateway.testing.providers import After, Die, Hang, Say, ScriptedProvider
from starlette_aigateway.types import Usage

pytestmark = pytest.mark.anyio

PRICE = Price("1000", "2000")
"""A tenth of a cent for an input token, two for an output token: 10^6 and 2 * 10^6 nano-USD."""

USUAL_COST = Decimal("0.020")
"""Ten input tokens and five output tokens, as `Say` reports them."""

ZERO = Decimal(0)
NOBODY = Principal("nobody")


def ask(text: str = "hello", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model=fields.pop("model", "m"), messages=[{"role": "user", "content": text}], **fields)


@asynccontextmanager
async def gateway_with(*providers: ScriptedProvider, lifespan: bool = True, **settings: Any) -> AsyncIterator[AIGateway]:
    settings.setdefault("prices", {"m": PRICE})
    settings.setdefault("retries", RetryPolicy(rounds=1))
    gateway = AIGateway.in_memory(providers=providers, **settings)
    if lifespan:
        async with gateway:
            yield gateway
            assert await gateway.check_ledger() == []
    else:
        yield gateway
        assert await gateway.check_ledger() == []


async def read(
    gateway: AIGateway, principal: Principal, request: CompletionRequest, *, stream: bool, into: list[str] | None = None
) -> None:
    """The whole answer, either way; its texts go `into` a list as they come."""
    if not stream:
        await gateway.complete(principal, request)
        return
    async with gateway.stream(principal, request) as answer:
        async for chunk in answer:
            if into is not None:
                into.append(chunk.text)


async def records(gateway: AIGateway) -> list[UsageRecord]:
    return list(reversed((await gateway.usage()).data))


async def spent_and_held(gateway: AIGateway, principal: Principal) -> tuple[Decimal, Decimal]:
    total = next(budget for budget in await gateway.budgets(principal) if budget.window == "total")
    return total.spent_usd, total.held_usd


def capped(usd: str = "100", **fields: Any) -> Principal:
    return Principal("user", hard_cap_usd=usd, **fields)


# -- what is booked ----------------------------------------------------------------------------------------------------


async def test_a_reported_usage_is_booked_exactly() -> None:
    async with gateway_with(ScriptedProvider("hi")) as gateway:
        answer = await gateway.complete(capped(), ask())
        assert answer.message["content"] == "hi"
        assert (answer.cost_usd, answer.cached, answer.provider) == (USUAL_COST, False, "scripted")
        assert await spent_and_held(gateway, capped()) == (USUAL_COST, ZERO)
        (record,) = await records(gateway)
        assert (record.outcome, record.cost_usd, record.request_id, record.price) == ("completed", USUAL_COST, answer.request_id, PRICE)


async def test_a_stream_is_booked_exactly_and_tells_its_cost_at_its_end() -> None:
    async with gateway_with(ScriptedProvider(Say("one two three"))) as gateway:
        async with gateway.stream(capped(), ask()) as stream:
            before_its_end = stream.cost_usd
            text = "".join([chunk.text async for chunk in stream])
        assert text == "one two three"
        assert before_its_end is None
        assert (stream.cost_usd, stream.usage, stream.finish_reason) == (USUAL_COST, Usage(input_tokens=10, output_tokens=5), "stop")
        assert [record.outcome for record in await records(gateway)] == ["completed"]


async def test_an_answer_without_usage_is_booked_as_an_estimate_that_is_never_below_the_text() -> None:
    async with gateway_with(ScriptedProvider(Say("x" * 50, usage=None))) as gateway:
        answer = await gateway.complete(capped(), ask(max_tokens=100))
        (record,) = await records(gateway)
        assert record.outcome == "estimated"
        assert record.usage.output_tokens >= 50
        assert answer.cost_usd == record.cost_usd > 0


async def test_usage_above_the_bound_is_booked_in_full_and_marked() -> None:
    async with gateway_with(ScriptedProvider(Say("hi", usage=Usage(input_tokens=10, output_tokens=5000)))) as gateway:
        answer = await gateway.complete(capped(), ask(max_tokens=10))
        assert answer.cost_usd == Decimal("10.01")
        assert [record.outcome for record in await records(gateway)] == ["overrun"]


async def test_an_error_that_charged_nothing_releases_the_hold() -> None:
    error = ProviderError("down", billed="no", retryable=False, status=500)
    async with gateway_with(ScriptedProvider(error)) as gateway:
        with pytest.raises(ProviderError):
            await gateway.complete(capped(), ask())
        assert await spent_and_held(gateway, capped()) == (ZERO, ZERO)
        assert [record.outcome for record in await records(gateway)] == ["released"]


@pytest.mark.parametrize("failure", [ProviderError("gone"), RuntimeError("secret text"), Die(ValueError("x"))])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_sent_and_never_answered_is_booked_in_full(failure: Any, stream: bool) -> None:
    async with gateway_with(ScriptedProvider(failure)) as gateway:
        with pytest.raises(ProviderError) as raised:
            await read(gateway, capped(), ask(max_tokens=7), stream=stream)
        assert "secret" not in str(raised.value)
        (record,) = await records(gateway)
        assert record.outcome == "ambiguous"
        assert await spent_and_held(gateway, capped()) == (record.cost_usd, ZERO)
        assert record.cost_usd > Decimal("0.014")


async def test_a_provider_that_says_what_it_billed_before_it_failed_is_believed() -> None:
    error = ProviderError("failed late", billed=Usage(input_tokens=3, output_tokens=1), retryable=False)
    async with gateway_with(ScriptedProvider(error)) as gateway:
        with pytest.raises(ProviderError):
            await gateway.complete(capped(), ask())
        assert await spent_and_held(gateway, capped()) == (Decimal("0.005"), ZERO)


async def test_a_provider_that_hangs_times_out_and_is_booked_in_full() -> None:
    async with gateway_with(ScriptedProvider(Hang(), timeout=0.02)) as gateway:
        with pytest.raises(ProviderTimeout):
            await gateway.complete(capped(), ask())
        assert [record.outcome for record in await records(gateway)] == ["ambiguous"]


async def test_a_stream_that_dies_after_its_first_content_raises_there_and_asks_nobody_else() -> None:
    first = ScriptedProvider(Die(after=2, text="one two three"), name="first")
    second = ScriptedProvider("never", name="second")
    async with gateway_with(first, second) as gateway:
        got: list[str] = []
        with pytest.raises(ProviderError):
            await read(gateway, capped(), ask(), stream=True, into=got)
        assert got == ["one ", "two "]
        assert second.calls == []
        assert [record.outcome for record in await records(gateway)] == ["ambiguous"]


# -- caps --------------------------------------------------------------------------------------------------------------


async def test_a_worst_case_that_does_not_fit_never_reaches_the_provider() -> None:
    provider = ScriptedProvider("never")
    async with gateway_with(provider) as gateway:
        with pytest.raises(SpendCapExceeded) as raised:
            await gateway.complete(capped("0.01"), ask(max_tokens=100))
        assert (raised.value.code, raised.value.scope, raised.value.window) == ("spend_cap_exceeded", "principal", "total")
        assert raised.value.request_id is not None
        assert provider.calls == []
        assert await records(gateway) == []


@pytest.mark.parametrize("cap", ["daily_cap_usd", "monthly_cap_usd", "hard_cap_usd"])
async def test_each_kind_of_cap_holds_for_principal_tenant_and_gateway(cap: str) -> None:
    limits: Any = {cap: "0.001"}
    async with gateway_with(ScriptedProvider("never")) as gateway:
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(Principal("a", **limits), ask())
        with pytest.raises(SpendCapExceeded) as raised:
            await gateway.complete(Principal("b", tenant=Tenant("t", **limits)), ask())
        assert raised.value.scope == "tenant"
        await gateway.save_tenant(Tenant("stored", **limits))
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(Principal("c", tenant="stored"), ask())
    async with gateway_with(ScriptedProvider("never"), limits=Limits(**limits)) as gateway:
        with pytest.raises(SpendCapExceeded) as raised:
            await gateway.complete(Principal("d"), ask())
        assert raised.value.scope == "gateway"


async def test_held_money_refuses_for_now_and_spent_money_for_good() -> None:
    go, arrived = anyio.Event(), anyio.Event()
    async with gateway_with(ScriptedProvider(After(go, Say("hi"), arrived), "again")) as gateway:
        principal = capped("1.5")
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.complete, principal, ask("first", max_tokens=500))
            await arrived.wait()
            with pytest.raises(SpendCapHeld) as raised:
                await gateway.complete(principal, ask("second", max_tokens=500))
            assert raised.value.retry_after is not None
            go.set()
        await gateway.complete(principal, ask("second", max_tokens=500))


async def test_the_budget_lowers_a_bound_that_nobody_gave_and_says_so() -> None:
    provider = ScriptedProvider(Say("cut", finish_reason="length"), repeat=True)
    async with gateway_with(provider, default_max_tokens=1000) as gateway:
        principal = capped("1.5")
        async with gateway.stream(principal, ask()) as stream:
            assert stream.lowered_to is not None
            assert 256 <= stream.lowered_to < 1000
            async for _ in stream:
                pass
        assert provider.calls[0].max_tokens == stream.lowered_to
        await gateway.complete(principal, ask())
        assert len(provider.calls) == 2, "an answer that the budget cut short is not cached"


async def test_an_answer_that_a_bound_of_ours_cut_short_is_shared_with_nobody() -> None:
    provider = ScriptedProvider(Say("cut", finish_reason="length"), repeat=True)
    async with gateway_with(provider) as gateway:
        await gateway.complete(Principal("capped", tenant="t", hard_cap_usd=100), ask())
        assert not (await gateway.complete(Principal("free", tenant="t"), ask())).cached
        assert [call.max_tokens for call in provider.calls] == [4096, None]
        assert (await gateway.complete(Principal("other", tenant="t"), ask())).cached, "its own end at its own length is a whole answer"


async def test_an_uncapped_call_sends_no_bound_of_ours() -> None:
    provider = ScriptedProvider("hi")
    async with gateway_with(provider) as gateway:
        await gateway.complete(NOBODY, ask())
        assert provider.calls[0].max_tokens is None


async def test_under_a_cap_an_unpriced_model_and_an_unbounded_parameter_are_refused_and_free_ones_are_not() -> None:
    async with gateway_with(ScriptedProvider("a", "b", "c"), prices={"free": Price.free()}) as gateway:
        with pytest.raises(PriceUnknown):
            await gateway.complete(capped(), ask())
        with pytest.raises(CostUnbounded) as raised:
            await gateway.complete(capped(), ask(model="free", params={"web_search_options": {}}))
        assert raised.value.param == "web_search_options"
        assert (await gateway.complete(capped(), ask(model="free"))).cost_usd == 0
        assert (await gateway.complete(NOBODY, ask(params={"web_search_options": {}}))).cost_usd == 0
    async with gateway_with(ScriptedProvider("d"), allow_unbounded=["web_search_options"]) as gateway:
        await gateway.complete(capped(), ask(params={"web_search_options": {}}))


async def test_a_provider_that_cannot_bound_its_output_is_left_out_under_a_cap_unless_its_bound_is_known() -> None:
    async with gateway_with(ScriptedProvider("a", bounds_output=False)) as gateway:
        with pytest.raises(CostUnbounded):
            await gateway.complete(capped(), ask())
    async with gateway_with(ScriptedProvider("a", bounds_output=False, max_output_tokens=300)) as gateway:
        await gateway.complete(capped(), ask())


@pytest.mark.parametrize("given", [10, None])
async def test_a_provider_that_does_not_obey_a_bound_is_held_for_all_that_it_may_say(given: int | None) -> None:
    """Whatever the caller asks for, 300 tokens may come."""
    usage = Usage(input_tokens=1, output_tokens=300)
    provider = ScriptedProvider(Say("a", usage=usage), bounds_output=False, max_output_tokens=300)
    async with gateway_with(provider) as gateway:
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(Principal("poor", hard_cap_usd="0.55"), ask(max_tokens=given))
        await gateway.complete(Principal("rich", hard_cap_usd=100), ask(max_tokens=given))
        (record,) = (await gateway.usage()).data
        assert record.outcome == "completed", "300 tokens are within what was held"


async def test_parallel_calls_are_counted_by_open_holds() -> None:
    go, arrived = anyio.Event(), anyio.Event()
    principal = Principal("p", max_parallel_requests=1)
    async with gateway_with(ScriptedProvider(After(go, Say("hi"), arrived), "next")) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.complete, principal, ask("one"))
            await arrived.wait()
            with pytest.raises(RateLimitExceeded) as raised:
                await gateway.complete(principal, ask("two"))
            assert raised.value.code == "too_many_parallel_requests"
            go.set()
        await gateway.complete(principal, ask("two"))


async def test_default_limits_hold_for_whoever_brings_none() -> None:
    async with gateway_with(ScriptedProvider("a", repeat=True), default_limits=Limits(requests_per_minute=1)) as gateway:
        await gateway.complete(Principal("x"), ask("1"))
        with pytest.raises(RateLimitExceeded):
            await gateway.complete(Principal("x"), ask("2"))
        own = Principal("y", requests_per_minute=2)
        await gateway.complete(own, ask("1"))
        await gateway.complete(own, ask("2"))


# -- who is asked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retryable_failure_goes_on_to_the_next_provider_under_a_hold_of_its_own(stream: bool) -> None:
    first = ScriptedProvider(ProviderError("down", billed="no", status=503), name="first")
    second = ScriptedProvider("second's", name="second")
    prices = {("first", "m"): Price("1", "1"), ("second", "m"): PRICE}
    async with gateway_with(first, second, prices=prices) as gateway:
        if stream:
            async with gateway.stream(capped(), ask()) as answer:
                assert "".join([chunk.text async for chunk in answer]) == "second's"
            assert answer.provider == "second"
        else:
            assert (await gateway.complete(capped(), ask())).provider == "second"
        assert [(record.provider, record.outcome, record.attempt) for record in await records(gateway)] == [
            ("first", "released", 1),
            ("second", "completed", 2),
        ]
        assert await spent_and_held(gateway, capped()) == (USUAL_COST, ZERO)


async def test_a_stream_that_dies_before_its_first_content_is_answered_by_the_next_provider() -> None:
    first = ScriptedProvider(Die(after=0, text="never"), name="first")
    second = ScriptedProvider("fine", name="second")
    async with gateway_with(first, second) as gateway, gateway.stream(NOBODY, ask()) as stream:
        assert "".join([chunk.text async for chunk in stream]) == "fine"


async def test_what_another_provider_would_refuse_as_well_is_not_tried_there() -> None:
    second = ScriptedProvider("never", name="second")
    rejected = ProviderRejected("too long", retryable=False, billed="no", status=400)
    async with gateway_with(ScriptedProvider(rejected, name="first"), second) as gateway:
        with pytest.raises(ProviderRejected):
            await gateway.complete(NOBODY, ask())
        assert second.calls == []


async def test_admission_needs_room_for_the_dearest_planned_provider() -> None:
    cheap, dear = ScriptedProvider("cheap", name="cheap"), ScriptedProvider("dear", name="dear")
    prices = {("cheap", "m"): Price("1", "1"), ("dear", "m"): Price("100000", "100000")}
    async with gateway_with(cheap, dear, prices=prices) as gateway:
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(capped("1"), ask())
        assert cheap.calls == []


async def test_when_a_later_hold_does_not_fit_the_provider_s_error_is_what_the_caller_sees() -> None:
    failing = ScriptedProvider(ProviderError("lost", status=500), name="first")
    async with gateway_with(failing, ScriptedProvider("never", name="second")) as gateway:
        with pytest.raises(ProviderError, match="lost"):
            await gateway.complete(capped("0.7"), ask(max_tokens=200))
        assert [record.outcome for record in await records(gateway)] == ["ambiguous"]


async def test_a_failing_target_is_left_alone_for_a_while() -> None:
    errors = [ProviderError("down", billed="no", status=500) for _ in range(5)]
    async with gateway_with(ScriptedProvider(*errors)) as gateway:
        for number in range(5):
            with pytest.raises(ProviderError, match="down"):
                await gateway.complete(NOBODY, ask(str(number)))
        with pytest.raises(NoProviderAvailable) as raised:
            await gateway.complete(NOBODY, ask("6"))
        assert raised.value.retry_after is not None


async def test_after_the_cooldown_one_call_tries_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    errors = [ProviderError("down", billed="no", status=500) for _ in range(5)]
    provider = ScriptedProvider(*errors, After(go, Say("up"), arrived), "more")
    async with gateway_with(provider) as gateway:
        for number in range(5):
            with pytest.raises(ProviderError, match="down"):
                await gateway.complete(NOBODY, ask(str(number)))
        monkeypatch.setattr("starlette_aigateway.attempts.monotonic", lambda: time.monotonic() + 31)
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.complete, NOBODY, ask("first"))
            await arrived.wait()
            with pytest.raises(NoProviderAvailable):
                await gateway.complete(NOBODY, ask("second"))
            go.set()
        await gateway.complete(NOBODY, ask("third"))


async def test_a_retry_at_the_same_provider_only_follows_a_failure_that_charged_nothing() -> None:
    free = ScriptedProvider(ProviderError("busy", billed="no", status=503), "fine", name="free")
    async with gateway_with(free, retries=RetryPolicy(rounds=2, backoff=0.001)) as gateway:
        assert (await gateway.complete(NOBODY, ask())).message["content"] == "fine"
    charged = ScriptedProvider(ProviderError("lost"), "never", name="charged")
    async with gateway_with(charged, retries=RetryPolicy(rounds=2, backoff=0.001)) as gateway:
        with pytest.raises(ProviderError):
            await gateway.complete(NOBODY, ask())
        assert len(charged.calls) == 1


async def test_a_public_name_is_mapped_to_the_upstream_s() -> None:
    provider = ScriptedProvider("hi", models={"m": "vendor/m-2026"})
    async with gateway_with(provider) as gateway:
        await gateway.complete(capped(), ask())
        assert provider.calls[0].model == "vendor/m-2026"
        with pytest.raises(NotFound) as raised:
            await gateway.complete(NOBODY, ask(model="other"))
        assert raised.value.code == "model_not_found"


async def test_the_requested_name_is_what_has_to_be_allowed() -> None:
    async with gateway_with(ScriptedProvider("hi")) as gateway:
        with pytest.raises(PermissionDenied):
            await gateway.complete(Principal("a", allowed_models=["other"]), ask())
        await gateway.complete(Principal("a", allowed_models=["m"]), ask())


# -- the cache ---------------------------------------------------------------------------------------------------------


async def test_the_same_call_again_is_answered_at_cost_zero_whichever_way_it_is_asked() -> None:
    provider = ScriptedProvider("one two", Say("three four"))
    async with gateway_with(provider) as gateway:
        whole = await gateway.complete(NOBODY, ask("a"))
        again = await gateway.complete(NOBODY, ask("a"))
        assert (again.cached, again.cost_usd, again.message, again.usage) == (True, ZERO, whole.message, whole.usage)
        async with gateway.stream(NOBODY, ask("a")) as stream:
            assert "".join([chunk.text async for chunk in stream]) == "one two"
        assert (stream.cached, stream.cost_usd, stream.usage) == (True, ZERO, whole.usage)
        async with gateway.stream(NOBODY, ask("b")) as stream:
            async for _ in stream:
                pass
        streamed = await gateway.complete(NOBODY, ask("b"))
        assert (streamed.cached, streamed.message["content"], streamed.finish_reason) == (True, "three four", "stop")
        assert [record.outcome for record in await records(gateway)] == ["completed", "cached", "cached", "completed", "cached"]


async def test_a_consumer_at_its_cap_may_still_read_what_is_free() -> None:
    principal = capped("0.8")
    async with gateway_with(ScriptedProvider(Say("hi", usage=Usage(input_tokens=10, output_tokens=300)), "never")) as gateway:
        await gateway.complete(principal, ask(max_tokens=300))
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(principal, ask("other", max_tokens=300))
        assert (await gateway.complete(principal, ask(max_tokens=300))).cached


async def test_answers_are_shared_within_a_tenant_and_with_nobody_else_unless_the_policy_says_so() -> None:
    async with gateway_with(ScriptedProvider("a", "b", "c")) as gateway:
        await gateway.complete(Principal("one", tenant="t"), ask())
        assert (await gateway.complete(Principal("two", tenant="t"), ask())).cached
        assert not (await gateway.complete(Principal("three", tenant="u"), ask())).cached
        assert not (await gateway.complete(Principal("four"), ask())).cached
    async with gateway_with(ScriptedProvider("a"), cache=CachePolicy(scope="gateway")) as gateway:
        await gateway.complete(Principal("one", tenant="t"), ask())
        assert (await gateway.complete(Principal("four"), ask())).cached


async def test_a_call_may_refuse_to_read_or_to_store() -> None:
    async with gateway_with(ScriptedProvider("1", "2", "3", "4")) as gateway:
        await gateway.complete(NOBODY, ask(), cache=CacheControl(read=False, store=False))
        assert (await gateway.complete(NOBODY, ask())).message["content"] == "2"
        assert (await gateway.complete(NOBODY, ask(), cache=CacheControl(read=False))).message["content"] == "3"
        assert (await gateway.complete(NOBODY, ask())).message["content"] == "3"
        assert (await gateway.complete(NOBODY, ask(), cache=CacheControl(max_age=0))).message["content"] in ("3", "4")


async def test_failures_and_broken_streams_are_not_cached() -> None:
    provider = ScriptedProvider(ProviderError("no"), Die(after=1, text="one two"), "fine")
    async with gateway_with(provider) as gateway:
        with pytest.raises(ProviderError):
            await gateway.complete(NOBODY, ask())
        with pytest.raises(ProviderError):
            await read(gateway, NOBODY, ask(), stream=True)
        assert not (await gateway.complete(NOBODY, ask())).cached


async def test_identical_calls_in_the_air_share_one_answer_and_one_bill() -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("once"), arrived))
    answers: list[str] = []
    async with gateway_with(provider) as gateway:

        async def call() -> None:
            answers.append((await gateway.complete(NOBODY, ask())).message["content"])

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(call)
            await arrived.wait()
            await anyio.wait_all_tasks_blocked()
            go.set()
        assert answers == ["once"] * 5
        assert sorted(record.outcome for record in await records(gateway)) == ["cached"] * 4 + ["completed"]


# -- who leaves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_call_whose_caller_is_cancelled_is_still_booked_exactly(lifespan: bool) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    async with gateway_with(ScriptedProvider(After(go, Say("hi"), arrived)), lifespan=lifespan) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.complete, capped(), ask())
            await arrived.wait()
            group.cancel_scope.cancel()
            go.set()
        await until(lambda: booked(gateway))
        assert await spent_and_held(gateway, capped()) == (USUAL_COST, ZERO)


@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_stream_that_its_reader_leaves_is_read_on_and_booked_exactly(lifespan: bool) -> None:
    async with gateway_with(ScriptedProvider(Say("one two three four five")), lifespan=lifespan) as gateway:
        async with gateway.stream(capped(), ask()) as stream:
            async for _ in stream:
                break
        await until(lambda: booked(gateway))
        (record,) = await records(gateway)
        assert (record.outcome, record.cost_usd) == ("completed", USUAL_COST)


@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_stream_that_does_not_end_in_time_is_booked_by_what_came(lifespan: bool) -> None:
    provider = ScriptedProvider(Hang(after=2, text="one two three"))
    async with gateway_with(provider, lifespan=lifespan, timeouts=Timeouts(drain=0.01)) as gateway:
        async with gateway.stream(capped(), ask()) as stream:
            async for _ in stream:
                break
        await until(lambda: booked(gateway))
        (record,) = await records(gateway)
        assert record.outcome == "estimated"
        assert record.usage.output_tokens >= len("one two ")
        assert provider.closed == 1


async def test_shutdown_settles_what_is_still_running() -> None:
    gateway = AIGateway.in_memory(
        providers=[ScriptedProvider(Hang(after=1, text="one two"))], prices={"m": PRICE}, timeouts=Timeouts(drain=0.01)
    )
    async with gateway, gateway.stream(capped(), ask()) as stream:
        async for _ in stream:
            break
    assert [record.outcome for record in await records(gateway)] == ["estimated"]
    assert await gateway.check_ledger() == []


async def booked(gateway: AIGateway) -> bool:
    return bool((await gateway.usage()).data)


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(10):
        while not await condition():
            await anyio.sleep(0.005)


# -- prompts -----------------------------------------------------------------------------------------------------------


async def test_a_prompt_by_reference_is_rendered_and_brings_its_settings() -> None:
    provider = ScriptedProvider("a", "b")
    async with gateway_with(provider) as gateway:
        await gateway.save_prompt("greet", [{"role": "system", "content": "Greet {{name}}."}], settings={"model": "m", "temperature": 0.1})
        await gateway.complete(NOBODY, CompletionRequest(prompt=PromptRef(name="greet", variables={"name": "Ada"})))
        assert provider.calls[0].messages == ({"role": "system", "content": "Greet Ada."},)
        assert (provider.calls[0].model, provider.calls[0].temperature) == ("m", 0.1)
        with pytest.raises(InvalidRequest) as raised:
            await gateway.complete(NOBODY, CompletionRequest(prompt=PromptRef(name="greet")))
        assert (raised.value.code, raised.value.param) == ("missing_variable", "prompt.variables.name")
        with pytest.raises(NotFound) as missing:
            await gateway.complete(NOBODY, ask(prompt=PromptRef(name="none")))
        assert missing.value.code == "prompt_not_found"


async def test_activating_a_version_is_a_move_of_a_label_forward_and_back() -> None:
    provider = ScriptedProvider("a", "b", "c")
    async with gateway_with(provider) as gateway:
        await gateway.save_prompt("p", "first")
        await gateway.save_prompt("p", "second")
        reference = CompletionRequest(model="m", prompt=PromptRef(name="p"), messages=[{"role": "user", "content": "x"}])
        await gateway.complete(NOBODY, reference)
        await gateway.activate_prompt("p", 2)
        await gateway.complete(NOBODY, reference)
        await gateway.activate_prompt("p", 1)
        assert (await gateway.complete(NOBODY, reference)).cached
        assert [call.messages[0]["content"] for call in provider.calls] == ["first", "second"]


# -- windows -----------------------------------------------------------------------------------------------------------


async def test_a_principal_with_other_limits_is_held_to_those_at_once() -> None:
    async with gateway_with(ScriptedProvider(Say("a"), Say("b"), Say("c"))) as gateway:
        await gateway.complete(Principal("p"), ask("one"))
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(Principal("p", hard_cap_usd="0.000001"), ask("two"))
        await gateway.complete(Principal("p"), ask("three"))


async def test_a_price_that_is_set_or_removed_holds_from_the_next_call_on() -> None:
    async with gateway_with(ScriptedProvider(Say("a"), Say("b"), Say("c"))) as gateway:
        assert (await gateway.complete(NOBODY, ask("one"))).cost_usd == USUAL_COST
        await gateway.set_price("m", Price(0, 0))
        assert (await gateway.complete(NOBODY, ask("two"))).cost_usd == ZERO
        await gateway.set_price("m", None)
        assert (await gateway.complete(NOBODY, ask("three"))).cost_usd == USUAL_COST


async def test_a_full_window_refuses_with_the_true_wait_and_asks_nobody() -> None:
    provider = ScriptedProvider("a", repeat=True)
    async with gateway_with(provider) as gateway:
        raw, key = await gateway.create_key("k", requests_per_minute=2)
        await gateway.complete(raw, ask("1"))
        await gateway.complete(raw, ask("2"))
        with pytest.raises(RateLimitExceeded) as raised:
            await gateway.complete(raw, ask("3"))
        assert raised.value.retry_after is not None
        assert 55 < raised.value.retry_after <= 60
        await gateway.update_key(key.id, requests_per_minute=3)
        await gateway.complete(raw, ask("3"))
        with pytest.raises(RateLimitExceeded):
            await gateway.complete(raw, ask("4"))


async def test_tokens_are_estimated_at_the_door_and_corrected_by_the_bill() -> None:
    heavy = Say("a", usage=Usage(input_tokens=900, output_tokens=99))
    async with gateway_with(ScriptedProvider(heavy, repeat=True)) as gateway:
        principal = Principal("t", tokens_per_minute=1000)
        await gateway.complete(principal, ask("1"))
        with pytest.raises(RateLimitExceeded) as raised:
            await gateway.complete(principal, ask("2"))
        assert raised.value.window == "tokens"
        with pytest.raises(InvalidRequest) as too_large:
            await gateway.complete(Principal("u", tokens_per_minute=10), ask("x" * 1000))
        assert too_large.value.code == "request_too_large_for_limit"


# -- flights, plans and an absent cache --------------------------------------------------------------------------------


async def test_who_waited_for_a_call_that_failed_makes_its_own() -> None:
    go, arrived = anyio.Event(), anyio.Event()
    failing = After(go, Die(ProviderError("lost", retryable=False)), arrived)
    async with gateway_with(ScriptedProvider(failing, "fine")) as gateway:
        answers: list[str] = []

        async def call() -> None:
            try:
                answers.append((await gateway.complete(NOBODY, ask())).message["content"])
            except ProviderError as error:
                answers.append(error.message)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await arrived.wait()
            group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            go.set()
        assert sorted(answers) == ["fine", "lost"]


async def test_who_waits_for_an_identical_call_waits_no_longer_than_its_own_timeout() -> None:
    arrived = anyio.Event()
    hanging = gateway_with(ScriptedProvider(Hang(arrived)), timeouts=Timeouts(drain=0.01))
    async with hanging as gateway, anyio.create_task_group() as group:
        group.start_soon(gateway.complete, NOBODY, ask())
        await arrived.wait()
        with pytest.raises(ProviderTimeout):
            await gateway.complete(NOBODY, ask(), timeout=0.02)
        group.cancel_scope.cancel()


async def test_without_a_cache_nothing_is_read_kept_or_shared() -> None:
    async with gateway_with(ScriptedProvider("a", "b", "c"), cache=CachePolicy(enabled=False)) as gateway:
        assert [(await gateway.complete(NOBODY, ask())).cached for _ in range(2)] == [False, False]
        await read(gateway, NOBODY, ask(), stream=True)


async def test_any_number_of_model_names_is_planned() -> None:
    async with gateway_with(ScriptedProvider("a", repeat=True), prices={}) as gateway:
        for number in range(1030):
            await gateway.complete(NOBODY, ask(model=f"m{number}"), cache=CacheControl(read=False, store=False))


async def test_a_model_is_needed_from_the_caller_or_the_prompt() -> None:
    async with gateway_with(ScriptedProvider("never")) as gateway:
        await gateway.save_prompt("p", "text")
        with pytest.raises(InvalidRequest) as raised:
            await gateway.complete(NOBODY, CompletionRequest(prompt=PromptRef(name="p")))
        assert raised.value.param == "model"


async def test_a_call_that_nobody_answered_is_told_to_the_operator_without_what_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    error = ProviderError("the provider first could not be reached", billed="no")
    error.__cause__ = ConnectionRefusedError("10.0.0.7 says secret")
    async with gateway_with(ScriptedProvider(error, name="first"), retries=RetryPolicy(rounds=1)) as gateway:
        with pytest.raises(ProviderError):
            await gateway.complete(NOBODY, ask("a private question"))
    assert "answered by no provider; the last was first, after 1 attempts" in caplog.text
    assert "ConnectionRefusedError" in caplog.text
    assert "secret" not in caplog.text
    assert "private" not in caplog.text
