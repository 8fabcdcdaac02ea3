"""What somebody who can write to the files planted in them is a miss, and runs and touches nothing."""

from __future__ import annotations

import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from diskcache.core import MODE_BINARY, MODE_PICKLE, MODE_RAW, MODE_TEXT

from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.cache_disk import BytesDisk
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.clock import FakeClock

from .rows import fresh, plant, rows

pytestmark = pytest.mark.anyio


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


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
