"""Keys in SQLite: the contract of every key store, and what this one promises of its files, processes and faults."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from starlette_aigateway.errors import ConfigurationError, InvalidArgument, NotFound, StorageUnavailable
from starlette_aigateway.policy import keys
from starlette_aigateway.stores.sqlite import commit_mark, config
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.keys import SQLiteKeyStore
from starlette_aigateway.testing.keys import CREATED, NOW, KeyStoreContract, digest_of, key
from starlette_aigateway.types import Key

pytestmark = pytest.mark.anyio


@pytest.fixture
def database(tmp_path: Path) -> Iterator[ConfigDatabase]:
    database = ConfigDatabase(tmp_path / "config.db")
    yield database
    database.close()


@pytest.fixture
def store(database: ConfigDatabase) -> SQLiteKeyStore:
    return SQLiteKeyStore(database)


class TestSQLiteKeyStore(KeyStoreContract):
    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[SQLiteKeyStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLiteKeyStore(database)
        database.close()


def opens(found: Key | None) -> bool:
    return found is not None and found.usable_at(NOW)


class Worker:
    """Another process with the same file, told what to do line by line."""

    SCRIPT = """
import sys
from datetime import UTC, datetime
from pathlib import Path
import anyio
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.keys import SQLiteKeyStore

async def main():
    async with ConfigDatabase(Path(sys.argv[1])) as database:
        store = SQLiteKeyStore(database)
        for line in sys.stdin:
            verb, argument = line.split()
            if verb == "find":
                found = await store.find(bytes.fromhex(argument), now=0.0)
                answer = "none" if found is None else "revoked" if found.revoked_at else "open"
            else:
                await store.update(argument, {"revoked_at": datetime.now(UTC)})
                answer = "done"
            print(answer, flush=True)

anyio.run(main)
"""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def worker(tmp_path: Path, database: ConfigDatabase) -> Iterator[Worker]:
    worker = Worker(tmp_path / "config.db")
    yield worker
    worker.close()


async def test_a_revocation_in_another_process_holds_from_the_next_find_on(store: SQLiteKeyStore, worker: Worker) -> None:
    await store.add(key(), digest_of(1))
    assert opens(await store.find(digest_of(1), now=NOW))
    assert worker.ask("revoke key_1") == "done"
    assert not opens(await store.find(digest_of(1), now=NOW))


async def test_a_revocation_here_holds_in_another_process_from_its_next_find_on(store: SQLiteKeyStore, worker: Worker) -> None:
    digest = digest_of(1).hex()
    assert worker.ask(f"find {digest}") == "none"
    await store.add(key(), digest_of(1))
    assert worker.ask(f"find {digest}") == "open"
    await store.update("key_1", {"revoked_at": CREATED})
    assert worker.ask(f"find {digest}") == "revoked"


async def test_a_raw_key_is_in_no_file(store: SQLiteKeyStore, tmp_path: Path) -> None:
    first, second = keys.mint(os.urandom), keys.mint(os.urandom)
    await store.add(key(hint=keys.hint(first)), keys.digest(first))
    await store.rotate("key_1", keys.digest(second), keys.hint(second), previous_until=NOW)
    assert await store.find(keys.digest(second), now=NOW) is not None
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.db", "config.db-shm", "config.db-wal", "config.db.lock", "config.db.version"]
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for raw in (first, second):
            assert raw.encode() not in content
            assert raw[len(keys.PREFIX) : -keys.CHECKSUM_LENGTH].encode() not in content


async def test_the_files_are_for_this_user_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with ConfigDatabase(tmp_path / "config.db") as database:
            await SQLiteKeyStore(database).add(key(), digest_of(1))
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("config.db", "config.db-shm", "config.db-wal", "config.db.lock", "config.db.version"), 0o600)


async def test_keys_survive_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        async with ConfigDatabase(tmp_path / "config.db") as database:
            store = SQLiteKeyStore(database)
            if await store.find(digest_of(1), now=NOW) is None:
                await store.add(key(metadata={"a": 1}), digest_of(1))
    async with ConfigDatabase(tmp_path / "config.db") as database:
        assert await SQLiteKeyStore(database).find(digest_of(1), now=NOW) == key(metadata={"a": 1})


async def test_constructing_opens_and_creates_nothing(tmp_path: Path) -> None:
    SQLiteKeyStore(ConfigDatabase(tmp_path / "config.db"))
    assert list(tmp_path.iterdir()) == []


async def test_a_closed_database_opens_again_and_forgets_what_it_knew(
    database: ConfigDatabase, store: SQLiteKeyStore, tmp_path: Path
) -> None:
    await store.add(key(), digest_of(1))
    assert opens(await store.find(digest_of(1), now=NOW))
    database.close()
    async with ConfigDatabase(tmp_path / "config.db") as other:
        await SQLiteKeyStore(other).update("key_1", {"revoked_at": CREATED})
    assert not opens(await store.find(digest_of(1), now=NOW))


async def test_a_known_key_is_answered_without_a_query_and_an_unknown_one_is_not_remembered(
    database: ConfigDatabase, store: SQLiteKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.add(key(), digest_of(1))
    queries = 0
    read = database.read

    def counted(op: config.Read[object]) -> object:
        nonlocal queries
        queries += 1
        return read(op)

    monkeypatch.setattr(database, "read", counted)
    for _ in range(3):
        assert await store.find(digest_of(1), now=NOW) is not None
    assert queries == 1
    for _ in range(3):
        assert await store.find(digest_of(2), now=NOW) is None
    assert queries == 4


async def test_what_is_remembered_is_bounded(database: ConfigDatabase) -> None:
    remembered: config.Remembered[int, int] = config.Remembered(database, limit=3)
    for number in range(10):
        assert remembered.get(number, lambda number=number: number) == number  # type: ignore[misc]  # the lambda's default is an int
    assert sorted(remembered.entries()) == [7, 8, 9]


async def test_a_failing_write_harms_no_other_in_its_batch(database: ConfigDatabase) -> None:
    def refuse(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO tenants (id, limits) VALUES ('refused', '{}')")
        raise NotFound("refused")

    def mistake(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO tenants (id, limits) VALUES ('mistaken', '{}')")
        raise KeyError("a mistake")

    def wrong_sql(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO nowhere VALUES (1)")

    def insert(connection: sqlite3.Connection, name: str) -> None:
        connection.execute("INSERT INTO tenants (id, limits) VALUES (?, '{}')", (name,))

    async def expect(error: type[Exception], op: config.Write[None]) -> None:
        with pytest.raises(error):
            await database.write(op)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(database.write, lambda connection: insert(connection, "one"))
        tasks.start_soon(expect, NotFound, refuse)
        tasks.start_soon(expect, KeyError, mistake)
        tasks.start_soon(expect, StorageUnavailable, wrong_sql)
        tasks.start_soon(expect, InvalidArgument, lambda connection: insert(connection, "\ud800"))
        tasks.start_soon(database.write, lambda connection: insert(connection, "two"))
    names = database.read(lambda connection: connection.execute("SELECT id FROM tenants ORDER BY id").fetchall())
    assert names == [("one",), ("two",)]


async def test_a_text_that_is_not_unicode_is_refused_as_such(store: SQLiteKeyStore) -> None:
    with pytest.raises(InvalidArgument):
        await store.get("\ud800")


async def test_a_file_that_is_no_database_is_storage_unavailable(tmp_path: Path) -> None:
    (tmp_path / "config.db").write_bytes(b"this is not a database" * 500)
    database = ConfigDatabase(tmp_path / "config.db")
    store = SQLiteKeyStore(database)
    with pytest.raises(StorageUnavailable, match=r"config\.db"):
        async with database:
            raise AssertionError
    with pytest.raises(StorageUnavailable):
        await store.find(digest_of(1), now=NOW)
    with pytest.raises(StorageUnavailable):
        await store.add(key(), digest_of(1))
    database.close()


async def test_a_directory_that_is_not_there_is_storage_unavailable_until_it_is(tmp_path: Path) -> None:
    database = ConfigDatabase(tmp_path / "later" / "config.db")
    store = SQLiteKeyStore(database)
    with pytest.raises(StorageUnavailable):
        await store.find(digest_of(1), now=NOW)
    (tmp_path / "later").mkdir()
    assert await store.find(digest_of(1), now=NOW) is None
    database.close()


async def test_a_database_of_a_newer_release_is_a_configuration_error(tmp_path: Path) -> None:
    async with ConfigDatabase(tmp_path / "config.db"):
        pass
    connection = sqlite3.connect(tmp_path / "config.db")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    database = ConfigDatabase(tmp_path / "config.db")
    with pytest.raises(ConfigurationError):
        database.version()
    database.close()


async def test_a_known_key_opens_nothing_once_the_database_cannot_be_read(
    store: SQLiteKeyStore, database: ConfigDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_mark, "STALE", 0.0)  # the moment at which it is asked
    await store.add(key(), digest_of(1))
    assert opens(await store.find(digest_of(1), now=NOW))
    database._watch.run(lambda connection: connection.close())
    with pytest.raises(StorageUnavailable):
        await store.find(digest_of(1), now=NOW)
    assert opens(await store.find(digest_of(1), now=NOW)), "the next call opens it anew"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # such a fork is what is tested
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_forked_child_opens_its_own_connections_and_sees_later_changes(store: SQLiteKeyStore, database: ConfigDatabase) -> None:
    await store.add(key(), digest_of(1))
    assert opens(await store.find(digest_of(1), now=NOW))
    to_child, from_parent = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(to_child, 1)
        try:
            find = store.find(digest_of(1), now=NOW)
            find.send(None)
        except StopIteration as answer:
            revoked = answer.value is not None and answer.value.revoked_at is not None
            os._exit(0 if revoked else 1)
        finally:
            os._exit(2)
    await store.update("key_1", {"revoked_at": CREATED})
    os.write(from_parent, b"x")
    _, status = os.waitpid(child, 0)
    os.close(to_child)
    os.close(from_parent)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not opens(await store.find(digest_of(1), now=NOW))


async def test_several_workers_that_start_at_once_all_find_the_schema(tmp_path: Path) -> None:
    workers = [Worker(tmp_path / "config.db") for _ in range(4)]
    try:
        assert [worker.ask(f"find {digest_of(1).hex()}") for worker in workers] == ["none"] * 4
    finally:
        for worker in workers:
            worker.close()
