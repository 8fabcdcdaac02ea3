"""A purge holds in every worker, also for what was put before it and not written yet."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from starlette_aigateway import cache_files, cache_purges
from starlette_aigateway.cache import DiskResponseCache, wait
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.clock import FakeClock

from .rows import rows

pytestmark = pytest.mark.anyio


async def test_a_purge_ends_the_writes_that_still_wait_in_another_worker(
    cache: DiskResponseCache, other: DiskResponseCache, directory: Path
) -> None:
    await cache.flush()
    gate = threading.Event()
    held = cache._worker().files.ask(lambda: int(gate.wait(30)))
    try:
        await cache.put(key("a"), b"answer", 60)
        assert await cache.get(key("a")) == b"answer"
        await other.purge()
        assert await cache.get(key("a")) is None
        await cache.put(key("b"), b"answer", 60)
    finally:
        gate.set()
    await wait(held)
    await cache.flush()
    assert [row[0] for row in rows(directory)] == [key("b")]
    assert await cache.get(key("a")) is None


PURGE = """
import sys, anyio
from pathlib import Path
from starlette_aigateway.cache import DiskResponseCache
async def main():
    async with DiskResponseCache(Path(sys.argv[1])) as cache:
        for _ in sys.stdin:
            print(await cache.purge(), flush=True)
anyio.run(main)
"""


async def test_a_purge_ends_what_was_put_by_a_worker_that_had_not_opened_the_files(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, clock=clock) as first, DiskResponseCache(directory, clock=clock) as second:
        await first.put(key("other"), b"answer", 60)
        await first.flush()
        await second.put(key("a"), b"answer", 60)
        await first.purge()
        await second.flush()
        assert [await worker.get(key("a")) for worker in (first, second)] == [None, None]


@pytest.fixture
def purger(directory: Path) -> Iterator[Callable[[], int]]:
    """Another process, which purges and says how many entries it has found."""
    worker = subprocess.Popen([sys.executable, "-c", PURGE, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sent, said = worker.stdin, worker.stdout

    def purge() -> int:
        assert sent is not None
        assert said is not None
        sent.write("purge\n")
        sent.flush()
        return int(said.readline())

    yield purge
    worker.communicate()


async def test_a_purge_in_another_process_holds_from_the_next_get_on(
    cache: DiskResponseCache, purger: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_purges, "STALE", 1e9)
    for _ in range(3):
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        assert await cache.get(key("a")) == b"answer"
        assert purger() == 1
        assert await cache.get(key("a")) is None


async def test_a_purge_that_makes_a_new_counter_ends_when_every_worker_has_looked(
    cache: DiskResponseCache, other: DiskResponseCache, directory: Path
) -> None:
    for number in range(3):
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        await other.flush()
        (directory / "purges").unlink()
        assert await cache.get(key("a")) == b"answer", f"{number}: from memory, or from the file"
        await other.purge()
        assert await cache.get(key("a")) is None


async def test_a_purge_ends_what_others_hold_of_files_that_were_removed(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as holding, DiskResponseCache(directory, clock=clock) as purging:
        await holding.put(key("a"), b"answer", 60)
        await holding.flush()
        await purging.flush()
        shutil.rmtree(directory)
        await purging.purge()
        assert await holding.get(key("a")) is None
        await holding.put(key("a"), b"another", 60)
        await holding.flush()
        assert await holding.get(key("a")) == b"another"
        assert rows(directory)


async def test_a_purge_waits_for_workers_that_still_read_another_counter_also_where_the_new_one_was_seen_before(
    cache: DiskResponseCache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    await cache.flush()
    await cache.purge()
    monkeypatch.setattr(cache_purges, "time", SimpleNamespace(monotonic=lambda: 1000.0, sleep=slept.append))
    (directory / "purges").unlink()
    purges = cache._worker().files._purges
    purges.open()
    purges.begin_generation()
    assert slept == [pytest.approx(cache_purges.STALE)]


async def test_within_a_while_nobody_looks_at_the_file_of_purges(cache: DiskResponseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_purges, "STALE", 1e9)
    await cache.flush()
    await cache.put(key("a"), b"answer", 60)
    looks: list[None] = []
    monkeypatch.setattr(cache._worker().files._purges, "_look", lambda: looks.append(None))
    for _ in range(10):
        assert await cache.get(key("a")) == b"answer"
        assert await cache.get(key("b")) is None
    assert looks == []


async def test_a_purge_of_a_locked_file_forgets_everything_all_the_same(
    directory: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "WRITE_TIMEOUT", 0.05)
    async with DiskResponseCache(directory, clock=clock) as cache:
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        lock = sqlite3.connect(directory / "cache.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        try:
            await cache.purge()
            assert await cache.get(key("a")) is None
        finally:
            lock.close()
        await cache.put(key("b"), b"answer", 60)
        await cache.flush()
        assert [row[0] for row in rows(directory)] == [key("b")]
