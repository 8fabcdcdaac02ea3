"""How much an admission costs: `python benchmarks/windows.py [directory]`, about ten seconds.

One process, two windows a call (requests and tokens of one of 200 principals), real files. CPU is the process's own (all threads),
so it holds what the event loop, the writer thread and SQLite take together.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import anyio

from starlette_aigateway.limiter import Limiter
from starlette_aigateway.policy.windows import WindowClaim
from starlette_aigateway.stores.windows.storage import FileWindowStorage

PRINCIPALS = 200
CALLS = {1: 2_000, 8: 8_000, 30: 20_000, 100: 20_000}


async def measure(limiter: Limiter, tasks: int, calls: int) -> tuple[float, float, list[float]]:
    """Wall seconds, CPU seconds and the latency of each call."""
    latencies: list[float] = []
    claims = [
        [WindowClaim(f"principal:key_{number}", "requests", 10**6), WindowClaim(f"principal:key_{number}", "tokens", 10**9, 1000)]
        for number in range(PRINCIPALS)
    ]

    async def work(first: int) -> None:
        for number in range(calls // tasks):
            begin = time.perf_counter()
            await limiter.admit(claims[(first * 7 + number) % PRINCIPALS])
            latencies.append(time.perf_counter() - begin)

    wall, cpu = time.perf_counter(), time.process_time()
    async with anyio.create_task_group() as group:
        for task in range(tasks):
            group.start_soon(work, task)
    return time.perf_counter() - wall, time.process_time() - cpu, sorted(latencies)


async def main(directory: Path) -> None:
    async with FileWindowStorage(path=directory / "windows.log") as storage:
        limiter = Limiter(storage, clock=time.time)
        await measure(limiter, 30, 1_500)
        print("tasks  calls/s  CPU us/call  p50 us  p99 us  max us")
        for tasks, calls in CALLS.items():
            wall, cpu, latencies = await measure(limiter, tasks, calls)
            count = len(latencies)
            middle, high, top = (latencies[int(count * share)] * 1e6 for share in (0.5, 0.99, 0.99999))
            print(f"{tasks:5d}  {count / wall:7.0f}  {cpu / count * 1e6:11.1f}  {middle:6.0f}  {high:6.0f}  {top:6.0f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as chosen:
        anyio.run(main, Path(chosen) / "data")
