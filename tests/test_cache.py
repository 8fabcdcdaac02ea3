"""The response cache on disk: what every cache promises, and what this one does when its files are planted, broken or gone."""

from __future__ import annotations

import logging
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import anyio
import pytest
from diskcache.core import MODE_BINARY, MODE_PICKLE, MODE_RAW, MODE_TEXT

from starlette_aigateway import cache_files, cache_purges
from starlette_aigateway.cache import DiskResponseCache, wait
from starlette_aigateway.cache_disk import BytesDisk, restored, stored
from starlette_aigateway.cache_files import CacheFiles
from starlette_aigateway.cache_sieve import Sieve
from starlette_aigateway.protocols import ResponseCache
from starlette_aigateway.testing.cache import ResponseCacheContract, SharedResponseCacheContract, key
from starlette_aigateway.testing.clock import FakeClock

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
async def cache(directory: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
    async with DiskResponseCache(directory, clock=clock) as opened:
        yield opened


@pytest.fixture
async def other(directory: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
    async with DiskResponseCache(directory, clock=clock) as opened:
        yield opened


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


def rows(directory: Path) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(directory / "cache.db")
    try:
        found = connection.execute("SELECT key, raw, mode, filename, value FROM Cache ORDER BY rowid").fetchall()
        return [(restored(name), *others) for name, *others in found]
    finally:
        connection.close()


def plant(directory: Path, name: str, *, mode: int, value: object = None, filename: str | None = None, raw: int = 1) -> None:
    connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
    try:
        connection.execute("DELETE FROM Cache WHERE key = ?", (stored(key(name)),))
        connection.execute(
            "INSERT INTO Cache (key, raw, store_time, expire_time, access_time, mode, filename, value) VALUES (?, ?, 0, NULL, 0, ?, ?, ?)",
            (stored(key(name)), raw, mode, filename, value),
        )
    finally:
        connection.close()
    sieve = Sieve(directory / "sieve")
    sieve.refresh()
    sieve.mark([key(name)], inf)


async def fresh(directory: Path, clock: FakeClock) -> DiskResponseCache:
    """A cache whose files exist and whose memory is empty."""
    made = DiskResponseCache(directory, memory_entries=0, clock=clock)
    await made.flush()
    return made


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


async def test_constructing_opens_and_creates_nothing(directory: Path) -> None:
    threads = threading.active_count()
    DiskResponseCache(directory)
    assert not directory.exists()
    assert threading.active_count() == threads


async def test_a_planted_pickle_is_a_miss_and_never_runs(directory: Path, clock: FakeClock, tmp_path: Path) -> None:
    async with await fresh(directory, clock) as cache:
        bomb = pickle.dumps(Bomb(tmp_path / "ran"))
        plant(directory, "a", mode=MODE_PICKLE, value=bomb)
        assert await cache.get(key("a")) is None
        await cache.flush()
        assert rows(directory) == []
        await cache.put(key("a"), b"answer", 60)
        assert await cache.get(key("a")) == b"answer"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["another key's", "half of two", "shorter", "of an older release"])
async def test_a_value_that_was_not_written_for_its_key_is_a_miss(directory: Path, clock: FakeClock, how: str) -> None:
    """As the death of the machine may leave it: nothing is synced."""
    async with await fresh(directory, clock) as cache:
        await cache.put(key("a"), b"a" * 5000, 60)
        await cache.put(key("b"), b"b" * 5000, 60)
        await cache.flush()
        (one, other) = [row[4] for row in rows(directory)]
        value = {
            "another key's": other,
            "half of two": one[:3000] + other[3000:],
            "shorter": one[:10],
            "of an older release": one[:8] + one[12:],
        }[how]
        plant(directory, "a", mode=MODE_RAW, value=value)
        assert await cache.get(key("a")) is None
        assert await cache.get(key("b")) == b"b" * 5000
        await cache.flush()
        assert len(rows(directory)) == 1, "it is removed"


async def test_a_planted_pickle_file_is_a_miss_and_never_runs(directory: Path, clock: FakeClock, tmp_path: Path) -> None:
    async with await fresh(directory, clock) as cache:
        (directory / "bomb.val").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        plant(directory, "a", mode=MODE_PICKLE, filename="bomb.val")
        assert await cache.get(key("a")) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", [MODE_RAW, MODE_BINARY, MODE_TEXT])
async def test_a_row_that_names_a_file_neither_reads_nor_removes_it(directory: Path, clock: FakeClock, tmp_path: Path, mode: int) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"\x00" * 16)
    async with await fresh(directory, clock) as cache:
        plant(directory, "a", mode=mode, filename=str(secret))
        plant(directory, "b", mode=mode, filename=str(secret))
        assert await cache.get(key("a")) is None
        await cache.put(key("b"), b"answer", 60)
        await cache.flush()
        await cache.purge()
    assert secret.exists()


@pytest.mark.parametrize("value", ["text", 12, 1.5, None, b"", b"short"])
async def test_a_row_that_is_not_ours_is_a_miss_and_removed(directory: Path, clock: FakeClock, value: object) -> None:
    async with await fresh(directory, clock) as cache:
        plant(directory, "a", mode=MODE_RAW, value=value)
        assert await cache.get(key("a")) is None
        await cache.flush()
        assert rows(directory) == []


@pytest.mark.parametrize("value", ["text", 1, 1.5, None, object(), [b"x"], bytearray(b"x")])
def test_the_disk_takes_bytes_only(tmp_path: Path, value: object) -> None:
    disk = BytesDisk(str(tmp_path))
    with pytest.raises(ValueError, match="bytes"):
        disk.store(value, False)
    with pytest.raises(ValueError, match="key"):
        disk.put([value])
    with pytest.raises(ValueError, match="files"):
        disk.filename()
    with pytest.raises(ValueError, match="key"):
        disk.get(pickle.dumps(value if value is None else 1), 0)


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


async def test_the_directory_is_for_this_user_only(directory: Path, clock: FakeClock) -> None:
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    async with await fresh(directory, clock):
        assert directory.stat().st_mode & 0o777 == 0o700


async def test_calls_that_wait_for_the_files_to_be_opened_hold_no_thread_each(directory: Path, clock: FakeClock) -> None:
    before = threading.active_count()
    async with DiskResponseCache(directory, clock=clock) as cache, anyio.create_task_group() as group:
        for number in range(30):
            group.start_soon(cache.get, key(str(number)))
        await cache.flush()
        assert threading.active_count() < before + 10


async def test_an_answer_survives_a_restart(directory: Path, clock: FakeClock) -> None:
    async with DiskResponseCache(directory, clock=clock) as cache:
        await cache.put(key("a"), b"answer", 60)
    async with DiskResponseCache(directory, clock=clock) as cache:
        assert await cache.get(key("a")) == b"answer"


async def test_a_closed_cache_opens_again_at_the_next_use(directory: Path, clock: FakeClock) -> None:
    cache = DiskResponseCache(directory, clock=clock)
    await cache.put(key("a"), b"answer", 60)
    cache.close()
    assert await cache.get(key("a")) == b"answer"
    cache.close()
    cache.close()


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


@pytest.mark.parametrize(("name", "value"), [("disk_unknown", 1), ("get", "x"), ("_con", 1), ("eviction_policy", "'"), ("sqlite_x;", "y")])
async def test_planted_settings_do_not_stop_the_cache(directory: Path, clock: FakeClock, name: str, value: object) -> None:
    async with await fresh(directory, clock):
        pass
    connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
    connection.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (name, value))
    connection.close()
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as cache:
        for _ in range(3):  # a read, a write or the opening notices it; what follows works
            await cache.get(key("a"))
            await cache.put(key("a"), b"answer", 60)
            await cache.flush()
        assert await cache.get(key("a")) == b"answer"


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
        await other.flush()
        (directory / "purges").unlink()
        assert await cache.get(key("a")) == b"answer", f"{number}: from memory, or from the file"
        await other.purge()
        assert await cache.get(key("a")) is None


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


async def test_a_cache_that_could_not_be_opened_is_tried_again(tmp_path: Path, clock: FakeClock) -> None:
    blocker = tmp_path / "cache"
    blocker.write_text("")
    async with DiskResponseCache(blocker, memory_entries=0, clock=clock) as cache:
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        blocker.unlink()
        clock.advance(cache_files.RETRY_AFTER)
        await cache.put(key("a"), b"answer", 60)
        await cache.flush()
        assert await cache.get(key("a")) == b"answer"


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


FORK = """
import os, sys, anyio
from pathlib import Path
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.testing.cache import key
cache = DiskResponseCache(Path(sys.argv[1]))
async def parent():
    await cache.put(key("parent"), b"of the parent", 60)
    await cache.flush()
async def child():
    assert await cache.get(key("parent")) == b"of the parent"
    await cache.put(key("child"), b"of the child", 60)
    cache.close()
async def after():
    assert await cache.get(key("child")) == b"of the child"
    cache.close()
anyio.run(parent)
pid = os.fork()
if pid == 0:
    anyio.run(child)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
anyio.run(after)
"""


def test_a_forked_child_opens_its_own_files(directory: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", FORK, str(directory)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


class SlowToOpen:
    """Files that are not opened before somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.may_open = threading.Event(), threading.Event()
        open_files = CacheFiles._open_files

        def slowly(files: CacheFiles) -> None:
            self.reached.set()
            assert self.may_open.wait(10)
            open_files(files)

        monkeypatch.setattr(CacheFiles, "_open_files", slowly)


async def test_all_calls_wait_while_the_files_are_being_opened(
    cache: DiskResponseCache, other: DiskResponseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    await other.put(key("a"), b"value", 60)
    await other.flush()
    slow, found = SlowToOpen(monkeypatch), []

    async def get() -> None:
        found.append(await cache.get(key("a")))

    async with anyio.create_task_group() as group:
        group.start_soon(get)
        await anyio.to_thread.run_sync(slow.reached.wait)
        group.start_soon(get)
        await anyio.wait_all_tasks_blocked()
        slow.may_open.set()
    assert found == [b"value"] * 2


async def test_when_the_files_were_waited_for_in_vain_nobody_else_waits(cache: DiskResponseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.cache.OPEN_TIMEOUT", 0.01)
    slow = SlowToOpen(monkeypatch)
    assert await cache.get(key("a")) is None
    monkeypatch.setattr("starlette_aigateway.cache.OPEN_TIMEOUT", inf)
    with anyio.fail_after(5):
        assert await cache.get(key("a")) is None
    slow.may_open.set()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # such a fork is what is tested
async def test_a_call_right_after_a_fork_waits_until_the_files_are_open_again(
    directory: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with DiskResponseCache(directory, memory_entries=0, clock=clock) as cache:
        await cache.put(key("a"), b"value", 60)
        await cache.flush()
        slow, found = SlowToOpen(monkeypatch), []
        forked = os.fork()
        if forked == 0:
            os._exit(0)
        os.waitpid(forked, 0)

        async def get() -> None:
            found.append(await cache.get(key("a")))

        async with anyio.create_task_group() as group:
            group.start_soon(get)
            await anyio.wait_all_tasks_blocked()
            slow.may_open.set()
        assert found == [b"value"]


WORKER = """
import sys, anyio
from pathlib import Path
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.testing.cache import key
async def main(directory, name):
    async with DiskResponseCache(Path(directory), memory_entries=0) as cache:
        for number in range(100):
            await cache.put(key(f"{name}-{number}"), name.encode() * 100, 60)
        await cache.flush()
        for number in range(100):
            assert await cache.get(key(f"{name}-{number}")) == name.encode() * 100
anyio.run(main, *sys.argv[1:])
"""


def test_workers_that_start_at_once_all_find_their_answers(directory: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(directory), name], stderr=subprocess.PIPE) for name in "abcd"]
    said = [worker.communicate(timeout=60)[1].decode() for worker in workers]
    assert said == [""] * 4
    assert len(rows(directory)) == 400


# -- what is at hand without a wait -----------------------------------------------------------------------------------------


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
