"""The files of the response cache, as one process has them open: one SELECT for a read, one thread for everything that writes.

Whoever can write to `cache.db` can poison it, but runs no code and reaches no other file: rows are bytes or they are nothing.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

from msgspec import Struct

from .cache_purges import Generation, Purges
from .cache_seal import sealed, unsealed
from .cache_sieve import Sieve
from .process import THIS, let_go, take_all
from .protocols import Clock

if TYPE_CHECKING:
    from .cache_disk import OneConnection

NAME = "cache.db"
READ_TIMEOUT = 0.05
"""Seconds that a read may wait for the file, on the event loop. In WAL mode a reader waits for nothing but a recovery."""

WRITE_TIMEOUT = 2.0
WRITER_PAGE_CACHE = 2000
"""KiB, as SQLite's own: a batch of writes fits in, and needs no page a second time."""

READER_PAGE_CACHE = 500
"""KiB: what is read often is in the memory tier."""

CLOSE_TIMEOUT = 10.0
RETRY_AFTER = 5.0
"""Seconds until a cache that could not be opened is tried again."""

GATHER_SECONDS = 0.1
MAX_BATCH = 256
CULL_SECONDS = 1.0
CULL_SHARE = 64
"""Room is made each second, and when a 64th of all there is was written."""

MAX_PENDING_BYTES = 64 * 2**20
KEPT_CORRUPT = 3
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
"""`SQLITE_ERROR` is a statement that does not fit the schema: somebody else's file."""

Failed: TypeAlias = Callable[[str, Exception], None]
"""Told what could not be done, and why."""


class Entry(Struct, frozen=True, gc=False):
    """An answer that is good until `expires_at`, and no longer than no other `generation` has begun."""

    expires_at: float
    value: bytes
    generation: Generation


class Put(Struct, frozen=True, gc=False):
    key: str
    entry: Entry
    ttl: float


class Forget(NamedTuple):
    key: str


class Ask(NamedTuple):
    """Work to be done after everything before it, whose result somebody waits for."""

    work: Callable[[], int]
    done: Future[int]


Task: TypeAlias = Put | Forget | Ask
Tasks: TypeAlias = queue.SimpleQueue[Task | None]


class CacheFiles:
    """`cache.db`, the file `purges`, which counts the purges, and the file `sieve`, which tells what cannot be in the first. Nothing is
    opened before the first task.

    Everything that fails is told to `failed`, and is a miss or a write that does not happen. `read`, `write` and `generation` are for
    event loops and do not wait; `open`, `purge` are carried out on the thread, by `ask`.
    """

    in_use_for_long: ClassVar[bool] = True

    def __init__(self, directory: Path, *, size_limit: int, clock: Clock, failed: Failed) -> None:
        self._directory = directory
        self._path = directory / NAME
        self._purges = Purges(directory / "purges")
        self.generation = self._purges.generation
        self._sieve = Sieve(directory / "sieve")
        self._size_limit = size_limit
        self._clock = clock
        self._failed = failed
        self._tasks: Tasks = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._hurry = threading.Event()
        self._queueing = threading.Lock()
        self._pending: dict[str, Put] = {}
        self._pending_bytes = 0
        self._using = threading.RLock()
        """Held by the thread while it uses the files, or opens them."""
        self._reading = threading.RLock()
        self._reader: OneConnection | None = None
        self._writer: OneConnection | None = None
        self._identity: tuple[int, int] | None = None
        self._retry_at = float("-inf")
        self._cull_at = 0.0
        self._unculled = 0
        self.tried = False
        """Whether the files were opened, or could not be. False again when they were closed for a fork."""
        THIS.pause_for_forks(self)

    def read(self, key: str, generation: Generation) -> Entry | None:
        """What waits to be written, else what is in the file."""
        waiting = self._pending.get(key)
        if waiting is not None and waiting.entry.generation in (None, generation):
            return waiting.entry
        if self._reader is None or not self._sieve.may_hold(key, self._clock()):
            return None
        try:
            with self._reading:
                packed = None if self._reader is None else self._reader.read(key)
            if packed is None:
                return None
            expires_at, value = unsealed(key, packed)
        except ValueError:  # a row that is not ours
            self._submit(Forget(key))
        except Exception as failure:  # noqa: BLE001  # whatever diskcache meets in a damaged file is a miss
            self._failed("read", failure)
            if damaged(failure):
                self.ask(self._rebuild)
        else:
            return Entry(expires_at, value, generation)
        return None

    def write(self, key: str, entry: Entry, ttl: float) -> None:
        """Queues a write, which `read` sees at once. With 64 MiB of writes in the queue, it does not happen."""
        task, size = Put(key, entry, ttl), len(entry.value)
        with self._queueing:
            if self._pending_bytes + size > MAX_PENDING_BYTES:
                return
            if not self._enqueue(task):
                return
            replaced = self._pending.get(key)
            self._pending[key] = task
            self._pending_bytes += size if replaced is None else size - len(replaced.entry.value)

    def ask(self, work: Callable[[], int]) -> Future[int]:
        """`work` on the thread, after everything that was queued before. A failure is told, and its result is 0."""
        done: Future[int] = Future()
        if not self._submit(Ask(work, done)):
            done.set_result(0)
        self._hurry.set()
        return done

    def check(self) -> None:
        """The files may be other ones by now: another worker set them aside, or somebody removed the directory. From the old ones, which a
        purge does not reach, nothing is read any more."""
        if self._identity is not None and self._identity != identity(self._path):
            self._close_reader()
            self.ask(self.open)

    def close(self) -> None:
        """Writes what is queued, ends the thread and closes the files, for good."""
        with self._queueing:
            self._closed = True
        if self._thread is not None:
            self._tasks.put(None)
            self._hurry.set()
            self._thread.join(CLOSE_TIMEOUT)
            if self._thread.is_alive():  # it waits for a lock; it closes them itself
                return
        self._close_files()

    def pause(self, timeout: float) -> bool:
        return take_all(timeout, self._using, self._reading)

    def close_files(self) -> None:
        self.tried = False
        self._close_files()

    def resume(self) -> None:
        let_go(self._reading, self._using)

    def abandon(self) -> None:
        THIS.keep(self)

    def open(self) -> int:
        """Opens what is closed, and anew what is not the file at the path any more. 1 if the files are open."""
        try:
            return int(self._opened())
        finally:
            self.tried = True

    def _opened(self) -> bool:
        if self._writer is not None and (self._reader is None or self._identity != identity(self._path)):
            self._close_files()
        if self._writer is None and self._clock() >= self._retry_at:
            self._retry_at = self._clock() + RETRY_AFTER
            if not self._open_or_replace():
                return False
            self._retry_at = float("-inf")
        if self._writer is not None and self._sieve.refresh():
            self._mark_all(self._writer)
        return self._writer is not None

    def _open_or_replace(self) -> bool:
        """A cache that cannot be opened is an empty cache; one that is damaged, a new one."""
        before = identity(self._path)
        try:
            self._open_files()
        except Exception as failure:  # noqa: BLE001  # as above
            self._failed("open", failure)
            self._close_files()
            if not damaged(failure) and not isinstance(failure, sqlite3.ProgrammingError):  # a setting in the file that is no SQL
                return False
            if identity(self._path) == before:
                self._set_aside()
            self._open_files()
        return True

    def _mark_all(self, writer: OneConnection) -> None:
        """What is on disk when a process opens the files. What comes later is marked by whoever writes it."""
        self._sieve.mark(writer.keys(), self._clock() + writer.longest_ttl())

    def purge(self) -> int:
        """Removes every row and says how many. A new generation begins before it, which ends the writes that were queued elsewhere, and one
        after it, which ends what was read meanwhile."""
        opened = self.open()
        self._purges.begin_generation()
        try:
            count = int(self._writer.clear()) if opened and self._writer is not None else 0
        except Exception as failure:  # noqa: BLE001  # what cannot be emptied is replaced
            self._failed("purge", failure)
            count = opened = 0
        if not opened:
            self._set_aside()
        for number in range(1, KEPT_CORRUPT + 1):
            for suffix in SUFFIXES:
                self._aside(number, suffix).unlink(missing_ok=True)
        self._purges.begin_generation()
        return count

    def _submit(self, task: Task) -> bool:
        with self._queueing:
            return self._enqueue(task)

    def _enqueue(self, task: Task) -> bool:
        """Under the lock of the queue. False: nothing is written any more."""
        if self._closed:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="aigateway-cache", daemon=True)
            self._thread.start()
        self._tasks.put(task)
        return True

    def _work(self) -> None:
        last = False
        while not last:
            batch, last = take(self._tasks, self._hurry)
            with self._using:
                self._carry_out_all(batch)
        self._close_files()

    def _carry_out_all(self, batch: Sequence[Task]) -> None:
        writes = [task for task in batch if not isinstance(task, Ask)]
        if writes:
            self._write(writes)
        for task in batch:
            if isinstance(task, Ask):
                task.done.set_result(self._carry_out(task.work))

    def _carry_out(self, work: Callable[[], int]) -> int:
        try:
            return work()
        except Exception as failure:  # noqa: BLE001  # the thread must outlive any fault, and somebody waits
            self._failed("use", failure)
            return 0

    def _write(self, tasks: Sequence[Put | Forget]) -> None:
        try:
            if self.open() and self._writer is not None:
                with self._writer.transact():
                    apply(self._writer, self._sieve, tasks, self.generation())
                self._cull(tasks)
        except Exception as failure:  # noqa: BLE001  # a write that fails is an answer that is not kept
            self._failed("write", failure)
            if damaged(failure):
                self._carry_out(self._rebuild)
        finally:
            self._written(tasks)

    def _cull(self, tasks: Sequence[Put | Forget]) -> None:
        """Looking for room costs as much as a batch of writes."""
        assert self._writer is not None
        self._unculled += sum(len(task.entry.value) for task in tasks if isinstance(task, Put))
        now = time.monotonic()
        if now >= self._cull_at or self._unculled * CULL_SHARE >= self._size_limit:
            self._cull_at, self._unculled = now + CULL_SECONDS, 0
            self._writer.cull()

    def _written(self, tasks: Sequence[Put | Forget]) -> None:
        with self._queueing:
            for task in tasks:
                if isinstance(task, Put) and self._pending.get(task.key) is task:
                    del self._pending[task.key]
                    self._pending_bytes -= len(task.entry.value)

    def _open_files(self) -> None:
        from .cache_disk import OneConnection  # diskcache is loaded when there are files, and on this thread

        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._directory.stat().st_mode & 0o077:
            self._directory.chmod(0o700)
        create(self._path)
        connect = partial(OneConnection, self._path, patience=WRITE_TIMEOUT, size_limit=self._size_limit)
        self._writer = connect(timeout=WRITE_TIMEOUT, page_cache=WRITER_PAGE_CACHE)
        self._identity = identity(self._path)
        reader = connect(timeout=READ_TIMEOUT, page_cache=READER_PAGE_CACHE)
        self._purges.open()
        self._reader = reader

    def _close_reader(self) -> None:
        with self._reading:
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.close()

    def _close_files(self) -> None:
        self._close_reader()
        writer, self._writer, self._identity = self._writer, None, None
        if writer is not None:
            writer.close()

    def _rebuild(self) -> int:
        if self._identity is not None and self._identity == identity(self._path):
            self._set_aside()
        return self.open()

    def _set_aside(self) -> None:
        """Renames the database, so that the next `open` makes a new one. Its log goes with it: a new file must not meet an old log."""
        self._close_files()
        number = next((n for n in range(1, KEPT_CORRUPT) if not self._aside(n).exists()), KEPT_CORRUPT)
        for suffix in SUFFIXES:
            old = Path(f"{self._path}{suffix}")
            if old.exists():
                old.replace(self._aside(number, suffix))
        self._purges.begin_generation()

    def _aside(self, number: int, suffix: str = "") -> Path:
        return Path(f"{self._path}.corrupt-{number}{suffix}")


SUFFIXES = ("-wal", "-shm", "")
"""The files of a database, itself at last."""


def apply(writer: OneConnection, sieve: Sieve, tasks: Sequence[Put | Forget], generation: Generation) -> None:
    """The last write of each key, within a transaction. A purge between `write` and now has made an entry void."""
    last = {task.key: task for task in tasks}.values()
    for task in last:
        if isinstance(task, Forget):
            writer.delete(task.key)
    puts = [task for task in last if isinstance(task, Put) and task.entry.generation in (None, generation)]
    for put in puts:
        sieve.mark((put.key,), put.entry.expires_at)
    writer.write([(put.key, sealed(put.key, put.entry.value, put.entry.expires_at), put.ttl) for put in puts])


def take(tasks: Tasks, hurry: threading.Event) -> tuple[list[Task], bool]:
    """Everything that waits, at least one task and up to the first `Ask`; and whether they are the last. After a first write it waits for
    more, for `GATHER_SECONDS` at most: `get` sees what is queued, so only the disk is in no hurry, and a thread that wakes for each
    write takes the interpreter from the event loop each time."""
    batch: list[Task] = []
    task = tasks.get()
    if isinstance(task, Put) and tasks.qsize() < MAX_BATCH:
        hurry.wait(GATHER_SECONDS)
    hurry.clear()
    while task is not None:
        batch.append(task)
        if isinstance(task, Ask) or len(batch) >= MAX_BATCH:
            return batch, False
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            return batch, False
    return batch, True


def create(path: Path) -> None:
    """Makes an empty file for this user only. One that exists is not even opened: SQLite keeps its locks, which this process would lose
    with any other descriptor (https://sqlite.org/howtocorrupt.html)."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def damaged(failure: Exception) -> bool:
    """Whether the file's contents are at fault, not its surroundings (a lock, the disk, a permission)."""
    if isinstance(failure, sqlite3.Error):
        code = getattr(failure, "sqlite_errorcode", None)
        return isinstance(code, int) and code & 0xFF in DAMAGED
    return not (isinstance(failure, OSError | MemoryError) or locked(failure))


def reason(failure: Exception) -> str:
    """What went wrong, in SQLite's and the system's own words, which name no key and no value."""
    if isinstance(failure, sqlite3.Error):
        return str(failure)
    if isinstance(failure, OSError):
        return failure.strerror or "no reason given"
    return "the file is locked" if locked(failure) else "the file's contents are not ours"


def locked(failure: Exception) -> bool:
    """Whether diskcache waited for the file in vain, and says so in its own way."""
    from diskcache import Timeout

    return isinstance(failure, Timeout)
