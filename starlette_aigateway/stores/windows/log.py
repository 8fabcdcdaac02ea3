"""The log that every process of a host makes its windows from: a small file that all of them have mapped into their memory.

Whoever has the lock of the storage takes in what others appended since its last turn, and appends what it does itself. No call of the
system is made for that, and no block of the file system allocated: whoever does either waits for threads, and for the syncs of others.

The file has two halves. When one is full, the log goes on in the other: each record there brings some windows of the older half along, or
drops those in which nothing counts any more, until the older half is needed no more. What becomes too large for a half moves to another
file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from ...policy.windows import Window
from ..lock_file import Identity, identity_of
from .mapped_file import LAST_TURN, Damaged, MappedFile, framed, given_up, make
from .states import Change, Drop, Windows

HALF = 1 << 20
"""Bytes of a half, at the least."""
ROOM = 8
"""The halves of a new file have room for `ROOM` times what the windows take."""
COPIED_AT_ONCE = 4
"""Windows that a record brings along from the older half."""
COPIED_IN_MOVE = 256

log = logging.getLogger("starlette_aigateway")


class Head(Struct, frozen=True, array_like=True, tag="v"):
    """The first record of the half with this number."""

    number: int


class Record(Struct, frozen=True, array_like=True, tag="r"):
    """Changes at the moment `now`, in Unix microseconds."""

    now: int
    changes: Sequence[Change]


Entry: TypeAlias = Head | Record
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder[Entry](Entry)


class WindowLog:
    """The log at `path` and the windows as they are at its end. Every verb needs the lock of the storage, the file `guard`, and raises
    `OSError`; opening raises `ConfigurationError` for a file of a newer release. Whoever meets damage moves what can be read to another
    file, and with it everybody else: they agree on what is left."""

    def __init__(self, path: Path, guard: Identity) -> None:
        self.windows = Windows()
        self._path = path
        self._ours = guard
        self._damaged = False
        self._file = self._opened()
        self._number = 0
        self._read_all()

    def close(self) -> None:
        self._file.close()

    @property
    def guard(self) -> Identity:
        """The lock that the others use. Another one than ours: one of the two was deleted."""
        return self._file.guard

    def take_over(self) -> None:
        """From now on it is written under our lock; whoever still has the other one finds that the log has moved."""
        self._move(self.windows.latest)

    @property
    def in_place(self) -> bool:
        """Whether this is still the file at the path."""
        try:
            return identity_of(self._path.stat()) == self._file.identity
        except FileNotFoundError:
            return False

    def catch_up(self) -> bool:
        """Takes in what others appended. False where they went on more than once, or in another file: it has to be read anew."""
        turn, file = self._file.turn, self._file
        if turn == self._number:
            if not file.at_end:
                self._replay()
        elif turn == self._number + 1:
            self._replay()
            self._go_on_in(turn)
            self._replay()
        else:
            return False
        if self._damaged:
            self._move(self.windows.latest)
        return True

    def append(self, now: int, changes: Sequence[Change]) -> None:
        """Keeps what was done to `windows`."""
        windows, file = self.windows, self._file
        windows.latest = max(windows.latest, now)
        copying = bool(windows.uncopied)
        if copying:
            changes = [*changes, *self._brought_along(now)]
        if not file.append(framed(_encode(Record(now, changes)))):
            self._move(now)
        elif copying:
            if not windows.uncopied and file.used > file.half // 2:
                with suppress(OSError):  # it is kept already; more room can wait
                    self._move(now)
        elif file.used > file.half * 3 // 4:
            self._turn_over()

    def _brought_along(self, now: int) -> Sequence[Change]:
        return self._copied(list(islice(self.windows.uncopied, COPIED_AT_ONCE)), now)

    def _copied(self, those: Iterable[Window], now: int) -> Sequence[Change]:
        windows = self.windows
        changes = [windows.copy(window, now) for window in those]
        for change in changes:
            windows.uncopied.pop(change.window, None)
            if isinstance(change, Drop):
                windows.drop(change.window)
        return changes

    def _turn_over(self) -> None:
        """From now on the other half is written. It is not needed: all of its windows were brought along."""
        number = self._number + 1
        self._go_on_in(number)
        self._file.begin_anew()
        self._file.append(framed(_encode(Head(number))))
        self._file.turn = number

    def _go_on_in(self, number: int) -> None:
        self._file.go_to(number)
        self._number = number
        self.windows.uncopied = dict.fromkeys(self.windows)

    def _move(self, now: int) -> None:
        """To a file with more room, in which all windows are. Whoever finds the old one still in its place goes on there."""
        windows, old = self.windows, self._file
        every = list(windows)
        parts = [every[begin : begin + COPIED_IN_MOVE] for begin in range(0, len(every), COPIED_IN_MOVE)]
        frames = b"".join([framed(_encode(Head(1))), *(framed(_encode(Record(now, self._copied(part, now)))) for part in parts)])
        old.turn = -self._number
        try:
            make(self._path, max(HALF, ROOM * len(frames)), frames, self._ours)
        except OSError:
            old.turn = self._number
            raise
        self._file = MappedFile(self._path)
        old.close()
        self._number = 1
        self._file.go_to(1)
        self._file.position += len(frames)
        self._damaged = False

    def _opened(self) -> MappedFile:
        try:
            return MappedFile(self._path)
        except FileNotFoundError:
            self._begin()
        except Damaged:
            self._warn()
            with given_up(self._path):
                self._begin()
        return MappedFile(self._path)

    def _begin(self) -> None:
        make(self._path, HALF, framed(_encode(Head(1))), self._ours)

    def _read_all(self) -> None:
        """The older half, if it is the one before, and the newer one."""
        file, windows = self._file, self.windows
        number = abs(file.turn or 0)  # negative: whoever was to move it was killed
        if not number:
            self._found_damage()
            number = max(self._begun(0), self._begun(1), 1)
        file.turn = number
        file.go_to(number - 1)
        if self._next() == Head(number - 1):
            self._replay()
        windows.uncopied = dict.fromkeys(windows)
        file.go_to(number)
        self._number = number
        if self._next() == Head(number):
            self._replay()
        else:
            self._found_damage()
        if self._damaged:
            self._move(windows.latest)

    def _begun(self, half: int) -> int:
        """The number that a half begins with."""
        self._file.go_to(half)
        entry = self._next()
        return entry.number if isinstance(entry, Head) and entry.number & 1 == half and entry.number <= LAST_TURN else 0

    def _replay(self) -> None:
        """To the end."""
        windows = self.windows
        while (entry := self._next()) is not None:
            if isinstance(entry, Record):
                for change in entry.changes:
                    change.apply(windows, entry.now)
                windows.latest = max(windows.latest, entry.now)

    def _next(self) -> Entry | None:
        file = self._file
        try:
            payload = file.next()
            return None if payload is None else _decoder.decode(payload)
        except (Damaged, msgspec.MsgspecError):
            self._found_damage()
            return None

    def _found_damage(self) -> None:
        self._damaged = True
        self._warn()

    def _warn(self) -> None:
        log.warning("the window store %s was damaged; the windows that it tells nothing of begin anew", self._path.name)
