"""What every `Ledger` promises beyond holds and settlements: credits, thresholds, limits that are only reported, pruning."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..accounts import GATEWAY_SCOPE, Credit, ScopeClaim, UsageQuery
from ..errors import InvalidArgument, SpendCapExceeded, SpendCapHeld, TooManyParallelRequests
from ..events import BudgetReached
from ..protocols import Ledger
from ..types import Caps
from .ledger_kit import (
    ACME,
    ALICE,
    DAY,
    LEASE,
    NOON,
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

ALL = UsageQuery(group_by=("outcome",), limit=1000)


def credit(name: str, amount: int = 100, **fields: Any) -> Credit:
    """A credit of `alice` for an hour; `fields` override."""
    values: dict[str, Any] = {
        "id": f"crd_{name}",
        "scope": ALICE,
        "amount": amount,
        "created_at": NOON,
        "expires_at": NOON + 3600,
        "actor": "ops",
        "note": "a busy week",
    }
    return Credit(**{**values, **fields})


class CreditContract:
    """Temporary top-ups."""

    async def test_a_credit_adds_to_every_cap_of_its_scope(self, ledger: Ledger, peer: Ledger) -> None:
        caps = Caps(day=100, month=110, total=120)
        await peer.add_credit(credit("a", 50))
        hold = await ledger.reserve(hold_request("a", caps=caps, minimum=10, admission=140, wanted=1_000), now=NOON)
        assert hold.amount == 150
        one = await budget(ledger, "day", caps=caps)
        assert (one.cap, one.credit, one.held, one.remaining) == (100, 50, 150, 0)
        await assert_clean(ledger)

    async def test_what_has_no_cap_has_no_credit_to_show(self, ledger: Ledger) -> None:
        await ledger.add_credit(credit("a"))
        one = await budget(ledger, caps=Caps(day=5))
        assert (one.cap, one.credit, one.remaining) == (None, 0, None)

    async def test_a_credit_of_a_tenant_or_of_the_gateway_raises_stored_caps(self, ledger: Ledger) -> None:
        scopes = (ScopeClaim(ALICE), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
        for scope in (ACME, GATEWAY_SCOPE):
            await ledger.set_caps(scope, Caps(total=50))
            assert isinstance(await refused(ledger.reserve(hold_request("a", 100, scopes=scopes), now=NOON)), SpendCapExceeded)
            await ledger.add_credit(credit(scope[:6], 50, scope=scope))
        await ledger.reserve(hold_request("a", 100, scopes=scopes), now=NOON)
        await assert_clean(ledger)

    async def test_a_credit_that_is_over_counts_no_more_and_what_was_spent_of_it_stays(self, ledger: Ledger) -> None:
        caps = Caps(total=100)
        await ledger.add_credit(credit("a", 50))
        await ledger.reserve(hold_request("a", 150, caps=caps), now=NOON)
        await ledger.settle("use_a", completed(150), now=NOON)
        over = NOON + 3600
        assert (await budget(ledger, caps=caps, now=over)).credit == 0
        assert isinstance(await refused(ledger.reserve(hold_request("b", 1, caps=caps, now=over), now=over)), SpendCapExceeded)
        assert await money(ledger) == (150, 0)
        await assert_clean(ledger)

    async def test_a_credit_that_was_seen_to_be_over_does_not_come_back_with_the_clock(self, ledger: Ledger, peer: Ledger) -> None:
        caps = Caps(total=100)
        await ledger.add_credit(credit("a", 50))
        over = NOON + 3600
        await refused(ledger.reserve(hold_request("a", 150, caps=caps, now=over), now=over))
        assert isinstance(await refused(peer.reserve(hold_request("b", 150, caps=caps), now=NOON)), SpendCapExceeded)
        (ended,) = await ledger.credits(ALICE)
        assert ended.ended_at == over
        await assert_clean(ledger)

    async def test_a_credit_is_given_once_per_id(self, ledger: Ledger, peer: Ledger) -> None:
        given, errors = await gather([partial((ledger, peer)[n % 2].add_credit, credit("a", 50)) for n in range(10)])
        assert errors == []
        assert given == [credit("a", 50)] * 10
        assert (await budget(ledger, caps=Caps(total=100))).credit == 50
        await assert_clean(ledger)

    async def test_a_credit_can_be_ended_early_once(self, ledger: Ledger, peer: Ledger) -> None:
        await ledger.add_credit(credit("a", 50))
        ended = await peer.end_credit("crd_a", now=NOON + 1)
        assert ended is not None
        assert ended.ended_at == NOON + 1
        assert await ledger.credit("crd_a") == ended
        assert await ledger.credit("crd_unknown") is None
        assert await ledger.end_credit("crd_a", now=NOON + 2) == ended
        assert (await budget(ledger, caps=Caps(total=100))).credit == 0
        assert await ledger.end_credit("crd_unknown", now=NOON) is None
        await assert_clean(ledger)

    async def test_credits_are_listed_newest_first_by_scope_and_page(self, ledger: Ledger) -> None:
        given = [credit(str(number), scope=ALICE if number % 2 else ACME) for number in range(5)]
        for one in given:
            await ledger.add_credit(one)
        assert await ledger.credits() == given[::-1]
        assert await ledger.credits(ALICE) == [given[3], given[1]]
        assert await ledger.credits(limit=2, before="crd_3") == [given[2], given[1]]

    async def test_the_running_credits_of_a_scope_have_a_sum_that_can_be_counted(self, ledger: Ledger) -> None:
        for number in range(1_000):
            await ledger.add_credit(credit(str(number), 10**15))
        assert isinstance(await refused(ledger.add_credit(credit("x", 1))), InvalidArgument)
        assert (await budget(ledger, caps=Caps(total=1))).remaining == 10**18 + 1
        await ledger.end_credit("crd_0", now=NOON)
        await ledger.add_credit(credit("x", 1))
        await assert_clean(ledger)

    async def test_a_credit_of_nothing_or_without_an_end_is_refused(self, ledger: Ledger) -> None:
        for wrong in (credit("a", 0), credit("a", -5), credit("a", expires_at=float("inf")), credit("a", created_at=-1.0)):
            assert isinstance(await refused(ledger.add_credit(wrong)), InvalidArgument)
        assert await ledger.credits() == []


class ThresholdContract:
    """Whoever listens is told when spending reaches 80 and 100 percent of a cap (a ledger's defaults)."""

    async def test_each_threshold_is_told_once_for_each_period(self, ledger: Ledger, peer: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        peer.listen(told.append)
        caps = Caps(day=1_000, total=100_000)
        for number, booked in enumerate((790, 10, 5, 195, 0)):
            await ledger.reserve(hold_request(str(number), booked, caps=caps), now=NOON)
            await peer.settle(f"use_{number}", completed(booked), now=NOON)
        tomorrow = NOON + DAY
        await ledger.reserve(hold_request("x", 900, caps=caps, now=tomorrow), now=tomorrow)
        await ledger.settle("use_x", completed(900), now=tomorrow)
        assert _unique(told) == [
            BudgetReached(scope=ALICE, window="day", period="2026-03-31", threshold=80, cap=1_000, spent=800),
            BudgetReached(scope=ALICE, window="day", period="2026-03-31", threshold=100, cap=1_000, spent=1_000),
            BudgetReached(scope=ALICE, window="day", period="2026-04-01", threshold=80, cap=1_000, spent=900),
        ]
        assert len(told) == len(_unique(told)) * (1 if ledger is not peer else 2)

    async def test_a_booking_that_passes_several_thresholds_tells_each(self, ledger: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        await ledger.reserve(hold_request("a", 100, caps=Caps(month=100)), now=NOON)
        await ledger.settle("use_a", completed(120), now=NOON)
        assert [(one.threshold, one.spent) for one in told] == [(80, 120), (100, 120)]

    async def test_an_expired_hold_is_spending_too(self, ledger: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        await ledger.reserve(hold_request("a", 90, caps=Caps(total=100)), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        assert [(one.window, one.threshold) for one in told] == [("total", 80)]

    async def test_held_money_is_not_spent(self, ledger: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        await ledger.reserve(hold_request("a", 100, caps=Caps(total=100)), now=NOON)
        await ledger.release("use_a", now=NOON)
        assert told == []

    async def test_spending_that_goes_down_and_up_again_is_told_once(self, ledger: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        caps = Caps(total=100)
        await ledger.reserve(hold_request("a", 90, caps=caps), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        await ledger.settle("use_a", completed(10), now=NOON + LEASE)
        await ledger.reserve(hold_request("b", 80, caps=caps, now=NOON + LEASE), now=NOON + LEASE)
        await ledger.settle("use_b", completed(80), now=NOON + LEASE)
        assert [one.threshold for one in told] == [80]

    async def test_a_cap_lowered_below_what_is_spent_is_told_with_the_refusal(self, ledger: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        await ledger.reserve(hold_request("a", 50, caps=Caps(total=1_000)), now=NOON)
        await ledger.settle("use_a", completed(50), now=NOON)
        assert isinstance(await refused(ledger.reserve(hold_request("b", 1, caps=Caps(total=50)), now=NOON)), SpendCapExceeded)
        assert [(one.threshold, one.cap) for one in told] == [(80, 50), (100, 50)]

    async def test_a_running_credit_counts_as_part_of_the_cap(self, ledger: Ledger) -> None:
        told: list[BudgetReached] = []
        ledger.listen(told.append)
        await ledger.add_credit(credit("a", 100))
        await ledger.reserve(hold_request("a", 159, caps=Caps(total=100)), now=NOON)
        await ledger.settle("use_a", completed(159), now=NOON)
        assert told == []
        await ledger.reserve(hold_request("b", 1, caps=Caps(total=100)), now=NOON)
        await ledger.settle("use_b", completed(1), now=NOON)
        assert [(one.threshold, one.cap, one.spent) for one in told] == [(80, 200, 160)]


def _unique(told: list[BudgetReached]) -> list[BudgetReached]:
    return list({repr(one): one for one in told}.values())


class ReportOnlyContract:
    """`enforce=False`: everything is booked, and what would have been refused says so."""

    async def test_what_would_be_refused_is_granted_and_marked(self, ledger: Ledger) -> None:
        caps = Caps(total=100)
        codes = []
        for name, amount in (("a", 90), ("b", 20), ("c", 200)):
            hold = await ledger.reserve(hold_request(name, amount, caps=caps, enforce=False), now=NOON)
            assert hold.amount == amount
            codes.append(hold.would_refuse)
        assert codes == [None, "spend_cap_held", "spend_cap_exceeded"]
        for name, amount in (("a", 90), ("b", 20), ("c", 150)):
            await ledger.settle(f"use_{name}", completed(amount), now=NOON)
        assert [(one.cost, one.would_refuse) for one in await records(ledger)] == [
            (150, "spend_cap_exceeded"),
            (20, "spend_cap_held"),
            (90, None),
        ]
        assert await money(ledger) == (260, 0)
        await assert_clean(ledger)

    async def test_the_parallel_limit_is_only_reported_as_well(self, ledger: Ledger) -> None:
        for name in ("a", "b"):
            hold = await ledger.reserve(hold_request(name, max_parallel=1, enforce=False), now=NOON)
        assert hold.would_refuse == TooManyParallelRequests.default_code

    async def test_a_refusal_that_was_passed_over_before_is_kept(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 500, caps=Caps(total=1), enforce=False, would_refuse="rate_limit_exceeded"), now=NOON)
        await ledger.release("use_a", now=NOON)
        assert [one.would_refuse for one in await records(ledger)] == ["rate_limit_exceeded"]

    async def test_the_wanted_is_granted_whatever_the_cap_affords(self, ledger: Ledger) -> None:
        hold = await ledger.reserve(hold_request("a", caps=Caps(total=50), minimum=10, admission=10, wanted=80, enforce=False), now=NOON)
        assert (hold.amount, hold.would_refuse) == (80, None)

    async def test_enforced_calls_still_see_what_was_only_reported(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 500, caps=Caps(total=100), enforce=False), now=NOON)
        assert isinstance(await refused(ledger.reserve(hold_request("b", 1, caps=Caps(total=100)), now=NOON)), SpendCapHeld)
        await assert_clean(ledger)

    async def test_asking_again_gives_the_same_answer(self, ledger: Ledger) -> None:
        request = hold_request("a", 500, caps=Caps(total=100), enforce=False)
        first = await ledger.reserve(request, now=NOON)
        assert await ledger.reserve(request, now=NOON) == first
        await ledger.settle("use_a", completed(5), now=NOON)
        assert (await ledger.reserve(request, now=NOON)).would_refuse == first.would_refuse


class PruneContract:
    """What is settled for good may be replaced by its sums."""

    async def test_pruning_changes_neither_budgets_nor_usage_and_the_books_stay_true(self, ledger: Ledger, peer: Ledger) -> None:
        scopes = (ScopeClaim(ALICE, Caps(total=10_000)), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
        for number in range(20):
            await ledger.reserve(hold_request(str(number), 100, scopes=scopes), now=NOON)
        for number in range(15):
            await ledger.settle(f"use_{number}", completed(10 + number), now=NOON + 1)
        await ledger.release("use_15", now=NOON + 1)
        before = [await money(ledger, scope=scope) for scope in (ALICE, ACME, GATEWAY_SCOPE)]
        report = await ledger.usage(ALL)
        assert await peer.prune(NOON + 2) > 0
        assert [await money(ledger, scope=scope) for scope in (ALICE, ACME, GATEWAY_SCOPE)] == before
        assert await ledger.usage(ALL) == report
        await assert_clean(ledger)

    async def test_what_is_open_or_may_be_adjusted_is_left(self, ledger: Ledger) -> None:
        for name in ("open", "expired", "settled"):
            await ledger.reserve(hold_request(name, 100, expires_at=NOON + (LEASE if name == "expired" else DAY)), now=NOON)
        await ledger.settle("use_settled", completed(30), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        await ledger.prune(NOON + 2 * LEASE)
        await ledger.settle("use_expired", completed(40), now=NOON + 2 * LEASE)
        await ledger.settle("use_open", completed(50), now=NOON + 2 * LEASE)
        assert await money(ledger) == (120, 0)
        await assert_clean(ledger)

    async def test_nothing_younger_than_the_moment_is_touched(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.settle("use_a", completed(30), now=NOON + 5)
        await ledger.record(cached_record("hit"))
        assert await ledger.prune(NOON + 5) == 0
        await assert_clean(ledger)

    async def test_pruning_goes_on_from_where_it_was(self, ledger: Ledger) -> None:
        for number in range(30):
            now = NOON + number * DAY
            await ledger.reserve(hold_request(str(number), 100, now=now), now=now)
            await ledger.settle(f"use_{number}", completed(10), now=now)
            await ledger.prune(now)
            await assert_clean(ledger)
        assert await money(ledger) == (300, 0)
        assert await money(ledger, "month", now=NOON) == (10 * 29, 0)

    async def test_an_id_that_was_pruned_is_still_known(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.settle("use_a", completed(30), now=NOON)
        await ledger.reserve(hold_request("b", 100), now=NOON + 1)
        await ledger.prune(NOON + 2)
        await ledger.reserve(hold_request("a", 100), now=NOON + 3)
        await ledger.settle("use_a", completed(99), now=NOON + 3)
        assert await money(ledger) == (30, 100)
        await assert_clean(ledger)
