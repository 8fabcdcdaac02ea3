"""The response cache: diskcache, shared by all workers of a host, with a memory tier in each of them."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread

from .cache_files import CacheFiles, Entry, reason
from .cache_purges import Generation
from .process import THIS
from .protocols import Clock
from .wakeup import ring_all, wakeup

OPEN_TIMEOUT = 1.0
"""Seconds that calls wait for the files to be opened, at the first use and after a fork; once it was in vain, nobody else waits."""

log = logging.getLogger("starlette_aigateway")


class MemoryTier:
    """The entries used last, at most `entries` of them and `size` bytes. Safe between threads."""

    def __init__(self, entries: int, size: int) -> None:
        self._max_entries = entries
        self._max_bytes = size
        self._bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, now: float, generation: Generation) -> bytes | None:
        if key not in self._entries:  # most calls ask for what is not there
            return None
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if entry.expires_at <= now or entry.generation != generation:
                self._drop(key)
                return None
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: str, entry: Entry) -> None:
        entries, size = self._entries, len(entry.value)
        with self._lock:
            if key in entries:
                self._drop(key)
            if size > self._max_bytes:
                return
            entries[key] = entry
            self._bytes += size
            while self._bytes > self._max_bytes or len(entries) > self._max_entries:
                self._drop(next(iter(entries)))

    def clear(self) -> int:
        with self._lock:
            count = len(self._entries)
            self._entries.clear()
            self._bytes = 0
            return count

    def _drop(self, key: str) -> None:
        self._bytes -= len(self._entries.pop(key).value)


class Worker:
    """What one process has of the cache; a forked child gets its own."""

    __slots__ = ("files", "generation", "memory")

    def __init__(self, files: CacheFiles, memory: MemoryTier) -> None:
        self.files = files
        self.memory = memory
        self.generation: Generation = None


class DiskResponseCache:
    """Answers on disk, shared by all workers of the host, and the ones used last in memory. No verb raises: a failure is a miss, logged
    once for each kind, without keys or values.

    `directory` is made at the first use (0700); nothing is opened before, and a forked child opens its own. `size_limit` is in bytes on
    disk, where the entries stored first make room; `memory_entries` and `memory_bytes` bound the memory of each process.

    - `put` waits for nothing, but for the files to be opened where they are not yet: a `get` in this process sees it at once, other
      workers when the writer thread has committed it. What is not yet written when the process dies is lost.
    - An entry expires by `clock` in every worker. A `purge` holds in every worker from its next `get` on, also for what was put before it
      and not yet written; but not for what a worker put that could not open the files then.
    - A damaged `cache.db` is set aside as `cache.db.corrupt-1` (at most three are kept, a purge removes them) and made anew.
    """

    def __init__(
        self,
        directory: Path,
        *,
        size_limit: int = 2**30,
        memory_entries: int = 1024,
        memory_bytes: int = 32 * 2**20,
        clock: Clock = time.time,
    ) -> None:
        self._directory = directory
        self._size_limit = size_limit
        self._memory_entries = memory_entries
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._workers: dict[int, Worker] = {}  # a parent's entry stays: its connections must be neither used nor closed in the child
        self._logged: set[tuple[str, str]] = set()

    async def get(self, key: str) -> bytes | None:
        worker = self._at_hand() or await self._open()
        files, now = worker.files, self._clock()
        generation = files.generation()
        if generation != worker.generation:
            files.check()
            worker.generation = generation  # afterwards: until then every other thread looks for itself
        value = worker.memory.get(key, now, generation)
        if value is not None:
            return value
        entry = files.read(key, generation)
        if entry is None or entry.expires_at <= now:
            return None
        worker.memory.put(key, entry)
        return entry.value

    def recall(self, key: str) -> bytes | None:
        """What `get` would give, where this process has it in memory; else None."""
        worker = self._at_hand()
        if worker is None:
            return None
        generation = worker.files.generation()
        return worker.memory.get(key, self._clock(), generation) if generation == worker.generation else None

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        if ttl > 0:
            worker = self._at_hand() or await self._open()
            entry = Entry(self._clock() + ttl, value, worker.files.generation())
            worker.memory.put(key, entry)
            worker.files.write(key, entry, ttl)

    async def purge(self) -> int:
        worker = self._worker()
        count = await wait(worker.files.ask(worker.files.purge))
        return max(count, worker.memory.clear())

    async def flush(self) -> None:
        """Returns when everything that was put before is on disk, or could not be written."""
        files = self._worker().files
        await wait(files.ask(files.open))

    def close(self) -> None:
        """Writes what is queued and closes the files; blocks for that. A later use opens them again."""
        worker = self._workers.pop(THIS.number, None)
        if worker is not None:
            worker.files.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)

    def _at_hand(self) -> Worker | None:
        """This process's, once its files were opened, or could not be, or were waited for in vain."""
        worker = self._workers.get(THIS.number)
        return worker if worker is not None and worker.files.tried else None

    async def _open(self) -> Worker:
        worker = self._worker()
        if not worker.files.tried and not await wait(worker.files.ask(worker.files.open), OPEN_TIMEOUT):
            worker.files.tried = True
        return worker

    def _worker(self) -> Worker:
        process = THIS.number
        return self._workers.get(process) or self._workers.setdefault(process, self._new_worker())

    def _new_worker(self) -> Worker:
        files = CacheFiles(self._directory, size_limit=self._size_limit, clock=self._clock, failed=self._failed)
        return Worker(files, MemoryTier(self._memory_entries, self._memory_bytes))

    def _failed(self, what: str, failure: Exception) -> None:
        kind = (what, type(failure).__name__)
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning(
                "the response cache could not %s its files (%s: %s); calls go on without it", what, type(failure).__name__, reason(failure)
            )


async def wait(done: Future[int], timeout: float | None = None) -> int:
    """The thread's result; 0 after `timeout` seconds without one."""
    waiting = wakeup()
    done.add_done_callback(lambda _: ring_all([waiting]))
    with anyio.move_on_after(timeout):
        await waiting.wait()
    return done.result() if done.done() else 0
