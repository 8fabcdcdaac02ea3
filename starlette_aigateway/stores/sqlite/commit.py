"""Group commit: one writer thread per process and file, which commits whatever is waiting as one transaction.

Operations are values. The thread takes all that wait, and hands them to one `apply` function inside `BEGIN IMMEDIATE` ... `COMMIT`;
every waiter learns its own result only after the commit. So a batch costs one sync to the disk and few statements, and since each
SQLite statement gives up the interpreter lock, few statements also means few waits for the event loop's thread.

Between processes a lock file stands before the database: a `flock` queues its waiters, where SQLite's own busy handler sleeps and
starves them (seconds at four processes).
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import EventLoopToken, current_token

from ...errors import AIGatewayError, StorageUnavailable

Op = TypeVar("Op")
Result = TypeVar("Result")

Apply = Callable[[sqlite3.Connection, Sequence[Op]], Sequence[Result | AIGatewayError]]
"""Carries out a batch inside an open transaction: one result or one domain error for each operation, in order. It must not raise
for a single operation; what it raises rolls back the whole batch."""

MAX_BATCH = 256
log = logging.getLogger("starlette_aigateway")


class Waiter(Generic[Op, Result]):
    """One operation under way. Filled by the writer thread, read by the event loop after `done` is set there."""

    __slots__ = ("done", "op", "outcome", "token")

    def __init__(self, op: Op) -> None:
        self.op = op
        self.token: EventLoopToken = current_token()
        self.done = anyio.Event()
        self.outcome: Result | BaseException | None = None


class GroupCommit(Generic[Op, Result]):
    """`await commit.run(op)` applies `op` durably. Cancelling the wait does not cancel the operation: shield what has to know.

    Opens nothing before the first `run`, and opens anew in a forked child. Raises `StorageUnavailable` when the database cannot be
    written within `timeout` seconds.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        apply: Apply[Op, Result],
        *,
        name: str,
        lock_file: Path | None = None,
        timeout: float = 5.0,
    ) -> None:
        self._connect = connect
        self._apply = apply
        self._name = name
        self._lock_file = lock_file
        self._timeout = timeout
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._queue: deque[Waiter[Op, Result]] = deque()
        self._wake = threading.Semaphore(0)
        self._guard = threading.Lock()
        self._closing = False

    async def run(self, op: Op) -> Result:
        waiter = Waiter[Op, Result](op)
        self._submit(waiter)
        await waiter.done.wait()
        outcome = waiter.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[return-value]  # set by _deliver before `done`

    def close(self) -> None:
        """Commits what is waiting and ends the thread. A later `run` starts a new one."""
        if self._pid != os.getpid():
            return
        with self._guard:
            thread, self._thread, self._closing = self._thread, None, True
        if thread is not None:
            self._wake.release()
            thread.join()
        self._closing = False

    def _submit(self, waiter: Waiter[Op, Result]) -> None:
        if self._pid != os.getpid():
            self._reset()
        with self._guard:
            self._queue.append(waiter)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"aigateway-{self._name}", daemon=True)
                self._thread.start()
        self._wake.release()

    def _work(self) -> None:
        connection: sqlite3.Connection | None = None
        lock: int | None = None
        try:
            while True:
                self._wake.acquire()
                batch = self._take()
                if batch:
                    try:
                        if connection is None:
                            connection = self._connect()
                            lock = self._open_lock()
                        outcomes: Sequence[Result | BaseException] = self._commit(connection, lock, batch)
                    except Exception as error:  # noqa: BLE001  # the thread must outlive any fault; every waiter is told
                        if connection is not None:
                            connection.close()
                            connection = None
                        outcomes = [self._unavailable(error)] * len(batch)
                    self._deliver(batch, outcomes)
                elif self._closing:
                    return
        finally:
            if connection is not None:
                connection.close()
            if lock is not None:
                os.close(lock)

    def _take(self) -> list[Waiter[Op, Result]]:
        batch: list[Waiter[Op, Result]] = []
        while self._queue and len(batch) < MAX_BATCH:
            batch.append(self._queue.popleft())
            if len(batch) > 1:
                self._wake.acquire(blocking=False)
        return batch

    def _commit(
        self, connection: sqlite3.Connection, lock: int | None, batch: Sequence[Waiter[Op, Result]]
    ) -> Sequence[Result | AIGatewayError]:
        self._lock(lock)
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                outcomes = self._apply(connection, [waiter.op for waiter in batch])
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        finally:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_UN)
        return outcomes

    def _open_lock(self) -> int | None:
        if self._lock_file is None:
            return None
        return os.open(self._lock_file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def _lock(self, lock: int | None) -> None:
        if lock is None:
            return
        deadline = time.monotonic() + self._timeout
        pause = 0.0001
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StorageUnavailable(f"the {self._name} store is locked by another process", retry_after=1.0) from None
                time.sleep(pause)
                pause = min(pause * 1.5, 0.002)
            else:
                return

    def _unavailable(self, error: Exception) -> StorageUnavailable:
        if isinstance(error, StorageUnavailable):
            return error
        log.error("the %s store failed: %s: %s", self._name, type(error).__name__, error)
        unavailable = StorageUnavailable(f"the {self._name} store is unavailable", retry_after=1.0)
        unavailable.__cause__ = error
        return unavailable

    def _deliver(self, batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException]) -> None:
        """Wakes the waiters, with one call into each event loop."""
        loops: dict[EventLoopToken, list[Waiter[Op, Result]]] = {}
        for waiter, outcome in zip(batch, outcomes, strict=True):
            waiter.outcome = outcome
            loops.setdefault(waiter.token, []).append(waiter)
        for token, waiters in loops.items():
            _call_soon(token, waiters)


def _call_soon(token: EventLoopToken, waiters: Sequence[Waiter[Op, Result]]) -> None:
    def wake() -> None:
        for waiter in waiters:
            waiter.done.set()

    native = token.native_token
    schedule = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon  # type: ignore[attr-defined]  # asyncio's loop, trio's token
    try:
        schedule(wake)
    except RuntimeError:  # the loop was closed while its operation was being committed; asyncio and trio.RunFinishedError
        log.debug("a waiter's event loop is closed")
