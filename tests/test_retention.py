"""`retention=`: what is old enough is rolled up in the background; and the same by hand."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import AIGateway, CompletionRequest, InvalidArgument, Price, Principal, Retention, StorageUnavailable, UsageReport
from starlette_aigateway.accounts import UsageQuery
from starlette_aigateway.protocols import Ledger
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.retention import Retainer
from starlette_aigateway.stores.sqlite.idempotency import SQLiteIdempotencyStore
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.ledger_kit import DAY, LEASE, NOON, assert_clean, hold_request

from .http_host import ALICE, service
from .test_cli import aigateway, answer

pytestmark = pytest.mark.anyio
MONTH = Retention(records=timedelta(days=30))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON)


class Told(SQLiteLedger):
    """Says what it was asked to roll up and to prune."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, durability="OFF")
        self.asked: list[tuple[str, float]] = []
        self.rolled = anyio.Event()
        self.failing: Exception | None = None

    async def prune(self, before: float) -> int:
        self.asked.append(("prune", before))
        return await super().prune(before)

    async def roll_up(self, before: float) -> int:
        if self.failing is not None:
            raise self.failing
        self.asked.append(("roll_up", before))
        gone = await super().roll_up(before)
        self.rolled.set()
        return gone


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Told]:
    async with Told(tmp_path / "ledger.db") as ledger:
        yield ledger


def gateway_over(data: Path, ledger: Ledger | None, clock: FakeClock, retention: Retention | None = MONTH, **more: Any) -> AIGateway:
    settings = {"providers": [EchoProvider()], "prices": {"echo": Price(1, 2)}, "clock": clock, "retention": retention, **more}
    return AIGateway(data_dir=data, ledger=ledger, **settings)


async def call(gateway: AIGateway, text: str = "hello") -> None:
    await gateway.complete(Principal("alice"), CompletionRequest(model="echo", messages=[{"role": "user", "content": text}]))


def day_of(clock: FakeClock, ago: int = 0) -> datetime:
    return datetime.fromtimestamp(clock.now // DAY * DAY - ago * DAY, UTC)


def sums(report: UsageReport) -> object:
    return report.totals, report.groups


async def test_records_that_are_old_enough_are_rolled_up_at_the_start(tmp_path: Path, clock: FakeClock, ledger: Told) -> None:
    async with gateway_over(tmp_path, ledger, clock, None) as gateway:
        for number in range(4):
            await call(gateway, f"{number}")
            clock.advance(20 * DAY)
        before = await gateway.usage(group_by=["day", "model", "principal"])
        assert len(before.data) == 4
        assert ledger.asked == []
    async with gateway_over(tmp_path, ledger, clock) as gateway:
        await ledger.rolled.wait()
        after = await gateway.usage(group_by=["day", "model", "principal"])
        assert sums(after) == sums(before)
        assert [one.created_at for one in after.data] == [clock.now - 20 * DAY]
        assert after.rolled_up_before == day_of(clock, 30).timestamp()
        assert await gateway.check_ledger() == []


def retainer(ledger: Ledger, data: Path, clock: FakeClock, retention: Retention = MONTH, **more: Any) -> Retainer:
    return Retainer(ledger, SQLiteIdempotencyStore(data / "answers.db"), retention, clock=clock, random=os.urandom, **more)


async def test_of_several_workers_one_does_it_in_an_hour(tmp_path: Path, clock: FakeClock, ledger: Told) -> None:
    workers = [retainer(ledger, tmp_path, clock) for _ in range(3)]
    for expected in (1, 1, 2):
        for worker in workers:
            await worker.take_turn()
        assert len([what for what, _ in ledger.asked if what == "roll_up"]) == expected
        clock.advance(2000)


async def test_a_worker_that_is_stopped_in_the_middle_leaves_the_rest_to_whoever_comes_next(
    tmp_path: Path, clock: FakeClock, ledger: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = anyio.Event()

    async def endless(before: float) -> int:
        begun.set()
        await anyio.sleep_forever()
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "roll_up", endless)
        async with anyio.create_task_group() as group:
            group.start_soon(retainer(ledger, tmp_path, clock).take_turn)
            await begun.wait()
            group.cancel_scope.cancel()
    await retainer(ledger, tmp_path, clock).take_turn()
    assert ledger.rolled.is_set()


async def test_entries_may_go_before_the_records(tmp_path: Path, clock: FakeClock, ledger: Told) -> None:
    async with gateway_over(tmp_path, ledger, clock, None) as gateway:
        await call(gateway)
        clock.advance(10 * DAY)
        await call(gateway, "later")
        await retainer(ledger, tmp_path, clock, Retention(entries=timedelta(days=7))).take_turn()
        assert ledger.asked == [("prune", clock.now - 7 * DAY)]
        report = await gateway.usage()
        assert (len(report.data), report.rolled_up_before) == (2, None)
        assert await gateway.check_ledger() == []


async def test_a_hold_that_nobody_settles_for_a_week_is_rolled_up_with_the_others(tmp_path: Path, clock: FakeClock, ledger: Told) -> None:
    await ledger.reserve(hold_request("lost", 100, now=clock.now), now=clock.now)
    await ledger.expire(now=clock.now + LEASE)
    clock.advance(31 * DAY)
    await ledger.reserve(hold_request("last", 100, now=clock.now), now=clock.now)
    await retainer(ledger, tmp_path, clock).retain(clock.now)
    report = await ledger.usage(UsageQuery())
    assert (report.data, report.totals.cost) == ([], 100)
    await assert_clean(ledger)


async def test_a_store_that_fails_is_told_to_the_log_and_tried_again_in_an_hour(
    tmp_path: Path, clock: FakeClock, ledger: Told, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.failing = StorageUnavailable("no room")
    worker = retainer(ledger, tmp_path, clock, sleep=clock.sleep)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.work)
        await clock.slept_on()
        assert "the ledger was not rolled up: StorageUnavailable: no room" in caplog.text
        ledger.failing = None
        clock.advance(3600)
        await ledger.rolled.wait()
        group.cancel_scope.cancel()


async def test_without_a_policy_nothing_is_asked_of_anybody(tmp_path: Path, clock: FakeClock, ledger: Told) -> None:
    await retainer(ledger, tmp_path, clock, Retention()).work()
    assert ledger.asked == []
    assert not (tmp_path / "answers.db").exists()


@pytest.mark.parametrize(
    ("ages", "param"),
    [
        ({"records": 90}, "records"),
        ({"records": timedelta(hours=23)}, "records"),
        ({"records": timedelta(days=-1)}, "records"),
        ({"entries": "7 days"}, "entries"),
        ({"records": timedelta(days=7), "entries": timedelta(days=8)}, "entries"),
    ],
)
def test_an_age_that_is_of_no_use_is_refused(ages: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Retention(**ages)
    assert caught.value.param == param


async def test_by_hand_it_takes_a_day_that_is_over(tmp_path: Path, clock: FakeClock) -> None:
    async with gateway_over(tmp_path, None, clock, None) as gateway:
        await call(gateway)
        clock.advance(2 * DAY)
        await call(gateway, "later")
        before = await gateway.usage(group_by=["day"])
        for moment in (day_of(clock), day_of(clock) + timedelta(days=1), datetime(2026, 1, 1)):  # noqa: DTZ001  # what is refused
            with pytest.raises(InvalidArgument) as caught:
                await gateway.prune_usage(moment)
            assert caught.value.param == "before"
        assert await gateway.prune_usage(day_of(clock, 1)) == 1
        assert await gateway.prune_usage(day_of(clock, 1)) == 0
        after = await gateway.usage(group_by=["day"])
        assert (sums(after), len(after.data)) == (sums(before), 1)
        assert await gateway.check_ledger() == []


def test_a_report_over_http_tells_before_when_records_may_be_gone(clock: FakeClock) -> None:
    with service(clock=clock) as host:
        host.complete(ALICE)
        assert host.call("GET", "/usage").json()["rolled_up_before"] is None
        clock.advance(3 * DAY)
        host.complete(ALICE, model="meta/llama")
        whole = host.call("GET", "/usage", params={"group_by": "day,model"}).json()
        assert anyio.run(host.gateway.prune_usage, day_of(clock, 1)) == 1
        told = host.call("GET", "/usage", params={"group_by": "day,model"}).json()
        assert told["rolled_up_before"] == "2026-04-02T00:00:00Z"
        assert {name: told[name] for name in ("totals", "groups")} == {name: whole[name] for name in ("totals", "groups")}
        assert len(told["data"]) == 1


async def test_the_command_knows_of_what_was_rolled_up(tmp_path: Path, clock: FakeClock) -> None:
    async with gateway_over(tmp_path, None, clock, None) as gateway:
        await call(gateway)
        clock.advance(3 * DAY)
        await call(gateway, "later")
        assert await gateway.prune_usage(day_of(clock, 1)) == 1
    checked = aigateway("check", "--data-dir", tmp_path)
    assert checked.stdout.startswith("everything adds up: ")
    assert " 1 records, 1 more rolled up, " in checked.stdout
    assert answer("check", "--data-dir", tmp_path)["rolled_up_records"] == 1
    used = aigateway("usage", "--data-dir", tmp_path, "--json")
    assert json.loads(used.stdout)["totals"]["calls"] == 2
    assert json.loads(used.stdout)["rolled_up_before"] == "2026-04-02T00:00:00Z"
    assert used.stderr.startswith("Records before 2026-04-02T00:00:00Z may be rolled up")
