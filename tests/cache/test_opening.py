"""When the files are opened, and who waits for it: at the first use, after a fork, in several workers at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from math import inf
from pathlib import Path

import anyio
import pytest

from starlette_aigateway import cache_files
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.cache_files import CacheFiles
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.clock import FakeClock

from .rows import fresh, rows

pytestmark = pytest.mark.anyio


async def test_constructing_opens_and_creates_nothing(directory: Path) -> None:
    threads = threading.active_count()
    DiskResponseCache(directory)
    assert not directory.exists()
    assert threading.active_count() == threads


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


async def test_a_closed_cache_opens_again_at_the_next_use(directory: Path, clock: FakeClock) -> None:
    cache = DiskResponseCache(directory, clock=clock)
    await cache.put(key("a"), b"answer", 60)
    cache.close()
    assert await cache.get(key("a")) == b"answer"
    cache.close()
    cache.close()


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


async def test_files_that_a_fork_closes_just_after_they_were_opened_are_not_taken_for_open(
    cache: DiskResponseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = CacheFiles.ask

    def and_fork(files: CacheFiles, work: Callable[[], int]) -> Future[int]:
        done = ask(files, work)
        done.result(10)
        files.close_files()
        return done

    monkeypatch.setattr(CacheFiles, "ask", and_fork)
    await cache.get(key("a"))
    assert cache._at_hand() is None


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
