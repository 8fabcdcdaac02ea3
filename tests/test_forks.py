"""A process that has used its stores may be forked: all files are closed for that, and parent and child open them anew."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakSet

import anyio
import pytest

from starlette_aigateway import process
from starlette_aigateway.accounts import Hold
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.cache_files import CacheFiles
from starlette_aigateway.stores.sqlite import write_ahead_log
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.connection import PerProcess
from starlette_aigateway.stores.sqlite.idempotency import SQLiteIdempotencyStore
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.sqlite.ledger_batch import Batch
from starlette_aigateway.stores.sqlite.readers import Readers
from starlette_aigateway.stores.writer import Writer
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.ledger_kit import NOON, hold_request

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # such forks are what is tested

NAMES = {"parent", "child", "later", "parent again"}


class Child:
    """A forked process that does `work`, which gets a function that waits for `go`."""

    def __init__(self, work: Callable[[Callable[[], object]], object]) -> None:
        to_child, from_parent = os.pipe()
        self._go = from_parent
        self._pid = os.fork()
        if self._pid == 0:
            os.close(from_parent)
            self._be(partial(work, partial(os.read, to_child, 1)))
        os.close(to_child)

    def _be(self, work: Callable[[], object]) -> NoReturn:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:  # noqa: BLE001  # whatever it is, nobody else tells it
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)

    def go(self) -> None:
        os.close(self._go)

    def end(self) -> None:
        assert os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]) == 0, "its standard error says why"


def rows(path: Path, query: str) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute(query)}


class Books:
    """The ledger."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ledger.db"
        self.ledger = SQLiteLedger(self._path)

    async def write(self, name: str) -> Hold:
        return await self.ledger.reserve(hold_request(name, 1), now=NOON)

    async def close(self) -> None:
        await self.ledger.aclose()

    def written(self) -> set[str]:
        return {name.removeprefix("use_") for name in rows(self._path, "SELECT hold FROM entries WHERE kind = 'hold'")}


class Config:
    def __init__(self, directory: Path) -> None:
        self._path = directory / "config.db"
        self.database = ConfigDatabase(self._path)

    async def write(self, name: str) -> None:
        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO tenants (id, limits) VALUES (?, '{}')", (name,))

        await self.database.write(insert)
        assert self.database.read(lambda connection: connection.execute("SELECT 1 FROM tenants WHERE id = ?", (name,)).fetchone())

    async def close(self) -> None:
        self.database.close()

    def written(self) -> set[str]:
        return rows(self._path, "SELECT id FROM tenants")


class Answers:
    """Of the idempotency keys."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "answers.db"
        self.store = SQLiteIdempotencyStore(self._path)

    async def write(self, name: str) -> None:
        await self.store.claim(name, "fingerprint", holder="me", until=NOON, now=NOON)

    async def close(self) -> None:
        await self.store.aclose()

    def written(self) -> set[str]:
        return rows(self._path, "SELECT key FROM answers")


class Cached:
    def __init__(self, directory: Path) -> None:
        self._directory = directory / "cache"
        self.cache = DiskResponseCache(self._directory)

    async def write(self, name: str) -> None:
        await self.cache.put(key(name), name.encode(), 60)
        await self.cache.flush()

    async def close(self) -> None:
        self.cache.close()

    def written(self) -> set[str]:
        async def read() -> set[str]:
            async with DiskResponseCache(self._directory) as cache:
                return {name for name in NAMES if await cache.get(key(name)) is not None}

        return anyio.run(read)


Store = Books | Config | Answers | Cached


@pytest.fixture(params=[Books, Config, Answers, Cached], ids=lambda kind: kind.__name__.lower())
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made: Store = request.param(tmp_path)
    return made


def test_what_a_child_writes_after_its_parent_closed_the_files_is_in_them(store: Store) -> None:
    anyio.run(store.write, "parent")

    def work(wait: Callable[[], object]) -> None:
        anyio.run(store.write, "child")
        wait()
        anyio.run(store.write, "later")
        anyio.run(store.close)

    child = Child(work)
    anyio.run(store.write, "parent again")
    anyio.run(store.close)
    child.go()
    child.end()
    assert store.written() == NAMES


def test_what_a_parent_writes_after_its_child_closed_the_files_is_in_them(store: Store) -> None:
    anyio.run(store.write, "parent")

    def work(wait: Callable[[], object]) -> None:
        wait()
        anyio.run(store.write, "child")
        anyio.run(store.close)

    child = Child(work)
    anyio.run(store.write, "parent again")
    child.go()
    child.end()
    anyio.run(store.write, "later")
    anyio.run(store.close)
    assert store.written() == NAMES


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not say what is open")
def test_no_database_is_open_in_the_moment_of_a_fork(store: Store, tmp_path: Path) -> None:
    anyio.run(store.write, "parent")
    assert any(name.endswith(".db") for name in open_files(tmp_path))

    def work(_: Callable[[], object]) -> None:
        left = {name for name in open_files(tmp_path) if name.endswith((".db", ".db-wal", ".db-shm", ".lock"))}
        assert not left, left

    Child(work).end()
    anyio.run(store.close)


def open_files(directory: Path) -> set[str]:
    """Of this process, in `directory`."""
    names: set[str] = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            names.add(str(entry.readlink()).removesuffix(" (deleted)"))
    return {name for name in names if name.startswith(str(directory))}


def test_a_childs_child_may_write_too(store: Store) -> None:
    anyio.run(store.write, "parent")

    def work(_: Callable[[], object]) -> None:
        anyio.run(store.write, "child")
        Child(lambda _: anyio.run(store.write, "later")).end()
        anyio.run(store.write, "parent again")
        anyio.run(store.close)

    Child(work).end()
    anyio.run(store.close)
    assert store.written() == NAMES


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


class Asked:
    """Whether a fork waits for somebody, and what lets go of the files then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Writer[Any, Any]] | type[Readers]) -> None:
        self._asked = threading.Event()
        self.reached = threading.Event()
        pause = kind.pause

        def tell(opener: Any, timeout: float) -> bool:
            self._asked.set()
            return pause(opener, timeout)

        monkeypatch.setattr(kind, "pause", tell)

    def hold_on(self) -> None:
        """With the files in use, until a fork waits for them."""
        self.reached.set()
        assert self._asked.wait(10), "nobody forks"


def in_a_thread(work: Callable[[], object], reached: threading.Event) -> threading.Thread:
    """Begins `work`, and returns once it has got there."""
    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(10)
    return thread


def test_a_fork_waits_for_a_transaction_and_both_sides_go_on_after_it(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, Writer)
    apply = Batch.flush

    def slowly(batch: Batch) -> None:
        if not asked.reached.is_set():
            asked.hold_on()
        apply(batch)

    anyio.run(books.ledger.ping)
    monkeypatch.setattr(Batch, "flush", slowly)
    thread = in_a_thread(partial(anyio.run, books.write, "parent"), asked.reached)
    child = Child(lambda _: anyio.run(books.write, "child"))
    thread.join()
    child.end()
    anyio.run(books.write, "later")
    anyio.run(books.close)
    assert books.written() == {"parent", "child", "later"}


def test_a_fork_waits_for_a_sync_and_who_waits_for_that_is_told(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, Writer)
    synced: list[int] = []

    def slowly(descriptor: int) -> None:
        if not synced:
            asked.hold_on()
        os.fsync(descriptor)
        synced.append(descriptor)

    anyio.run(books.ledger.ping)
    monkeypatch.setattr(write_ahead_log, "_datasync", slowly)
    told: list[str] = []

    async def write() -> None:
        told.append((await books.write("parent")).id)

    thread = in_a_thread(partial(anyio.run, write), asked.reached)
    Child(lambda _: anyio.run(books.write, "child")).end()
    thread.join()
    assert told == ["use_parent"]
    anyio.run(books.close)
    assert books.written() == {"parent", "child"}


def test_a_fork_waits_for_a_report(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, Readers)
    anyio.run(books.write, "parent")
    found: list[Any] = []

    def read(connection: sqlite3.Connection) -> None:
        asked.hold_on()
        found.extend(connection.execute("SELECT hold FROM entries"))

    thread = in_a_thread(partial(anyio.run, books.ledger._readers.run, read), asked.reached)
    Child(lambda _: anyio.run(books.write, "child")).end()
    thread.join()
    assert found == [("use_parent",)]
    anyio.run(books.close)
    assert books.written() == {"parent", "child"}


def test_calls_go_on_while_a_fork_waits_for_a_report(
    books: Books, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(monkeypatch, Readers)
    anyio.run(books.write, "parent")

    def read(connection: sqlite3.Connection) -> None:
        asked.hold_on()
        writer = in_a_thread(partial(anyio.run, books.write, "later"), asked.reached)
        writer.join(process.PATIENCE / 2)
        assert not writer.is_alive(), "a call waits for the fork, and that for this report"

    thread = in_a_thread(partial(anyio.run, books.ledger._readers.run, read), asked.reached)
    with caplog.at_level(logging.WARNING):
        Child(lambda _: anyio.run(books.write, "child")).end()
    thread.join()
    assert caplog.messages == [], "it was waited for in vain"
    anyio.run(books.close)
    assert books.written() == {"parent", "later", "child"}


def test_an_interrupt_while_another_thread_forks_lets_go_of_nothing_that_is_closed_for_that(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, interrupted = Asked(monkeypatch, Writer), threading.Event()

    def sync_in_the_end(descriptor: int) -> None:
        asked.hold_on()
        assert interrupted.wait(10)
        os.fsync(descriptor)

    anyio.run(books.write, "parent")
    with monkeypatch.context() as patch:
        patch.setattr(write_ahead_log, "_datasync", sync_in_the_end)
        syncing = in_a_thread(partial(anyio.run, books.write, "later"), asked.reached)
        forking = in_a_thread(lambda: Child(lambda _: anyio.run(books.write, "child")).end(), asked._asked)
        guard = process.THIS._guard
        process.THIS._guard = Interrupted(guard)  # type: ignore[assignment]
        try:
            with pytest.raises(KeyboardInterrupt):
                process.THIS._pause()
            process.THIS._resume()
        finally:
            process.THIS._guard = guard
        assert books.ledger._readers._paused, "the files are closed for the other thread's fork"
        interrupted.set()
        for thread in (syncing, forking):
            thread.join()
    anyio.run(books.close)
    assert books.written() == {"parent", "later", "child"}


class Interrupted:
    """A lock, for a thread that is interrupted while it waits for it."""

    def __init__(self, lock: Any) -> None:
        self.release = lock.release

    def acquire(self) -> NoReturn:
        raise KeyboardInterrupt


def test_a_fork_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(process, "PATIENCE", 0.05)
    monkeypatch.setattr(process.THIS, "_openers", WeakSet())  # none of other tests
    reached, forked = threading.Event(), threading.Event()
    per_process = PerProcess(lambda: sqlite3.connect(tmp_path / "a.db", check_same_thread=False))

    def read(connection: sqlite3.Connection) -> int:
        reached.set()
        assert forked.wait(10)
        return int(connection.execute("SELECT 1").fetchone()[0])

    found: list[int] = []
    thread = in_a_thread(lambda: found.append(per_process.run(read)), reached)
    with caplog.at_level(logging.WARNING):
        child = Child(lambda _: per_process.run(lambda connection: connection.execute("SELECT 1").close()))
    forked.set()
    child.end()
    thread.join()
    assert found == [1]
    assert caplog.messages == ["this process is forked while a store is in use: the child may be refused by it"]
    per_process.close()


UNDER_LOAD = """
import asyncio, multiprocessing, sys
from starlette_aigateway import AIGateway, Price, Principal
from starlette_aigateway.testing import ScriptedProvider, Say

gateway = AIGateway(providers=[ScriptedProvider(Say("hello"), repeat=True)], data_dir=sys.argv[1], prices={"m": Price(1, 1)})
PARENT, CHILD = Principal("parent", hard_cap_usd="100"), Principal("child", hard_cap_usd="100")

async def call(principal, text):
    answer = await gateway.acting_as(principal).complete(model="m", messages=[{"role": "user", "content": text}], max_tokens=10)
    return answer.cost_usd

async def spent(principal):
    return [budget.spent for budget in await gateway.budgets(principal) if budget.window == "total"]

def child(number):
    async def calls():
        async with gateway:
            for again in range(5):
                await call(CHILD, f"child {number} {again}")
    asyncio.run(calls())

async def main():
    made = [0] * 8
    at_work = True

    async def load(number):
        while at_work:
            made[number] += 1
            await call(PARENT, f"parent {number} {made[number]}")

    async with gateway:
        price = round(await call(Principal("a"), "a") * 10**9)
        loads = [asyncio.create_task(load(number)) for number in range(8)]
        for number in range(10):
            process = multiprocessing.get_context("fork").Process(target=child, args=(number,))
            process.start()
            await asyncio.to_thread(process.join)
            assert process.exitcode == 0
        at_work = False
        await asyncio.gather(*loads)
        assert await spent(PARENT) == [sum(made) * price]
        assert await spent(CHILD) == [50 * price]
        assert await gateway.check_ledger() == []

asyncio.run(main())
"""


def test_forks_under_load_fail_no_call_and_lose_none(tmp_path: Path) -> None:
    forking = [sys.executable, "-c", UNDER_LOAD, str(tmp_path)]
    ran = subprocess.run(forking, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_what_cannot_be_closed_keeps_nobody_out_after_the_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise sqlite3.OperationalError("no")

    per_process = PerProcess(lambda: sqlite3.connect(tmp_path / "a.db"))
    parents = per_process.run(lambda connection: connection)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(per_process, "close_files", fail)
        child = Child(lambda _: exit_unless(per_process.run(lambda connection: connection is not parents)))
    child.end()
    assert caplog.messages == ["a store could not be closed for a fork: OperationalError"]
    assert per_process.run(lambda connection: connection) is parents
    per_process.close()


def exit_unless(true: bool) -> None:
    assert true


def test_reports_that_follow_each_other_without_end_do_not_keep_a_fork(books: Books, caplog: pytest.LogCaptureFixture) -> None:
    anyio.run(books.write, "parent")
    under_way, over = threading.Semaphore(0), threading.Event()

    def read(connection: sqlite3.Connection) -> None:
        under_way.release()
        time.sleep(0.02)

    async def reports() -> None:
        while not over.is_set():
            await books.ledger._readers.run(read)

    threads = [threading.Thread(target=anyio.run, args=(reports,)) for _ in range(3)]
    for thread in threads:
        thread.start()
        under_way.acquire()
    with caplog.at_level(logging.WARNING):
        Child(lambda _: anyio.run(books.write, "child")).end()
    over.set()
    for thread in threads:
        thread.join()
    assert caplog.messages == [], "it was waited for in vain"
    anyio.run(books.close)
    assert books.written() == {"parent", "child"}


def test_an_interrupt_while_a_fork_waits_for_a_report_locks_nobody_out(books: Books) -> None:
    anyio.run(books.write, "parent")
    readers, over, reached = books.ledger._readers, threading.Event(), threading.Event()

    def read(connection: sqlite3.Connection) -> None:
        reached.set()
        assert over.wait(10)

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    thread = in_a_thread(partial(anyio.run, readers.run, read), reached)
    readers._change.wait_for = lambda *_: interrupt()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        process.THIS._pause()
    process.THIS._resume()
    del readers._change.wait_for
    over.set()
    thread.join()
    assert anyio.run(readers.run, lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
    anyio.run(books.close)


def test_what_is_in_the_midst_of_a_transaction_is_waited_for_though_a_report_was_waited_for_in_vain(
    books: Books, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "PATIENCE", 0.3)
    reading, reached, over = Asked(monkeypatch, Readers), threading.Event(), threading.Event()
    writing = Asked(monkeypatch, Writer)
    apply = Batch.flush

    def slowly(batch: Batch) -> None:
        if not writing.reached.is_set():
            writing.hold_on()
        apply(batch)

    def read(connection: sqlite3.Connection) -> None:
        reached.set()
        assert over.wait(10)

    anyio.run(books.write, "parent")
    monkeypatch.setattr(Batch, "flush", slowly)
    report = in_a_thread(partial(anyio.run, books.ledger._readers.run, read), reached)
    call = in_a_thread(partial(anyio.run, books.write, "later"), writing.reached)
    with caplog.at_level(logging.WARNING):
        child = Child(lambda _: anyio.run(books.write, "child"))
    over.set()
    child.end()
    for thread in (report, call):
        thread.join()
    assert len(caplog.messages) == 1, "only the report was waited for in vain"
    assert reading._asked.is_set()
    anyio.run(books.close)
    assert books.written() == {"parent", "later", "child"}


def test_nobody_reads_from_the_cache_while_its_files_are_closed_for_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskResponseCache(tmp_path / "cache")
    files, close_files = cache._worker().files, CacheFiles.close_files
    free: list[bool] = []

    def closed(closing: CacheFiles) -> None:
        close_files(closing)
        if closing is files:  # not one that another test has left
            thread = threading.Thread(target=lambda: free.append(closing._reading.acquire(blocking=False)))
            thread.start()
            thread.join()

    anyio.run(cache.flush)
    monkeypatch.setattr(CacheFiles, "close_files", closed)
    Child(lambda _: Child(lambda _: None).end()).end()
    assert free == [False]
    assert files._reading.acquire(blocking=False)
    files._reading.release()
    cache.close()


def test_a_child_has_nothing_of_what_waits_in_its_parent_from_the_beginning(books: Books) -> None:
    anyio.run(books.write, "parent")

    def begun(_: object) -> None:
        commit = books.ledger._commit
        assert (commit._writer, commit._gathered) == (None, {})

    Child(begun).end()
    anyio.run(books.close)


def test_an_interrupt_at_any_place_of_the_hooks_of_a_fork_leaves_both_processes_going_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.interrupted_forks", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert int(done.stdout) > 100
