"""Group commit: one writer thread per process and file, which commits whatever is waiting as one transaction.

Operations are values. The thread takes all that wait, and hands them to one `apply` function inside `BEGIN IMMEDIATE` ... `COMMIT`;
every waiter learns its own result only after the commit. So a batch costs one sync to the disk and few statements, and since each
SQLite statement gives up the interpreter lock, few statements also means few waits for the event loop's thread.

Between processes a lock file stands before the database: SQLite's own busy handler sleeps ever longer and starves its waiters
(seconds at four processes). What waits joins the batch until the moment the lock is ours.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from ...errors import AIGatewayError, StorageUnavailable
from ...process import THIS
from ...wakeup import ring_all, wakeup
from .commit_mark import CommitMark
from .witness import Identity, Witness

Op = TypeVar("Op")
Result = TypeVar("Result")

Apply = Callable[[sqlite3.Connection, Sequence[Op]], Sequence[Result | AIGatewayError]]
"""Carries out a batch inside an open transaction: one result or one domain error for each operation, in order. It must not raise
for a single operation; what it raises rolls back the whole batch. It may be called again for an operation that was rolled back."""

Failed = Callable[[BaseException], None]
"""Hears in the writer's thread what kept an operation from being carried out; must not raise."""

MAX_BATCH = 256
"""Operations after which a batch takes no more; what one pass of an event loop brings is never divided."""
NOTE_AFTER = 0.25
"""Seconds without work, or `NOTE_AT_LAST` seconds with it, after which a witness notes how far the file has got."""

NOTE_AT_LAST = 1.0
log = logging.getLogger("starlette_aigateway")


class Waiter(Generic[Op, Result]):
    """One operation under way. Filled by the writer thread, read by the event loop after it is woken; or nobody waits for it, and `failed`
    is called where it was not carried out."""

    __slots__ = ("failed", "op", "outcome", "wakeup")

    def __init__(self, op: Op, failed: Failed | None = None) -> None:
        self.op = op
        self.failed = failed
        self.wakeup = wakeup()
        self.outcome: Result | BaseException | None = None


class GroupCommit(Generic[Op, Result]):
    """`await commit.run(op)` applies `op` durably. Cancelling the wait does not cancel the operation: shield what has to know.

    Opens nothing before the first `run`, and opens anew in a forked child. Raises `StorageUnavailable` when the database cannot be
    written within `timeout` seconds. With a `witness`, also when it is not the file any more that was opened. Commits are told to `mark`.
    `committed` is called on the writer's thread after each transaction that went well.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        apply: Apply[Op, Result],
        *,
        name: str,
        lock_file: Path | None = None,
        timeout: float = 5.0,
        witness: Witness | None = None,
        mark: CommitMark | None = None,
        committed: Callable[[], object] | None = None,
    ) -> None:
        self._connect = connect
        self._apply = apply
        self._name = name
        self._lock_file = lock_file if witness is None else witness.lock_file
        self._witness = witness
        self._mark = mark
        self._committed = committed
        self._timeout = timeout
        self._pid = THIS.pid
        self._guard = threading.Lock()
        self._writer: _Writer[Op, Result] | None = None
        self._gathered: dict[int, list[Waiter[Op, Result]]] = {}

    async def run(self, op: Op) -> Result:
        waiter: Waiter[Op, Result] = Waiter(op)
        self._gather(waiter)
        await waiter.wakeup.wait()
        outcome = waiter.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[return-value]  # set by _deliver before the wakeup

    def tell(self, op: Op, failed: Failed) -> None:
        """Applies `op` after what this event loop has asked for before it and before what it asks for later, and waits for nothing."""
        self._gather(Waiter(op, failed))

    def close(self) -> None:
        """Commits what is waiting and ends the thread. A later `run` starts a new one."""
        if self._pid != THIS.pid:
            return
        for loop in list(self._gathered):
            self._submit(loop)
        with self._guard:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.stop()
        if writer is not None:
            writer.join()

    def _gather(self, waiter: Waiter[Op, Result]) -> None:
        """What one pass of the event loop brings goes to the thread together: it is woken once, and begins with a batch."""
        if self._pid != THIS.pid:
            self._forget_parent()
        loop = id(waiter.wakeup.loop)
        gathered = self._gathered.get(loop)
        if gathered is None:
            self._gathered[loop] = [waiter]
            waiter.wakeup.soon(lambda: self._submit(loop))
        else:
            gathered.append(waiter)

    def _submit(self, loop: int) -> None:
        waiters = self._gathered.pop(loop, None)
        if waiters is None:
            return
        with self._guard:
            if self._writer is None:
                lock = LockFile(self._lock_file, self._name, self._timeout)
                self._writer = _Writer(self._connect, self._apply, self._name, lock, self._witness, self._mark, self._committed)
            self._writer.put(waiters)

    def _forget_parent(self) -> None:
        """In a forked child: the thread stayed behind, and the descriptor that came along must not keep the parent's lock alive."""
        writer, self._writer = self._writer, None
        self._gathered = {}
        self._guard = threading.Lock()
        self._pid = THIS.pid
        if writer is not None:
            writer.lock.close()


class _Writer(Generic[Op, Result]):
    """The thread, its queue and its connection. None in the queue ends it."""

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        apply: Apply[Op, Result],
        name: str,
        lock: LockFile,
        witness: Witness | None,
        mark: CommitMark | None,
        committed: Callable[[], object] | None,
    ) -> None:
        self.lock = lock
        self._witness = witness
        self._mark = mark
        self._committed = committed
        self._identity: Identity = None
        self._unnoted_since: float | None = None
        self._connect = connect
        self._apply = apply
        self._name = name
        self._queue: SimpleQueue[list[Waiter[Op, Result]] | None] = SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name=f"aigateway-{name}", daemon=True)
        self._thread.start()

    def put(self, waiters: list[Waiter[Op, Result]]) -> None:
        self._queue.put(waiters)

    def stop(self) -> None:
        self._queue.put(None)

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                try:
                    outcomes = self._turn(batch)
                except Exception as error:  # noqa: BLE001  # the thread must outlive any fault; every waiter is told
                    self._take(batch)
                    self._disconnect()
                    log.error("the %s store failed: %s: %s", self._name, type(error).__name__, error)
                    outcomes = [self._unavailable(error) for _ in batch]
                _deliver(batch, outcomes)
                if self._stopped:
                    return
        finally:
            self._note()
            self._disconnect()

    def _next(self) -> list[Waiter[Op, Result]] | None:
        """The next batch. While none comes there is time to note how far the file has got; in the end it is taken."""
        if self._unnoted_since is not None:
            if time.monotonic() - self._unnoted_since >= NOTE_AT_LAST:
                self._note()
            try:
                return self._queue.get(timeout=NOTE_AFTER)
            except Empty:
                self._note()
        return self._queue.get()

    def _note(self) -> None:
        if self._witness is not None and self._connection is not None and self._unnoted_since is not None:
            self._witness.note(self._connection)
        self._unnoted_since = None

    def _turn(self, batch: list[Waiter[Op, Result]]) -> Sequence[Result | BaseException]:
        """Commits `batch` and all that came while the lock was awaited, which it appends."""
        connection = self._open()
        with self.lock:
            self._take(batch)
            outcomes = self._commit_or_isolate(connection, [waiter.op for waiter in batch])
        if self._mark is not None:
            self._mark.wait()
        if self._witness is not None and self._unnoted_since is None:
            self._unnoted_since = time.monotonic()
        return outcomes

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
            self._identity = None if self._witness is None else self._witness.identity()
            if self._mark is not None:
                self._mark.open()
        elif self._witness is not None and self._witness.identity() != self._identity:
            raise StorageUnavailable(f"the file of the {self._name} store was removed or replaced while it was in use", retry_after=1.0)
        return self._connection

    def _take(self, batch: list[Waiter[Op, Result]]) -> None:
        while len(batch) < MAX_BATCH and self._queue.qsize():
            waiters = self._queue.get()
            if waiters is None:
                self._stopped = True
                return
            batch.extend(waiters)

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
                    log.error("an operation on the %s store failed: %s", self._name, type(own).__name__)
                    outcomes.append(self._unavailable(own))
            return outcomes

    def _commit(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | AIGatewayError]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            outcomes = self._apply(connection, ops)
            if len(outcomes) != len(ops):
                raise RuntimeError(f"{len(ops)} operations gave {len(outcomes)} results")
            self._end(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if self._committed is not None:
            self._committed()
        return outcomes

    def _end(self, connection: sqlite3.Connection) -> None:
        if self._mark is None:
            connection.execute("COMMIT")
            return
        self._mark.begin()
        try:
            connection.execute("COMMIT")
        finally:
            self._mark.end()

    def _disconnect(self) -> None:
        """The lock file may be another one by now as well."""
        self._unnoted_since = None
        self.lock.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _unavailable(self, error: Exception) -> AIGatewayError:
        """An error for one waiter alone: the gateway writes the request's id into it."""
        if isinstance(error, AIGatewayError):
            return copy(error)
        unavailable = StorageUnavailable(f"the {self._name} store is unavailable", retry_after=1.0)
        unavailable.__cause__ = error
        return unavailable


class LockFile:
    """The lock between processes, a `flock` on a file that is never deleted: it dies with its process. `path` of None is no lock.

    Entering raises `StorageUnavailable` after `timeout` seconds. Whoever had to wait for it pauses before its next turn, so that a busy
    process does not shut out those that poll.
    """

    POLL = 0.0002
    COURTESY = 0.001
    """Seconds; several polls long, so that whoever waits finds the lock free before the one that had it comes again."""

    def __init__(self, path: Path | None, name: str, timeout: float) -> None:
        self._path = path
        self._name = name
        self._timeout = timeout
        self._descriptor: int | None = None
        self._contended = False

    def __enter__(self) -> None:
        if self._path is None:
            return
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if self._contended:
            time.sleep(self.COURTESY)
        self._contended = not self._try(self._descriptor)
        if self._contended:
            self._poll(self._descriptor)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _poll(self, descriptor: int) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._try(descriptor):
            if time.monotonic() >= deadline:
                raise StorageUnavailable(f"the {self._name} store is locked by another process", retry_after=1.0)
            time.sleep(self.POLL)


def _deliver(batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException]) -> None:
    for waiter, outcome in zip(batch, outcomes, strict=True):
        waiter.outcome = outcome
        if waiter.failed is not None and isinstance(outcome, BaseException):
            waiter.failed(outcome)
    ring_all([waiter.wakeup for waiter in batch if waiter.failed is None])
