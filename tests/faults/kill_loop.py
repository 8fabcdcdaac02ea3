"""Worker processes under load, killed at random moments and started again; then the provider's bill is held against our books.

    python -m tests.faults.kill_loop --kills 300 --seed 1

Exits with 1 where a cap was passed, a billed call is not booked in full, or the audit finds anything.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import anyio

from starlette_aigateway.accounts import GATEWAY_SCOPE
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.types import Caps

from .kill_load import LOST, Load
from .kill_verdict import Verdict, verdict
from .kill_worker import MOUNT, gateway_over

ROOT = Path(__file__).parent.parent.parent
HOUSEHOLDS = 16
LONGER_THAN_ANY_LEASE = 3600.0
CAP_STEP = 100
"""US dollars by which the gateway's own cap is raised, for workers to come, each time that it is reached."""


class Workers:
    """Processes, each behind a listening socket that outlives it. `cap` is the gateway's own, for those that are started next."""

    def __init__(self, count: int, data_dir: Path, bill: Path) -> None:
        self.cap = CAP_STEP
        self._arguments = (str(data_dir), str(bill))
        self._sockets = [socket.create_server(("127.0.0.1", 0), backlog=512) for _ in range(count)]
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in self._sockets]

    def start(self) -> None:
        self._processes = [self._spawn(listener) for listener in self._sockets]

    def kill(self, number: int) -> None:
        process = self._processes[number]
        assert process.poll() is None, f"a worker ended by itself, with {process.returncode}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart(self, number: int) -> None:
        self._processes[number] = self._spawn(self._sockets[number])

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for listener in self._sockets:
            listener.close()

    def _spawn(self, listener: socket.socket) -> subprocess.Popen[bytes]:
        descriptor = listener.fileno()
        command = [sys.executable, "-m", "tests.faults.kill_worker", *self._arguments, str(self.cap), str(descriptor)]
        return subprocess.Popen(command, cwd=ROOT, pass_fds=[descriptor], start_new_session=True)


@contextmanager
def workers_over(count: int, data_dir: Path, bill: Path) -> Iterator[Workers]:
    workers = Workers(count, data_dir, bill)
    try:
        workers.start()
        yield workers
    finally:
        workers.close()


async def serves(url: str) -> None:
    """Returns once a worker answers there: connections wait for it in the socket's backlog."""
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}{MOUNT}/readyz") as answer:
                    if answer.status == 200:
                        return
            except LOST:
                await anyio.sleep(0.05)


async def kill_again_and_again(workers: Workers, load: Load, kills: int, chance: random.Random, show: bool) -> None:
    """Each time one that serves, after a moment of load; the last time all at once."""
    for number in range(kills):
        victim = chance.randrange(len(workers.urls))
        with anyio.fail_after(60):
            await serves(workers.urls[victim])
        await anyio.sleep(chance.uniform(0, 0.5))
        workers.kill(victim)
        if load.gateway_is_full.is_set():
            workers.cap += CAP_STEP
            load.gateway_is_full = anyio.Event()
        workers.restart(victim)
        if show and number % 10 == 9:
            print(f"{number + 1} of {kills} kills; {dict(load.seen.statuses)}", file=sys.stderr, flush=True)


async def kill_loop(directory: Path, *, kills: int, seed: int, count: int = 4, clients: int = 24, show: bool = False) -> Verdict:
    data_dir, bill = directory / "data", directory / "bill.jsonl"
    bill.touch()
    begun = time.monotonic()
    with workers_over(count, data_dir, bill) as workers:
        async with gateway_over(data_dir, bill, str(workers.cap)) as admin:
            load = Load(admin, workers.urls, seed)
            await load.found(HOUSEHOLDS)
            over = anyio.Event()
            async with anyio.create_task_group() as group:
                for _ in range(clients):
                    group.start_soon(load.call_until, over.is_set)
                await kill_again_and_again(workers, load, kills, random.Random(seed), show)
                over.set()
                workers.close()
            caps = load.caps | {GATEWAY_SCOPE: Caps(month=workers.cap * 10**9)}
            now = time.time()
            async with SQLiteLedger(data_dir / "ledger.db") as ledger:
                await ledger.expire(now=now + LONGER_THAN_ANY_LEASE)
            findings = [f"{found.invariant} {found.subject}: {found.message}" for found in await admin.check_ledger()]
    seconds = time.monotonic() - begun
    return await verdict(data_dir / "ledger.db", bill, load.seen, caps, kills=kills + count, seconds=seconds, now=now, findings=findings)


def table(found: Verdict) -> str:
    lines = [
        ("kills", f"{found.kills} in {found.seconds} s"),
        ("requests", f"{found.asked}: {found.statuses}, {found.connections_lost} lost their server, {found.streams_left} left a stream"),
        ("calls billed by the provider", f"{found.billed_calls}, {found.billed_usd} USD"),
        ("calls booked by us", f"{found.booked_calls}, {found.booked_usd} USD: {found.outcomes}"),
        ("booked exactly as billed", f"{found.exact_calls}"),
        ("over-charged by kills", f"{found.over_charged.get('expired', 0)} USD, {found.over_charged_by_kills:.2%} of the bill"),
        ("over-charged by silence", f"{found.over_charged_by_silence:.2%} of the bill, where the provider told no usage"),
        ("caps, reached, over cap", f"{found.caps}, {found.caps_reached}, {found.over_cap}"),
        ("lost", f"{found.lost} calls, {found.lost_usd} USD"),
        ("findings of the audit", "\n".join(found.findings[:20]) or "none"),
        ("wrong", "; ".join(found.wrong) or "nothing"),
    ]
    return "\n".join(f"{name:30} {value}" for name, value in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="the whole verdict on one line")
    given = parser.parse_args()

    async def run() -> Verdict:
        with tempfile.TemporaryDirectory(prefix="aigateway-kills-") as directory:
            return await kill_loop(Path(directory), kills=given.kills, seed=given.seed, count=given.workers, show=True)

    found = anyio.run(run)
    print(found.as_json() if given.json else table(found))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
