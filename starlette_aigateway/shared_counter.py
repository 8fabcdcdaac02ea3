"""A number that all processes of a host see change at once."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from .shared_cells import SharedCells

SIZE = 8
UNMAPPED = -1


class SharedCounter(SharedCells):
    """The counter in the first bytes of the file `path`. Nothing guards `set`: who calls it has to be the only one by a lock of its own.
    `increment` needs none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "q")

    @property
    def mapped(self) -> bool:
        return self.cells is not None

    @property
    def value(self) -> int:
        """`UNMAPPED` while there is no file that could be mapped."""
        cells = self.cells
        return UNMAPPED if cells is None else cells[0]

    def set(self, value: int) -> None:
        """Nothing, while there is no file that could be mapped."""
        if self.cells is not None:
            self.cells[0] = value

    def increment(self) -> None:
        """By one, whoever else does so at the same moment, and also where nothing could be mapped. Raises `OSError` without a file."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            value = int.from_bytes(os.pread(descriptor, SIZE, 0), sys.byteorder, signed=True)
            os.pwrite(descriptor, (value + 1).to_bytes(SIZE, sys.byteorder, signed=True), 0)
        finally:
            os.close(descriptor)
