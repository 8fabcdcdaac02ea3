"""Callers that leave over real sockets, many at a time: nothing lost, nothing left open."""

import asyncio
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from starlette_aigateway.drains import OnDisconnect

from ..serving import serve
from .billing_upstream import BillingUpstream, Wanted, charges
from .disconnect_storm import Plan, storm, visit
from .storm_gateway import MOUNT, Server, Settings, gateway_process


@pytest.mark.parametrize("mode", ["drain", "cancel"])
@pytest.mark.parametrize("seed", [1, 2])
def test_in_a_storm_of_disconnects_every_call_is_booked_exactly_or_marked_and_above_its_charge(
    tmp_path: Path, mode: OnDisconnect, seed: int
) -> None:
    summary = storm(60, seed, mode, tmp_path)
    assert summary.holds, summary
    assert summary.charged_calls > 20
    if mode == "drain":
        assert summary.booked == summary.charged
    else:
        assert summary.outcomes["estimated"] > 0


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"])
def test_a_server_tells_that_a_whole_answer_is_not_waited_for_any_more(tmp_path: Path, server: Server, owned: bool) -> None:
    bill = tmp_path / "bill.jsonl"
    with serve(BillingUpstream(bill), lifespan="off", timeout_graceful_shutdown=0) as upstream:
        settings = Settings(
            data_dir=str(tmp_path / "gateway"), upstream=f"{upstream}/v1", server=server, owned=owned, on_disconnect="cancel"
        )
        with gateway_process(settings) as (_, port):
            plan = Plan(Wanted("ada", words=50, pause=1.0), stream=False, most=None, seconds=None, abruptly=False)
            asyncio.run(leave_once_begun(plan, port, bill))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}{MOUNT}", headers={"x-user": "ada"}) as client:
                record = first_record(client)
    assert record["outcome"] == "ambiguous"
    assert Decimal(record["cost_usd"]) * 10**9 >= charges(bill)["ada"].cost


async def leave_once_begun(plan: Plan, port: int, bill: Path) -> None:
    call = asyncio.create_task(visit(plan, port))
    async with asyncio.timeout(20):
        while not bill.exists() or not charges(bill):
            await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait([call])


def first_record(client: httpx.Client) -> dict[str, Any]:
    """Once it is there; long before the upstream has answered."""
    deadline = time.monotonic() + 20
    while not (data := client.get("/usage").json()["data"]):
        assert time.monotonic() < deadline, "the call goes on though its caller has left"
        time.sleep(0.02)
    record: dict[str, Any] = data[0]
    return record
