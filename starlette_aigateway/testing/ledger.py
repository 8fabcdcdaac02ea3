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
from typing import Any

from ..accounts import (
    UsageQuery,
    UsageRecord,
    UsageTotals,
)
from ..errors import InvalidRequest, SpendCapExceeded
from ..protocols import Ledger
from ..types import Caps
from .ledger_ends import ResolveContract
from .ledger_holds import HoldContract
from .ledger_kit import (
    DAY,
    LEASE,
    NOON,
    assert_clean,
    budget,
    cached_record,
    completed,
    hold_request,
    money,
    records,
    refused,
)
from .ledger_limits import CreditContract, PruneContract, ReportOnlyContract, ThresholdContract
from .ledger_rollups import RollUpContract


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

    async def test_who_wants_a_page_alone_gets_nothing_summed_up(self, ledger: Ledger) -> None:
        for name in "abc":
            await ledger.record(cached_record(name))
        whole = await ledger.usage(UsageQuery(limit=2, group_by=("model",)))
        page = await ledger.usage(UsageQuery(limit=2, group_by=("model",), totals=False))
        assert (page.data, page.next_cursor) == (whole.data, whole.next_cursor)
        assert (page.totals, list(page.groups)) == (UsageTotals(), [])

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
    RollUpContract,
):
    """All of it. See the module's docstring for the fixtures."""
