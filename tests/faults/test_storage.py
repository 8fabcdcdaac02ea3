"""A disk that is full, a lock that somebody else holds, a directory that nobody may write to: nothing gets through, nothing is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from starlette_aigateway import ConfigurationError, StorageUnavailable
from starlette_aigateway.testing.providers import After

from .disks import KINDS, Disk, disk, may_mount, unmount
from .locks import BEGIN, HOLD_THE_LOCK_FILE, holder
from .service import HURRIED, gateway_over, service

pytestmark = pytest.mark.anyio


@pytest.fixture(params=KINDS)
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with disk(request.param, tmp_path, monkeypatch) as found:
        yield found


# -- a disk that takes nothing more ------------------------------------------------------------------------------------


async def test_while_the_disk_is_full_no_call_reaches_a_provider_and_then_all_goes_on(small: Disk) -> None:
    async with service(small.path) as found:
        assert (await found.call()).status_code == 200
        small.spoil()
        await found.until_refused()
        assert [await found.refused() for _ in range(5)] == [True] * 5
        assert await found.ready() == (200 if small.pings else 503)
        assert await found.gateway.check_ledger() == []
        small.mend()
        assert (await found.call()).status_code == 200
        assert await found.ready() == 200
    async with gateway_over(small.path) as again:
        assert await again.check_ledger() == []


NO_SETTLEMENT_FITS = [kind for kind in KINDS if kind != "quota"]
"""A settlement frees what its hold took up, so that under a quota on pages it is written all the same."""


@pytest.mark.parametrize("small", NO_SETTLEMENT_FITS, indirect=True)
async def test_calls_that_were_in_the_air_when_the_disk_filled_are_settled_once_there_is_room(small: Disk) -> None:
    arrived, go_on, answered = [anyio.Event() for _ in range(40)], anyio.Event(), [anyio.Event() for _ in range(40)]
    async with service(small.path, *[After(go_on, "late", each) for each in arrived]) as found, anyio.create_task_group() as group:

        async def slow(answer: anyio.Event) -> None:
            assert (await found.call()).status_code == 200, "the answer is there, and paid for"
            answer.set()

        for each in answered:
            group.start_soon(slow, each)
        for each in arrived:
            await each.wait()
        small.spoil()
        await found.until_refused()
        go_on.set()
        for each in answered:
            await each.wait()
        assert await found.held() > 0
        small.mend()
        await found.until_nothing_is_held()
        outcomes = await found.outcomes()
        assert set(outcomes) == {"completed"}
        assert len(outcomes) == len(found.provider.calls)
        assert await found.gateway.check_ledger() == []


# -- a lock that somebody else holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [HOLD_THE_LOCK_FILE, BEGIN.format("IMMEDIATE"), BEGIN.format("EXCLUSIVE")])
async def test_a_ledger_that_is_locked_is_waited_for_within_a_bound_and_refuses(tmp_path: Path, code: str) -> None:
    async with service(tmp_path, timeouts=HURRIED) as found:
        assert (await found.call()).status_code == 200
        with holder(code, tmp_path / "ledger.db"):
            with anyio.fail_after(5):
                answer = await found.call()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert len(found.provider.calls) == 1
            assert await found.ready() == 503
        assert (await found.call()).status_code == 200
        assert await found.gateway.check_ledger() == []


async def test_a_gateway_starts_when_the_lock_is_free_and_says_so_before(tmp_path: Path) -> None:
    async with service(tmp_path) as found:
        await found.call()
    with holder(HOLD_THE_LOCK_FILE, tmp_path / "ledger.db"), pytest.raises(StorageUnavailable, match="locked by another process"):
        async with service(tmp_path, timeouts=HURRIED):
            pass
    async with service(tmp_path) as found:
        assert (await found.call()).status_code == 200
        assert len(await found.outcomes()) == 2


async def test_keys_can_be_read_while_somebody_else_writes_them(tmp_path: Path) -> None:
    async with service(tmp_path, timeouts=HURRIED) as found:
        raw, _ = await found.gateway.create_key("k", hard_cap_usd="1")
        with holder(BEGIN.format("IMMEDIATE"), tmp_path / "config.db"):
            assert (await found.call(key=raw)).status_code == 200
            with anyio.fail_after(5), pytest.raises(StorageUnavailable):
                await found.gateway.create_key("other")
        await found.gateway.create_key("other")


# -- a directory that nobody may write to ------------------------------------------------------------------------------


@contextmanager
def read_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`path`, with all that is in it, cannot be written to within the block. A superuser who may not mount is told so."""
    if may_mount():
        subprocess.run(["mount", "--bind", str(path), str(path)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
        try:
            yield
        finally:
            unmount(path)
    else:
        path.chmod(0o500)
        access = os.access
        monkeypatch.setattr(os, "access", lambda place, mode: not (place == path and mode & os.W_OK) and access(place, mode))
        try:
            yield
        finally:
            path.chmod(0o700)
            monkeypatch.setattr(os, "access", access)


async def test_a_directory_that_is_read_only_is_refused_at_the_start_by_name_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    async with service(data) as found:
        await found.call()
    with read_only(data, monkeypatch):
        assert not os.access(data, os.W_OK)
        with pytest.raises(ConfigurationError, match=r"data_dir .*write"):
            async with service(data):
                pass
        async with service(data, lifespan=False) as mounted:
            assert await mounted.ready() == 503
            assert (await mounted.call()).status_code == 503
            assert mounted.provider.calls == []
    async with service(data) as found:
        assert await found.outcomes() == ["completed"]


async def test_a_ledger_that_cannot_be_opened_lets_nothing_through(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(StorageUnavailable, match=r"ledger\.db"):
        async with service(tmp_path):
            pass
    async with service(tmp_path, lifespan=False) as mounted:
        assert await mounted.ready() == 503
        assert await mounted.refused()
