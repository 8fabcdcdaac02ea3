"""The write-ahead log of a database, synced to the disk by us instead of by SQLite within its COMMIT.

A COMMIT with `synchronous=NORMAL` writes the log and does not wait for the disk; `FULL` adds a sync of the same file at its end
(https://sqlite.org/pragma.html#pragma_synchronous). Who tells nobody of a commit before `sync` has returned promises as much, and has
given back the lock by then: another process commits meanwhile, and its sync covers this commit, too.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from ...errors import StorageUnavailable

_datasync = getattr(os, "fdatasync", os.fsync)  # macOS has none


class WriteAheadLog:
    """That of the database at `path`, which is open.

    The system tells each open file of a failed write once, and takes the page for written from then on. So after a sync that failed, no
    later one is believed: all raise, until `write_back` has brought everything into the database itself, and the log begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.path.realpath(path) + "-wal"
        self._descriptor: int | None = None
        self._doubtful = False

    def open(self) -> None:
        """Before the first commit: what fails from then on is told to this descriptor. Closing it touches none of SQLite's locks, which
        are on the other files."""
        self.close()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    @property
    def doubtful(self) -> bool:
        """Whether what was committed may be lost in a power cut, though later syncs went well."""
        return self._doubtful

    def sync(self) -> None:
        """Raises `OSError`, and `StorageUnavailable` while an earlier failure is not made up for."""
        if self._doubtful:
            raise StorageUnavailable("a sync to the disk has failed", retry_after=1.0)
        assert self._descriptor is not None, "it is open"
        try:
            _datasync(self._descriptor)
        except OSError:
            self._doubtful = True
            raise

    def write_back(self, connection: sqlite3.Connection) -> None:
        """Under the lock between processes. Raises `StorageUnavailable` while a reader keeps the log from beginning anew."""
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StorageUnavailable("a sync to the disk has failed, and the log of the database is still read", retry_after=1.0)
        self._doubtful = False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
