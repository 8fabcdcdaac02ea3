"""What every `Ledger` promises of usage records that are rolled up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from msgspec.structs import replace

from ..accounts import GATEWAY_SCOPE, ScopeClaim, UsageGroup, UsageQuery, UsageTotals
from ..protocols import Ledger
from ..types import Caps
from .ledger_kit import ACME, DAY, LEASE, NOON, assert_clean, cached_record, completed, hold_request, money, records

MIDNIGHT = NOON - DAY / 2
"""Of the day that `NOON` is in."""

GROUPINGS: Sequence[tuple[str, ...]] = (
    (), ("day",), ("month",), ("model",), ("provider",), ("principal",), ("tenant",), ("key",), ("outcome",),
    ("day", "principal", "model"), ("month", "tenant", "key", "provider", "outcome"),
)  # fmt: skip
FILTERS = (
    UsageQuery(),
    UsageQuery(principal="alice"),
    UsageQuery(tenant="acme"),
    UsageQuery(key_id="key_1"),
    UsageQuery(model="m1"),
    UsageQuery(principal="alice", tenant="acme", model="m1"),
)


QUESTIONS: Sequence[UsageQuery] = [
    replace(asked, since=since, until=until, group_by=groups)
    for groups, asked, since, until in product(GROUPINGS, FILTERS, (None, MIDNIGHT), (None, MIDNIGHT, MIDNIGHT + DAY))
]
"""By each grouping and filter, over several ranges of whole days."""


async def figures(ledger: Ledger, queries: Sequence[UsageQuery] = QUESTIONS) -> list[tuple[UsageTotals, Sequence[UsageGroup]]]:
    """Totals and groups."""
    reports = [await ledger.usage(query) for query in queries]
    return [(report.totals, report.groups) for report in reports]


async def lively(ledger: Ledger, days: int = 3) -> None:
    """Calls of `days` days up to the one that `NOON` is in: of everybody, of every kind, with every outcome."""
    for day in range(1 - days, 1):
        noon = NOON + day * DAY
        for number, (principal, tenant, key) in enumerate((("alice", "acme", "key_1"), ("alice", None, None), ("bob", "acme", "key_2"))):
            scopes = (ScopeClaim(f"principal:{principal}", Caps(total=10**6)), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
            for model in ("m1", "m2"):
                name = f"{day}_{number}_{model}"
                payer: dict[str, Any] = {
                    "principal": principal,
                    "tenant": tenant,
                    "key_id": key,
                    "model": model,
                    "scopes": scopes,
                    "now": noon,
                }
                for end in ("completed", "ambiguous", "released", "expired", "late"):
                    await ledger.reserve(hold_request(f"{name}_{end}", 100, **payer), now=noon)
                await ledger.settle(f"use_{name}_completed", completed(30 + number), now=noon + 1)
                await ledger.settle(f"use_{name}_ambiguous", completed(100, outcome="ambiguous", usage=None), now=noon + 1)
                await ledger.release(f"use_{name}_released", now=noon + 1)
                await ledger.expire(now=noon + LEASE)
                await ledger.settle(f"use_{name}_late", completed(20), now=noon + LEASE)
                await ledger.record(
                    cached_record(f"{name}_hit", created_at=noon, principal=principal, tenant=tenant, key_id=key, model=model)
                )


class RollUpContract:
    """Records of days that are over may be replaced by their sums."""

    async def test_rolling_up_changes_neither_totals_nor_groups_of_whole_days_nor_budgets(self, ledger: Ledger, peer: Ledger) -> None:
        await lively(ledger)
        await ledger.expire(now=NOON + 10 * DAY)  # the expired ones are final
        before = await figures(ledger), await money(ledger), await money(ledger, scope=GATEWAY_SCOPE)
        everything = len(await records(ledger, limit=1000))
        gone = await peer.roll_up(MIDNIGHT)
        assert gone == everything - len(await records(ledger, since=MIDNIGHT, limit=1000))
        assert len(await records(ledger, limit=1000)) == everything - gone
        assert (await figures(ledger), await money(ledger), await money(ledger, scope=GATEWAY_SCOPE)) == before
        await assert_clean(ledger)
        await ledger.reserve(hold_request("last", now=NOON + 10 * DAY), now=NOON + 10 * DAY)
        assert await ledger.roll_up(MIDNIGHT + DAY) == everything - gone
        assert (await ledger.usage(UsageQuery())).data == []
        await assert_clean(ledger)
        assert await figures(ledger) == before[0]

    async def test_a_report_says_before_when_records_may_be_gone(self, ledger: Ledger) -> None:
        await ledger.record(cached_record("a", created_at=NOON - DAY))
        assert (await ledger.usage(UsageQuery())).rolled_up_before is None
        assert await ledger.roll_up(NOON) == 1
        assert (await ledger.usage(UsageQuery())).rolled_up_before == MIDNIGHT

    async def test_a_day_that_is_rolled_up_counts_as_at_its_midnight_also_in_part(self, ledger: Ledger) -> None:
        await ledger.record(cached_record("early", created_at=MIDNIGHT - DAY + 60))
        await ledger.roll_up(MIDNIGHT)
        await ledger.record(cached_record("late", created_at=MIDNIGHT - 60))  # one that is not rolled up yet

        async def calls(since: float | None, until: float | None) -> int:
            return (await ledger.usage(UsageQuery(since=since, until=until))).totals.calls

        yesterday = MIDNIGHT - DAY
        assert await calls(yesterday, MIDNIGHT) == 2
        assert (await calls(yesterday - 1, yesterday + 1), await calls(yesterday + 1, MIDNIGHT)) == (2, 0)
        assert (await calls(None, yesterday), await calls(yesterday, None)) == (0, 2)
        assert await calls(MIDNIGHT, None) == 0

    async def test_days_that_are_not_over_by_the_moment_stay(self, ledger: Ledger) -> None:
        await ledger.record(cached_record("a", created_at=NOON - DAY))
        assert await ledger.roll_up(NOON - 1 - DAY / 2) == 0
        assert len(await records(ledger)) == 1
        assert (await ledger.usage(UsageQuery())).rolled_up_before is None

    async def test_what_may_be_adjusted_stays_and_is_adjusted(self, ledger: Ledger) -> None:
        yesterday = NOON - DAY
        for name in ("open", "expired", "settled"):
            expires_at = yesterday + (LEASE if name == "expired" else 3 * DAY)
            await ledger.reserve(hold_request(name, 100, expires_at=expires_at), now=yesterday)
        await ledger.settle("use_settled", completed(30), now=yesterday)
        await ledger.expire(now=yesterday + LEASE)
        await ledger.reserve(hold_request("today", 100), now=NOON)
        assert await ledger.roll_up(NOON) == 1
        assert [one.id for one in await records(ledger)] == ["use_expired"]
        await ledger.settle("use_expired", completed(40), now=NOON)
        await ledger.settle("use_open", completed(50), now=NOON)
        assert await money(ledger) == (120, 100)
        assert await ledger.roll_up(NOON) == 0, "they were settled after the day"
        await assert_clean(ledger)
        await ledger.settle("use_today", completed(1), now=NOON)
        await ledger.reserve(hold_request("tomorrow", 100), now=NOON + DAY)
        assert await ledger.roll_up(NOON + DAY) == 4
        assert (await ledger.usage(UsageQuery())).totals.cost == 121
        await assert_clean(ledger)

    async def test_a_settlement_of_a_hold_that_is_rolled_up_finds_it_unknown_and_changes_nothing(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON - DAY)
        await ledger.settle("use_a", completed(30), now=NOON - DAY)
        await ledger.reserve(hold_request("b", 100), now=NOON)
        await ledger.roll_up(NOON)
        assert await ledger.settle("use_a", completed(60), now=NOON) is None
        await ledger.release("use_a", now=NOON)
        assert await money(ledger) == (30, 100)
        await assert_clean(ledger)

    async def test_rolling_up_again_adds_to_what_is_there(self, ledger: Ledger, peer: Ledger) -> None:
        for turn in range(3):
            await ledger.record(cached_record(f"a{turn}", created_at=NOON - DAY, tenant="acme"))
            await peer.record(cached_record(f"b{turn}", created_at=NOON - DAY))
            assert await (ledger, peer)[turn % 2].roll_up(NOON) == 2
            assert await ledger.roll_up(NOON) == 0
        groups = (await ledger.usage(UsageQuery(group_by=("day", "tenant")))).groups
        assert [(dict(group.by), group.totals.cached_calls, group.totals.input_tokens) for group in groups] == [
            ({"day": "2026-03-30", "tenant": None}, 3, 30),
            ({"day": "2026-03-30", "tenant": "acme"}, 3, 30),
        ]
        await assert_clean(ledger)

    async def test_names_that_nobody_gave_and_empty_ones_stay_apart(self, ledger: Ledger) -> None:
        for name, tenant in (("a", None), ("b", ""), ("c", ""), ("d", "acme")):
            await ledger.record(cached_record(name, created_at=NOON - DAY, tenant=tenant, key_id=tenant))
        before = await ledger.usage(UsageQuery(group_by=("tenant", "key"), limit=1))
        await ledger.roll_up(NOON)
        assert (await ledger.usage(UsageQuery(group_by=("tenant", "key")))).groups == before.groups
        assert (await ledger.usage(UsageQuery(tenant=""))).totals.calls == 2

    async def test_what_was_pruned_before_is_rolled_up_too(self, ledger: Ledger) -> None:
        await ledger.reserve(hold_request("a", 100), now=NOON - DAY)
        await ledger.settle("use_a", completed(30), now=NOON - DAY)
        await ledger.reserve(hold_request("b", 100), now=NOON)
        await ledger.prune(NOON)
        assert await ledger.roll_up(NOON) == 1
        assert await money(ledger) == (30, 100)
        await assert_clean(ledger)

    async def test_the_last_moment_of_a_day_belongs_to_it(self, ledger: Ledger) -> None:
        await ledger.record(cached_record("a", created_at=MIDNIGHT - 0.0001))
        before = await figures(ledger)
        assert await ledger.roll_up(MIDNIGHT) == 1
        assert await figures(ledger) == before
        assert (await ledger.usage(UsageQuery(group_by=("day",)))).groups[0].by == {"day": "2026-03-30"}
