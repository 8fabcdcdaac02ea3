"""Batches as transactions on one connection, under a lock between processes."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from ...errors import AIGatewayError, StorageUnavailable
from ..lock_file import LockFile
from ..turns import Op, Result, told, unavailable
from .commit_mark import CommitMark
from .witness import Identity, Witness
from .write_ahead_log import WriteAheadLog

Apply = Callable[[sqlite3.Connection, Sequence[Op]], Sequence[Result | AIGatewayError]]
"""Carries out a batch inside an open transaction: one result or one domain error for each operation, in order. It must not raise
for a single operation; what it raises rolls back the whole batch. It may be called again for an operation that was rolled back."""

CHECKPOINT_PAGES = 1000
"""As SQLite's own `wal_autocheckpoint`."""

PAGES_OF_A_BATCH = 10
"""That a transaction writes to the log, besides about one for each operation."""

log = logging.getLogger("starlette_aigateway")


@dataclass(frozen=True, kw_only=True)
class StoreFile(Generic[Op, Result]):
    """What a file is written with. With a `witness`, it has to be the file that was opened. Commits are told to `mark`; `committed` is
    called after each transaction that went well. What is `quick` waits for no disk: it may be written on an event loop. With a
    `write_ahead_log` that is so of a file whose commits last, too: they do once `Transactions.sync` has returned."""

    connect: Callable[[], sqlite3.Connection]
    apply: Apply[Op, Result]
    name: str
    lock_file: Path | None = None
    timeout: float = 5.0
    witness: Witness | None = None
    mark: CommitMark | None = None
    committed: Callable[[], object] | None = None
    quick: bool = False
    write_ahead_log: WriteAheadLog | None = None

    @property
    def lasts_at_once(self) -> bool:
        return self.write_ahead_log is None

    def turns(self) -> Transactions[Op, Result]:
        return Transactions(self)


class Transactions(Generic[Op, Result]):
    """The connection of one process, made at the first turn, and its lock. Not for two threads at a time."""

    def __init__(self, store: StoreFile[Op, Result]) -> None:
        self._store = store
        self.lock = LockFile(store.lock_file, store.name, store.timeout)
        self._connection: sqlite3.Connection | None = None
        self._identity: Identity = None
        self.noted = True
        """Whether the witness knows how far the file has got."""
        self._pages = 0
        self._unsynced = False

    def turn(self, take: Callable[[], Sequence[Op]]) -> Sequence[Result | BaseException]:
        """Waits for the lock, and commits what there is to `take` by then. Raises what keeps all of it from being written."""
        store, connection = self._store, self._open()
        with self.lock:
            if store.write_ahead_log is not None and store.write_ahead_log.doubtful:
                store.write_ahead_log.write_back(connection)
            outcomes = self._patiently(connection, take())
        if store.mark is not None:
            store.mark.wait()
        self.noted = store.witness is None
        return outcomes

    def at_once(self, ops: Sequence[Op]) -> Sequence[Result | BaseException] | None:
        """Commits `ops` without any wait; None where that cannot be, and nothing was done. Raises as `turn`."""
        if self._connection is None or not self._sound or not self.lock.enter_at_once():
            return None
        try:
            outcomes = self._commit_or_isolate(self._connection, ops)
        except sqlite3.OperationalError as error:
            if is_busy(error):
                return None
            raise
        finally:
            self.lock.leave()
        self.noted = self._store.witness is None
        return outcomes

    @property
    def _sound(self) -> bool:
        """Whether it is still the file that was opened, and all that was committed to it lasts or will at the next sync."""
        witness, write_ahead_log = self._store.witness, self._store.write_ahead_log
        if write_ahead_log is not None and write_ahead_log.doubtful:
            return False
        return witness is None or witness.identity() == self._identity

    def sync(self) -> None:
        """Returns when everything lasts that was committed before. Needs neither the lock nor the connection. Raises what `fail` is to be
        told."""
        write_ahead_log = self._store.write_ahead_log
        if write_ahead_log is not None and (self._unsynced or write_ahead_log.doubtful):
            self._unsynced = False  # what is committed from now on is not
            try:
                write_ahead_log.sync()
            except BaseException:
                self._unsynced = True
                raise

    @property
    def full(self) -> bool:
        """Whether there are many pages in a log that commits do not empty themselves."""
        return self._pages >= CHECKPOINT_PAGES and self._store.write_ahead_log is not None

    def checkpoint(self) -> None:
        """Moves the pages from the log into the database, as far as nobody reads the older ones. What fails here fails at a commit, too, or
        is done the next time."""
        self._pages = 0
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def fail(self, error: Exception, count: int) -> Sequence[BaseException]:
        self.close()
        return told(self._store.name, error, count)

    def note(self) -> None:
        if self._store.witness is not None and self._connection is not None and not self.noted:
            self._store.witness.note(self._connection, self.sync)
        self.noted = True

    def close(self) -> None:
        """The lock file may be another one by now as well. What is not synced yet is, or is in doubt from now on."""
        connection, self._connection = self._connection, None
        try:
            with suppress(OSError, StorageUnavailable):
                self.sync()
            self._unsynced = False
        finally:
            self.noted = True
            self._close_files(connection)

    def _close_files(self, connection: sqlite3.Connection | None) -> None:
        try:
            if self._store.write_ahead_log is not None:
                self._store.write_ahead_log.close()
            if connection is not None:
                with suppress(OSError):  # the last one to close removes the log, and nobody is to commit to it just before
                    self.lock.enter_at_once()
                connection.close()
        finally:
            self.lock.close()

    def close_for_fork(self) -> None:
        try:
            self.note()
        finally:
            self.close()

    def _open(self) -> sqlite3.Connection:
        witness, mark = self._store.witness, self._store.mark
        if self._connection is None:
            self._connection = self._store.connect()
            self._identity = None if witness is None else witness.identity()
            if mark is not None:
                mark.open()
            if self._store.quick:
                self._connection.execute("PRAGMA busy_timeout=0")
            if self._store.write_ahead_log is not None:
                self._store.write_ahead_log.open()
                self._connection.execute("PRAGMA wal_autocheckpoint=0")  # it waits for the disk
        elif witness is not None and witness.identity() != self._identity:
            raise StorageUnavailable(
                f"the file of the {self._store.name} store was removed or replaced while it was in use", retry_after=1.0
            )
        return self._connection

    def _patiently(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | BaseException]:
        """Who writes to the file without the lock, a shell perhaps, is waited for by SQLite; here where the connection has no patience."""
        deadline = time.monotonic() + self._store.timeout
        while True:
            try:
                return self._commit_or_isolate(connection, ops)
            except sqlite3.OperationalError as error:
                if not self._store.quick or not is_busy(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(LockFile.POLL)

    def _commit_or_isolate(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | BaseException]:
        """One transaction; where it fails for another reason than the storage, one for each operation, so that a single bad one
        does not take the others with it."""
        try:
            return self._commit(connection, ops)
        except (sqlite3.OperationalError, StorageUnavailable):
            raise
        except Exception as error:
            if len(ops) == 1 or type(error) is sqlite3.DatabaseError:  # the latter: the file is damaged
                raise
            outcomes: list[Result | BaseException] = []
            for op in ops:
                try:
                    outcomes.extend(self._commit(connection, [op]))
                except Exception as own:  # noqa: BLE001  # whatever one operation does, the others are carried out
                    log.error("an operation on the %s store failed: %s", self._store.name, type(own).__name__)
                    outcomes.append(unavailable(self._store.name, own))
            return outcomes

    def _commit(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | AIGatewayError]:
        store = self._store
        connection.execute("BEGIN IMMEDIATE")
        try:
            outcomes = store.apply(connection, ops)
            if len(outcomes) != len(ops):
                raise RuntimeError(f"{len(ops)} operations gave {len(outcomes)} results")
            self._end(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._pages += PAGES_OF_A_BATCH + len(ops)
        self._unsynced = True
        if store.committed is not None:
            store.committed()
        return outcomes

    def _end(self, connection: sqlite3.Connection) -> None:
        mark = self._store.mark
        if mark is None:
            connection.execute("COMMIT")
            return
        mark.begin()
        try:
            connection.execute("COMMIT")
        finally:
            mark.end()


def is_busy(error: sqlite3.OperationalError) -> bool:
    return isinstance(code := getattr(error, "sqlite_errorcode", None), int) and code & 0xFF == sqlite3.SQLITE_BUSY
