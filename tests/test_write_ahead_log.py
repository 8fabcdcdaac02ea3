"""What somebody was told lasts: a commit is told when it was synced, and a sync that failed is never taken for one."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import anyio
import pytest

from starlette_aigateway.errors import StorageUnavailable
from starlette_aigateway.stores import writer as writer_module
from starlette_aigateway.stores.sqlite import transactions, write_ahead_log
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.sqlite.ledger_batch import Batch
from starlette_aigateway.stores.sqlite.witness import Witness, noted
from starlette_aigateway.stores.sqlite.write_ahead_log import WriteAheadLog
from starlette_aigateway.stores.writer import Writer
from starlette_aigateway.testing.ledger_kit import NOON, assert_clean, completed, gather, hold_request, money

pytestmark = pytest.mark.anyio


class Syncs:
    """What stands in for the system's sync. `before` is called in front of the real one, `after` behind it."""

    def __init__(self) -> None:
        self.count = 0
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def __call__(self, descriptor: int) -> None:
        self.count += 1
        self.before()
        os.fsync(descriptor)
        self.after()


class Gate:
    """Keeps a sync until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(10), "nobody opened it"

    async def until_reached(self) -> None:
        with anyio.fail_after(10):
            while not self.reached.is_set():
                await anyio.lowlevel.checkpoint()


@pytest.fixture(autouse=True)
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    made = Syncs()
    monkeypatch.setattr(write_ahead_log, "_datasync", made)
    return made


@pytest.fixture(params=["the event loop commits", "the event loop commits during a sync", "the thread commits"], autouse=True)
def committing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SLOW", 1e9)
    if request.param == "the event loop commits during a sync":
        monkeypatch.setattr(Writer, "ENOUGH", 1)
    elif request.param == "the thread commits":
        monkeypatch.setattr(writer_module, "MAX_AT_ONCE", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
async def ledger(path: Path) -> AsyncIterator[SQLiteLedger]:
    async with SQLiteLedger(path) as ledger:
        yield ledger


@pytest.fixture
async def peer(path: Path) -> AsyncIterator[SQLiteLedger]:
    """As another process has it."""
    async with SQLiteLedger(path) as peer:
        yield peer


def holds(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute("SELECT hold FROM entries WHERE kind = 'hold'")}


async def reserve(ledger: SQLiteLedger, name: str, told: list[str] | None = None) -> None:
    await ledger.reserve(hold_request(name, 1), now=NOON)
    if told is not None:
        told.append(name)


async def test_a_grant_is_on_the_disk_before_anybody_is_told(ledger: SQLiteLedger, path: Path, syncs: Syncs) -> None:
    gate = syncs.before = Gate()
    told: list[str] = []
    async with anyio.create_task_group() as group:
        group.start_soon(reserve, ledger, "a", told)
        await gate.until_reached()
        assert holds(path) == {"use_a"}, "it is committed"
        await anyio.wait_all_tasks_blocked()
        assert told == []
        gate.opened.set()
    assert told == ["a"]


async def test_what_was_told_survives_a_power_cut_at_any_moment(ledger: SQLiteLedger, path: Path, tmp_path: Path, syncs: Syncs) -> None:
    """A copy of the files as each sync has left them is all that the power cut after it leaves; the database itself is not written to
    before there are many pages in the log."""
    told: list[str] = []
    cuts: list[int] = []

    def keep() -> None:
        shutil.copy(f"{path}-wal", tmp_path / f"{len(cuts)}.db-wal")
        shutil.copy(path, tmp_path / f"{len(cuts)}.db")
        cuts.append(-1)

    async def until_told(number: int) -> None:
        await reserve(ledger, str(number))
        told.append(f"use_{number}")
        cuts[-1] = len(told)

    syncs.after = keep
    for first in range(0, 60, 6):
        await gather([partial(until_told, number) for number in range(first, first + 6)])
    assert len(cuts) >= 10
    for number, count in enumerate(cuts):
        assert holds(tmp_path / f"{number}.db") >= set(told[: max(0, count)])
    assert set(told) == holds(path)


async def test_no_lock_is_held_while_the_disk_is_waited_for(ledger: SQLiteLedger, peer: SQLiteLedger, syncs: Syncs) -> None:
    gate = syncs.before = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(reserve, ledger, "a")
        await gate.until_reached()
        syncs.before = lambda: None
        await reserve(peer, "b")
        gate.opened.set()
    await assert_clean(ledger)
    assert await money(ledger) == (0, 2)


async def test_what_comes_during_a_sync_is_one_batch_with_one_sync(
    ledger: SQLiteLedger, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "ENOUGH", 24)
    gate = syncs.before = Gate()
    syncs.count = 0
    async with anyio.create_task_group() as group:
        group.start_soon(reserve, ledger, "a")
        await gate.until_reached()
        for number in range(20):
            group.start_soon(reserve, ledger, str(number))
            await anyio.wait_all_tasks_blocked()
        gate.opened.set()
    assert syncs.count == 2
    assert await money(ledger) == (0, 21)


async def test_a_sync_that_fails_is_told_and_what_it_left_in_doubt_is_brought_home_first(
    ledger: SQLiteLedger, peer: SQLiteLedger, path: Path, syncs: Syncs
) -> None:
    await reserve(ledger, "before")

    def fail() -> None:
        syncs.before = lambda: None
        raise OSError(errno.EIO, "no")

    syncs.before = fail
    with pytest.raises(StorageUnavailable):
        await reserve(ledger, "lost")
    assert holds(path) == {"use_before", "use_lost"}, "whoever asked has to find out"
    await reserve(ledger, "after")
    with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as database:  # without its log
        assert {name for (name,) in database.execute("SELECT hold FROM entries")} == {"use_before", "use_lost"}
    await reserve(peer, "peer")
    await assert_clean(ledger)
    assert await money(ledger) == (0, 4)


async def test_what_was_committed_while_a_sync_failed_is_told_to_nobody_either(
    ledger: SQLiteLedger, path: Path, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "ENOUGH", 3)
    gate, told = Gate(), list[str]()

    def fail() -> None:
        syncs.before = lambda: None
        gate()
        raise OSError(errno.EIO, "no")

    async def lost(name: str) -> None:
        with pytest.raises(StorageUnavailable):
            await reserve(ledger, name, told)

    syncs.before = fail
    async with anyio.create_task_group() as group:
        group.start_soon(lost, "first")
        await gate.until_reached()
        if writer_module.MAX_AT_ONCE:
            for name in ("second", "third", "fourth"):
                group.start_soon(lost, name)
            with anyio.fail_after(5):
                while len(holds(path)) < 4:  # until they are committed
                    await anyio.lowlevel.checkpoint()
        gate.opened.set()
    assert told == []
    await reserve(ledger, "after", told)
    await assert_clean(ledger)
    assert told == ["after"]


async def test_a_batch_that_fails_while_another_is_synced_harms_neither_that_one_nor_the_next(
    ledger: SQLiteLedger, path: Path, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "ENOUGH", 2)
    gate = syncs.before = Gate()
    told: list[str] = []
    async with anyio.create_task_group() as group:
        group.start_soon(reserve, ledger, "first", told)
        await gate.until_reached()

        def broken(_batch: Batch) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        async def fails(name: str) -> None:
            with pytest.raises(StorageUnavailable):
                await reserve(ledger, name, told)

        with monkeypatch.context() as patched:
            patched.setattr(Batch, "flush", broken)
            async with anyio.create_task_group() as failing:
                for name in ("second", "third"):
                    failing.start_soon(fails, name)
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                await anyio.wait_all_tasks_blocked()
                gate.opened.set()
        await reserve(ledger, "last", told)
    assert told == ["first", "last"]
    assert holds(path) == {"use_first", "use_last"}
    await assert_clean(ledger)


async def test_while_a_reader_keeps_the_doubtful_log_nothing_is_granted(ledger: SQLiteLedger, path: Path, syncs: Syncs) -> None:
    def fail() -> None:
        syncs.before = lambda: None
        raise OSError(errno.EIO, "no")

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchone()
        syncs.before = fail
        for name in ("a", "b", "c"):
            with pytest.raises(StorageUnavailable, match=r"sync|unavailable"):
                await reserve(ledger, name)
        reader.execute("COMMIT")
        await reserve(ledger, "d")
    assert holds(path) == {"use_a", "use_d"}
    await assert_clean(ledger)


async def test_closing_waits_for_what_is_being_synced_and_tells_it(ledger: SQLiteLedger, syncs: Syncs) -> None:
    gate = syncs.before = Gate()
    told: list[str] = []
    async with anyio.create_task_group() as group:
        group.start_soon(reserve, ledger, "a", told)
        await gate.until_reached()
        group.start_soon(reserve, ledger, "b", told)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(ledger.aclose)
        writer = ledger._commit._writer
        while writer is not None and not writer._stopping:
            await anyio.lowlevel.checkpoint()
        gate.opened.set()
    assert sorted(told) == ["a", "b"]
    assert await money(ledger) == (0, 2)


async def test_who_comes_while_another_closes_is_not_told_a_failure_of_what_was_done(
    ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch, syncs: Syncs
) -> None:
    """The next writer begins when the one that is being closed has ended: its end closes the log that both sync."""
    await ledger.ping()
    first = ledger._commit._writer
    assert first is not None
    opened = threading.Event()
    noted, wal_opened = first._turns.note, WriteAheadLog.open

    def note() -> None:
        opened.wait(0.3)  # the next one does not open the log before this one has closed it
        noted()

    def opening(log: WriteAheadLog) -> None:
        wal_opened(log)
        opened.set()

    monkeypatch.setattr(first._turns, "note", note)
    monkeypatch.setattr(WriteAheadLog, "open", opening)
    syncs.before = partial(first._thread.join, 10)
    closer = threading.Thread(target=ledger._commit.close)
    closer.start()
    with anyio.fail_after(10):
        while ledger._commit._writer is first:
            await anyio.sleep(0.001)
        hold = await ledger.reserve(hold_request("a"), now=NOON)
    await anyio.to_thread.run_sync(closer.join)
    assert hold.id == "use_a"
    await assert_clean(ledger)


async def test_nobody_is_told_of_a_commit_to_a_log_that_was_removed(ledger: SQLiteLedger, path: Path, syncs: Syncs) -> None:
    """As SQLite does in a process that it believes to be the last one, while a forked child goes on."""
    await reserve(ledger, "a")
    path.with_name(f"{path.name}-wal").unlink()
    for name in ("b", "c"):
        with pytest.raises(StorageUnavailable, match=r"ledger\.db-wal was removed while this process had it open: start it anew"):
            await reserve(ledger, name)
    await ledger.aclose()
    with pytest.raises(StorageUnavailable, match="was removed"):
        await reserve(ledger, "d")


async def test_a_lock_that_cannot_be_taken_at_all_is_told_and_the_next_one_is_carried_out(
    ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing takes the lock as well: what fails there must not end the thread that others wait for."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    await reserve(ledger, "a")
    with monkeypatch.context() as patched, anyio.fail_after(10):
        patched.setattr(fcntl, "flock", no_locks)
        with pytest.raises(StorageUnavailable):
            await reserve(ledger, "b")
    with anyio.fail_after(10):
        await reserve(ledger, "c")
    await assert_clean(ledger)


FORKED = """
import os, sys
import anyio
from starlette_aigateway.errors import StorageUnavailable
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.writer import Writer
from starlette_aigateway.testing.ledger_kit import NOON, hold_request

Writer.pause = lambda self, timeout: False
ledger = SQLiteLedger(sys.argv[1])
to_child, to_parent = os.pipe(), os.pipe()

async def reserve(*names):
    for name in names:
        await ledger.reserve(hold_request(name, 1), now=NOON)
        print(name, flush=True)

anyio.run(reserve, "parent")
child = os.fork()
if child == 0:
    anyio.run(reserve, "child")
    os.write(to_parent[1], b"x")
    os.read(to_child[0], 1)
    try:
        anyio.run(reserve, "later")
    except StorageUnavailable:
        print("refused", flush=True)
    os._exit(0)
os.read(to_parent[0], 1)
anyio.run(ledger.aclose)
os.write(to_child[1], b"x")
os.waitpid(child, 0)
"""


def test_a_child_that_was_forked_over_open_files_is_told_of_nothing_that_is_lost_when_its_parent_closes_them(path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", FORKED, path], capture_output=True, text=True, timeout=60, check=True)
    told = ran.stdout.split()
    assert told == ["parent", "child", "refused"], ran.stderr
    assert holds(path) == {"use_parent", "use_child"}


def test_what_waits_for_a_sync_is_carried_out_though_its_event_loop_is_closed(path: Path, syncs: Syncs) -> None:
    ledger = SQLiteLedger(path)
    gate = Gate()

    async def leave() -> None:
        await reserve(ledger, "first")
        syncs.before = gate
        for name in "ab":
            task = asyncio.create_task(reserve(ledger, name))
            await gate.until_reached()
            await asyncio.sleep(0)
            task.cancel()

    asyncio.run(leave())
    writer = ledger._commit._writer
    assert writer is not None
    gate.opened.set()
    while not writer._idle:
        pass
    asyncio.run(ledger.aclose())
    assert holds(path) == {"use_first", "use_a", "use_b"}


async def test_the_log_stays_small_though_no_commit_empties_it(ledger: SQLiteLedger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "CHECKPOINT_PAGES", 100)
    for number in range(200):
        await reserve(ledger, str(number))
        await ledger.settle(f"use_{number}", completed(1), now=NOON)
    assert Path(f"{path}-wal").stat().st_size < 200 * 4096
    await assert_clean(ledger)


def test_a_witness_notes_nothing_that_does_not_last(tmp_path: Path) -> None:
    path = tmp_path / "numbers.db"
    witness = Witness(path, progress="SELECT 7", remedy="")
    witness.lock_file.touch()

    def fail() -> None:
        raise OSError(errno.EIO, "no")

    with closing(sqlite3.connect(path)) as connection:
        witness.note(connection, fail)
        assert noted(path) == 0
        witness.note(connection, lambda: None)
    assert noted(path) == 7


def numbers(path: Path) -> transactions.Transactions[int, int]:
    """Turns at a file of numbers, with one committed and not synced yet."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS numbers (n)")
        return connection

    def apply(connection: sqlite3.Connection, numbers: Sequence[int]) -> Sequence[int]:
        return [connection.execute("INSERT INTO numbers VALUES (?)", (number,)).rowcount for number in numbers]

    log = WriteAheadLog(path)
    turns = transactions.StoreFile(connect=connect, apply=apply, name="numbers", quick=True, write_ahead_log=log).turns()
    assert turns.turn(lambda: [7]) == [1]
    return turns


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_a_sync_that_was_interrupted_left_is_synced_by_the_next_one(tmp_path: Path, syncs: Syncs) -> None:
    turns = numbers(tmp_path / "numbers.db")
    syncs.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        turns.sync()
    syncs.before = lambda: None
    syncs.count = 0
    turns.sync()
    turns.sync()
    assert syncs.count == 1
    turns.close()


def test_who_waits_for_a_sync_while_closing_for_a_fork_is_interrupted_is_told_and_the_next_turn_opens_anew(
    tmp_path: Path, syncs: Syncs
) -> None:
    turns = numbers(tmp_path / "numbers.db")
    syncs.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        turns.close_for_fork()
    syncs.before = lambda: None
    with pytest.raises(StorageUnavailable) as raised:
        turns.sync()
    assert len(turns.fail(raised.value, 1)) == 1
    assert turns.turn(lambda: [8]) == [1]
    syncs.count = 0
    turns.sync()
    assert syncs.count == 1
    turns.close()


def test_after_a_failure_no_sync_is_believed_until_the_log_begins_anew(tmp_path: Path, syncs: Syncs) -> None:
    path = tmp_path / "numbers.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE numbers (n)")
        log = WriteAheadLog(path)
        log.open()
        log.sync()

        def fail() -> None:
            raise OSError(errno.ENOSPC, "no")

        syncs.before = fail
        with pytest.raises(OSError, match="no"):
            log.sync()
        syncs.before = lambda: None
        with pytest.raises(StorageUnavailable):
            log.sync()
        log.open()
        with pytest.raises(StorageUnavailable):
            log.sync()
        log.write_back(connection)
        log.sync()
        log.close()


async def test_a_log_beside_the_file_that_a_link_names_is_found(tmp_path: Path, syncs: Syncs) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "ledger.db").symlink_to(tmp_path / "there" / "ledger.db")
    async with SQLiteLedger(tmp_path / "there" / "ledger.db"):
        pass
    async with SQLiteLedger(tmp_path / "ledger.db") as ledger:
        syncs.count = 0
        await reserve(ledger, "a")
        assert syncs.count == 1
