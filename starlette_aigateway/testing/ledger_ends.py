"""What every `Ledger` promises of how holds end: settled, released, expired."""

from __future__ import annotations

from functools import partial

import anyio

from ..accounts import (
    Settlement,
    UsageQuery,
    UsageRecord,
)
from ..errors import SpendCapExceeded
from ..protocols import Ledger
from ..types import Caps, Usage
from .ledger_kit import (
    DAY,
    LEASE,
    NOON,
    PRICE,
    assert_clean,
    completed,
    gather,
    hold_request,
    money,
    records,
    refused,
)


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

    async def test_a_clock_that_jumps_by_weeks_leaves_a_late_settlement_its_week(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        jumped = NOON + 30 * DAY
        await ledger.expire(now=jumped)
        await ledger.reserve(hold_request("b", 100, now=jumped), now=jumped)
        await ledger.settle("use_a", completed(130), now=jumped + DAY)
        assert await money(ledger) == (130, 100)
        await assert_clean(ledger)

    async def test_an_expired_hold_that_nobody_settles_for_a_week_is_final(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON)
        await ledger.expire(now=NOON + LEASE)
        await ledger.expire(now=NOON + LEASE + 7 * DAY + 1)
        record = await ledger.settle("use_a", completed(30), now=NOON + 8 * DAY)
        assert record is not None
        assert (record.outcome, record.cost) == ("expired", 100)
        await assert_clean(ledger)
