"""Which process this is, without a call of the system: that takes a third of a microsecond, and a call asks six times. And what a fork
must find closed."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from typing import ClassVar, NamedTuple, Protocol
from weakref import WeakSet

PATIENCE = 5.0
"""Seconds that a fork waits, all in all, for those who are using their files."""

log = logging.getLogger("starlette_aigateway")


class Closable(Protocol):
    def close(self) -> None: ...


class Opener(Protocol):
    """Has files open that a forked child must not share with its parent: what SQLite keeps of its locks in memory is copied, and the locks
    are not (https://sqlite.org/howtocorrupt.html, section 2.6)."""

    in_use_for_long: ClassVar[bool]
    """A fork waits for such openers first, and keeps nobody from the files of the others meanwhile."""

    def pause(self, timeout: float) -> bool:
        """Waits until nobody uses the files, and keeps everybody from them until `resume`. False after `timeout` seconds in vain."""

    def close_files(self) -> None:
        """Between `pause` and `resume`."""

    def resume(self) -> None:
        """In the parent and in the child, in the thread that called `pause`."""

    def abandon(self) -> None:
        """In a child that was forked with the files open, since nothing was paused or closed: forgets whatever is the parent's, its locks
        too, and closes nothing. Is paused no more, unless it asks for that again."""


class Pause(NamedTuple):
    """What one fork keeps everybody from: all that was paused for it, and of that what could be closed."""

    openers: list[Opener]
    closed: list[Opener]


class Forking(threading.local):
    """The fork that this thread is about to make. A hook that is interrupted does not keep Python from forking: a thread that was waiting
    for another one's fork just then has paused nothing itself, and resumes nothing."""

    def __init__(self) -> None:
        self.pause = Pause([], [])

    def end(self) -> Pause:
        pause, self.pause = self.pause, Pause([], [])
        return pause


class Process:
    """`pid` is `os.getpid()`, in a forked child as well."""

    __slots__ = ("_forking", "_guard", "_inherited", "_openers", "_parents", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._parents: WeakSet[Closable] = WeakSet()
        self._openers: WeakSet[Opener] = WeakSet()
        self._inherited: list[object] = []
        self._forking = Forking()
        self._guard = threading.RLock()  # one that knows whose it is
        os.register_at_fork(before=self._pause, after_in_parent=self._resume, after_in_child=self._begin)

    def close_in_child(self, what: Closable) -> None:
        """What a forked child must not keep open, whether it ever uses it or not."""
        self._parents.add(what)

    def pause_for_forks(self, opener: Opener) -> None:
        """Before it opens anything. Whoever has its lock must not ask for this."""
        with self._guard:
            self._openers.add(opener)

    def keep(self, what: object) -> None:
        """What came along from the parent, and would be closed with its last reference."""
        self._inherited.append(what)

    def _pause(self) -> None:
        """In front of a fork. What cannot be closed in time is left to the child to abandon."""
        self._guard.acquire()
        until = time.monotonic() + PATIENCE
        for opener in sorted(self._openers, key=lambda opener: not opener.in_use_for_long):
            if not opener.pause(max(0.0, until - time.monotonic())):
                log.warning("this process is forked while a store is in use: the child may be refused by it")
                continue
            self._forking.pause.openers.append(opener)
            try:
                opener.close_files()
                self._forking.pause.closed.append(opener)
            except Exception as error:  # noqa: BLE001  # whatever it is, nobody may be kept out after the fork
                log.warning("a store could not be closed for a fork: %s", type(error).__name__)

    def _resume(self) -> None:
        for opener in self._forking.end().openers:
            opener.resume()
        with suppress(RuntimeError):  # it is another thread's: this one was interrupted while it waited
            self._guard.release()

    def _begin(self) -> None:
        """In a child. Where the host's server forks without Python's `os.fork`, nothing was paused."""
        self.pid = os.getpid()
        self._guard = threading.RLock()
        closed = self._forking.end().closed
        for opener in list(self._openers):
            if opener in closed:
                opener.resume()
            else:
                self._openers.discard(opener)
                opener.abandon()
        for what in list(self._parents):
            what.close()


THIS = Process()
"""The one state of a module in this library: a hook at forks is never taken back, so there is one for everybody."""
