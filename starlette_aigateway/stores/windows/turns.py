"""Turns at the windows: under the lock between processes, what is asked is carried out and kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from ...errors import StorageUnavailable
from ...policy.windows import microseconds
from ...protocols import Clock
from ..lock_file import LockFile
from ..sqlite.connection import prepare_directory
from ..turns import told
from .book import Book
from .log import WindowLog
from .ops import Op, Outcome
from .states import Change, Windows

ENTRIES = 3
"""Times that a turn enters a lock file that another one has taken the place of, before it gives up."""
LOOK_EVERY = 1.0
"""Seconds after which it is looked whether the file is still the one that was opened."""

log = logging.getLogger("starlette_aigateway")


@dataclass(frozen=True, kw_only=True)
class WindowFile:
    """`path` of None keeps the windows in this process. `clock` gives Unix seconds; `timeout` is the longest wait for the lock."""

    path: Path | None
    clock: Clock
    timeout: float
    name: ClassVar[str] = "window"
    quick: ClassVar[bool] = True
    lasts_at_once: ClassVar[bool] = True

    def turns(self) -> WindowTurns:
        return WindowTurns(self)


class WindowTurns:
    """As `Transactions`, for `GroupCommit`. Raises `OSError`, and `ConfigurationError` for a directory that cannot be or a file of a newer
    release. After anything that failed the next turn reads the file anew."""

    full: ClassVar[bool] = False
    noted: ClassVar[bool] = True

    def __init__(self, file: WindowFile) -> None:
        self._file = file
        path = file.path
        self.lock = LockFile(None if path is None else path.with_name(f"{path.name}.lock"), file.name, file.timeout, brief=True)
        self._kept: WindowLog | Unkept | None = None
        self._look_at = 0.0

    def turn(self, take: Callable[[], Sequence[Op]]) -> Sequence[Outcome]:
        if self._kept is None and self._file.path is not None:
            prepare_directory(self._file.path.parent)
        for _ in range(ENTRIES):
            with self.lock:
                kept = self._current(self._kept)
                if kept is not None:
                    return self._carry_out(kept, take())
            self.lock.close()
        raise StorageUnavailable("the lock file of the window store is replaced again and again", retry_after=1.0)

    def at_once(self, ops: Sequence[Op]) -> Sequence[Outcome] | None:
        """None where the file is not open yet, or another process has its turn for longer than a moment."""
        kept = self._kept
        if kept is None or not self.lock.enter_at_once():
            return None
        try:
            current = self._current(kept)
            if current is not None:
                return self._carry_out(current, ops)
            self.lock.close()
            return None
        finally:
            self.lock.leave()

    def sync(self) -> None:
        """Windows have to outlive their process, not the machine."""

    def checkpoint(self) -> None:
        """The log keeps itself short."""

    def note(self) -> None:
        """No witness is told."""

    def fail(self, error: Exception, count: int) -> Sequence[Exception]:
        self.close()
        return told(self._file.name, error, count)

    def close(self) -> None:
        self._forget()
        self.lock.close()

    def close_for_fork(self) -> None:
        """Nothing: a child may have the file mapped as well, and closes the descriptor of the lock by itself."""

    def _open(self) -> WindowLog | Unkept:
        if self._file.path is None:
            self._kept = Unkept()
        else:
            assert self.lock.identity is not None, "it was entered"
            self._kept = WindowLog(self._file.path, self.lock.identity)
        return self._kept

    def _current(self, kept: WindowLog | Unkept | None) -> WindowLog | Unkept | None:
        """What everybody writes to, as it is now. None where our lock is not theirs: its file was deleted, or replaced. Before a log is
        opened that is looked at first: under another lock somebody may be moving it, who would be taken for killed."""
        try:
            if kept is None or not kept.catch_up():
                self._forget()
                if not self.lock.in_place:
                    return None
                kept = self._open()
            current = self._in_its_place(kept)
            if current.guard != self.lock.identity:
                if not self.lock.in_place:
                    self._forget()
                    return None
                current.take_over()
        except BaseException:
            self._forget()
            raise
        return current

    def _carry_out(self, kept: WindowLog | Unkept, ops: Sequence[Op]) -> Sequence[Outcome]:
        try:
            book = Book(kept.windows, microseconds(self._file.clock()))
            outcomes = [op.apply(book) for op in ops]
            if book.changes:
                kept.append(book.now, book.changes)
        except BaseException:
            self._forget()
            raise
        return outcomes

    def _in_its_place(self, kept: WindowLog | Unkept) -> WindowLog | Unkept:
        now = time.monotonic()
        if now < self._look_at:
            return kept
        self._look_at = now + LOOK_EVERY
        if kept.in_place:
            return kept
        log.warning("the file of the window store was removed or replaced while it was in use; what is there now goes on")
        self._forget()
        return self._open()

    def _forget(self) -> None:
        """What is in a file can be read again."""
        if isinstance(self._kept, WindowLog):
            self._kept.close()
            self._kept = None


class Unkept:
    """Windows without a file. A walk over them drops those in which nothing counts any more."""

    guard: ClassVar[None] = None
    in_place: ClassVar[bool] = True
    WALK_AFTER: ClassVar[int] = 1024
    STEP: ClassVar[int] = 4

    def __init__(self) -> None:
        self.windows = Windows()
        self._changes = 0

    def catch_up(self) -> bool:
        """There is nobody else."""
        return True

    def take_over(self) -> None:
        """There is no lock."""

    def append(self, now: int, changes: Sequence[Change]) -> None:
        windows = self.windows
        windows.latest = max(windows.latest, now)
        self._changes += len(changes)
        if not windows.uncopied and self._changes > self.WALK_AFTER:
            self._changes = 0
            windows.uncopied = dict.fromkeys(windows)
        for window in list(islice(windows.uncopied, self.STEP)):
            del windows.uncopied[window]
            if windows.idle(window, now):
                windows.drop(window)
