"""The ledger over several real processes: the cap holds, a crash leaves nothing behind that does not expire."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.testing.ledger_kit import LEASE, NOON, assert_clean, completed, hold_request, money
from starlette_aigateway.types import Caps

pytestmark = pytest.mark.anyio

CAPS = Caps(total=5_000)


async def reserve_many(path: Path, worker: str) -> None:
    """150 calls at once for 100 each below a cap that lets 50 in all processes together through; prints how many it got."""
    granted = 0

    async def call(ledger: SQLiteLedger, number: int) -> None:
        nonlocal granted
        try:
            await ledger.reserve(hold_request(f"{worker}_{number}", 100, caps=CAPS), now=NOON)
        except Exception as error:  # noqa: BLE001  # printed, for the test to look at
            print(type(error).__name__, flush=True)
        else:
            granted += 1

    async with SQLiteLedger(path) as ledger:
        await ledger.ping()
        print("ready", flush=True)
        sys.stdin.readline()
        async with anyio.create_task_group() as group:
            for number in range(150):
                group.start_soon(call, ledger, number)
    print(f"granted {granted}", flush=True)


async def write_without_end(path: Path, worker: str) -> None:
    """Reserves and settles until it is killed; names on stdout each hold that was granted and each that was settled."""
    async with SQLiteLedger(path) as ledger:

        async def caller(task: int) -> None:
            number = 0
            while True:
                number += 1
                hold = await ledger.reserve(hold_request(f"{worker}_{task}_{number}", 100), now=NOON)
                print(f"granted {hold.id}", flush=True)
                if number % 3:
                    await settle_or_release(ledger, hold.id, number)
                    print(f"settled {hold.id}", flush=True)

        async with anyio.create_task_group() as group:
            for task in range(8):
                group.start_soon(caller, task)


async def settle_or_release(ledger: SQLiteLedger, hold_id: str, number: int) -> None:
    if number % 3 == 1:
        await ledger.settle(hold_id, completed(60), now=NOON)
    else:
        await ledger.release(hold_id, now=NOON)


def start(job: str, path: Path, worker: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.test_ledger_processes", job, str(path), worker],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(processes: Sequence[subprocess.Popen[str]], text: str) -> list[str]:
    """Says `text` to each process and returns all that they print until their end."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.flush()
    printed = []
    for process in processes:
        out, _ = process.communicate(timeout=30)
        printed += out.split("\n")
        assert process.returncode == 0
    return [text for text in printed if text]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_three_processes_never_pass_the_cap_together(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    workers = [start("reserve_many", path, name) for name in "abc"]
    for worker in workers:
        assert line(worker) == "ready"
    printed = tell(workers, "go\n")
    granted = sum(int(text.split()[1]) for text in printed if text.startswith("granted"))
    assert granted == 50
    assert {text for text in printed if not text.startswith("granted")} == {"SpendCapHeld"}
    async with SQLiteLedger(path) as ledger:
        assert await money(ledger) == (0, 5_000)
        await assert_clean(ledger)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_kill_in_the_middle_of_writing_loses_nothing_that_was_granted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    workers = [start("write_without_end", path, name) for name in "ab"]
    seen: list[str] = [line(worker) for worker in workers for _ in range(60)]
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    for worker in workers:
        out, _ = worker.communicate(timeout=30)
        seen += out.splitlines()
    granted = {text.split()[1] for text in seen if text.startswith("granted ")}
    settled = {text.split()[1] for text in seen if text.startswith("settled ")}
    async with SQLiteLedger(path) as ledger:
        await assert_clean(ledger)
        expired = {record.id for record in await ledger.expire(now=NOON + LEASE)}
        assert granted - settled <= expired | await resolved_ids(path)
        assert not settled & expired
        spent, held = await money(ledger)
        assert held == 0
        assert spent >= 100 * len(granted & expired)
        await assert_clean(ledger)


async def resolved_ids(path: Path) -> set[str]:
    """Holds that were resolved by a transaction whose process did not live to say so."""
    connection = sqlite3.connect(path)
    ids = {name for (name,) in connection.execute("SELECT id FROM usage WHERE outcome <> 'expired'")}
    connection.close()
    return ids


if __name__ == "__main__":
    jobs = {"reserve_many": reserve_many, "write_without_end": write_without_end}
    anyio.run(jobs[sys.argv[1]], Path(sys.argv[2]), sys.argv[3])
