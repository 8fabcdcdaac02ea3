"""How often the response cache was purged, by whichever worker: read at each `get`, without a call of the system."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeAlias

from .shared_counter import SharedCounter

STALE = 0.05
"""Seconds after which a worker looks whether the file at the path is still the one that it reads."""

Generation: TypeAlias = tuple[int, int] | None
"""Another one after each purge and for other files; None while there are none."""


class Purges:
    """The counter in the file `path`, which is made when it is opened."""

    def __init__(self, path: Path) -> None:
        self._counter = SharedCounter(path)
        self._files = 0
        self._look_at = float("inf")
        self._changed_at = float("-inf")

    def open(self) -> None:
        self._look()

    def generation(self) -> Generation:
        """What an entry is compared with at every read: so no worker answers from its memory what another one purged."""
        if time.monotonic() >= self._look_at:
            self._look()
        cells = self._counter.cells
        return None if cells is None else (self._files, cells[0])

    def begin_generation(self) -> None:
        """In every worker, before this returns. Blocks for `STALE` seconds where others may read another file. Raises `OSError` without
        a directory."""
        self._look()
        self._counter.increment()
        time.sleep(max(0.0, self._changed_at + STALE - time.monotonic()))

    def _look(self) -> None:
        """At the file at the path, which may be another one than before."""
        self._look_at = time.monotonic() + STALE
        if self._counter.refresh():
            self._files += 1
            self._changed_at = time.monotonic()
