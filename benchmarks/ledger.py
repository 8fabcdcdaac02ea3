"""Durable hold+settle pairs a second over several processes, and the longest wait for one verb.

    python benchmarks/ledger.py --processes 4 --tasks 32 --seconds 5

Every process runs its own event loop and ledger over the same file; every grant and settlement is synced to the disk
(`--durability FULL`). All processes share one capped scope, as one busy tenant would. Bounded: at most `--seconds`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import anyio

from starlette_aigateway.accounts import GATEWAY_SCOPE, HoldRequest, ScopeClaim, Settlement, principal_scope, tenant_scope
from starlette_aigateway.stores.sqlite.connection import Durability
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.types import Caps, Price, Usage


class Job(NamedTuple):
    path: Path
    durability: Durability
    tasks: int
    seconds: float


class Outcome(NamedTuple):
    """Of one process; waits and CPU in seconds."""

    pairs: int
    waits: list[float]
    cpu: float


PRICE = Price("0.15", "0.60")
AMPLE = Caps(10**17, 10**17, 10**17)


def request(name: str, principal: str, now: float) -> HoldRequest:
    return HoldRequest(
        id=f"use_{name}",
        request_id=f"req_{name}",
        attempt=1,
        scopes=(ScopeClaim(principal_scope(principal), AMPLE, 1000), ScopeClaim(tenant_scope("acme")), ScopeClaim(GATEWAY_SCOPE)),
        principal=principal,
        tenant="acme",
        key_id=principal,
        provider="openai",
        model="gpt-4o-mini",
        price=PRICE,
        minimum=100_000,
        wanted=200_000,
        admission=150_000,
        expires_at=now + 60,
    )


async def work(job: Job, number: int, start: Barrier) -> Outcome:
    path, durability, tasks, seconds = job
    ledger = SQLiteLedger(path, durability=durability)
    waits: list[float] = []
    pairs = 0

    async def caller(task: int, deadline: float) -> None:
        nonlocal pairs
        turn = 0
        while (began := time.perf_counter()) < deadline:
            turn += 1
            now = time.time()
            hold = await ledger.reserve(request(f"{number}_{task}_{turn}", f"key_{task % 8}", now), now=now)
            held = time.perf_counter()
            end = Settlement(outcome="completed", amount=105_000, usage=Usage(input_tokens=300, output_tokens=100), latency_ms=800)
            await ledger.settle(hold.id, end, now=time.time())
            waits.extend((held - began, time.perf_counter() - held))
            pairs += 1

    async with ledger:
        await ledger.ping()
        start.wait()
        cpu = time.process_time()
        deadline = time.perf_counter() + seconds
        async with anyio.create_task_group() as group:
            for task in range(tasks):
                group.start_soon(caller, task, deadline)
        cpu = time.process_time() - cpu
    return Outcome(pairs, waits, cpu)


def process(job: Job, number: int, start: Barrier, results: multiprocessing.SimpleQueue[Outcome]) -> None:
    results.put(anyio.run(work, job, number, start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=32, help="concurrent callers in each process")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--durability", choices=["FULL", "NORMAL", "OFF"], default="FULL")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        start = context.Barrier(options.processes)
        results: multiprocessing.SimpleQueue[Outcome] = context.SimpleQueue()
        path = Path(directory) / "ledger.db"
        job = Job(path, options.durability, options.tasks, options.seconds)
        workers = [context.Process(target=process, args=(job, number, start, results)) for number in range(options.processes)]
        for worker in workers:
            worker.start()
        outcomes = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
        findings = anyio.run(SQLiteLedger(path).check)
    pairs = sum(outcome.pairs for outcome in outcomes)
    waits = sorted(wait for outcome in outcomes for wait in outcome.waits)
    cpu = sum(outcome.cpu for outcome in outcomes)
    print(f"{options.processes} processes x {options.tasks} callers, {options.durability}, {options.seconds:g} s")
    print(f"pairs/s      {pairs / options.seconds:10.0f}")
    print(f"wait p50     {waits[len(waits) // 2] * 1e3:10.2f} ms")
    print(f"wait p99     {waits[int(len(waits) * 0.99)] * 1e3:10.2f} ms")
    print(f"wait longest {waits[-1] * 1e3:10.2f} ms")
    print(f"CPU          {cpu / max(pairs, 1) * 1e6:10.1f} us per pair, all threads, callers included")
    print(f"check        {'clean' if not findings else findings[:3]}")


if __name__ == "__main__":
    main()
