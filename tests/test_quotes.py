"""A quote says what the call would then meet, and leaves no trace: no provider, window, hold, record, claim or event knows of it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    CacheControl,
    CompletionRequest,
    CostUnbounded,
    InvalidRequest,
    Limits,
    Message,
    NotFound,
    PermissionDenied,
    Price,
    PriceUnknown,
    Principal,
    PromptRef,
    Quote,
    RateLimitExceeded,
    RetryPolicy,
    SpendCapExceeded,
    SpendCapHeld,
    StorageUnavailable,
    Tenant,
    TooManyParallelRequests,
    UnprocessableRequest,
)
from starlette_aigateway.events import Event
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.providers import After, Say, ScriptedProvider
from starlette_aigateway.types import Usage

from .http_host import ALICE, MESSAGES, ROOT, service

pytestmark = pytest.mark.anyio

PRICE = Price("1000", "2000")
"""10^6 nano-USD for an input token, two for an output token."""

ALL = Limits(requests_per_minute=100, tokens_per_minute=100_000, max_parallel_requests=10, hard_cap_usd=100)
USER = Principal("user", tenant=Tenant("acme", requests_per_minute=60, daily_cap_usd=50), requests_per_minute=30, monthly_cap_usd=20)


HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def ask(text: str = "hello", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model=fields.pop("model", "m"), messages=[{"role": "user", "content": text}], **fields)


@asynccontextmanager
async def gateway_with(*providers: ScriptedProvider, **settings: Any) -> AsyncIterator[AIGateway]:
    settings = {"prices": {"m": PRICE}, "retries": RetryPolicy(rounds=1), "clock": FakeClock(), **settings}
    make = AIGateway if "data_dir" in settings else AIGateway.in_memory
    async with make(providers=providers, **settings) as gateway:
        yield gateway
        assert await gateway.check_ledger() == []


async def refusal_of(gateway: AIGateway, principal: Principal, request: CompletionRequest) -> AIGatewayError | None:
    """What the call itself meets."""
    try:
        await gateway.complete(principal, request)
    except AIGatewayError as error:
        return error
    return None


def facts(error: AIGatewayError | None) -> object:
    return None if error is None else (type(error), str(error), error.code, error.param, error.retry_after, error.details)


# -- no trace ----------------------------------------------------------------------------------------------------------


async def test_a_quote_leaves_no_trace(tmp_path: Path) -> None:
    """Byte for byte, what the ledger and the answers have on the disk."""
    events: list[Event] = []

    async def observe(event: Event) -> None:
        events.append(event)

    provider = ScriptedProvider("hi")
    async with gateway_with(provider, data_dir=tmp_path, limits=ALL, observers=[observe]) as gateway:
        await gateway.complete(USER, ask("a call on the books"), idempotency_key="first")
        caller = gateway.acting_as(USER)
        await caller.quote(model="m", messages=HELLO)  # opens a reader
        windows = await gateway._composition.pipeline.admission.windows(USER)
        budgets = await gateway.budgets(USER, gateway=True)
        await gateway._composition.observers.flush()
        seen = list(events)
        names = [f"{name}{suffix}" for name in ("ledger.db", "answers.db") for suffix in ("", "-wal")]
        files = {name: (tmp_path / name).read_bytes() for name in names}
        for number in range(5):
            quote = await gateway.quote(USER, ask(f"quote {number}"), idempotency_key="second", tags={"a": "b"}, timeout=5)
            assert quote.would_refuse is None
            assert (await caller.quote(model="m", messages=HELLO, idempotency_key="second", stream=True)).would_refuse is None
            refused = await gateway.quote(Principal("poor", hard_cap_usd="0.01"), ask())
            assert refused.would_refuse is not None
        assert {name: (tmp_path / name).read_bytes() for name in names} == files
        assert await gateway._composition.pipeline.admission.windows(USER) == windows
        assert await gateway.budgets(USER, gateway=True) == budgets
        await gateway._composition.observers.flush()
        assert events == seen
        assert len(provider.calls) == 1
        assert len((await gateway.usage()).data) == 1


async def test_quotes_are_not_counted_by_a_window_that_a_single_call_fills() -> None:
    async with gateway_with(ScriptedProvider("hi")) as gateway:
        once = Principal("once", requests_per_minute=1, tokens_per_minute=1000, max_parallel_requests=1, hard_cap_usd="1.5")
        for _ in range(3):
            assert (await gateway.quote(once, ask(max_tokens=400))).would_refuse is None
        await gateway.complete(once, ask(max_tokens=400))
        assert isinstance((await gateway.quote(once, ask(max_tokens=400))).would_refuse, RateLimitExceeded)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [ask(), ask(max_tokens=7), ask(max_tokens=7, n=3)], ids=["chosen", "given", "three"])
async def test_the_quoted_cost_is_what_the_attempt_then_holds(request_: CompletionRequest) -> None:
    ends, arrived = anyio.Event(), anyio.Event()
    principal = Principal("user", hard_cap_usd=100)
    async with gateway_with(ScriptedProvider(After(ends, Say("hi"), arrived))) as gateway, anyio.create_task_group() as group:
        quote = await gateway.quote(principal, request_)
        (target,) = quote.targets
        output = (request_.n or 1) * (request_.max_tokens or 4096)
        assert quote.worst_case_usd == target.worst_case_usd == Decimal(target.input_tokens + 2 * output) / 1000
        assert (target.provider, target.model, target.price, target.bounded) == ("scripted", "m", PRICE, True)
        assert (target.max_tokens, target.imposed) == (request_.max_tokens or 4096, request_.max_tokens is None)
        group.start_soon(gateway.complete, principal, request_)
        await arrived.wait()
        total = next(budget for budget in await gateway.budgets(principal) if budget.window == "total")
        assert total.held_usd == quote.worst_case_usd
        ends.set()


async def test_what_has_to_fit_is_the_least_that_the_dearest_target_needs() -> None:
    cheap, dear = ScriptedProvider(name="cheap"), ScriptedProvider(name="dear", models={"m": "upstream-m"})
    prices = {("cheap", "m"): PRICE, ("dear", "m"): Price("5000", "9000", request=1)}
    async with gateway_with(cheap, dear, prices=prices) as gateway:
        quote = await gateway.quote(Principal("user", hard_cap_usd=1000), ask())
        first, second = quote.targets
        assert ((first.provider, first.model), (second.provider, second.model)) == (("cheap", "m"), ("dear", "upstream-m"))
        assert quote.required_usd == second.minimum_usd == Decimal(second.input_tokens * 5 + 256 * 9) / 1000 + 1
        assert quote.worst_case_usd == second.worst_case_usd == Decimal(second.input_tokens * 5 + 4096 * 9) / 1000 + 1
        assert first.worst_case_usd == Decimal(first.input_tokens + 4096 * 2) / 1000
        just = await gateway.quote(Principal("just", hard_cap_usd=quote.required_usd or 0), ask())
        assert just.would_refuse is None
        less = await gateway.quote(Principal("less", hard_cap_usd=(quote.required_usd or 0) - Decimal("1e-9")), ask())
        assert isinstance(less.would_refuse, SpendCapExceeded)


async def test_a_bound_that_the_budget_lowers_is_quoted_as_it_would_be_sent() -> None:
    provider = ScriptedProvider("hi")
    async with gateway_with(provider) as gateway:
        principal = Principal("user", hard_cap_usd=2)
        quote = await gateway.quote(principal, ask())
        (target,) = quote.targets
        assert 256 < (target.max_tokens or 0) < 1000
        assert target.imposed
        assert quote.worst_case_usd == 2
        await gateway.complete(principal, ask())
        assert [call.max_tokens for call in provider.calls] == [target.max_tokens]


async def test_the_cost_of_a_call_that_nothing_bounds_is_said_to_be_unbounded() -> None:
    async with gateway_with(ScriptedProvider(), ScriptedProvider(name="endless", models=("e",), bounds_output=False)) as gateway:
        free = Principal("free")
        assert not (await gateway.quote(free, ask())).bounded, "no output bound is sent for those who have no cap"
        assert (await gateway.quote(free, ask())).targets[0].max_tokens is None
        assert (await gateway.quote(free, ask(max_tokens=5))).bounded
        assert not (await gateway.quote(free, ask(max_tokens=5, params={"service_tier": "priority"}))).bounded
        unknown = await gateway.quote(free, ask(model="e", max_tokens=5))
        assert (unknown.bounded, unknown.worst_case_usd, unknown.required_usd) == (False, None, None), "an unknown cost is not zero"


async def test_budgets_and_windows_are_the_callers_own_and_its_tenants() -> None:
    async with gateway_with(ScriptedProvider("hi"), limits=ALL) as gateway:
        await gateway.complete(USER, ask())
        quote = await gateway.quote(USER, ask())
        assert list(quote.budgets) == list(await gateway.budgets(USER))
        assert {budget.scope for budget in quote.budgets} == {"principal:user", "tenant:acme"}
        assert [(state.claim.scope_kind, state.claim.kind, state.remaining) for state in quote.windows] == [
            ("principal", "requests", 29), ("tenant", "requests", 59),
        ]  # fmt: skip


async def test_the_limit_of_the_whole_gateway_refuses_without_figures() -> None:
    async with gateway_with(ScriptedProvider(), limits=Limits(hard_cap_usd="0.123")) as gateway:
        quote = await gateway.quote(USER, ask())
        assert isinstance(quote.would_refuse, SpendCapExceeded)
        assert (quote.would_refuse.scope, quote.would_refuse.details) == ("gateway", {"scope": "gateway", "window": "total"})
        assert "0.123" not in str(quote.would_refuse)


# -- cached answers ----------------------------------------------------------------------------------------------------


async def test_a_cached_answer_is_quoted_at_nothing_also_at_a_reached_cap() -> None:
    async with gateway_with(ScriptedProvider("hi")) as gateway:
        principal = Principal("user", hard_cap_usd="2", tokens_per_minute=5000)
        assert (await gateway.quote(principal, ask(max_tokens=800))).cached is False
        await gateway.complete(principal, ask(max_tokens=800))
        quote = await gateway.quote(principal, ask(max_tokens=800))
        assert quote.cached
        assert quote.bounded
        assert {quote.worst_case_usd, quote.required_usd} == {Decimal(0)}
        assert len(quote.targets) == 0
        assert quote.would_refuse is None, "who has reached a cap may read what costs nothing"
        assert quote.windows == [], "a cached answer takes no tokens"
        anew = await gateway.quote(principal, ask(max_tokens=1000), cache=CacheControl(read=False))
        assert isinstance(anew.would_refuse, SpendCapExceeded)
        assert (await gateway.quote(principal, ask(max_tokens=800), cache=CacheControl(read=False))).cache == "miss"
        assert (await gateway.quote(principal, ask(max_tokens=800), cache=CacheControl(read=False, store=False))).cache == "bypass"


async def test_a_cached_answer_still_has_to_pass_the_window_of_requests() -> None:
    async with gateway_with(ScriptedProvider("hi")) as gateway:
        principal = Principal("user", requests_per_minute=1)
        await gateway.complete(principal, ask())
        quote = await gateway.quote(principal, ask())
        assert quote.cached
        assert isinstance(quote.would_refuse, RateLimitExceeded)
        assert quote.would_refuse.retry_after == 60


# -- what would refuse it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "request_", "kind", "code"),
    [
        ({"requests_per_minute": 1}, ask(), RateLimitExceeded, "rate_limit_exceeded"),
        ({"tokens_per_minute": 100}, ask(max_tokens=60), RateLimitExceeded, "rate_limit_exceeded"),
        ({"tokens_per_minute": 100}, ask(max_tokens=150), InvalidRequest, "request_too_large_for_limit"),
        ({"daily_cap_usd": "0.5"}, ask(max_tokens=800), SpendCapExceeded, "spend_cap_exceeded"),
        ({"monthly_cap_usd": "0.5"}, ask(max_tokens=800), SpendCapExceeded, "spend_cap_exceeded"),
        ({"hard_cap_usd": "0.5"}, ask(), SpendCapExceeded, "spend_cap_exceeded"),
        ({"hard_cap_usd": "0.5"}, ask(params={"web_search_options": {}}), CostUnbounded, "cost_unbounded"),
        ({"hard_cap_usd": "0.5"}, ask(model="free", max_tokens=1), PriceUnknown, "price_unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("whose", ["principal", "tenant", "gateway"])
async def test_the_quote_names_the_limit_that_then_refuses(
    limits: dict[str, Any], request_: CompletionRequest, kind: type[AIGatewayError], code: str, whose: str
) -> None:
    used = Say("hi", usage=Usage(input_tokens=80, output_tokens=0))
    of_gateway = Limits(**limits) if whose == "gateway" else None
    async with gateway_with(ScriptedProvider(used), limits=of_gateway) as gateway:
        tenant = Tenant("acme", **(limits if whose == "tenant" else {}))
        principal = Principal("user", tenant=tenant, **(limits if whose == "principal" else {}))
        await gateway.complete(principal, ask("one call before", max_tokens=1))
        quote = await gateway.quote(principal, request_)
        met = await refusal_of(gateway, principal, request_)
        assert type(quote.would_refuse) is kind
        assert quote.would_refuse.code == code
        assert facts(quote.would_refuse) == facts(met)
        if isinstance(quote.would_refuse, RateLimitExceeded | SpendCapExceeded) and kind is not CostUnbounded:
            assert quote.would_refuse.scope == whose


async def test_running_calls_are_what_would_refuse_the_next_one() -> None:
    ends, arrived = anyio.Event(), anyio.Event()
    async with gateway_with(ScriptedProvider(After(ends, Say("hi"), arrived))) as gateway, anyio.create_task_group() as group:
        group.start_soon(gateway.complete, Principal("user"), ask(max_tokens=100))
        await arrived.wait()
        for principal, kind in (
            (Principal("user", max_parallel_requests=1), TooManyParallelRequests),
            (Principal("user", hard_cap_usd="0.5"), SpendCapHeld),
        ):
            told = (await gateway.quote(principal, ask("another", max_tokens=100))).would_refuse
            assert type(told) is kind
            assert told.retry_after is not None
            assert facts(told) == facts(await refusal_of(gateway, principal, ask("another", max_tokens=100)))
        ends.set()


async def test_the_first_limit_on_the_way_is_the_one_that_is_named_and_the_cost_is_told_all_the_same() -> None:
    async with gateway_with(ScriptedProvider("hi", "ho")) as gateway:
        principal = Principal("user", requests_per_minute=1, hard_cap_usd="0.5")
        await gateway.complete(principal, ask(max_tokens=1))
        quote = await gateway.quote(principal, ask(max_tokens=1000))
        assert isinstance(quote.would_refuse, RateLimitExceeded)
        assert quote.worst_case_usd is not None
        assert quote.worst_case_usd > 2
        nothing = await gateway.quote(Principal("user", hard_cap_usd="0.5"), ask(model="free"))
        assert (nothing.targets, nothing.worst_case_usd, nothing.bounded) == ((), None, False), "no target may be tried"


def drawn(random_: random.Random) -> tuple[Principal, CompletionRequest]:
    """Somebody with some limits, and a call that they allow more often than not."""
    limits: dict[str, Any] = {
        name: random_.choice([None, None, *values])
        for name, values in {
            "requests_per_minute": (1, 3),
            "tokens_per_minute": (60, 2000),
            "daily_cap_usd": ("0.2", "1.2"),
            "hard_cap_usd": ("0.3", "2", "30"),
        }.items()
    }
    tenant = random_.choice([None, Tenant("acme", monthly_cap_usd=random_.choice(["0.5", "5"]), requests_per_minute=9)])
    fields: dict[str, Any] = {"max_tokens": random_.choice([None, 1, 100, 400]), "n": random_.choice([None, 1, 3])}
    if random_.random() < 0.15:
        fields["params"] = {"audio": {"voice": "x"}}
    principal = Principal(random_.choice("abc"), tenant=tenant, **limits)
    return principal, ask(str(random_.random()), model=random_.choice(["m", "m", "m", "free"]), **fields)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_the_limits_are_the_call_meets_what_was_quoted(seed: int) -> None:
    random_ = random.Random(seed)
    provider = ScriptedProvider(Say("hi", usage=Usage(input_tokens=40, output_tokens=60)), repeat=True)
    clock = FakeClock()
    refused = passed = 0
    async with gateway_with(provider, clock=clock, limits=Limits(hard_cap_usd=9)) as gateway:
        for _ in range(40):
            principal, request = drawn(random_)
            quote = await gateway.quote(principal, request)
            met = await refusal_of(gateway, principal, request)
            assert facts(quote.would_refuse) == facts(met)
            if met is None:
                assert provider.calls[-1].max_tokens == quote.targets[0].max_tokens
                assert provider.calls[-1].model == quote.targets[0].model
            refused, passed = refused + (met is not None), passed + (met is None)
            clock.advance(random_.choice([0, 1, 20]))
    assert refused > 5
    assert passed > 5


# -- what is no limit --------------------------------------------------------------------------------------------------


async def test_what_no_limit_refuses_is_raised_as_by_the_call() -> None:
    async with gateway_with(ScriptedProvider(models=("m",))) as gateway:
        await gateway.save_prompt("greet", "Greet {{name}}.")
        for principal, request, kind in (
            (USER, ask(model="nowhere"), NotFound),
            (Principal("user", allowed_models=["other"]), ask(), PermissionDenied),
            (USER, CompletionRequest(model="m", prompt=PromptRef(name="none")), NotFound),
            (USER, CompletionRequest(model="m", prompt=PromptRef(name="greet")), UnprocessableRequest),
            (USER, ask(max_tokens=-1), InvalidRequest),
            (USER, CompletionRequest(model="m"), InvalidRequest),
        ):
            with pytest.raises(kind) as raised:
                await gateway.quote(principal, request)
            with pytest.raises(kind) as met:
                await gateway.complete(principal, request)
            assert facts(raised.value) == facts(met.value)


async def test_a_quote_of_a_prompt_counts_what_the_prompt_would_send() -> None:
    async with gateway_with(ScriptedProvider()) as gateway:
        await gateway.save_prompt("greet", "Greet {{name}}." + "x" * 1000, settings={"model": "m", "max_tokens": 30})
        quote = await gateway.quote(USER, CompletionRequest(prompt=PromptRef(name="greet", variables={"name": "Ada"})))
        assert (quote.model, quote.prompt, quote.targets[0].max_tokens, quote.targets[0].imposed) == ("m", "greet@1", 30, False)
        assert quote.targets[0].input_tokens > 1000


async def test_a_ledger_that_cannot_be_read_gives_no_quote(tmp_path: Path) -> None:
    async with gateway_with(ScriptedProvider(), data_dir=tmp_path) as gateway:
        ledger = gateway._ledger

        async def away(*args: Any, **more: Any) -> Any:
            raise StorageUnavailable("away")

        ledger.probe = away  # type: ignore[method-assign]  # a ledger that fails at this verb alone
        with pytest.raises(StorageUnavailable):
            await gateway.quote(USER, ask())


async def test_a_raw_key_is_quoted_as_its_principal() -> None:
    async with gateway_with(ScriptedProvider()) as gateway:
        raw, key = await gateway.create_key("k", hard_cap_usd=3)
        quote: Quote = await gateway.quote(raw, ask())
        assert {budget.scope for budget in quote.budgets} == {f"principal:{key.id}"}


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_over_http_a_limit_is_an_answer_and_everything_else_an_error() -> None:
    with service() as host:
        body = {"model": "echo", "messages": MESSAGES, "max_completion_tokens": 100, "n": 2, "stream": True}
        quote = host.call("POST", "/quote", ALICE, json=body)
        assert quote.status_code == 200
        told = quote.json()
        (target,) = told["targets"]
        assert Decimal(told["worst_case_usd"]) == (target["input_tokens"] + 2 * 200) * Decimal("1e-6")
        assert (target["max_tokens"], target["imposed"], told["would_refuse"], told["cached"]) == (100, False, None, False)
        assert {budget["scope"] for budget in told["budgets"]} == {"principal"}
        assert host.call("GET", "/usage", ROOT).json()["totals"]["calls"] == 0
        poor, _ = host.key(hard_cap_usd="0.000001")
        refused = host.call("POST", "/quote", poor, json=body)
        assert (refused.status_code, refused.json()["would_refuse"]["status"]) == (200, 402)
        met = host.call("POST", "/v1/chat/completions", poor, json=body)
        assert {name: refused.json()["would_refuse"][name] for name in ("type", "code", "message", "param", "details")} == {
            name: value for name, value in met.json()["error"].items() if name != "request_id"
        }
        assert refused.json()["would_refuse"]["window"] == "total"
        assert host.call("POST", "/quote", ALICE, json={"model": "echo"}).status_code == 400
        assert host.call("POST", "/quote", {}, json=body).status_code == 401
        narrow, _ = host.key(allowed_models=["other"])
        assert host.call("POST", "/quote", narrow, json=body).status_code == 403


def test_over_http_the_cache_is_asked_as_the_call_would_ask_it() -> None:
    with service() as host:
        body = {"model": "echo", "messages": MESSAGES}
        assert host.call("POST", "/complete", ALICE, json=body).headers["x-cache"] == "miss"
        hit = host.call("POST", "/quote", ALICE, json=body).json()
        assert (hit["cached"], hit["worst_case_usd"], hit["targets"]) == (True, "0", [])
        past = host.call("POST", "/quote", ALICE | {"cache-control": "no-cache"}, json=body).json()
        assert (past["cached"], len(past["targets"])) == (False, 1)
