"""What a hold was made with is what it ends with: its price, its periods, its durability."""

from __future__ import annotations

import itertools
import sqlite3
from pathlib import Path

import anyio
import pytest

from starlette_aigateway import AIGateway, CacheControl, Price, StorageUnavailable
from starlette_aigateway.accounts import UsageQuery
from starlette_aigateway.stores.sqlite import write_ahead_log
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.testing.ledger_kit import NOON, completed, hold_request
from starlette_aigateway.testing.providers import After, Say, ScriptedProvider
from starlette_aigateway.types import Usage

from .kit import FaultyLedger, outcomes, read
from .kit import gateway_over as gateway_with
from .service import gateway_over

pytestmark = pytest.mark.anyio

USAGE = Usage(input_tokens=10, output_tokens=5)
ALONE = CacheControl(read=False, store=False)
OLD, NEW = Price("1000", "2000"), Price("7000", "9000")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_price_that_changes_while_a_call_runs_holds_for_later_calls_only(stream: bool) -> None:
    arrived, go_on = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go_on, Say("late", usage=USAGE), arrived), Say("soon", usage=USAGE))
    async with AIGateway.in_memory(providers=[provider], prices={"m": OLD}) as gateway, anyio.create_task_group() as group:
        ended = anyio.Event()

        async def early() -> None:
            await read(gateway, stream, cache=ALONE)
            ended.set()

        group.start_soon(early)
        await arrived.wait()
        await gateway.set_price("m", NEW)
        await read(gateway, not stream, cache=ALONE)
        go_on.set()
        await ended.wait()
        later, first = (await gateway.usage()).data
        assert (first.price, first.cost) == (OLD, 20_000_000)
        assert (later.price, later.cost) == (NEW, 115_000_000)
        assert await gateway.check_ledger() == []


async def test_the_lease_of_a_stream_that_goes_on_ends_as_much_later_as_it_was_long(
    ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(step=25.0)
    monkeypatch.setattr("starlette_aigateway.attempt.monotonic", lambda: next(seconds))
    monkeypatch.setattr("starlette_aigateway.attempt.lease", lambda *_: 60.0)
    ends: list[float] = []

    async def renew(hold_id: str, expires_at: float, *, now: float) -> bool:
        ends.append(expires_at - now)
        return await FaultyLedger.renew(ledger, hold_id, expires_at, now=now)

    ledger.renew = renew  # type: ignore[method-assign]  # told when the lease is to end
    async with gateway_with(ledger, ScriptedProvider("one two three four")) as gateway:
        await read(gateway, stream=True)
        assert set(ends) == {60.0}
        assert await outcomes(gateway) == ["completed"]


async def test_a_settlement_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with SQLiteLedger(path) as ledger:
        await ledger.reserve(hold_request("a"), now=NOON)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("CREATE TRIGGER no BEFORE UPDATE ON balances BEGIN SELECT raise(ABORT, 'no'); END")
        with pytest.raises(StorageUnavailable):
            await ledger.settle("use_a", completed(60), now=NOON)
        assert (await ledger.usage(UsageQuery())).data == []
        assert await ledger.check() == []
        other.execute("DROP TRIGGER no")
        other.close()
        await ledger.settle("use_a", completed(60), now=NOON)
        assert (await ledger.usage(UsageQuery())).totals.cost == 60
        assert await ledger.check() == []


async def test_a_gateways_ledger_syncs_what_it_grants_and_settles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That nobody is told before, and what a power cut leaves, is `tests/test_write_ahead_log.py`."""
    syncs: list[int] = []
    monkeypatch.setattr(write_ahead_log, "_datasync", syncs.append)
    async with gateway_over(tmp_path, ScriptedProvider("hi")) as gateway:
        syncs.clear()
        await read(gateway, stream=False)
        assert len(syncs) == 2
        connection = gateway._ledger._commit._writer._turns._connection  # type: ignore[attr-defined]  # the one that writes
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
