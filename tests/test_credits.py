"""Credits and budget thresholds through the gateway: what a host gives, and what observers hear."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from starlette_aigateway import AIGateway, CompletionRequest, NotFound, Price, Principal, SpendCapExceeded, Tenant, Usage
from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.events import BudgetReached, Event
from starlette_aigateway.testing import FakeClock, Say, ScriptedProvider

pytestmark = pytest.mark.anyio

PRICES = {"m": Price("1", "1", request="1")}
HOUR = timedelta(hours=1)
FREE = Say("", usage=Usage(input_tokens=0, output_tokens=0))


def ask(text: str) -> CompletionRequest:
    return CompletionRequest(model="m", messages=[{"role": "user", "content": text}])


def gateway_of(clock: FakeClock, **settings: Any) -> AIGateway:
    return AIGateway.in_memory(providers=[ScriptedProvider(FREE, repeat=True)], prices=PRICES, clock=clock, **settings)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def test_a_credit_carries_a_principal_over_its_cap_until_it_expires(clock: FakeClock) -> None:
    who = Principal("alice", monthly_cap_usd="1.5")
    async with gateway_of(clock) as gateway:
        await gateway.complete(who, ask("one"))
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(who, ask("two"))
        credit = await gateway.add_credit(who, "1", expires=HOUR, note="a busy hour", actor="eve")
        assert (credit.amount_usd, credit.actor, credit.note) == (Decimal(1), "eve", "a busy hour")
        await gateway.complete(who, ask("two"))
        month = next(budget for budget in await gateway.budgets(who) if budget.window == "month")
        assert (month.spent_usd, month.credit_usd, month.remaining_usd) == (Decimal(2), Decimal(1), Decimal("0.5"))
        clock.advance(3600)
        with pytest.raises(SpendCapExceeded, match="is reached"):
            await gateway.complete(who, ask("three"))
        clock.advance(-3600)
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(who, ask("three"))
        assert await gateway.check_ledger() == []


async def test_a_credit_that_is_over_leaves_the_others_of_its_scope_running(clock: FakeClock) -> None:
    who = Principal("alice", monthly_cap_usd="1.5")
    async with gateway_of(clock) as gateway:
        short = await gateway.add_credit(who, "1", expires=HOUR)
        long = await gateway.add_credit(who, "2", expires=2 * HOUR)
        clock.advance(3600)
        for text in ("one", "two", "three"):
            await gateway.complete(who, ask(text))
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(who, ask("four"))
        assert (await gateway.get_credit(short.id)).ended_at == clock()
        assert (await gateway.get_credit(long.id)).ended_at is None
        assert await gateway.check_ledger() == []


async def test_a_credit_is_for_a_key_a_principal_a_tenant_or_the_gateway(clock: FakeClock) -> None:
    async with gateway_of(clock) as gateway:
        _, key = await gateway.create_key("k")
        until = datetime.fromtimestamp(clock(), UTC) + HOUR
        given = [
            await gateway.add_credit(key, 1, expires=until),
            await gateway.add_credit(key.id, 1, expires=HOUR),
            await gateway.add_credit("alice", 1, expires=HOUR),
            await gateway.add_credit(tenant=Tenant("t"), amount=1, expires=HOUR),
            await gateway.add_credit(gateway=True, amount=1, expires=HOUR),
        ]
        assert [credit.scope for credit in given] == [f"principal:{key.id}"] * 2 + ["principal:alice", "tenant:t", "gateway"]
        assert {credit.expires_at for credit in given} == {clock() + 3600}
        assert set(await gateway.list_credits()) == set(given)
        assert await gateway.list_credits(tenant="t") == [given[3]]
        assert await gateway.get_credit(given[0].id) == given[0]
        assert (await gateway.end_credit(given[2].id)).ended_at == clock()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"principal": "a", "amount": 1.5}, "amount"),
        ({"principal": "a", "amount": 0}, "amount"),
        ({"principal": "a", "amount": 10**7}, "amount"),
        ({"principal": "a", "amount": 1, "expires": timedelta(0)}, "expires"),
        ({"principal": "a", "amount": 1, "expires": datetime(2001, 1, 1)}, "expires"),  # noqa: DTZ001  # without a time zone, on purpose
        ({"principal": "a", "amount": 1, "expires": datetime(2001, 1, 1, tzinfo=UTC)}, "expires"),
        ({"principal": "a", "amount": 1, "expires": timedelta(days=10**6)}, "expires_at"),
        ({"principal": "a", "amount": 1, "note": 5}, "note"),
        ({"principal": "a", "amount": 1, "note": "\ud800"}, "note"),
        ({"principal": "a", "amount": 1_000_001}, "amount"),
        ({"principal": "a", "amount": 1, "actor": ""}, "actor"),
        ({"principal": "a", "tenant": "t", "amount": 1}, "principal"),
        ({"amount": 1}, "principal"),
    ],
)
async def test_a_credit_that_makes_no_sense_names_the_argument(clock: FakeClock, fields: dict[str, Any], param: str) -> None:
    async with gateway_of(clock) as gateway:
        with pytest.raises(InvalidArgument) as caught:
            await gateway.add_credit(**{"expires": HOUR, **fields})
        assert caught.value.param == param
        assert await gateway.audit() == [], "what was refused was not done"


async def test_a_credit_for_a_key_or_of_an_id_that_does_not_exist_is_not_found(clock: FakeClock) -> None:
    async with gateway_of(clock) as gateway:
        for asked in (
            gateway.add_credit("key_nobody", 1, expires=HOUR),
            gateway.get_credit("crd_nothing"),
            gateway.end_credit("crd_nothing"),
            gateway.list_credits("key_nobody"),
        ):
            with pytest.raises(NotFound):
                await asked


async def test_observers_hear_once_when_a_threshold_is_reached(clock: FakeClock) -> None:
    events: list[Event] = []

    async def observer(event: Event) -> None:
        events.append(event)

    who = Principal("alice", daily_cap_usd=4, tenant=Tenant("t", monthly_cap_usd=100))
    async with gateway_of(clock, observers=[observer], budget_thresholds=(50, 75)) as gateway:
        for text in ("one", "two", "three"):
            await gateway.complete(who, ask(text))
    assert [(one.scope, one.window, one.threshold, one.spent, one.cap) for one in events if isinstance(one, BudgetReached)] == [
        ("principal:alice", "day", 50, 2 * 10**9, 4 * 10**9),
        ("principal:alice", "day", 75, 3 * 10**9, 4 * 10**9),
    ]


@pytest.mark.parametrize("wrong", [(0,), (1001,), (80.0,), (True,), ("80",)])
def test_thresholds_are_whole_percents(wrong: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        AIGateway.in_memory(budget_thresholds=wrong)
    assert caught.value.param == "budget_thresholds"


async def test_pruning_keeps_budgets_and_the_audit_clean(clock: FakeClock) -> None:
    who = Principal("alice", hard_cap_usd=100)
    async with gateway_of(clock) as gateway:
        for number in range(10):
            await gateway.complete(who, ask(str(number)))
            clock.advance(60)
        before = await gateway.budgets(who)
        assert await gateway.prune_ledger(datetime.fromtimestamp(clock() - 120, UTC)) > 0
        assert await gateway.budgets(who) == before
        assert await gateway.check_ledger() == []
        with pytest.raises(InvalidArgument, match="in the past"):
            await gateway.prune_ledger(datetime.fromtimestamp(clock() + 1, UTC))
