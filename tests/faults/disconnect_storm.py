"""Many calls over real sockets whose clients leave at random points: what was booked, against what the provider charged.

`python -m tests.faults.disconnect_storm --streams 500` prints a summary as JSON and fails if anything is lost, short or left open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from starlette_aigateway import AIGateway, UsageRecord
from starlette_aigateway.drains import OnDisconnect

from ..serving import serve
from .billing_upstream import BillingUpstream, Charge, Wanted, charges
from .storm_gateway import MOUNT, Settings, gateway_process

AT_ONCE = 50
"""Calls in the air at a time."""


class Plan(Struct, frozen=True):
    """One client. It leaves after `most` bytes of the answer or after `seconds`, or, where both are None, stays to its end; `abruptly`
    is with a reset."""

    wanted: Wanted
    stream: bool
    most: int | None
    seconds: float | None
    abruptly: bool


class Summary(Struct, frozen=True, kw_only=True):
    """Amounts are nano-USD. `short` are calls booked below what was charged, `inexact` those booked as exact that are not; `lost` were
    charged and not booked. `over_share` is what the marked ones were booked above their charge, of all that was charged."""

    mode: OnDisconnect
    streams: int
    seed: int
    charged_calls: int
    charged: int
    booked: int
    outcomes: Mapping[str, int]
    exact: int
    over_share: float
    lost: Sequence[str]
    short: Sequence[str]
    inexact: Sequence[str]
    open_holds: int
    findings: Sequence[str]

    @property
    def holds(self) -> bool:
        return not (self.lost or self.short or self.inexact or self.open_holds or self.findings)


def plans(count: int, seed: int) -> list[Plan]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        words = chance.randint(3, 60)
        wanted = Wanted(f"call{number}", words, pause := chance.uniform(0.001, 0.01))
        stays = chance.random() < 0.2
        by_bytes = chance.random() < 0.5
        most = None if stays or not by_bytes else chance.choice([0, chance.randint(1, 600), chance.randint(1, 150 * words)])
        seconds = None if stays or by_bytes else chance.uniform(0.005, 1.2 * words * pause)
        made.append(Plan(wanted, chance.random() < 0.8, most, seconds, chance.random() < 0.5))
    return made


async def visit(plan: Plan, port: int) -> None:
    """One client, by hand: it sends its request, reads as long as it stays, and goes."""
    message = {"role": "user", "content": msgspec.json.encode(plan.wanted).decode()}
    body = json.dumps({"model": "m", "messages": [message], "max_tokens": 100, "stream": plan.stream}).encode()
    head = (
        f"POST {MOUNT}/v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nx-user: {plan.wanted.name}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(plan.seconds):
                await read(reader, plan.most)
    finally:
        if plan.abruptly:
            writer.transport.abort()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def read(reader: asyncio.StreamReader, most: int | None) -> None:
    read = 0
    while (most is None or read < most) and (data := await reader.read(256)):
        read += len(data)


async def visit_all(made: Sequence[Plan], port: int) -> None:
    room = asyncio.Semaphore(AT_ONCE)

    async def visit_in_turn(plan: Plan) -> None:
        async with room:
            await visit(plan, port)

    await asyncio.gather(*[visit_in_turn(plan) for plan in made])


def storm(streams: int, seed: int, mode: OnDisconnect, directory: Path) -> Summary:
    """Runs it, stops the gateway with SIGTERM while its last drains still run, and holds its books against the bill."""
    bill = directory / "bill.jsonl"
    data_dir = directory / "gateway"
    with serve(BillingUpstream(bill), lifespan="off") as upstream:
        settings = Settings(data_dir=str(data_dir), upstream=f"{upstream}/v1", on_disconnect=mode)
        with gateway_process(settings) as (process, port):
            asyncio.run(visit_all(plans(streams, seed), port))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM), "the gateway did not end well"
    records, findings = asyncio.run(booked(data_dir))
    return judged(charges(bill), records, findings, open_holds(data_dir), (mode, streams, seed))


async def booked(data_dir: Path) -> tuple[Sequence[UsageRecord], Sequence[str]]:
    async with AIGateway(data_dir=data_dir) as gateway:
        records: list[UsageRecord] = []
        cursor: str | None = None
        while True:
            page = await gateway.usage(limit=1000, cursor=cursor)
            records.extend(page.data)
            cursor = page.next_cursor
            if cursor is None:
                return records, [str(finding) for finding in await gateway.check_ledger()]


def open_holds(data_dir: Path) -> int:
    with sqlite3.connect(data_dir / "ledger.db") as connection:
        return int(connection.execute("SELECT count(*) FROM holds").fetchone()[0])


def judged(
    charged: Mapping[str, Charge], records: Sequence[UsageRecord], findings: Sequence[str], holds: int, run: tuple[OnDisconnect, int, int]
) -> Summary:
    costs: Counter[str] = Counter()
    exact: set[str] = set()
    for record in records:
        costs[record.principal] += record.cost
        if record.outcome == "completed":
            exact.add(record.principal)
    known = {record.principal for record in records if record.outcome != "released"}
    over = sum(costs[name] - charge.cost for name, charge in charged.items() if name not in exact)
    mode, streams, seed = run
    return Summary(
        mode=mode,
        streams=streams,
        seed=seed,
        charged_calls=len(charged),
        charged=sum(charge.cost for charge in charged.values()),
        booked=sum(costs.values()),
        outcomes=Counter(record.outcome for record in records),
        exact=len(exact),
        over_share=round(over / max(1, sum(charge.cost for charge in charged.values())), 4),
        lost=sorted(name for name in charged if name not in known),
        short=sorted(name for name, charge in charged.items() if costs[name] < charge.cost),
        inexact=sorted(name for name in exact if name not in charged or costs[name] != charged[name].cost),
        open_holds=holds,
        findings=findings,
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=["drain", "cancel", "both"], default="both")
    chosen = parser.parse_args(arguments)
    modes: Sequence[OnDisconnect] = ("drain", "cancel") if chosen.mode == "both" else (chosen.mode,)
    summaries = []
    for mode in modes:
        with tempfile.TemporaryDirectory() as directory:
            summaries.append(storm(chosen.streams, chosen.seed, mode, Path(directory)))
    print(msgspec.json.format(msgspec.json.encode(summaries)).decode())
    return 0 if all(summary.holds for summary in summaries) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
