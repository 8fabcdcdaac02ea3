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

    SQLite removes the log when it closes the last connection. A process that was forked over open connections (`process.py`) is not counted
    (https://sqlite.org/howtocorrupt.html, section 2.6): its log may be removed while it commits to it, and what SQLite keeps of it in that
    process is wrong from then on. So a log that is gone makes every commit of this process fail, until it is started anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.path.realpath(path) + "-wal"
        self._descriptor: int | None = None
        self._doubtful = False
        self._removed = False

    def open(self) -> None:
        """Before the first commit: what fails from then on is told to this descriptor. Closing it touches none of SQLite's locks, which
        are on the other files."""
        self.close()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    @property
    def doubtful(self) -> bool:
        """Whether what was committed may be lost in a power cut, though later syncs went well, or is lost."""
        return self._doubtful or self._removed

    def sync(self) -> None:
        """Raises `OSError`, and `StorageUnavailable` while an earlier failure is not made up for, and where the log is gone, or closed: by
        a fork that was interrupted."""
        self._check_presence()
        if self._doubtful:
            raise StorageUnavailable("a sync to the disk has failed", retry_after=1.0)
        if self._descriptor is None:
            raise StorageUnavailable("the log was closed before it was synced", retry_after=1.0)
        try:
            _datasync(self._descriptor)
        except OSError:
            self._doubtful = True
            raise
        self._removed = os.fstat(self._descriptor).st_nlink == 0
        self._check_presence()

    def _check_presence(self) -> None:
        if self._removed:
            raise StorageUnavailable(
                f"{Path(self._path).name} was removed while this process had it open: start it anew. A process that is forked has to"
                " open its files itself; where the fork is not Python's own, close the gateway before",
                retry_after=1.0,
            )

    def write_back(self, connection: sqlite3.Connection) -> None:
        """Under the lock between processes. Raises `StorageUnavailable` while a reader keeps the log from beginning anew, and where it is
        gone."""
        self._check_presence()
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StorageUnavailable("a sync to the disk has failed, and the log of the database is still read", retry_after=1.0)
        self._doubtful = False

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
