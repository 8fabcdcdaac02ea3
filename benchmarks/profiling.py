"""Where the time of one call goes: microseconds of CPU by stage, for an answer from the cache, a miss, and a stream of 20 chunks.

    python benchmarks/profiling.py                  a minute; under Python 3.11, see below
    python benchmarks/profiling.py --functions 40   the functions, too

Serves `app.py` (everything on, a durable ledger) by uvicorn in this process, under load from other processes. Each case is loaded twice:
once as it is, for the CPU of each thread, and once under cProfile, for the shares of the event loop's thread. From the profile, what
cProfile itself costs is taken off, and the rest is scaled to the CPU without it. So the sums are measured and the shares are good to some
percent. From Python 3.12 on, cProfile mixes the threads of a process: the shares are then those of all threads together.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import uvicorn
from comparison import cases, cores, generators
from comparison.load import Plan
from comparison.loops import run
from comparison.report import columns
from comparison.servers import Server, ended, free_port

from starlette_aigateway.policy.keys import mint

CASES = ("hit", "miss", "stream")
PACKAGE = "starlette_aigateway"
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("server: uvicorn", ("uvicorn/", "httptools/")),
    ("Starlette around the gateway", ("starlette/", "app.py")),
    (
        "who calls: key, login, origin",
        (
            *("@http/door", "@http/credentials", "@http/origins", "@http/questions", "@policy/keys", "@standing", "@administration"),
            *("@stores/sqlite/keys", "@stores/sqlite/tenants", "@stores/sqlite/config", "@shared_c"),
        ),
    ),
    (
        "stream: read, meter, pass on",
        ("@streams", "@channel", "@pouring", "@replay", "@http/sse", "@http/pace", "@wires/sse", "@wires/openai_chat_stream"),
    ),
    ("HTTP of the gateway", ("@http/", "@gateway", "@middleware")),
    ("wire: decode, check, encode", ("@wires/",)),
    ("windows", ("@limiter", "@policy/windows", "@stores/windows/")),
    ("cache", ("@cache", "@answers", "@repeats", "@policy/caching", "@flights", "diskcache/")),
    ("ledger", ("@holds", "@outbox", "@attempt", "@policy/budgets", "@stores/sqlite/ledger", "@stores/sqlite/witness", "@accounts")),
    ("group commit: hand over, wake", ("@stores/", "@wakeup")),
    ("price, estimate, metering", ("@policy/", "@prices", "@money")),
    ("provider: adapter and HTTP client", ("@providers/", "aiohttp/", "yarl/", "multidict/")),
    ("jobs, deadlines, observers", ("@background", "@drains", "@lifecycle", "@deadlines", "@weight", "@observing", "@events", "@entropy")),
    ("pipeline and admission", ("@",)),
    ("anyio, asyncio, standard library", ("",)),
)
"""What a stage is made of, as the beginnings of files: `@` is this package, the others are installed ones. The first that fits holds."""

IDLE = ("select.epoll", "select.kqueue", "_overlapped")
Function: TypeAlias = tuple[str, int, str]
Stats: TypeAlias = Mapping[Function, tuple[int, int, float, float, Mapping[Function, tuple[int, int, float, float]]]]


class Overhead(NamedTuple):
    """Seconds that cProfile adds for one call: to the function that is called, and to the one that calls."""

    called: float
    calling: float


class Profile(NamedTuple):
    """Of one case, per request: CPU of each thread in microseconds, and the shares of stages and functions in that of the main one."""

    threads: Mapping[str, float]
    stages: Mapping[str, float]
    functions: Mapping[str, float]
    calls: float
    requests_per_second: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, twice for each case (default: 4)")
    parser.add_argument("--connections", type=int, default=64, help="calls in the air (default: 64)")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="list the N dearest functions of each case")
    parser.add_argument("--no-wrk", action="store_true", help="make the load with a loop in Python")
    return parser.parse_args()


class Bench:
    """The app, served in this process, and what loads it."""

    def __init__(self, options: argparse.Namespace, key: str) -> None:
        self._options = options
        self._key = key
        self._port = free_port()
        self._cores = cores.choose()
        self._generator = generators.choose(not options.no_wrk)
        self._overhead = overhead()

    async def run(self, app: Any) -> dict[str, Profile]:
        server = uvicorn.Server(uvicorn.Config(app, port=self._port, access_log=False, log_level="warning"))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
            if serving.done():
                raise SystemExit("the app did not start")
        profiles = {case: await self._profile(case) for case in CASES}
        server.should_exit = True
        await serving
        return profiles

    async def _profile(self, case: str) -> Profile:
        await self._load(case, 1.0)
        before = thread_cpu()
        requests = await self._load(case, self._options.seconds)
        used = {name: (seconds - before.get(name, 0.0)) / requests * 1e6 for name, seconds in thread_cpu().items()}
        profiler = cProfile.Profile()
        profiler.enable()
        profiled = await self._load(case, self._options.seconds)
        profiler.disable()
        stats: Stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # what it is made for, and typeshed does not tell
        owns = own_seconds(stats, self._overhead)
        scale = used["MainThread"] / sum(owns.values())
        stages: defaultdict[str, float] = defaultdict(float)
        functions: defaultdict[str, float] = defaultdict(float)
        for (file, line, name), seconds in owns.items():
            stages[stage_of(file)] += seconds * scale
            functions[f"{short(file)}:{line} {name}"] += seconds * scale
        calls = sum(count for _, count, *_ in stats.values()) / profiled
        return Profile(used, stages, functions, calls, requests / self._options.seconds)

    async def _load(self, case: str, seconds: float) -> int:
        plan = Plan(
            ports=[self._port],
            path=f"/ai{cases.CALL}",
            headers={"authorization": f"Bearer {self._key}"},
            body=cases.body(case == "stream"),
            unique=case != "hit",
            connections=self._options.connections,
            seconds=seconds,
        )
        load = await asyncio.to_thread(self._generator.run, plan, self._cores.load)
        if load.refused or load.broken or not load.requests:
            raise SystemExit(f"{case}: {load.refused} of {load.requests} calls were refused, {load.broken} broke off")
        return load.requests


def overhead() -> Overhead:
    """Measured on calls of nothing."""

    def nothing() -> None: ...

    def calling(count: int) -> None:
        for _ in range(count):
            nothing()

    count = 200_000
    began = time.perf_counter()
    calling(count)
    plain = (time.perf_counter() - began) / count
    profiler = cProfile.Profile()
    profiler.enable()
    calling(count)
    profiler.disable()
    stats: Stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # as above
    seconds = {name: own / count for (_, _, name), (_, _, own, _, _) in stats.items()}
    return Overhead(seconds["nothing"], max(0.0, seconds["calling"] - plain))


def own_seconds(stats: Stats, cost: Overhead) -> dict[Function, float]:
    """The time that each function took itself, less the profiler's. That of a function in C is its caller's, who has a file."""
    owns: dict[Function, float] = {}
    for function, (_, _, own, _, _) in stats.items():
        if function[0] != "~":
            owns[function] = owns.get(function, 0.0) + own
    for function, (_, count, _, _, callers) in stats.items():
        if function[0] != "~":
            owns[function] -= count * cost.called
        for caller, (calls, _, own, _) in callers.items():
            if caller in owns:
                in_c = own - calls * cost.called if function[0] == "~" and not function[2].startswith(IDLE) else 0.0
                owns[caller] += in_c - calls * cost.calling
    return {function: seconds for function, seconds in owns.items() if seconds > 0}


def short(file: str) -> str:
    """A file as the stages name it: `@pipeline.py`, `uvicorn/server.py`."""
    for mark, sign in ((f"/{PACKAGE}/", "@"), ("/site-packages/", ""), ("/benchmarks/", "")):
        if mark in file:
            return sign + file.rpartition(mark)[2]
    return file


def stage_of(file: str) -> str:
    name = short(file)
    return next(stage for stage, beginnings in STAGES if name.startswith(beginnings))


def thread_cpu() -> dict[str, float]:
    """Seconds of CPU of each thread that lives, by its name; where the system does not tell, those of all as the main one's."""
    clock: Callable[[int], int] | None = getattr(time, "pthread_getcpuclockid", None)
    if clock is None:
        return {"MainThread": time.process_time()}
    found: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is not None:
            found[thread.name.rstrip("-0123456789_")] += time.clock_gettime(clock(thread.ident))
    return found


def table(profiles: Mapping[str, Profile]) -> str:
    shown = profiles.values()
    writers = dict.fromkeys(name for profile in shown for name in profile.threads if name.startswith("aigateway"))
    rows = [
        *((name, [profile.stages.get(name, 0.0) for profile in shown]) for name, _ in STAGES),
        ("= thread of the event loop", [profile.threads["MainThread"] for profile in shown]),
        *((f"thread {name}", [profile.threads.get(name, 0.0) for profile in shown]) for name in writers),
        ("calls of functions", [profile.calls for profile in shown]),
        ("requests/s in this run", [profile.requests_per_second for profile in shown]),
    ]
    return columns([("us of CPU for one call", *profiles), *((name, *(f"{value:.0f}" for value in values)) for name, values in rows)])


@contextmanager
def upstream(work: Path) -> Iterator[int]:
    server = Server("upstream", work / "upstream.log", "ready")
    with ended([server]):
        server.start(lambda port: [sys.executable, "-m", "comparison.upstream", "--port", str(port)], {}, cores.choose().load)
        server.wait_until_ready()
        yield server.ports[0]


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="aigateway-profile-") as work, upstream(Path(work)) as port:
        os.environ.update(WORK=work, UPSTREAM=f"http://127.0.0.1:{port}/v1")
        import app  # reads both

        with cores.on(cores.choose().server):
            profiles = run(Bench(options, mint(app.random)).run(app.app))
    print(table(profiles))
    for case in CASES if options.functions else ():
        dearest = sorted(profiles[case].functions.items(), key=lambda item: -item[1])[: options.functions]
        print(f"\n{case}")
        print("\n".join(f"{cost:7.1f}  {name}" for name, cost in dearest))


if __name__ == "__main__":
    main()
