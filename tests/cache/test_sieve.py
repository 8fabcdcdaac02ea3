"""What cannot be on disk is not looked for there, and what is on disk is found: after a start, beside other workers, without the file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from math import inf
from pathlib import Path

import pytest

from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.cache_sieve import CELLS, Sieve
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.clock import FakeClock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def cache(tmp_path: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
    async with on_disk(tmp_path, clock) as opened:
        yield opened


@pytest.fixture
async def other(tmp_path: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
    async with on_disk(tmp_path, clock) as opened:
        yield opened


def on_disk(directory: Path, clock: FakeClock) -> DiskResponseCache:
    """Without a memory tier."""
    return DiskResponseCache(directory, memory_entries=0, clock=clock)


def questions(cache: DiskResponseCache) -> list[str]:
    """The statements that reads of `cache`, whose files are open, send to the file from now on."""
    asked: list[str] = []
    reader = cache._worker().files._reader
    assert reader is not None
    reader._con.set_trace_callback(asked.append)
    return asked


async def stored(cache: DiskResponseCache, name: str, ttl: float = 60.0) -> None:
    await cache.put(key(name), name.encode(), ttl)
    await cache.flush()


async def test_an_answer_that_nobody_stored_is_not_looked_for_in_the_file(cache: DiskResponseCache) -> None:
    await stored(cache, "a")
    asked = questions(cache)
    assert await cache.get(key("b")) is None
    assert asked == []
    assert await cache.get(key("a")) == b"a"
    assert len(asked) == 1


async def test_an_answer_that_has_expired_is_not_looked_for(cache: DiskResponseCache, clock: FakeClock) -> None:
    await stored(cache, "a", ttl=10)
    asked = questions(cache)
    clock.advance(12)
    assert await cache.get(key("a")) is None
    assert asked == []


async def test_what_another_worker_stores_later_is_found(cache: DiskResponseCache, other: DiskResponseCache) -> None:
    await stored(other, "first")
    assert await cache.get(key("first")) == b"first"
    await stored(other, "second")
    assert await cache.get(key("second")) == b"second"


async def test_answers_from_before_there_was_such_a_file_are_found(tmp_path: Path, clock: FakeClock) -> None:
    async with on_disk(tmp_path, clock) as cache:
        await stored(cache, "a", ttl=10)
        await stored(cache, "b", ttl=1000)
    (tmp_path / "sieve").unlink()
    async with on_disk(tmp_path, clock) as cache:
        clock.advance(9)
        assert await cache.get(key("a")) == b"a"
        clock.advance(900)
        assert await cache.get(key("b")) == b"b"


async def test_a_file_that_is_lost_while_workers_run_costs_no_answer_once_they_have_stored_another(
    cache: DiskResponseCache, other: DiskResponseCache, tmp_path: Path
) -> None:
    await stored(cache, "a")
    assert await other.get(key("a")) == b"a"
    (tmp_path / "sieve").unlink()
    await stored(cache, "b")
    await stored(other, "c")
    for worker in (cache, other):
        for name in "abc":
            assert await worker.get(key(name)) == name.encode()


async def test_without_memory_that_could_be_mapped_the_file_is_asked(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sieve").mkdir()
    async with on_disk(tmp_path, clock) as cache:
        await stored(cache, "a")
        asked = questions(cache)
        assert await cache.get(key("a")) == b"a"
        assert await cache.get(key("b")) is None
        assert len(asked) == 2


@pytest.fixture
def sieve(tmp_path: Path) -> Sieve:
    made = Sieve(tmp_path / "sieve")
    assert made.refresh()
    return made


def test_a_mark_holds_to_the_last_moment_of_what_expires_last(sieve: Sieve) -> None:
    sieve.mark(["a"], 100.5)
    sieve.mark(["a"], 50.0)
    assert sieve.may_hold("a", 100.4)
    assert not sieve.may_hold("a", 101.0)


@pytest.mark.parametrize("expires_at", [2.0**32, 1e300, inf])
def test_what_expires_after_all_seconds_that_a_cell_can_hold_is_held(sieve: Sieve, expires_at: float) -> None:
    sieve.mark(["a"], expires_at)
    assert sieve.may_hold("a", 4e9)


def test_what_has_expired_in_all_clocks_is_not_held(sieve: Sieve) -> None:
    sieve.mark(["a"], -5.0)
    assert not sieve.may_hold("a", 0.0)


@pytest.mark.parametrize(("stored", "most"), [(CELLS // 100, 20), (50_000, 500)])
def test_of_many_other_keys_hardly_any_is_looked_for_in_vain(sieve: Sieve, stored: int, most: int) -> None:
    sieve.mark((key(f"stored {number}") for number in range(stored)), 100.0)
    vain = sum(sieve.may_hold(key(f"other {number}"), 0.0) for number in range(10_000))
    assert vain < most


def test_two_processes_share_the_marks(sieve: Sieve, tmp_path: Path) -> None:
    other = Sieve(tmp_path / "sieve")
    other.refresh()
    other.mark(["a"], 100.0)
    assert sieve.may_hold("a", 50.0)
    assert (tmp_path / "sieve").stat().st_mode & 0o777 == 0o600
