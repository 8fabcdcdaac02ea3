"""The response cache on disk: what every cache promises, what is kept of it in which form, and what is in memory."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from starlette_aigateway import cache_files
from starlette_aigateway.cache import DiskResponseCache, wait
from starlette_aigateway.cache_disk import restored, stored
from starlette_aigateway.protocols import ResponseCache
from starlette_aigateway.testing.cache import ResponseCacheContract, SharedResponseCacheContract, key
from starlette_aigateway.testing.clock import FakeClock

from .rows import fresh, rows

pytestmark = pytest.mark.anyio


class TestMemoryAndDisk(ResponseCacheContract):
    pass


class TestDiskAlone(ResponseCacheContract):
    @pytest.fixture
    async def cache(self, directory: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
        async with DiskResponseCache(directory, memory_entries=0, clock=clock) as opened:
            yield opened


class TestTwoWorkers(SharedResponseCacheContract):
    async def written(self, cache: ResponseCache) -> None:
        assert isinstance(cache, DiskResponseCache)
        await cache.flush()


DIGITS = "0123456789abcdef" * 4


KEYS = ["k", "ключ", DIGITS, DIGITS.upper(), DIGITS[:-1], DIGITS[:-1] + "g", f" {DIGITS[:-2]} ", "ab" * 16, "é" * 32]


async def test_keys_of_whatever_form_are_told_apart_on_disk(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, clock=clock) as cache:
        for name in KEYS:
            await cache.put(name, name.encode(), 60)
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as again:
        assert [await again.get(name) for name in KEYS] == [name.encode() for name in KEYS]
    (directory / "sieve").unlink()
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as marked:
        assert [await marked.get(name) for name in KEYS] == [name.encode() for name in KEYS]
        assert await marked.purge() == len(KEYS)


def test_a_key_of_the_gateways_own_is_a_digest_on_disk() -> None:
    assert stored(key("a")) == bytearray.fromhex(key("a"))


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_found_in_what_was_stored_of_it(name: str) -> None:
    found = stored(name)
    assert restored(found if isinstance(found, str) else bytes(found)) == name


@pytest.mark.parametrize("foreign", [None, 1, 1.5, b"", b"short", b"x" * 33, DIGITS])
def test_a_row_whose_key_nobody_wrote_has_no_name(foreign: object) -> None:
    with pytest.raises(ValueError, match="not one of ours"):
        restored(foreign)


async def test_no_file_is_ever_written_for_a_value(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, clock=clock) as cache:
        await cache.put(key("a"), b"x" * 2**20, 60)
        await cache.flush()
        assert {path.name for path in directory.iterdir()} <= {"cache.db", "cache.db-wal", "cache.db-shm", "purges", "sieve"}


async def test_an_answer_survives_a_restart(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, clock=clock) as cache:
        await cache.put(key("a"), b"answer", 60)
    async with DiskResponseCache(directory, clock=clock) as cache:
        assert await cache.get(key("a")) == b"answer"


async def test_the_last_write_of_a_key_in_a_batch_is_the_one_that_is_kept(directory: Path, clock: FakeClock) -> None:
    async with await fresh(directory, clock) as cache:
        gate = threading.Event()
        held = cache._worker().files.ask(lambda: int(gate.wait(30)))
        for number in range(3):
            await cache.put(key("a"), b"%d" % number, 60)
            await cache.put(key(f"b{number}"), b"another", 60)
        gate.set()
        await wait(held)
        await cache.flush()
        assert len(rows(directory)) == 4
        await cache.put(key("a"), b"later", 60)
        await cache.flush()
        assert len(rows(directory)) == 4
        assert await cache.get(key("a")) == b"later"


async def test_with_too_much_waiting_to_be_written_further_writes_do_not_happen(
    directory: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "MAX_PENDING_BYTES", 25)
    async with await fresh(directory, clock) as cache:
        gate = threading.Event()
        cache._worker().files.ask(lambda: int(gate.wait(30)))
        try:
            for name in ("a", "b", "c"):
                await cache.put(key(name), b"0123456789", 60)
        finally:
            gate.set()
        await cache.flush()
        assert [row[0] for row in rows(directory)] == [key("a"), key("b")]
        await cache.put(key("c"), b"0123456789", 60)
        await cache.flush()
        assert len(rows(directory)) == 3


async def test_the_oldest_entries_make_room(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, size_limit=512 * 1024, memory_entries=0, clock=clock) as cache:
        for number in range(200):
            await cache.put(key(str(number)), os.urandom(8192), 60)
            if number % 20 == 0:
                await cache.flush()
        await cache.flush()
        assert await cache.get(key("0")) is None
        assert await cache.get(key("199")) is not None
        assert 20 < len(rows(directory)) < 65
        assert (directory / "cache.db").stat().st_size <= 640 * 1024


@pytest.mark.parametrize(("entries", "size"), [(2, 10**6), (100, 20)])
async def test_the_memory_tier_keeps_what_was_used_last_within_its_bounds(
    directory: Path, clock: FakeClock, entries: int, size: int
) -> None:
    async with DiskResponseCache(directory, memory_entries=entries, memory_bytes=size, clock=clock) as cache:
        await cache.flush()
        for name in ("a", "b"):
            await cache.put(key(name), b"0123456789", 60)
        await cache.get(key("a"))
        await cache.put(key("c"), b"0123456789", 60)
        await cache.flush()
        connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
        connection.execute("DELETE FROM Cache")
        connection.close()
        assert [await cache.get(key(name)) for name in ("a", "b", "c")] == [b"0123456789", None, b"0123456789"]


async def test_threads_with_loops_of_their_own_share_one_cache(directory: Path, clock: FakeClock, anyio_backend: str) -> None:
    wrong: list[str] = []
    async with DiskResponseCache(directory, memory_entries=4, clock=clock) as cache:

        async def use(name: str) -> None:
            for number in range(50):
                mine = key(f"{name}-{number}")
                await cache.put(mine, mine.encode(), 60)
                if await cache.get(mine) != mine.encode():
                    wrong.append(mine)

        def loop(name: str) -> None:
            anyio.run(use, name, backend=anyio_backend)

        threads = [threading.Thread(target=loop, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
    assert not wrong


async def test_what_is_in_memory_is_recalled_as_the_same_object_for_as_long_as_it_may_be_given(
    cache: DiskResponseCache, other: DiskResponseCache, clock: FakeClock
) -> None:
    assert cache.recall(key("a")) is None
    await cache.get(key("a"))
    await cache.put(key("a"), b"one", 60)
    assert cache.recall(key("a")) is await cache.get(key("a")) is cache.recall(key("a"))
    await cache.flush()
    await other.get(key("b"))
    assert other.recall(key("a")) is None, "it is on disk, which is for get to look at"
    assert await other.get(key("a")) == other.recall(key("a")) == b"one"
    await other.purge()
    assert cache.recall(key("a")) is None
    await cache.put(key("a"), b"another", 60)
    clock.advance(60)
    assert cache.recall(key("a")) is None
