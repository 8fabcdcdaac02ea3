"""Files that are damaged, cut short, lost or exchanged: the ledger and the keys are never quietly begun anew, the cache always is."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from starlette_aigateway import StorageUnavailable
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.testing import FakeClock

from .locks import HOLD_THE_LOCK_FILE, holder
from .service import HURRIED, WHO, Service, service

pytestmark = [pytest.mark.anyio, pytest.mark.untraced]

CALLS = 30
GARBAGE = b"\xa5garbage" * 2000


def overwritten(path: Path, start: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(GARBAGE[:size])


def without_header(path: Path) -> None:
    overwritten(path, 0, 100)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def with_garbage_in_the_middle(path: Path) -> None:
    overwritten(path, 4096, 4096)


def anothers(path: Path) -> None:
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t (a)")
    other.close()


DAMAGES = [without_header, cut_short, emptied, gone, with_garbage_in_the_middle]


async def used(data: Path) -> str:
    """A directory in which a key was made and calls were booked, cleanly closed; gives the key."""
    async with service(data) as found:
        raw, _ = await found.gateway.create_key("k", hard_cap_usd="100")
        for _ in range(CALLS):
            assert (await found.call()).status_code == 200
        await found.cached_call()
    return raw


async def assert_refused(data: Path, name: str, key: str | None = None) -> None:
    """No start, and on a bare mount no call; what is there stays as it is."""
    path = data / name
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(StorageUnavailable, match=rf"{name} .*stop the service.* put a backup back") as refused:
        async with service(data):
            pass
    assert str(data) not in str(refused.value)
    async with service(data, lifespan=False) as mounted:
        assert await mounted.ready() == 503
        assert (await mounted.call(key=key)).status_code == 503
        assert mounted.provider.calls == []
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_ledger_is_refused_at_the_start_and_says_what_to_do(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    await used(tmp_path)
    damage(tmp_path / "ledger.db")
    await assert_refused(tmp_path, "ledger.db")


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damaged_keys_are_refused_at_the_start_and_say_what_to_do(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    raw = await used(tmp_path)
    damage(tmp_path / "config.db")
    await assert_refused(tmp_path, "config.db", raw)


async def test_a_ledger_that_was_exchanged_for_another_one_is_refused(tmp_path: Path) -> None:
    await used(tmp_path)
    anothers(tmp_path / "ledger.db")
    with pytest.raises(StorageUnavailable, match=r"ends at row 0, though row 62 was committed"):
        async with service(tmp_path):
            pass


async def crashed(data: Path, found: Service) -> None:
    """What a power cut would leave at `data` of the gateway that runs: its files as they are, the log not yet in the database."""
    lock = found.gateway._composition.embedded.directory / "ledger.db.lock"  # type: ignore[union-attr]  # it has one
    with anyio.fail_after(10):
        while int.from_bytes(lock.read_bytes()) < 2 * CALLS:
            await anyio.sleep(0.01)
    shutil.copytree(lock.parent, data)


@pytest.mark.parametrize("damage", [without_header, emptied, gone, cut_short])
async def test_a_log_that_was_lost_or_damaged_is_noticed_and_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    data = tmp_path / "after"
    async with service(tmp_path / "before") as found:
        for _ in range(CALLS):
            await found.call()
        await crashed(data, found)
    damage(data / "ledger.db-wal")
    with pytest.raises(
        StorageUnavailable, match=r"ledger[.]db ends at row \d+, though row 60 was committed: its -wal .*delete the [.]lock"
    ):
        async with service(data):
            pass


async def test_a_crash_without_damage_goes_on_where_it_was(tmp_path: Path) -> None:
    data = tmp_path / "after"
    async with service(tmp_path / "before") as found:
        for _ in range(CALLS):
            await found.call()
        await crashed(data, found)
    async with service(data) as found:
        assert len(await found.outcomes()) == CALLS
        assert await found.gateway.check_ledger() == []


async def test_a_ledger_that_was_pruned_is_no_older_than_before(tmp_path: Path) -> None:
    clock = FakeClock()
    async with service(tmp_path, clock=clock) as found:
        for _ in range(CALLS):
            await found.call()
        clock.advance(10 * 86_400.0)
        assert await found.gateway.prune_ledger(datetime.fromtimestamp(clock.now, UTC)) > CALLS
    async with service(tmp_path, clock=clock) as found:
        assert (await found.call()).status_code == 200
        assert await found.gateway.check_ledger() == []


async def test_an_older_copy_is_taken_only_when_the_operator_says_so(tmp_path: Path) -> None:
    await used(tmp_path)
    shutil.copy(tmp_path / "ledger.db", tmp_path / "backup")
    async with service(tmp_path) as found:
        for _ in range(CALLS):
            await found.call()
    shutil.copy(tmp_path / "backup", tmp_path / "ledger.db")
    with pytest.raises(StorageUnavailable, match=r"an older copy was put in its place"):
        async with service(tmp_path):
            pass
    (tmp_path / "ledger.db.lock").unlink()
    async with service(tmp_path) as found:
        assert len(await found.outcomes()) == CALLS + 1
        assert await found.gateway.check_ledger() == []


async def test_damage_is_let_through_by_nobody_once_the_file_is_read_again(tmp_path: Path) -> None:
    """Until then a process has the pages in memory, and knows of nothing."""
    async with service(tmp_path, timeouts=HURRIED) as found:
        for _ in range(CALLS):
            await found.call()
        with holder(HOLD_THE_LOCK_FILE, tmp_path / "ledger.db"):
            assert await found.refused()
        (tmp_path / "ledger.db-wal").write_bytes(GARBAGE)
        without_header(tmp_path / "ledger.db")
        for _ in range(3):
            assert await found.refused()
        assert await found.ready() == 503


@pytest.mark.parametrize("whole", [False, True])
async def test_a_ledger_that_is_removed_while_the_gateway_runs_is_not_made_anew(tmp_path: Path, whole: bool) -> None:
    data = tmp_path / "data"
    await used(data)
    async with service(data) as found:
        if whole:
            data.rename(tmp_path / "elsewhere")
            data.mkdir()
        else:
            (data / "ledger.db").rename(tmp_path / "ledger.db")
        for _ in range(3):
            assert await found.refused()
        assert await found.ready() == 503
        assert not (data / "ledger.db").exists()


async def test_a_removed_ledger_that_is_put_back_is_gone_on_with(tmp_path: Path) -> None:
    data = tmp_path / "data"
    await used(data)
    async with service(data) as found:
        spent = [budget.spent for budget in await found.gateway.budgets(WHO)]
        (data / "ledger.db").rename(tmp_path / "ledger.db")
        assert await found.refused()
    (tmp_path / "ledger.db").rename(data / "ledger.db")
    async with service(data) as found:
        assert [budget.spent for budget in await found.gateway.budgets(WHO)] == spent
        assert (await found.call()).status_code == 200
        assert await found.gateway.check_ledger() == []


@pytest.mark.parametrize("damage", [without_header, cut_short, emptied, gone, with_garbage_in_the_middle, anothers])
async def test_a_damaged_cache_is_set_aside_and_no_call_notices(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    await used(tmp_path)
    damage(tmp_path / "cache" / "cache.db")
    caches = []
    for _ in range(2):
        async with service(tmp_path) as found:
            caches += [(await found.cached_call()).headers["x-cache"] for _ in range(2)]
            assert await found.gateway.check_ledger() == []
    assert caches[1:] == ["hit", "hit", "hit"], "the new file keeps what is put into it"


async def test_a_cache_that_is_damaged_while_the_gateway_runs_is_rebuilt(tmp_path: Path) -> None:
    async with service(tmp_path) as found:
        responses = found.gateway._composition.responses
        assert isinstance(responses, DiskResponseCache)
        await found.cached_call()
        await responses.flush()
        cache = tmp_path / "cache" / "cache.db"
        cache.with_name("cache.db-wal").write_bytes(b"")
        cache.write_bytes(GARBAGE)
        caches = []
        for _ in range(3):  # what is put while the file is set aside is not kept
            responses._worker().memory.clear()
            caches.append((await found.cached_call()).headers["x-cache"])
            await responses.flush()
        assert (caches[0], caches[2]) == ("miss", "hit")
    assert [path for path in cache.parent.iterdir() if ".corrupt-" in path.name]
