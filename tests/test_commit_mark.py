"""What tells all workers of a commit to `config.db`: over real processes, with a writer that is killed half-way and files that are lost.

Where a test makes `STALE` endless, a reader asks the database only when the mark sends it there.
"""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from starlette_aigateway.shared_counter import UNMAPPED, SharedCounter
from starlette_aigateway.stores.sqlite import commit_mark
from starlette_aigateway.stores.sqlite.commit_mark import CommitMark
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.keys import SQLiteKeyStore
from starlette_aigateway.testing.keys import CREATED, NOW, digest_of, key

pytestmark = pytest.mark.anyio

REVOKE = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
import anyio
from starlette_aigateway import shared_cells
from starlette_aigateway.stores.sqlite.commit_mark import CommitMark
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.keys import SQLiteKeyStore

{before}

async def main():
    async with ConfigDatabase(Path(sys.argv[1])) as database:
        for key_id in sys.stdin:
            await SQLiteKeyStore(database).update(key_id.strip(), {{"revoked_at": datetime.now(UTC)}})
            print("done", flush=True)

anyio.run(main)
"""
DIES_AFTER_THE_COMMIT = "CommitMark.end = lambda mark: os._exit(9)"
DIES_BEFORE_THE_COMMIT = """
begin = CommitMark.begin
CommitMark.begin = lambda mark: (begin(mark), os._exit(9))
"""
CANNOT_MAP = """
def refused(*_):
    raise PermissionError

shared_cells.mmap.mmap = refused
"""


class Revoker:
    """Another process, which revokes the keys that it is told."""

    def __init__(self, path: Path, before: str = "") -> None:
        script = REVOKE.format(before=before)
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def revoke(self, key_id: str) -> str:
        """`done`, or nothing of a process that has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(key_id + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.db"


@pytest.fixture
def version_file(tmp_path: Path) -> Path:
    return tmp_path / "config.db.version"


@pytest.fixture
def database(path: Path) -> Iterator[ConfigDatabase]:
    database = ConfigDatabase(path)
    yield database
    database.close()


@pytest.fixture
def store(database: ConfigDatabase) -> SQLiteKeyStore:
    return SQLiteKeyStore(database)


@pytest.fixture
def revoker(path: Path) -> Iterator[Callable[[str], Revoker]]:
    started: list[Revoker] = []

    def start(before: str = "") -> Revoker:
        started.append(Revoker(path, before))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_mark, "STALE", 1e9)


async def opens(store: SQLiteKeyStore, number: int) -> bool:
    found = await store.find(digest_of(number), now=NOW)
    return found is not None and found.usable_at(NOW)


async def give(store: SQLiteKeyStore, count: int) -> None:
    """Keys 1 to `count`, each of which has been used."""
    for number in range(1, count + 1):
        await store.add(key(f"key_{number}"), digest_of(number))
    for number in range(1, count + 1):
        assert await opens(store, number)


def questions(database: ConfigDatabase) -> list[str]:
    """Fills with the statements that the connection is asked, which watches for changes."""
    asked: list[str] = []
    database._watch.run(lambda connection: connection.set_trace_callback(asked.append))
    return asked


@pytest.mark.usefixtures("endless")
async def test_the_mark_alone_tells_of_a_revocation_in_another_process(store: SQLiteKeyStore, revoker: Callable[..., Revoker]) -> None:
    await give(store, 3)
    other = revoker()
    for number in (1, 2, 3):
        assert await opens(store, number)
        assert other.revoke(f"key_{number}") == "done"
        assert not await opens(store, number)


@pytest.mark.usefixtures("endless")
async def test_while_nobody_commits_nothing_is_asked(store: SQLiteKeyStore, database: ConfigDatabase) -> None:
    await give(store, 1)
    asked = questions(database)
    for _ in range(100):
        assert await opens(store, 1)
    assert asked == []


async def test_a_commit_that_marks_nothing_is_noticed_when_what_was_seen_is_stale(
    store: SQLiteKeyStore, database: ConfigDatabase, path: Path
) -> None:
    await give(store, 1)
    database._version.forget()
    asked_at = time.monotonic()
    assert await opens(store, 1)
    assert database._version._seen.until <= time.monotonic() + commit_mark.STALE
    assert database._version._seen.until >= asked_at + commit_mark.STALE
    with closing(sqlite3.connect(path)) as shell:
        shell.execute("UPDATE keys SET revoked_at = '2020-01-01T00:00:00Z'")
        shell.commit()
    database._version._seen = database._version._seen._replace(until=time.monotonic())
    assert not await opens(store, 1)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(("fault", "holds"), [(DIES_AFTER_THE_COMMIT, True), (DIES_BEFORE_THE_COMMIT, False)])
async def test_a_writer_that_is_killed_between_the_two_marks_deceives_nobody(
    store: SQLiteKeyStore, database: ConfigDatabase, revoker: Callable[..., Revoker], fault: str, holds: bool
) -> None:
    await give(store, 2)
    assert revoker(fault).revoke("key_1") == ""
    assert await opens(store, 1) is not holds

    asked = questions(database)
    assert await opens(store, 2)
    assert asked, "nobody has said since that the commit is over"
    assert revoker().revoke("key_2") == "done"
    assert not await opens(store, 2)
    asked.clear()
    assert not await opens(store, 2)
    assert asked == [], "a later writer has"


@pytest.mark.usefixtures("endless")
async def test_a_version_file_that_was_deleted_hides_no_commit_of_a_running_worker(
    store: SQLiteKeyStore, revoker: Callable[..., Revoker], version_file: Path
) -> None:
    await give(store, 3)
    other = revoker()
    assert other.revoke("key_1") == "done"
    assert not await opens(store, 1)
    version_file.unlink()
    assert await opens(store, 2)
    assert other.revoke("key_2") == "done"
    assert not await opens(store, 2)
    assert other.revoke("key_3") == "done"
    assert not await opens(store, 3)


@pytest.mark.parametrize("before", ["", CANNOT_MAP], ids=["maps another file", "maps none"])
async def test_a_worker_that_cannot_reach_all_readers_answers_when_they_have_asked(
    store: SQLiteKeyStore,
    database: ConfigDatabase,
    revoker: Callable[..., Revoker],
    version_file: Path,
    before: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await give(store, 1)
    monkeypatch.setattr(database._version._counter, "refresh", lambda: False)
    if not before:
        version_file.unlink()
    other = revoker(before)
    assert other.revoke("nobody") == "done"
    version_file.unlink()
    database._version.forget()
    assert await opens(store, 1), "asked a moment ago"
    assert other.revoke("key_1") == "done"
    assert not await opens(store, 1)


def test_only_a_writer_that_may_not_reach_all_readers_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("starlette_aigateway.stores.sqlite.commit_mark.time.sleep", slept.append)
    lock_file, version_file = tmp_path / "config.db.lock", tmp_path / "config.db.version"

    def commits(mark: CommitMark) -> int:
        """How often it waits."""
        before = len(slept)
        mark.begin()
        mark.end()
        mark.wait()
        return len(slept) - before

    first = CommitMark(tmp_path / "config.db", lock_file)
    first.open()
    lock_file.touch()
    assert commits(first) == 0, "the database is new"
    later = CommitMark(tmp_path / "config.db", lock_file)
    later.open()
    assert [commits(later), commits(later)] == [1, 0]
    version_file.unlink()
    assert [commits(later), commits(later)] == [1, 0], "it is another file"
    version_file.unlink()
    version_file.mkdir()
    assert [commits(later), commits(later)] == [1, 1], "it is none"


async def test_a_reader_that_cannot_map_asks_each_time(
    store: SQLiteKeyStore, database: ConfigDatabase, revoker: Callable[..., Revoker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("starlette_aigateway.shared_cells.mmap.mmap", refused)
    await give(store, 1)
    asked = questions(database)
    assert await opens(store, 1)
    assert await opens(store, 1)
    assert asked == ["PRAGMA data_version"] * 2
    assert revoker().revoke("key_1") == "done"
    assert not await opens(store, 1)


@pytest.mark.usefixtures("endless")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # such a fork is what is tested
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_forked_child_sees_its_parents_commits(store: SQLiteKeyStore) -> None:
    await give(store, 1)
    from_parent, to_child = os.pipe()
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = drive(opens(store, 1))
            os.write(to_parent, b"x")
            os.read(from_parent, 1)
            os._exit(0 if before and not drive(opens(store, 1)) else 1)
        finally:
            os._exit(2)
    os.read(from_child, 1)
    await store.update("key_1", {"revoked_at": CREATED})
    os.write(to_child, b"x")
    _, status = os.waitpid(child, 0)
    for end in (from_parent, to_child, from_child, to_parent):
        os.close(end)
    assert os.waitstatus_to_exitcode(status) == 0


def drive(answer: Coroutine[None, None, bool]) -> bool:
    """What a coroutine gives that waits for nothing, without an event loop."""
    try:
        answer.send(None)
    except StopIteration as end:
        return bool(end.value)
    raise AssertionError("it waits")


def test_a_counter_is_one_number_for_all_who_map_it(tmp_path: Path) -> None:
    first, second = SharedCounter(tmp_path / "counter"), SharedCounter(tmp_path / "counter")
    assert (first.value, first.mapped) == (UNMAPPED, False)
    assert first.refresh()
    assert second.refresh()
    assert not first.refresh()
    first.set(7)
    assert (first.value, second.value) == (7, 7)
    assert (tmp_path / "counter").stat().st_mode & 0o777 == 0o600


def test_a_counter_follows_its_path_to_another_file(tmp_path: Path) -> None:
    counter, other = SharedCounter(tmp_path / "counter"), SharedCounter(tmp_path / "counter")
    counter.refresh()
    counter.set(7)
    (tmp_path / "counter").unlink()
    other.refresh()
    other.set(1)
    assert counter.value == 7
    assert counter.refresh()
    assert counter.value == 1


INCREMENT = """
import sys
from pathlib import Path
from starlette_aigateway.shared_counter import SharedCounter
counter = SharedCounter(Path(sys.argv[1]))
for _ in range(500):
    counter.increment()
"""


def test_increments_of_several_processes_are_all_counted_and_seen_by_who_maps_the_file(tmp_path: Path) -> None:
    counter = SharedCounter(tmp_path / "counter")
    counter.refresh()
    workers = [subprocess.Popen([sys.executable, "-c", INCREMENT, str(tmp_path / "counter")]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert counter.value == 1500


def test_a_counter_without_a_directory_counts_nothing_and_is_mapped_when_there_is_one(tmp_path: Path) -> None:
    counter = SharedCounter(tmp_path / "later" / "counter")
    assert not counter.refresh()
    counter.set(3)
    assert counter.value == UNMAPPED
    (tmp_path / "later").mkdir()
    assert counter.refresh()
    assert counter.value == 0
