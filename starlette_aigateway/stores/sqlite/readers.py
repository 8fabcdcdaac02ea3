"""Read connections for worker threads: reports must wait for no writer, and no writer for them."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import anyio.to_thread

from ...errors import AIGatewayError, StorageUnavailable
from ...process import THIS, let_go

T = TypeVar("T")


class Readers:
    """Connections that are opened as they are needed, kept for the next reader, and closed for a fork."""

    in_use_for_long: ClassVar[bool] = True

    KEPT = 4

    def __init__(self, connect: Callable[[], sqlite3.Connection], name: str) -> None:
        self._connect = connect
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._change = threading.Condition(self._lock)
        self._idle: list[sqlite3.Connection] = []
        self._reading = 0
        """Those who have a connection open, or are about to."""
        self._paused = False
        """A fork waits for them, and lets no more come."""
        THIS.pause_for_forks(self)

    async def run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """`read` in a worker thread, on one snapshot. Raises `StorageUnavailable` where the database fails."""
        return await anyio.to_thread.run_sync(self._read, read)

    def close(self) -> None:
        with self._change:
            self.close_files()

    def pause(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        if not self._lock.acquire(timeout=timeout):
            return False
        self._paused = True
        free = self._change.wait_for(lambda: not self._reading, until - time.monotonic())
        if not free:
            self.resume()
        return free

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            self._change.notify_all()
        let_go(self._lock)

    def abandon(self) -> None:
        THIS.keep(self._idle)
        self._begin()

    def close_files(self) -> None:
        """Under the lock."""
        while self._idle:
            self._idle.pop().close()

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        try:
            with self._snapshot() as connection:
                return read(connection)
        except sqlite3.Error as error:
            raise StorageUnavailable(f"the {self._name} store cannot be read: {error}", retry_after=1.0) from error

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        with self._counted():
            connection = self._take()
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            except AIGatewayError:
                connection.execute("ROLLBACK")
                self._keep(connection)
                raise
            except BaseException:
                connection.close()
                raise
            self._keep(connection)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._paused)
            self._reading += 1
        try:
            yield
        finally:
            with self._change:
                self._reading -= 1
                self._change.notify_all()

    def _take(self) -> sqlite3.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def _keep(self, connection: sqlite3.Connection) -> None:
        if len(self._idle) < self.KEPT:
            self._idle.append(connection)
        else:
            connection.close()
