"""Files that are damaged, gone, locked or cannot be made: calls go on, and what can be made anew is."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest

from starlette_aigateway import cache_files, cache_purges
from starlette_aigateway.cache import DiskResponseCache, wait
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.clock import FakeClock

from .rows import rows

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("contents", [b"this is not a database" * 1000, b"SQLite format 3\x00" + b"\xff" * 8192])
async def test_a_file_that_is_no_database_is_set_aside_and_made_anew(directory: Path, clock: FakeClock, contents: bytes) -> None:
    directory.mkdir()
    (directory / "cache.db").write_bytes(contents)
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as cache:
        assert await cache.get(key("a")) is None
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        assert await cache.get(key("a")) == b"answer"
        assert (directory / "cache.db.corrupt-1").read_bytes() == contents
        await cache.purge()
        assert not list(directory.glob("*corrupt*"))


async def test_a_database_of_somebody_else_is_set_aside(directory: Path, clock: FakeClock) -> None:
    directory.mkdir()
    connection = sqlite3.connect(directory / "cache.db")
    connection.execute("CREATE TABLE Cache (something TEXT)")
    connection.close()
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as cache:
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        assert await cache.get(key("a")) == b"answer"
    assert (directory / "cache.db.corrupt-1").exists()


async def test_a_database_that_breaks_while_open_is_rebuilt_in_every_worker(
    cache: DiskResponseCache, other: DiskResponseCache, directory: Path
) -> None:
    await other.put(key("b"), b"answer", 60)
    await other.flush()
    await cache.flush()
    for path in directory.glob("cache.db*"):
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
    for worker in (cache, other):
        for _ in range(3):
            await worker.get(key("z"))
            await worker.put(key("a"), b"answer", 60)
            await worker.flush()
    for worker in (cache, other):
        assert await worker.get(key("a")) == b"answer"
    assert [row[0] for row in rows(directory)] == [key("a")]


async def test_a_removed_directory_is_made_anew_and_its_answers_are_gone(
    cache: DiskResponseCache, other: DiskResponseCache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_purges, "STALE", 0.0)  # the moment at which a worker looks
    for worker in (cache, other):
        await worker.put(key("a"), b"answer", 60)
        await worker.flush()
    directory.rename(directory.parent / "removed")
    assert await other.get(key("b")) is None
    await cache.put(key("b"), b"answer", 60)
    await cache.flush()
    await other.flush()
    assert await other.get(key("a")) is None
    assert await other.get(key("b")) == b"answer"


async def test_a_worker_that_only_reads_notices_new_files(
    cache: DiskResponseCache, other: DiskResponseCache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_purges, "STALE", 0.0)
    await other.flush()
    directory.rename(directory.parent / "removed")
    await cache.put(key("a"), b"answer", 60)
    await cache.flush()
    assert await other.get(key("a")) is None
    await wait(other._worker().files.ask(lambda: 0))
    assert await other.get(key("a")) == b"answer"


async def test_a_directory_that_cannot_be_made_leaves_a_cache_in_memory(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    async with DiskResponseCache(tmp_path / "file" / "cache", clock=clock) as cache:
        assert await cache.get(key("a")) is None
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        assert await cache.get(key("a")) == b"answer"
        assert await cache.purge() == 1
        assert await cache.get(key("a")) is None


async def test_a_failure_is_logged_once_and_names_no_key_and_no_value(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.DEBUG):
        async with DiskResponseCache(tmp_path / "file" / "cache", clock=clock) as cache:
            for _ in range(5):
                await cache.put(key("a"), b"the answer", 60)
                await cache.flush()
                clock.advance(cache_files.RETRY_AFTER)
    lines = [record.getMessage() for record in caplog.records if record.name == "starlette_aigateway"]
    assert len(lines) == 1
    assert "could not open" in lines[0]
    assert key("a") not in lines[0]
    assert "the answer" not in lines[0]


async def test_a_locked_file_still_answers_reads_and_delays_no_put(
    directory: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "WRITE_TIMEOUT", 0.05)
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as cache:
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        lock = sqlite3.connect(directory / "cache.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        try:
            await cache.put(key("b"), b"answer", 60)
            assert await cache.get(key("b")) == b"answer"
            assert await cache.get(key("a")) == b"answer"
            await cache.flush()
            assert await cache.get(key("b")) is None
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        await cache.put(key("b"), b"answer", 60)
        await cache.flush()
        assert await cache.get(key("b")) == b"answer"
