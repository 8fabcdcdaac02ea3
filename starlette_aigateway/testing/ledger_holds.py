"""What every `Ledger` promises of holds: which are granted, and which are refused."""

from __future__ import annotations

from functools import partial

from ..accounts import (
    GATEWAY_SCOPE,
    Hold,
    ScopeClaim,
    UsageQuery,
)
from ..errors import CostUnbounded, SpendCapExceeded, SpendCapHeld, TooManyParallelRequests
from ..protocols import Ledger
from ..types import NO_CAPS, Caps
from .ledger_kit import (
    ACME,
    ALICE,
    DAY,
    LEASE,
    NOON,
    assert_clean,
    budget,
    completed,
    gather,
    hold_request,
    money,
    records,
    refused,
)


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

    async def test_what_is_not_bounded_is_refused_by_any_cap_and_by_nothing_else(self, ledger: Ledger) -> None:
        scopes = (ScopeClaim(ALICE), ScopeClaim(GATEWAY_SCOPE))
        await ledger.reserve(hold_request("a", 1, scopes=scopes, bounded=False), now=NOON)
        await ledger.set_caps(GATEWAY_SCOPE, Caps(total=1_000_000))
        error = await refused(ledger.reserve(hold_request("b", 1, scopes=scopes, bounded=False), now=NOON))
        assert isinstance(error, CostUnbounded)
        await ledger.reserve(hold_request("b", 1, scopes=scopes), now=NOON)
        await assert_clean(ledger)

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
