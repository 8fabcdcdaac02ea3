"""What every `Ledger` promises, as a class of tests.

Subclass it in your own tests and give it two fixtures: `ledger`, an empty and open ledger, and `peer`, a second handle on the same
books as another worker process would have it (the same object, if your backend has but one process)::

    class TestMyLedger(LedgerContract):
        @pytest.fixture
        async def ledger(self): ...

        @pytest.fixture
        async def peer(self, ledger): ...

The tests are async and run by anyio's pytest plugin: set `pytestmark = pytest.mark.anyio` in your module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio

from ..accounts import (
    GATEWAY_SCOPE,
    Hold,
    ScopeClaim,
    Settlement,
    UsageQuery,
    UsageRecord,
)
from ..errors import InvalidRequest, SpendCapExceeded, SpendCapHeld, TooManyParallelRequests
from ..protocols import Ledger
from ..types import NO_CAPS, Caps, Usage
from .ledger_kit import (
    ACME,
    ALICE,
    DAY,
    LEASE,
    NOON,
    PRICE,
    assert_clean,
    budget,
    cached_record,
    completed,
    gather,
    hold_request,
    money,
    records,
    refused,
)
from .ledger_limits import CreditContract, PruneContract, ReportOnlyContract, ThresholdContract


class HoldContract:
    """Granting and refusing."""

    async def test_a_hold_counts_in_day_month_and_total_of_every_scope(self, ledger: Ledger) -> None:
        scopes = (ScopeClaim(ALICE), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
        hold = await ledger.reserve(hold_request("a", 100, scopes=scopes), now=NOON)
        assert hold == Hold(id="use_a", amount=100, made_at=NOON, expires_at=NOON + LEASE)
        budgets = await ledger.budgets({ALICE: None, ACME: None, GATEWAY_SCOPE: None}, now=NOON)
        assert [(one.scope, one.window, one.period) for one in budgets] == [
            (scope, window, period)
            for scope in (ALICE, ACME, GATEWAY_SCOPE)
            for window, period in (("day", "2026-03-31"), ("month", "2026-03"), ("total", ""))
        ]
        assert {(one.spent, one.held) for one in budgets} == {(0, 100)}
        await assert_clean(ledger)

    async def test_budgets_of_an_unknown_scope_are_zeros(self, ledger: Ledger) -> None:
        budgets = await ledger.budgets({"principal:nobody": Caps(day=5)}, now=NOON)
        assert [(one.cap, one.spent, one.held, one.remaining) for one in budgets] == [(5, 0, 0, 5), (None, 0, 0, None), (None, 0, 0, None)]

    async def test_exactly_fifty_of_three_hundred_concurrent_holds_fit(self, ledger: Ledger, peer: Ledger) -> None:
        caps = Caps(total=5_000)
        calls = [
            partial((ledger if number % 2 else peer).reserve, hold_request(str(number), 100, caps=caps), now=NOON) for number in range(300)
        ]
        granted, errors = await gather(calls)
        assert len(granted) == 50
        assert {type(error) for error in errors} == {SpendCapHeld}
        assert await money(ledger) == (0, 5_000)
        await assert_clean(ledger)

    async def test_all_scopes_are_held_or_none(self, ledger: Ledger) -> None:
        await ledger.set_caps(ACME, Caps(month=50))
        scopes = (ScopeClaim(ALICE, Caps(total=1_000)), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
        error = await refused(ledger.reserve(hold_request("a", 100, scopes=scopes), now=NOON))
        assert isinstance(error, SpendCapExceeded)
        assert (error.scope, error.window) == ("tenant", "month")
        for scope in (ALICE, ACME, GATEWAY_SCOPE):
            assert await money(ledger, scope=scope) == (0, 0)
        await assert_clean(ledger)

    async def test_the_refusal_of_a_shared_scope_tells_no_amounts(self, ledger: Ledger) -> None:
        await ledger.set_caps(ACME, Caps(month=1_234_567))
        scopes = (ScopeClaim(ALICE), ScopeClaim(ACME))
        await ledger.reserve(hold_request("a", 1_000_000, scopes=scopes), now=NOON)
        error = await refused(ledger.reserve(hold_request("b", 1_000_000, scopes=scopes), now=NOON))
        assert "0.00" not in str(error)
        assert error.details is not None
        assert not {"cap_usd", "spent_usd", "held_usd"} & error.details.keys()

    async def test_the_refusal_of_the_callers_own_scope_tells_the_amounts(self, ledger: Ledger) -> None:
        caps = Caps(day=2_000_000_000)
        await ledger.reserve(hold_request("a", 1_500_000_000, caps=caps), now=NOON)
        await ledger.settle("use_a", completed(1_500_000_000), now=NOON)
        error = await refused(ledger.reserve(hold_request("b", 1_000_000_000, caps=caps), now=NOON))
        assert isinstance(error, SpendCapExceeded)
        assert not isinstance(error, SpendCapHeld)
        assert error.retry_after is None
        assert error.details is not None
        assert {**error.details} == {
            "scope": "principal",
            "window": "day",
            "resets_at": "2026-04-01T00:00:00Z",
            "cap_usd": "2",
            "spent_usd": "1.5",
            "held_usd": "0",
            "required_usd": "1",
        }

    async def test_held_money_alone_makes_the_refusal_temporary(self, ledger: Ledger) -> None:
        caps = Caps(total=100)
        await ledger.reserve(hold_request("a", 100, caps=caps), now=NOON)
        error = await refused(ledger.reserve(hold_request("b", 50, caps=caps), now=NOON))
        assert isinstance(error, SpendCapHeld)
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 5
        assert error.resets_at is None
        await ledger.settle("use_a", completed(60), now=NOON)
        final = await refused(ledger.reserve(hold_request("b", 50, caps=caps), now=NOON))
        assert type(final) is SpendCapExceeded

    async def test_one_window_that_is_spent_makes_the_refusal_final(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 90), now=NOON)
        await ledger.settle("use_a", completed(90), now=NOON)
        await ledger.reserve(hold_request("b", 10), now=NOON)
        error = await refused(ledger.reserve(hold_request("c", 20, caps=Caps(day=100, total=115)), now=NOON))
        assert type(error) is SpendCapExceeded
        assert error.window == "day"

    async def test_the_grant_is_what_the_tightest_cap_affords(self, ledger: Ledger) -> None:
        scopes = (ScopeClaim(ALICE, Caps(day=900, month=700, total=800)), ScopeClaim(ACME, Caps(day=750)))
        hold = await ledger.reserve(hold_request("a", scopes=scopes, minimum=10, admission=600, wanted=1_000), now=NOON)
        assert hold.amount == 700

    async def test_a_grant_is_never_below_the_minimum(self, ledger: Ledger) -> None:
        request = hold_request("a", caps=Caps(total=99), minimum=100, admission=100, wanted=500)
        assert isinstance(await refused(ledger.reserve(request, now=NOON)), SpendCapExceeded)

    async def test_admission_must_fit_although_less_is_wanted(self, ledger: Ledger) -> None:
        request = hold_request("a", caps=Caps(total=500), minimum=10, wanted=20, admission=501)
        assert isinstance(await refused(ledger.reserve(request, now=NOON)), SpendCapExceeded)
        hold = await ledger.reserve(hold_request("b", caps=Caps(total=500), minimum=10, wanted=20, admission=500), now=NOON)
        assert hold.amount == 20

    async def test_stored_caps_hold_where_a_claim_brings_none(self, ledger: Ledger, peer: Ledger) -> None:
        scopes = (ScopeClaim(ALICE), ScopeClaim(GATEWAY_SCOPE))
        await peer.set_caps(GATEWAY_SCOPE, Caps(total=100))
        await ledger.reserve(hold_request("a", 100, scopes=scopes), now=NOON)
        assert isinstance(await refused(ledger.reserve(hold_request("b", 1, scopes=scopes), now=NOON)), SpendCapHeld)
        assert (await budget(ledger, scope=GATEWAY_SCOPE, caps=None)).cap == 100

    async def test_changed_caps_keep_what_is_spent(self, ledger: Ledger) -> None:
        scopes = (ScopeClaim(ACME),)
        await ledger.set_caps(ACME, Caps(total=100))
        await ledger.reserve(hold_request("a", 80, scopes=scopes), now=NOON)
        await ledger.settle("use_a", completed(80), now=NOON)
        await ledger.set_caps(ACME, Caps(total=150))
        await ledger.reserve(hold_request("b", 70, scopes=scopes), now=NOON)
        await ledger.set_caps(ACME, Caps(total=50))
        one = await budget(ledger, scope=ACME, caps=None)
        assert (one.cap, one.spent, one.held, one.remaining) == (50, 80, 70, 0)
        assert isinstance(await refused(ledger.reserve(hold_request("c", 0, scopes=scopes), now=NOON)), SpendCapExceeded)
        await ledger.set_caps(ACME, NO_CAPS)
        await ledger.reserve(hold_request("d", 10**12, scopes=scopes), now=NOON)
        await assert_clean(ledger)

    async def test_open_holds_are_limited_in_number(self, ledger: Ledger, peer: Ledger) -> None:
        calls = [partial(ledger.reserve, hold_request(str(number), max_parallel=3), now=NOON) for number in range(10)]
        granted, errors = await gather(calls)
        assert len(granted) == 3
        error = errors[0]
        assert isinstance(error, TooManyParallelRequests)
        assert (error.scope, error.window, error.limit, error.retry_after) == ("principal", "parallel", 3, 1)
        await peer.release(granted[0].id, now=NOON)
        await peer.settle(granted[1].id, completed(1), now=NOON)
        granted, _ = await gather([partial(ledger.reserve, hold_request(f"x{n}", max_parallel=3), now=NOON) for n in range(10)])
        assert len(granted) == 2
        await assert_clean(ledger)

    async def test_a_replaced_hold_gives_its_money_to_the_next(self, ledger: Ledger) -> None:
        caps = Caps(total=100)
        await ledger.reserve(hold_request("a", 100, caps=caps, max_parallel=1), now=NOON)
        await ledger.reserve(hold_request("b", 100, caps=caps, max_parallel=1, replaces="use_a"), now=NOON)
        assert await money(ledger) == (0, 100)
        assert [(one.id, one.outcome, one.cost) for one in await records(ledger)] == [("use_a", "released", 0)]
        await assert_clean(ledger)

    async def test_a_replaced_hold_is_released_although_the_next_is_refused(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 60), now=NOON)
        request = hold_request("b", 200, caps=Caps(total=100), replaces="use_a")
        assert isinstance(await refused(ledger.reserve(request, now=NOON)), SpendCapExceeded)
        assert await money(ledger) == (0, 0)
        assert [one.outcome for one in await records(ledger)] == ["released"]
        await assert_clean(ledger)

    async def test_probing_is_granted_what_reserving_would_be_and_holds_nothing(self, ledger: Ledger, peer: Ledger) -> None:
        caps = Caps(month=350)
        wish = hold_request("a", caps=caps, minimum=10, wanted=400, admission=100)
        for _ in range(3):
            assert (await peer.probe(wish, now=NOON)).amount == 350
        assert await money(ledger) == (0, 0)
        assert await ledger.reserve(wish, now=NOON) == Hold(id="use_a", amount=350, made_at=NOON, expires_at=NOON + LEASE)
        assert (await ledger.usage(UsageQuery())).data == []
        await assert_clean(ledger)

    async def test_probing_is_refused_as_reserving_would_be(self, ledger: Ledger, peer: Ledger) -> None:
        await ledger.set_caps(ACME, Caps(total=250))
        scopes = (ScopeClaim(ALICE, NO_CAPS, 2), ScopeClaim(ACME))
        for step in ("held", "parallel", "spent"):
            wish = hold_request(step, 151 if step == "held" else 100, scopes=scopes)
            if step == "held":
                await ledger.reserve(hold_request("first", 100, scopes=scopes), now=NOON)
            elif step == "parallel":
                await ledger.reserve(hold_request("second", 100, scopes=scopes), now=NOON)
            else:
                await ledger.settle("use_first", completed(151), now=NOON)
            told, met = await refused(peer.probe(wish, now=NOON)), await refused(ledger.reserve(wish, now=NOON))
            assert (type(told), str(told), told.details, told.retry_after) == (type(met), str(met), met.details, met.retry_after)
        assert type(met) is SpendCapExceeded
        await assert_clean(ledger)

    async def test_probing_counts_an_expired_lease_and_a_new_period_without_writing_either(self, ledger: Ledger, peer: Ledger) -> None:
        caps = Caps(day=100, total=150)
        await ledger.reserve(hold_request("a", 100, caps=caps), now=NOON)
        assert isinstance(await refused(peer.probe(hold_request("b", 100, caps=caps), now=NOON)), SpendCapHeld)
        late = NOON + LEASE + 1
        assert type(await refused(peer.probe(hold_request("b", 100, caps=caps), now=late))) is SpendCapExceeded, "the lease is over: booked"
        assert await money(ledger) == (0, 100), "which only a reserve writes"
        assert (await peer.probe(hold_request("b", 50, caps=caps), now=NOON + DAY)).amount == 50
        assert isinstance(await refused(ledger.reserve(hold_request("c", 1, caps=caps), now=NOON)), SpendCapHeld), "no day was seen"
        await assert_clean(ledger)


class ResolveContract:
    """Settling, releasing, renewing, expiring; each once."""

    async def test_a_settlement_books_and_writes_the_record(self, ledger: Ledger) -> None:
        request = hold_request("a", 100, tenant="acme", key_id="key_1", prompt="greet@3", tags={"team": "blue"}, attempt=2)
        await ledger.reserve(request, now=NOON)
        usage = Usage(
            input_tokens=9,
            output_tokens=5,
            cache_read_input_tokens=3,
            cache_creation_input_tokens=4,
            cache_creation_1h_input_tokens=2,
            reasoning_output_tokens=1,
        )
        settlement = Settlement(outcome="estimated", amount=42, usage=usage, response_model="gpt-4o-mini-2026", latency_ms=12)
        record = await ledger.settle("use_a", settlement, now=NOON + 5)
        assert record == UsageRecord(
            id="use_a",
            request_id="req_a",
            attempt=2,
            created_at=NOON,
            principal="alice",
            tenant="acme",
            key_id="key_1",
            provider="openai",
            model="gpt-4o-mini",
            response_model="gpt-4o-mini-2026",
            usage=usage,
            cost=42,
            price=PRICE,
            outcome="estimated",
            latency_ms=12,
            prompt="greet@3",
            tags={"team": "blue"},
        )
        assert await records(ledger) == [record]
        assert await money(ledger) == (42, 0)
        await assert_clean(ledger)

    async def test_a_settlement_above_the_hold_is_booked_in_full(self, ledger: Ledger) -> None:
        caps = Caps(total=100)
        await ledger.reserve(hold_request("a", 100, caps=caps), now=NOON)
        await ledger.settle("use_a", Settlement(outcome="overrun", amount=130), now=NOON)
        assert await money(ledger) == (130, 0)
        assert type(await refused(ledger.reserve(hold_request("b", 0, caps=caps), now=NOON))) is SpendCapExceeded
        await assert_clean(ledger)

    async def test_settling_twice_changes_nothing(self, ledger: Ledger, peer: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        first = await ledger.settle("use_a", completed(40), now=NOON)
        assert first is not None
        assert await peer.settle("use_a", completed(99), now=NOON + 1) == first
        await peer.release("use_a", now=NOON + 2)
        assert await money(ledger) == (40, 0)
        await assert_clean(ledger)

    async def test_concurrent_settlements_of_one_hold_book_once(self, ledger: Ledger, peer: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        seen: list[UsageRecord | None] = []

        async def settle(store: Ledger, amount: int) -> None:
            seen.append(await store.settle("use_a", completed(amount), now=NOON))

        async with anyio.create_task_group() as group:
            for amount in range(1, 11):
                group.start_soon(settle, ledger if amount % 2 else peer, amount)
        assert len({one.cost for one in seen if one is not None}) == 1
        assert len(seen) == 10
        assert await money(ledger) == (seen[0].cost if seen[0] else -1, 0)
        await assert_clean(ledger)

    async def test_releasing_gives_all_back_once(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.release("use_a", now=NOON, latency_ms=3)
        await ledger.release("use_a", now=NOON + 1, latency_ms=4)
        record = await ledger.settle("use_a", completed(40), now=NOON + 2)
        assert record is not None
        assert (record.outcome, record.cost, record.latency_ms) == ("released", 0, 3)
        assert await money(ledger) == (0, 0)
        await assert_clean(ledger)

    async def test_reserving_twice_gives_the_same_hold(self, ledger: Ledger, peer: Ledger) -> None:
        hold = await ledger.reserve(hold_request("a", caps=Caps(total=100), minimum=1, admission=1, wanted=70), now=NOON)
        again = await peer.reserve(hold_request("a", caps=Caps(total=100), minimum=1, admission=1, wanted=70), now=NOON + 1)
        assert again == hold
        assert await money(ledger) == (0, 70)
        await ledger.settle("use_a", completed(5), now=NOON)
        resolved = await ledger.reserve(hold_request("a", 70), now=NOON + 2)
        assert (resolved.id, resolved.amount, resolved.made_at) == ("use_a", 70, NOON)
        assert await money(ledger) == (5, 0)
        await assert_clean(ledger)

    async def test_unknown_holds_are_not_made_up(self, ledger: Ledger) -> None:
        assert await ledger.settle("use_x", completed(40), now=NOON) is None
        await ledger.release("use_x", now=NOON)
        assert await ledger.renew("use_x", NOON + 100, now=NOON) is False
        assert await records(ledger) == []
        await assert_clean(ledger)

    async def test_an_expired_lease_is_booked_in_full(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        assert await ledger.expire(now=NOON + LEASE - 0.001) == []
        expired = await ledger.expire(now=NOON + LEASE)
        assert [(one.id, one.outcome, one.cost, one.created_at) for one in expired] == [("use_a", "expired", 100, NOON)]
        assert await ledger.expire(now=NOON + LEASE + 1) == []
        assert await money(ledger) == (100, 0)
        assert await ledger.renew("use_a", NOON + 1_000, now=NOON + LEASE) is False
        await assert_clean(ledger)

    async def test_leases_expire_in_passing_of_a_reserve(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100, max_parallel=1), now=NOON)
        await ledger.reserve(hold_request("b", 10, now=NOON + LEASE, max_parallel=1), now=NOON + LEASE)
        assert await money(ledger) == (100, 10)
        assert [one.outcome for one in await records(ledger)] == ["expired"]
        await assert_clean(ledger)

    async def test_many_leases_expire_at_once(self, ledger: Ledger) -> None:
        await gather([partial(ledger.reserve, hold_request(str(number), 3), now=NOON) for number in range(300)])
        assert len(await ledger.expire(now=NOON + LEASE)) == 300
        assert await money(ledger) == (900, 0)
        await assert_clean(ledger)

    async def test_a_renewed_lease_lives_on(self, ledger: Ledger, peer: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        assert await peer.renew("use_a", NOON + 2 * LEASE, now=NOON + 50) is True
        assert await ledger.expire(now=NOON + LEASE) == []
        assert len(await ledger.expire(now=NOON + 2 * LEASE)) == 1
        await assert_clean(ledger)

    async def test_a_late_settlement_of_an_expired_hold_books_the_difference_once(self, ledger: Ledger, peer: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        late = await peer.settle("use_a", completed(30, latency_ms=9), now=NOON + 2 * LEASE)
        assert late is not None
        assert (late.id, late.outcome, late.cost, late.usage.input_tokens) == ("use_a.adjust", "adjusted", -70, 10)
        assert await ledger.settle("use_a", completed(99), now=NOON + 3 * LEASE) == late
        await ledger.release("use_a", now=NOON + 3 * LEASE)
        assert await money(ledger) == (30, 0)
        totals = (await ledger.usage(UsageQuery())).totals
        assert (totals.calls, totals.cost, totals.input_tokens) == (1, 30, 10)
        await assert_clean(ledger)

    async def test_whoever_was_cancelled_before_it_learned_of_its_hold_gives_it_back_by_its_id(self, ledger: Ledger) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.release("use_a", now=NOON)
        await ledger.ping()
        assert await money(ledger) == (0, 0)
        await assert_clean(ledger)

    async def test_a_late_release_of_an_expired_hold_gives_all_back(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        await ledger.release("use_a", now=NOON + 2 * LEASE)
        assert await money(ledger) == (0, 0)
        assert sorted((one.id, one.cost) for one in await records(ledger)) == [("use_a", 100), ("use_a.adjust", -100)]
        await assert_clean(ledger)

    async def test_an_expired_hold_that_nobody_settles_for_a_week_is_final(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        await ledger.expire(now=NOON + LEASE + 7 * DAY + 1)
        record = await ledger.settle("use_a", completed(30), now=NOON + 8 * DAY)
        assert record is not None
        assert (record.outcome, record.cost) == ("expired", 100)
        await assert_clean(ledger)


class PeriodContract:
    """The calendar."""

    async def test_day_and_month_begin_anew_and_the_total_does_not(self, ledger: Ledger) -> None:
        caps = Caps(day=100, month=100, total=150)
        await ledger.reserve(hold_request("a", 100, caps=caps), now=NOON)
        await ledger.settle("use_a", completed(100), now=NOON)
        assert isinstance(await refused(ledger.reserve(hold_request("b", 1, caps=caps), now=NOON + DAY / 2 - 0.001)), SpendCapExceeded)
        april = NOON + DAY / 2
        await ledger.reserve(hold_request("c", 50, caps=caps, now=april), now=april)
        error = await refused(ledger.reserve(hold_request("d", 51, caps=caps, now=april), now=april))
        assert isinstance(error, SpendCapExceeded)
        assert (error.window, error.resets_at) == ("total", None)
        assert (await budget(ledger, "month", now=april)).period == "2026-04"
        assert await money(ledger, "month", now=april) == (0, 50)
        await assert_clean(ledger)

    async def test_a_hold_settles_in_the_periods_that_it_was_made_in(self, ledger: Ledger) -> None:
        before, after = NOON + DAY / 2 - 1, NOON + DAY / 2 + 1
        await ledger.reserve(hold_request("a", 100, now=before), now=before)
        await ledger.reserve(hold_request("b", 7, now=after), now=after)
        await ledger.settle("use_a", completed(40), now=after)
        assert await money(ledger, "day", now=after) == (0, 7)
        assert await money(ledger, "month", now=after) == (0, 7)
        assert await money(ledger, "total", now=after) == (40, 7)
        report = await ledger.usage(UsageQuery(group_by=("day",)))
        assert [(group.by["day"], group.totals.cost) for group in report.groups] == [("2026-03-31", 40)]
        await assert_clean(ledger)

    async def test_a_clock_that_steps_back_reopens_nothing(self, ledger: Ledger, peer: Ledger) -> None:
        caps = Caps(day=100)
        await ledger.reserve(hold_request("a", 100, caps=caps), now=NOON)
        yesterday = NOON - DAY
        assert isinstance(await refused(peer.reserve(hold_request("b", 1, caps=caps, now=yesterday), now=yesterday)), SpendCapExceeded)
        assert (await budget(ledger, "day", now=yesterday)).period == "2026-03-31"
        hold = await peer.reserve(hold_request("c", 1, now=yesterday), now=yesterday)
        assert hold.made_at == NOON - DAY / 2
        await assert_clean(ledger)


class UsageContract:
    """Records and reports."""

    async def test_a_cached_answer_is_recorded_once(self, ledger: Ledger, peer: Ledger) -> None:
        record = cached_record("a", tags={"a": "b"}, tenant="acme")
        await ledger.record(record)
        await peer.record(record)
        report = await ledger.usage(UsageQuery())
        assert report.data == [record]
        assert (report.totals.calls, report.totals.cached_calls, report.totals.cost) == (1, 1, 0)
        await assert_clean(ledger)

    async def test_released_and_adjusted_records_are_not_calls(self, ledger: Ledger) -> None:
        for name in "abc":
            await ledger.reserve(hold_request(name, 100), now=NOON)
        await ledger.settle("use_a", completed(1), now=NOON)
        await ledger.release("use_b", now=NOON)
        await ledger.expire(now=NOON + LEASE)
        await ledger.settle("use_c", completed(2), now=NOON + LEASE)
        report = await ledger.usage(UsageQuery(group_by=("outcome",)))
        assert (report.totals.calls, report.totals.cost) == (2, 3)
        assert {group.by["outcome"]: (group.totals.calls, group.totals.cost) for group in report.groups} == {
            "completed": (1, 1),
            "released": (0, 0),
            "expired": (1, 100),
            "adjusted": (0, -98),
        }

    async def test_pages_are_newest_first_and_complete(self, ledger: Ledger) -> None:
        times = [NOON + offset for offset in (3, 1, 1, 1, 2, 0.0004, 0.0001, 5, 4, 4)]
        for number, moment in enumerate(times):
            await ledger.record(cached_record(str(number), created_at=moment))
        seen: list[UsageRecord] = []
        cursor: str | None = None
        while True:
            report = await ledger.usage(UsageQuery(limit=3, cursor=cursor))
            assert report.totals.calls == len(times)
            seen.extend(report.data)
            cursor = report.next_cursor
            if cursor is None:
                break
            assert len(report.data) == 3
        assert len({one.id for one in seen}) == len(times)
        milliseconds = [round(one.created_at * 1000) for one in seen]
        assert milliseconds == sorted(milliseconds, reverse=True)

    async def test_filters_are_exact_and_combined(self, ledger: Ledger) -> None:
        await ledger.record(cached_record("a", tenant="acme", key_id="key_1", model="m1", created_at=NOON))
        await ledger.record(cached_record("b", tenant="acme", key_id="key_2", model="m2", created_at=NOON + 0.0002))
        await ledger.record(cached_record("c", principal="bob", model="m1", created_at=NOON + 10))

        async def found(**query: Any) -> str:
            return "".join(sorted(one.id.removeprefix("use_") for one in await records(ledger, **query)))

        assert await found() == "abc"
        assert await found(principal="alice") == "ab"
        assert await found(tenant="acme") == "ab"
        assert await found(key_id="key_2") == "b"
        assert await found(model="m1") == "ac"
        assert await found(model="m1", tenant="acme") == "a"
        assert await found(since=NOON + 0.0002) == "bc"
        assert await found(until=NOON + 0.0002) == "a"
        assert await found(since=NOON, until=NOON + 10, principal="alice") == "ab"
        assert await found(principal="nobody") == ""

    async def test_groups_cover_all_that_the_filters_match(self, ledger: Ledger) -> None:
        for number in range(6):
            fields: Mapping[str, Any] = {"model": f"m{number % 2}", "created_at": NOON + number % 3 * DAY, "key_id": None}
            await ledger.record(cached_record(str(number), **fields))
        report = await ledger.usage(UsageQuery(group_by=("month", "model", "key"), limit=1))
        assert [(dict(group.by), group.totals.calls, group.totals.input_tokens) for group in report.groups] == [
            ({"month": "2026-03", "model": "m0", "key": None}, 1, 10),
            ({"month": "2026-03", "model": "m1", "key": None}, 1, 10),
            ({"month": "2026-04", "model": "m0", "key": None}, 2, 20),
            ({"month": "2026-04", "model": "m1", "key": None}, 2, 20),
        ]

    async def test_bad_queries_name_what_is_wrong(self, ledger: Ledger) -> None:
        for query, param in (
            (UsageQuery(cursor="nonsense!"), "cursor"),
            (UsageQuery(cursor="ä"), "cursor"),
            (UsageQuery(cursor=""), "cursor"),
            (UsageQuery(group_by=("day", "colour")), "group_by"),
            (UsageQuery(limit=0), "limit"),
            (UsageQuery(since=math.inf), "since"),
            (UsageQuery(until=math.nan), "until"),
        ):
            error = await refused(ledger.usage(query))
            assert isinstance(error, InvalidRequest)
            assert error.param == param

    async def test_ping_tells_that_it_can_be_written(self, ledger: Ledger) -> None:
        await ledger.ping()


class LedgerContract(
    HoldContract,
    ResolveContract,
    PeriodContract,
    UsageContract,
    CreditContract,
    ThresholdContract,
    ReportOnlyContract,
    PruneContract,
):
    """All of it. See the module's docstring for the fixtures."""
