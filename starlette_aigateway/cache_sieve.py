"""Which answers cannot be on disk, told without a question to SQLite.

For most calls there is none, and to look for it in the file costs as much as all other lookups of a call together, on the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from zlib import crc32

from .shared_cells import SharedCells

CELLS: Final = 2**19
"""2 MiB. With 50,000 answers, one in thirty keys that none of them has is looked for in the file."""

HIGHEST: Final = 13
"""Right shift of a CRC-32, which leaves as many bits as there are cells."""

LATEST: Final = 2**32 - 1


class Sieve:
    """A file of cells that all workers map. Each key falls on two, by the lowest and the highest bits of its CRC-32. A cell holds when the
    last of the keys that fall on it expires (Unix seconds by the gateway's clock, rounded up): after that, none of them is on disk.
    Whoever writes a row marks its key before it commits. Where two workers mark the same cell at the same moment, one mark may be lost,
    and an answer is not found that was there.
    """

    def __init__(self, path: Path) -> None:
        self._cells = SharedCells(path, "I", CELLS)

    def refresh(self) -> bool:
        """Maps the file that is at the path now; whether it is another one than before, in which all that is on disk has to be marked."""
        return self._cells.refresh()

    def may_hold(self, key: str, now: float) -> bool:
        """True where nothing could be mapped."""
        cells = self._cells.cells
        if cells is None:
            return True
        mark = crc32(key.encode())
        return cells[mark % CELLS] > now and cells[mark >> HIGHEST] > now

    def mark(self, keys: Iterable[str], expires_at: float) -> None:
        cells = self._cells.cells
        if cells is None:
            return
        until = max(0, math.ceil(min(expires_at, LATEST)))
        for key in keys:
            mark = crc32(key.encode())
            for cell in (mark % CELLS, mark >> HIGHEST):
                if cells[cell] < until:
                    cells[cell] = until
