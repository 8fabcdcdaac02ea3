"""What several workers on one `data_dir` get out of the cores of this machine, over what one gets out of one: calls a second.

    python benchmarks/workers.py
    python benchmarks/workers.py --cases miss --workers 1,2 --rounds 3 --seconds 1

Without servers, sockets, load and upstream, which would take the cores from the workers (`scripts/bench --workers` has them all): each
worker is a process that makes its own calls, and the n-th stays on the n-th core. Everything is on, and shared: one stored key with
windows and caps, one durable ledger, one cache. The numbers of workers take turns in each round; medians, and the least and the most.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ample_key
from comparison import loops
from comparison.cases import CALL, body
from comparison.cores import on
from comparison.in_process import AtHand, Client
from comparison.load import NUMBER
from comparison.options import cases_of, number

from starlette_aigateway import AIGateway, Price
from starlette_aigateway.providers import OpenAIProvider

CASES = ("hit", "miss")
WARM_UP = 32
BODY = body(stream=False)


class Work(NamedTuple):
    """Of one worker: `callers` make one call after the other for `seconds`."""

    directory: Path
    raw_key: str
    case: str
    callers: int
    seconds: float


class Outcome(NamedTuple):
    """What one worker did in `seconds`, which its last calls made a little longer; CPU in seconds, of all threads."""

    calls: int
    seconds: float
    cpu: float


class Figures(NamedTuple):
    """Of all workers together: calls a second, and CPU in microseconds a call."""

    rate: float
    cpu: float


def gateway(directory: Path) -> AIGateway:
    provider = OpenAIProvider(api_key="upstream", base_url="http://upstream.invalid/v1", transport=AtHand())
    return AIGateway(providers=[provider], data_dir=directory, prices={"gpt-4o-mini": Price("0.15", "0.60")})


async def made_key(directory: Path) -> str:
    own = gateway(directory)
    async with own.lifespan():
        return await ample_key.make(own, "workers")


async def carry_out(work: Work, start: Barrier) -> Outcome:
    own = gateway(work.directory)
    serial = count(os.getpid() * 10**9)

    async def call() -> None:
        unique = next(serial) if work.case == "miss" else 0
        await client.call(CALL, BODY.replace(NUMBER, f"{unique:016d}").encode())

    async def calls(deadline: float) -> None:
        while time.monotonic() < deadline:
            await call()

    async with own.lifespan():
        client = Client(own, work.raw_key)
        for _ in range(WARM_UP):
            await call()
        client.answers.clear()
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)  # as docs/performance.md tells hosts
        await asyncio.to_thread(start.wait)
        cpu, began = time.process_time(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(work.callers):
                group.create_task(calls(began + work.seconds))
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    if client.answers.keys() != {(200, work.case.encode())}:
        raise SystemExit(f"calls went wrong: {dict(client.answers)}")
    return Outcome(client.answers.total(), seconds, cpu)


def worker(work: Work, start: Barrier, outcomes: multiprocessing.SimpleQueue[Outcome | None]) -> None:
    outcome: Outcome | None = None
    try:
        outcome = loops.run(carry_out(work, start))
    finally:
        if outcome is None:
            start.abort()
        outcomes.put(outcome)


def measure(case: str, workers: int, callers: int, seconds: float) -> Figures:
    context = multiprocessing.get_context("spawn")
    start, outcomes = context.Barrier(workers), context.SimpleQueue()
    usable = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    with tempfile.TemporaryDirectory(prefix="aigateway-workers-") as name:
        directory = Path(name)
        work = Work(directory, asyncio.run(made_key(directory)), case, callers, seconds)
        processes = [context.Process(target=worker, args=(work, start, outcomes)) for _ in range(workers)]
        for place, process in enumerate(processes):
            with on({usable[place % len(usable)]} if usable else None):
                process.start()
        brought = [outcomes.get() for _ in processes]
        for process in processes:
            process.join()
    done = [outcome for outcome in brought if outcome is not None]
    if len(done) < workers:
        raise SystemExit(1)
    rate = sum(outcome.calls / outcome.seconds for outcome in done)
    return Figures(rate, sum(outcome.cpu for outcome in done) / sum(outcome.calls for outcome in done) * 1e6)


def rounds(case: str, counts: Sequence[int], options: argparse.Namespace) -> dict[int, list[Figures]]:
    found: dict[int, list[Figures]] = {workers: [] for workers in counts}
    for round_number in range(1, options.rounds + 1):
        for workers in counts:
            print(f"{case}: round {round_number} of {options.rounds}, {workers} workers", file=sys.stderr)
            found[workers].append(measure(case, workers, max(1, options.callers // (workers if options.shared else 1)), options.seconds))
    return found


def report(case: str, found: dict[int, list[Figures]]) -> None:
    first, *_ = found.values()
    for workers, figures in found.items():
        ratios = [one.rate / base.rate for one, base in zip(figures, first, strict=True)]
        rate, cpu = (statistics.median(values) for values in zip(*figures, strict=True))
        ratio = f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{case:5} {workers:7d} {rate:9,.0f} {cpu:12.0f}   {ratio}")


def numbers(text: str) -> list[int]:
    return [number(int, 1, 64)(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=cases_of(CASES), default=[*CASES], help="of hit,miss (default: both)")
    parser.add_argument("--workers", type=numbers, default=[1, 2, 4], help="ratios are to the first of them (default: 1,2,4)")
    parser.add_argument("--callers", type=number(int, 1, 10_000), default=64, help="that call at a time, in each worker (default: 64)")
    parser.add_argument("--shared", action="store_true", help="the callers are divided between the workers")
    parser.add_argument("--rounds", type=number(int, 1, 100), default=5)
    parser.add_argument("--seconds", type=number(float, 0.1, 600), default=2.0, help="of calls, each time")
    options = parser.parse_args()
    print("case  workers   calls/s  CPU us/call   ratio (from the least to the most of a round)")
    for case in options.cases:
        report(case, rounds(case, options.workers, options))


if __name__ == "__main__":
    main()
