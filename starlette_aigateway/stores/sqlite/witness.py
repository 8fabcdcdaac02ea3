"""What stands beside a database file and knows of it what SQLite cannot: that it was there before, and how far it had got.

To SQLite an absent file is a new one, and a log (`-wal`) that was lost or overwritten is one that ended earlier: either would forget what
was spent, and no cap would hold. So the lock file, which is made after the database and never deleted, keeps the number of the last row
that was committed: unsynced, so that it is never more than what is on the disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ...errors import StorageDamaged, StorageUnavailable

NUMBER_BYTES = 8
LOST = "To go on with it as it is, without what is lost, delete the .lock file beside it"
Identity: TypeAlias = tuple[int, int] | None


def lock_file_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def noted(path: Path) -> int | None:
    """How far the database at `path` had got at the least. None: it has no lock file, so nothing was ever committed to it."""
    lock_file = lock_file_of(path)
    try:
        return int.from_bytes(lock_file.read_bytes()[:NUMBER_BYTES], "big")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageUnavailable(f"{lock_file.name} cannot be read: {error.strerror}") from error


def shortfall(reached: int, known: int | None) -> str | None:
    """What is missing from a database that has only `reached` what was noted before it was read."""
    if reached >= (known or 0):
        return None
    return (
        f"ends at row {reached}, though row {known} was committed: its -wal file was lost or damaged, or an older copy was put in its place"
    )


class Witness:
    """Of the database at `path`. `progress` is a query for a number that never falls; `remedy` says what its operator should do."""

    def __init__(self, path: Path, *, progress: str, remedy: str) -> None:
        self.lock_file = lock_file_of(path)
        self._path = path
        self._progress = progress
        self._remedy = remedy
        self._opened = False

    def identity(self) -> Identity:
        """Which file is at the path. None: there is none."""
        try:
            facts = self._path.stat()
        except OSError:
            return None
        return facts.st_dev, facts.st_ino

    def open(self, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """What `connect` opens, which may be a new file where there never was one. Raises `StorageUnavailable` for a database that is gone,
        empty, or behind what was committed to it."""
        known = noted(self._path)  # before the database is read: others may commit meanwhile
        if (self._opened or known is not None) and self._is_empty():
            raise StorageDamaged(f"{self._path.name} is gone or empty, though it was in use before: {self._remedy}")
        connection = connect()
        try:
            missing = shortfall(self._reached(connection), known)
            if missing is not None:
                raise StorageDamaged(f"{self._path.name} {missing}. {LOST}; else {self._remedy}")
        except BaseException:
            connection.close()
            raise
        self._opened = True
        return connection

    def note(self, connection: sqlite3.Connection, sync: Callable[[], None]) -> None:
        """Keeps how far the database has got, once `sync` has made that last. A number that is too low, another process's or an unwritten
        one, only notices less."""
        with suppress(OSError, StorageUnavailable, sqlite3.Error):
            reached = self._reached(connection)
            sync()
            with self.lock_file.open("r+b", buffering=0) as file:
                file.write(reached.to_bytes(NUMBER_BYTES, "big"))

    def _reached(self, connection: sqlite3.Connection) -> int:
        return int(connection.execute(self._progress).fetchone()[0])

    def _is_empty(self) -> bool:
        try:
            return self._path.stat().st_size == 0
        except OSError:
            return True
