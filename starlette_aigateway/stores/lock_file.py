"""A lock between processes that nobody who waits for it can be starved of."""

from __future__ import annotations

import fcntl
import os
import time
from functools import partial
from pathlib import Path
from typing import TypeAlias

from ..errors import StorageUnavailable
from ..process import THIS

Identity: TypeAlias = tuple[int, int]
"""Device and inode."""

_give_way = getattr(os, "sched_yield", partial(time.sleep, 0))  # not every Unix has it


class LockFile:
    """The lock between processes, a `flock` on a file that we never delete: it dies with its process, and a forked child does not keep it.
    `path` of None is no lock. Where others deleted the file, `identity` is another one than that of who came later.

    Entering raises `StorageUnavailable` after `timeout` seconds. Whoever had to wait for it pauses before its next turn, so that a busy
    process does not shut out those that poll. Not so where turns are `brief`, tens of microseconds: there nobody is shut out, and whoever
    finds it taken looks again at once, a few times.
    """

    POLL = 0.0002
    COURTESY = 0.001
    """Seconds; several polls long, so that whoever waits finds the lock free before the one that had it comes again."""

    LOOKS = 64
    """At a lock whose turns are brief: a few tenths of a millisecond, in which its holder may be given the core."""

    def __init__(self, path: Path | None, name: str, timeout: float, *, brief: bool = False) -> None:
        self._path = path
        self._name = name
        self._timeout = timeout
        self._brief = brief
        self._descriptor: int | None = None
        self.identity: Identity | None = None
        """Of the file that is open."""
        self._contended = False

    def __enter__(self) -> None:
        if self._path is None:
            return
        descriptor = self._open(self._path) if self._descriptor is None else self._descriptor
        if self._contended:
            time.sleep(self.COURTESY)
        free = self._try(descriptor)
        self._contended = not (free or self._brief)
        if not free:
            self._poll(descriptor)

    def enter_at_once(self) -> bool:
        """Enters without a wait and without opening anything, or says that this is not the moment: also where others had to be waited for
        the last time, and are to find it free."""
        if self._path is None:
            return True
        descriptor = self._descriptor
        if descriptor is None or self._contended:
            return False
        return self._try(descriptor) or (self._brief and self._look_again(descriptor))

    @property
    def in_place(self) -> bool:
        """Whether who comes now would wait for this one."""
        try:
            return self._path is None or identity_of(self._path.stat()) == self.identity
        except FileNotFoundError:
            return False

    def leave(self) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def __exit__(self, *_: object) -> None:
        self.leave()

    def close(self) -> None:
        descriptor, self._descriptor, self.identity = self._descriptor, None, None
        if descriptor is not None:
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        THIS.call_in_child(self.close)
        descriptor = self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.identity = identity_of(os.fstat(descriptor))
        return descriptor

    def _try(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _look_again(self, descriptor: int) -> bool:
        for _ in range(self.LOOKS):
            _give_way()
            if self._try(descriptor):
                return True
        return False

    def _poll(self, descriptor: int) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._try(descriptor):
            if time.monotonic() >= deadline:
                raise StorageUnavailable(f"the {self._name} store is locked by another process", retry_after=1.0)
            time.sleep(self.POLL)


def identity_of(facts: os.stat_result) -> Identity:
    return facts.st_dev, facts.st_ino
