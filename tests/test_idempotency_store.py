"""Claims and kept outcomes in SQLite: the contract, and what this store promises of its file, its processes and its faults."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from starlette_aigateway.errors import InvalidArgument, StorageUnavailable
from starlette_aigateway.protocols import Claim
from starlette_aigateway.stores.sqlite.idempotency import PRUNED_AT_ONCE, UNCLAIMED_SECONDS, SQLiteIdempotencyStore
from starlette_aigateway.testing.idempotency import CLAIMED, DAY, LEASE, NOW, RUNNING, IdempotencyContract, claim

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteIdempotencyStore]:
    async with SQLiteIdempotencyStore(tmp_path / "answers.db") as store:
        yield store


class TestSQLiteIdempotencyStore(IdempotencyContract):
    @pytest.fixture
    async def elsewhere(self, tmp_path: Path) -> AsyncIterator[SQLiteIdempotencyStore]:
        async with SQLiteIdempotencyStore(tmp_path / "answers.db") as store:
            yield store


def rows(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])
    finally:
        connection.close()


async def test_it_opens_nothing_before_it_is_used_and_its_file_is_this_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    async with SQLiteIdempotencyStore(path) as store:
        assert not path.exists()
        await claim(store, "a")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_kept_outcomes_survive_a_restart_and_commits_are_synced(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    async with SQLiteIdempotencyStore(path) as store:
        await claim(store, "a")
        await store.keep("k", b"answer", holder="a", until=DAY)
        connection = store._connect()
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        connection.close()
    async with SQLiteIdempotencyStore(path) as store:
        assert await claim(store, "b") == Claim("kept", b"answer")


async def test_what_is_over_is_deleted_in_passing_and_what_may_be_needed_stays(store: SQLiteIdempotencyStore, tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    kept = 3 * PRUNED_AT_ONCE
    for number in range(kept):
        await claim(store, "a", f"kept {number}")
        await store.keep(f"kept {number}", b"answer", holder="a", until=DAY)
    await claim(store, "a", "slow")
    assert rows(path) == kept + 1
    await claim(store, "b", "new", now=DAY - 1)
    assert rows(path) == kept + 2
    for number in range(3):
        await claim(store, "b", f"later {number}", now=DAY, lease=10 * 86_400)
    assert rows(path) == len(["slow", "new", "later 0", "later 1", "later 2"])
    assert await store.keep("slow", b"at last", holder="a", until=2 * DAY)
    await claim(store, "b", "much later", now=DAY + 59 + UNCLAIMED_SECONDS, lease=10 * 86_400)
    assert await store.renew("later 0", holder="b", until=2 * DAY)
    assert not await store.renew("new", holder="b", until=2 * DAY)


async def test_a_moment_that_is_none_is_refused(store: SQLiteIdempotencyStore) -> None:
    for wrong in (float("nan"), float("inf"), NOW * 1000):
        with pytest.raises(InvalidArgument):
            await claim(store, "a", now=wrong)
        with pytest.raises(InvalidArgument):
            await store.renew("k", holder="a", until=wrong)
        with pytest.raises(InvalidArgument):
            await store.keep("k", b"", holder="a", until=wrong)


async def test_a_file_that_cannot_be_used_is_storage_unavailable_and_works_once_it_can(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    path.mkdir()
    async with SQLiteIdempotencyStore(path, timeout=0.05) as store:
        with pytest.raises(StorageUnavailable):
            await claim(store, "a")
        path.rmdir()
        assert await claim(store, "a") == CLAIMED


# -- other processes ---------------------------------------------------------------------------------------------------


async def contend(path: Path, name: str) -> None:
    """Claims key after key as told on stdin, and prints what came of it."""
    async with SQLiteIdempotencyStore(path) as store:
        await claim(store, name, f"own key of {name}")
        print("ready", flush=True)
        for line in sys.stdin:
            count = int(line)
            states = [""] * count

            async def one(number: int, states: list[str] = states) -> None:
                states[number] = (await claim(store, name, f"key {number}")).state

            async with anyio.create_task_group() as group:
                for number in range(count):
                    group.start_soon(one, number)
            print(" ".join(states), flush=True)


class Worker:
    def __init__(self, path: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_idempotency_store", str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert self.line() == "ready"

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, how: int | None = None) -> None:
        if how is not None:
            os.kill(self.process.pid, how)
        self.process.communicate(timeout=30)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_of_processes_that_race_for_the_same_keys_exactly_one_wins_each(tmp_path: Path) -> None:
    workers = [Worker(tmp_path / "answers.db", name) for name in "abc"]
    for worker in workers:
        worker.say("200")
    answers = [worker.line().split() for worker in workers]
    for worker in workers:
        worker.end()
    for states in zip(*answers, strict=True):
        assert sorted(states) == ["claimed", "running", "running"]
    assert len(answers[0]) == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_claim_of_a_killed_process_is_free_when_its_lease_ends(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    worker = Worker(path, "a")
    worker.say("1")
    assert worker.line() == "claimed"
    worker.end(signal.SIGKILL)
    async with SQLiteIdempotencyStore(path) as store:
        assert await claim(store, "b", "key 0", now=LEASE - 1) == RUNNING
        assert await claim(store, "b", "key 0", now=LEASE) == CLAIMED


if __name__ == "__main__":
    anyio.run(contend, Path(sys.argv[1]), sys.argv[2])
