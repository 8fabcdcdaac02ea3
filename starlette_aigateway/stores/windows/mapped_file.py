"""A file of two halves that all processes of a host have mapped into their memory, each filled with frames, one after the other.

A frame is its length, a CRC-32 and its payload. The first two are written last, so that what a killed process left unfinished is not there.
How far each half is filled is noted after that: no frame where one was noted is damage, and not the end.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from tempfile import mkstemp
from zlib import crc32

from ...errors import ConfigurationError
from ..lock_file import Identity, identity_of

MAGIC = b"aigwinds"
VERSION = 1
LAST_VERSION = 2**16
"""What is above is no version of any release."""
PAGE = 4096
_head = Struct("<8sQQQQ")
"""The magic, the version, the bytes of a half, and which lock file it is written under."""
_turn = Struct("<q")
_TURN_AT = _head.size
_TURN_END = _TURN_AT + _turn.size
_CHECK_BITS = 24
LAST_TURN = 2**38
"""No log gets there, and its number has room beside its check."""
_filled = Struct("<Q")
_frame = Struct("<II")
END = bytes(_frame.size)


class Damaged(Exception):
    """What is there is not what was written."""


class MappedFile:
    """The file at `path`, and the `position` in it where the next frame is read or written; first of all `go_to` a half. Opening raises
    `OSError`, `Damaged` for a file that is none of these, and `ConfigurationError` for one of a newer release."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            head = os.pread(descriptor, PAGE, 0)
            self.half, self.guard = _described(head, facts.st_size, path.name)
            self._memory = mmap.mmap(descriptor, facts.st_size)
        finally:
            os.close(descriptor)
        self.identity = identity_of(facts)
        self._begin = self._end = self.position = self._filled_at = 0
        self._turn: tuple[bytes, int | None] = b"", None

    @property
    def turn(self) -> int | None:
        """The number of the half that is written now, its parity says which; negative once the log went on in another file. None where
        what is there was never written."""
        cell = self._memory[_TURN_AT:_TURN_END]
        if cell != self._turn[0]:
            self._turn = cell, _turn_in(cell)
        return self._turn[1]

    @turn.setter
    def turn(self, number: int) -> None:
        self._memory[_TURN_AT:_TURN_END] = _turn_cell(number)

    @property
    def at_end(self) -> bool:
        return self._memory[self.position : self.position + _frame.size] == END and self._filled <= self.used

    @property
    def _filled(self) -> int:
        """Bytes of the half that frames were written to, or some less where a process was killed before it noted the last of them."""
        return int(_filled.unpack_from(self._memory, self._filled_at)[0])

    @_filled.setter
    def _filled(self, size: int) -> None:
        self._memory[self._filled_at : self._filled_at + _filled.size] = _filled.pack(size)

    @property
    def used(self) -> int:
        """Bytes of the half up to here."""
        return self.position - self._begin

    def go_to(self, number: int) -> None:
        self._begin = self.position = PAGE + (number & 1) * self.half
        self._end = self._begin + self.half
        self._filled_at = _TURN_END + (number & 1) * _filled.size

    def begin_anew(self) -> None:
        """The half is written from its beginning on. Who looks before there is something finds nothing, and no damage."""
        self._filled = 0
        self._memory[self._begin : self._begin + _frame.size] = END

    def next(self) -> bytes | None:
        """The payload of the next frame, None at the end. Raises `Damaged`."""
        begin = self.position + _frame.size
        length, check = _frame.unpack_from(self._memory, self.position)
        if not length and self._filled <= self.used:
            return None
        payload = self._memory[begin : begin + length]
        if not length or begin + length > self._end - len(END) or crc32(payload) != check:
            raise Damaged
        self.position = begin + length
        return payload

    def append(self, frames: bytes) -> bool:
        """Writes them; False where there is no room for them, and nothing was done."""
        memory, begin, end = self._memory, self.position, self.position + len(frames)
        if end + len(END) > self._end:
            return False
        memory[begin + _frame.size : end + len(END)] = frames[_frame.size :] + END
        memory[begin : begin + _frame.size] = frames[: _frame.size]
        self.position = end
        self._filled = self.used
        return True

    def close(self) -> None:
        self._memory.close()


def _described(head: bytes, size: int, name: str) -> tuple[int, Identity]:
    """The bytes of a half, and the lock."""
    if len(head) < PAGE:
        raise Damaged
    magic, version, half, device, inode = _head.unpack_from(head)
    if magic == MAGIC and VERSION < version <= LAST_VERSION:
        raise ConfigurationError(
            f"{name} in data_dir has version {version} of its format, and this release knows {VERSION}: a newer release wrote it."
            " Upgrade the package to that release, or give this one a data_dir of its own",
            param="data_dir",
        )
    if magic != MAGIC or version != VERSION or half < PAGE or size != PAGE + 2 * half:
        raise Damaged
    return half, (device, inode)


def _turn_cell(number: int) -> bytes:
    """The number and a check of it, to be written with one store: a process is killed before it or after it."""
    return _turn.pack(number << _CHECK_BITS | crc32(_turn.pack(number)) >> 32 - _CHECK_BITS)


def _turn_in(cell: bytes) -> int | None:
    number = int(_turn.unpack(cell)[0]) >> _CHECK_BITS
    return number if abs(number) <= LAST_TURN and _turn_cell(number) == cell else None


@contextmanager
def given_up(path: Path) -> Iterator[None]:
    """Whoever has the damaged file at `path` open finds that the log went on in another one, once the block has put that in its place."""
    with path.open("r+b") as damaged:
        yield
        if os.fstat(damaged.fileno()).st_size >= PAGE:
            os.pwrite(damaged.fileno(), _turn_cell(-1), _TURN_AT)


def framed(payload: bytes) -> bytes:
    return _frame.pack(len(payload), crc32(payload)) + payload


def make(path: Path, half: int, frames: bytes, guard: Identity) -> None:
    """A file at `path`, in place of what was there, with `half` bytes or some more in each of its halves, and `frames` in half 1, to be
    written under the lock file `guard`. Written and not only made longer: memory without a place on the disk would be fatal to use."""
    half = -(-half // PAGE) * PAGE
    for left_behind in path.parent.glob(f"{path.name}.*.new"):
        left_behind.unlink(missing_ok=True)
    descriptor, name = mkstemp(prefix=f"{path.name}.", suffix=".new", dir=path.parent)  # nobody else writes to it
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            head = _head.pack(MAGIC, VERSION, half, *guard) + _turn_cell(1) + _filled.pack(0) + _filled.pack(len(frames))
            file.write(head.ljust(PAGE, b"\0"))
            file.write(bytes(half))
            file.write(frames.ljust(half, b"\0"))
        unfinished.replace(path)
    except BaseException:  # a full disk is to be no fuller
        unfinished.unlink(missing_ok=True)
        raise
