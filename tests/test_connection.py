"""Opening a SQLite file: for this user only, several workers at once, never over a fork."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
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


def test_a_forked_child_gets_a_connection_of_its_own_and_leaves_its_parents_open(monkeypatch: pytest.MonkeyPatch) -> None:
    per_process = PerProcess(lambda: sqlite3.connect(":memory:"))
    parents = per_process.get()
    assert per_process.get() is parents
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    childs = per_process.get()
    assert childs is not parents
    assert per_process.get() is childs
    per_process.close()
    with pytest.raises(sqlite3.ProgrammingError):
        childs.execute("SELECT 1")
    assert parents.execute("SELECT 1").fetchone() == (1,)
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
