"""A clock that steps, and periods that end while a call is in the air: no period is opened again, nothing is spent twice or nowhere."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import anyio
import pytest

from starlette_aigateway import AIGateway, CompletionRequest, Price, Principal, SpendCapExceeded
from starlette_aigateway.accounts import Budget, Window
from starlette_aigateway.testing import FakeClock
from starlette_aigateway.testing.providers import After, Say, ScriptedProvider
from starlette_aigateway.types import LimitFields, Usage

pytestmark = [pytest.mark.anyio, pytest.mark.untraced, pytest.mark.parametrize("stream", [False, True])]

HOUR, DAY = 3600.0, 86_400.0
USD = 10**9
"""Nano-USD of each call, which is also all that it may cost."""


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def gateway_at(moment: str, *steps: Any) -> tuple[AIGateway, FakeClock]:
    clock = FakeClock(at(moment))
    provider = ScriptedProvider(*steps, Say("yes", usage=Usage(input_tokens=1, output_tokens=1)), repeat=True)
    return AIGateway.in_memory(providers=[provider], prices={"m": Price(0, 0, request=1)}, clock=clock), clock


async def call(gateway: AIGateway, who: Principal, stream: bool, number: int = 0) -> None:
    request = CompletionRequest(model="m", messages=[{"role": "user", "content": f"question {number}"}], max_tokens=5)
    if not stream:
        await gateway.complete(who, request)
        return
    async with gateway.stream(who, request) as answer:
        async for _ in answer:
            pass


async def budget(gateway: AIGateway, who: Principal, window: Window) -> Budget:
    return next(found for found in await gateway.budgets(who) if found.window == window)


# -- the clock steps back ----------------------------------------------------------------------------------------------

BACK = [
    ("daily_cap_usd", "day", "2026-05-10T00:00:01", -2.0, "2026-05-11T00:00"),
    ("daily_cap_usd", "day", "2026-05-10T09:00", -10 * HOUR, "2026-05-11T00:00"),
    ("daily_cap_usd", "day", "2026-05-10T09:00", -400 * DAY, "2026-05-11T00:00"),
    ("monthly_cap_usd", "month", "2026-06-01T00:00:01", -2.0, "2026-07-01T00:00"),
    ("monthly_cap_usd", "month", "2026-12-31T23:00", -31 * DAY, "2027-01-01T00:00"),
    ("monthly_cap_usd", "month", "2028-02-29T12:00", -40 * DAY, "2028-03-01T00:00"),
    ("hard_cap_usd", "total", "2026-05-10T09:00", -400 * DAY, None),
]


@pytest.mark.parametrize(("cap", "window", "moment", "step", "resets"), BACK)
async def test_a_clock_that_steps_back_opens_no_period_again_and_the_refusal_says_when_the_next_one_begins(
    stream: bool, cap: str, window: Window, moment: str, step: float, resets: str | None
) -> None:
    limits: LimitFields = {cap: Decimal(2)}  # type: ignore[misc]  # one of the names
    who = Principal("user", **limits)
    gateway, clock = gateway_at(moment)
    async with gateway:
        for number in range(2):
            await call(gateway, who, stream, number)
        period = (await budget(gateway, who, window)).period
        clock.advance(step)
        with pytest.raises(SpendCapExceeded) as refused:
            await call(gateway, who, stream, 3)
        assert refused.value.resets_at == (None if resets is None else datetime.fromisoformat(resets).replace(tzinfo=UTC))
        found = await budget(gateway, who, window)
        assert (found.period, found.spent, found.held) == (period, 2 * USD, 0)
        assert await gateway.check_ledger() == []


async def test_what_is_used_after_a_step_back_counts_in_the_day_that_the_ledger_had_reached(stream: bool) -> None:
    who = Principal("user", daily_cap_usd="3")
    gateway, clock = gateway_at("2026-05-10T09:00")
    async with gateway:
        await call(gateway, who, stream, 1)
        clock.advance(-2 * DAY)
        await call(gateway, who, stream, 2)
        clock.advance(2 * DAY + HOUR)
        await call(gateway, who, stream, 3)
        found = await budget(gateway, who, "day")
        assert (found.period, found.spent) == ("2026-05-10", 3 * USD)
        days = [record.created_at for record in (await gateway.usage()).data]
        assert days == sorted(days, reverse=True)
        assert min(days) >= at("2026-05-10T00:00")
        with pytest.raises(SpendCapExceeded):
            await call(gateway, who, stream, 4)


@pytest.mark.parametrize("seed", range(5))
async def test_however_the_clock_steps_each_period_is_spent_once(stream: bool, seed: int) -> None:
    chance = random.Random(seed)
    who = Principal("user", daily_cap_usd="3", monthly_cap_usd="8", hard_cap_usd="25")
    gateway, clock = gateway_at("2026-01-30T20:00")
    spent: dict[str, int] = {}
    latest = 0.0
    async with gateway:
        for number in range(60):
            clock.advance(chance.choice((-31 * DAY, -DAY, -5 * HOUR, -1.0, 0.0, 1.0, 5 * HOUR, 9 * HOUR, DAY)))
            latest = max(latest, clock.now)
            day = datetime.fromtimestamp(latest, UTC).strftime("%Y-%m-%d")
            periods = {day: 3, day[:7]: 8, "": 25}
            fits = all(spent.get(period, 0) < cap * USD for period, cap in periods.items())
            try:
                await call(gateway, who, stream, number)
            except SpendCapExceeded:
                assert not fits
            else:
                assert fits
                for period in periods:
                    spent[period] = spent.get(period, 0) + USD
            for found in await gateway.budgets(who):
                assert (found.period in periods, found.spent, found.held) == (True, spent.get(found.period, 0), 0)
        assert await gateway.check_ledger() == []


# -- a period ends, or the clock steps, while a call is in the air -----------------------------------------------------


class InTheAir:
    """A call that waits at its provider while the block runs, and is over after it."""

    def __init__(self, moment: str, who: Principal, stream: bool) -> None:
        self._go_on, self._arrived = anyio.Event(), anyio.Event()
        self._say = Say("yes, late", usage=Usage(input_tokens=1, output_tokens=1))
        self.gateway, self.clock = gateway_at(moment, After(self._go_on, self._say, self._arrived))
        self._who = who
        self._stream = stream
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> InTheAir:
        await self._stack.enter_async_context(self.gateway)
        self._group = await self._stack.enter_async_context(anyio.create_task_group())
        self._ended = anyio.Event()
        self._group.start_soon(self._run)
        await self._arrived.wait()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def _run(self) -> None:
        await call(self.gateway, self._who, self._stream, -1)
        self._ended.set()

    async def land(self) -> None:
        self._go_on.set()
        await self._ended.wait()


@pytest.mark.parametrize(
    ("moment", "later", "window", "before"),
    [
        ("2026-05-31T23:59:59", 2.0, "month", "2026-05"),
        ("2026-12-31T23:59:59", 2.0, "month", "2026-12"),
        ("2028-02-29T23:59:59", 2.0, "month", "2028-02"),
        ("2026-05-10T23:59:59", 2.0, "day", "2026-05-10"),
    ],
)
async def test_a_call_that_outlives_its_period_is_booked_into_the_one_that_it_began_in(
    stream: bool, moment: str, later: float, window: Window, before: str
) -> None:
    who = Principal("user", daily_cap_usd="1", monthly_cap_usd="1" if window == "month" else "5")
    async with InTheAir(moment, who, stream) as flight:
        gateway = flight.gateway
        flight.clock.advance(later)
        await call(gateway, who, stream)  # the new period is untouched by what is held in the old one
        new = await budget(gateway, who, window)
        assert (new.period > before, new.spent, new.held) == (True, USD, 0)
        await flight.land()
        assert await budget(gateway, who, window) == new
        grouped = await gateway.usage(group_by=[window])
        assert [(group.by[window], group.totals.cost) for group in grouped.groups] == [(before, USD), (new.period, USD)]
        with pytest.raises(SpendCapExceeded) as refused:
            await call(gateway, who, stream, 1)
        assert refused.value.resets_at is not None
        assert timedelta(0) < refused.value.resets_at - datetime.fromtimestamp(flight.clock.now, UTC) <= timedelta(days=31)
        assert await gateway.check_ledger() == []


@pytest.mark.parametrize("step", [-400 * DAY, -HOUR, -1.0])
async def test_a_clock_that_steps_back_under_a_call_changes_nothing_of_its_bill(stream: bool, step: float) -> None:
    who = Principal("user", hard_cap_usd="5")
    async with InTheAir("2026-05-10T09:00", who, stream) as flight:
        flight.clock.advance(step)
        await call(flight.gateway, who, stream)
        assert (await budget(flight.gateway, who, "total")).held > 0, "its lease is not over"
        await flight.land()
        found = await budget(flight.gateway, who, "total")
        assert (found.spent, found.held) == (2 * USD, 0)
        assert [record.outcome for record in (await flight.gateway.usage()).data] == ["completed", "completed"]
        assert await flight.gateway.check_ledger() == []


@pytest.mark.parametrize("step", [HOUR, 3 * DAY, 400 * DAY])
async def test_a_clock_that_steps_past_the_lease_of_a_call_books_it_once_in_the_end(stream: bool, step: float) -> None:
    who = Principal("user", hard_cap_usd="5")
    async with InTheAir("2026-05-10T09:00", who, stream) as flight:
        flight.clock.advance(step)
        await call(flight.gateway, who, stream)
        found = await budget(flight.gateway, who, "total")
        assert (found.spent, found.held) == (2 * USD, 0), "the hold of the one in the air is booked in full"
        flight.clock.advance(-step)
        await flight.land()
        assert (await budget(flight.gateway, who, "total")).spent == 2 * USD
        assert sorted(record.outcome for record in (await flight.gateway.usage()).data) == ["adjusted", "completed", "expired"]
        assert await flight.gateway.check_ledger() == []
