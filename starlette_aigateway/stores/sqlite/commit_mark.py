"""Whether anything was committed to a database since it was last asked, told without asking it.

A `SharedCounter` beside the database is odd while a commit is under way and another even number after it. So a reader that finds the
even number which it knows can go on with what it read. An odd one, a commit that goes on or whose process was killed, sends it to the
database itself (`PRAGMA data_version`), and so does, for commits that mark nothing, such as those of the `sqlite3` shell, the passing of
`STALE` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...shared_counter import SharedCounter

STALE = 0.05
"""Seconds after which a reader asks the database, whatever the mark says."""


def mark_of(database: Path) -> SharedCounter:
    return SharedCounter(database.with_name(database.name + ".version"))


class CommitMark:
    """The writer's side; used under its lock between processes.

    Where a reader may be looking at another file, since this one was made or changed hands a moment ago, or none could be mapped, `wait`
    waits until every reader has asked the database: what was committed then holds everywhere before its writer says so.
    """

    def __init__(self, database: Path, lock_file: Path) -> None:
        self._counter = mark_of(database)
        self._lock_file = lock_file
        self._unsure = False

    def open(self) -> None:
        """Before the lock file is made at the first write ever, which no reader can have missed."""
        new = not self._lock_file.exists()
        if self._counter.refresh() and not new:
            self._unsure = True

    def begin(self) -> None:
        self._counter.set(self._counter.value | 1)
        if self._counter.refresh():  # the file was deleted: what was mapped stays odd for whoever still looks at it
            self._unsure = True
            self._counter.set(self._counter.value | 1)

    def end(self) -> None:
        self._counter.set(self._counter.value + 1)

    def wait(self) -> None:
        if self._unsure or not self._counter.mapped:
            time.sleep(STALE)
        self._unsure = False


class Seen(NamedTuple):
    """A `version` that is true while the counter is at `mark`, and until the moment `until` (monotonic)."""

    mark: int
    version: int
    until: float


NOTHING = Seen(-2, -1, 0.0)


class Version:
    """The reader's side: a number that is another one after any commit. `ask` asks the database."""

    def __init__(self, database: Path, ask: Callable[[], int]) -> None:
        self._counter = mark_of(database)
        self._ask = ask
        self._seen = NOTHING
        self._look_at = 0.0

    def get(self) -> int:
        """About 0.3 µs; raises what `ask` raises."""
        mark, version, until = self._seen
        cells = self._counter.cells
        if cells is not None and mark == cells[0] and time.monotonic() < until:
            return version
        return self._asked()

    def forget(self) -> None:
        self._seen = NOTHING

    def _asked(self) -> int:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + STALE
            self._counter.refresh()
        mark = self._counter.value  # before the question: what is committed after it changes the mark
        version = self._ask()
        self._seen = NOTHING if mark & 1 else Seen(mark, version, now + STALE)
        return version
