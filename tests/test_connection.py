"""Opening a SQLite file: for this user only, several workers at once, never over a fork."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest

from starlette_aigateway.errors import StorageUnavailable
from starlette_aigateway.stores.sqlite import connection
from starlette_aigateway.stores.sqlite.connection import PerProcess, connect, create_private


def test_a_worker_waits_while_another_one_makes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        other.execute("ROLLBACK")

    monkeypatch.setattr(time, "sleep", pause)
    opened = connect(tmp_path / "a.db", durability="OFF", schema=["CREATE TABLE t (a)"])
    assert opened.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert len(pauses) == 1
    opened.close()
    other.close()


def test_a_file_that_stays_locked_is_storage_unavailable_after_the_timeout(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match=r"a\.db"):
        connect(tmp_path / "a.db", durability="OFF", schema=[], busy_timeout=0.01)
    other.close()


def test_a_private_file_is_made_once_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    before = os.umask(0)
    try:
        create_private(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"content")
    create_private(path)
    assert path.read_bytes() == b"content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.db"]


def test_a_database_in_memory_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    connect(Path(":memory:"), durability="OFF", schema=[]).close()
    assert list(tmp_path.iterdir()) == []


def itself(opened: sqlite3.Connection) -> sqlite3.Connection:
    return opened


def is_open(opened: sqlite3.Connection) -> bool:
    with suppress(sqlite3.ProgrammingError):
        opened.execute("SELECT 1").close()
        return True
    return False


def test_there_is_one_connection_until_it_is_closed() -> None:
    per_process = PerProcess(lambda: sqlite3.connect(":memory:"))
    first = per_process.run(itself)
    assert per_process.run(itself) is first
    per_process.close()
    assert not is_open(first)
    assert is_open(per_process.run(itself))
    per_process.close()


def test_a_child_that_was_forked_without_a_pause_leaves_its_parents_connection_open() -> None:
    per_process = PerProcess(lambda: sqlite3.connect(":memory:"))
    parents = per_process.run(itself)
    per_process.abandon()
    assert per_process.run(itself) is not parents
    per_process.close()
    assert is_open(parents)
    parents.close()


def test_a_start_does_not_read_all_of_a_large_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.db"
    opened = connection.connect(path, durability="OFF", schema=("CREATE TABLE t (x)",))
    asked: list[str] = []
    opened.set_trace_callback(asked.append)
    connection.look_for_damage(opened, path, "mend it")
    assert asked == ["PRAGMA quick_check(1)"]
    monkeypatch.setattr(connection, "CHECK_BYTES", 0)
    connection.look_for_damage(opened, path, "mend it", ("t",))
    assert asked == ["PRAGMA quick_check(1)", "PRAGMA quick_check(t)"]
    opened.close()
