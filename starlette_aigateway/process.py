"""Which process this is, without a call of the system: that takes a third of a microsecond, and each call asks. And what a fork
must find closed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, NamedTuple, Protocol
from weakref import WeakMethod, WeakSet

PATIENCE = 5.0
"""Seconds that a fork waits for those who are using their files for long, and then as long for the others."""

INTERRUPTS = 2
"""That may come in the midst of the hooks after one fork: Python drops what a hook raises, and goes on with the next one."""

log = logging.getLogger("starlette_aigateway")


class Opener(Protocol):
    """Has files open that a forked child must not share with its parent: what SQLite keeps of its locks in memory is copied, and the locks
    are not (https://sqlite.org/howtocorrupt.html, section 2.6). All but `abandon` may be interrupted anywhere."""

    in_use_for_long: ClassVar[bool]
    """A fork waits for such openers first, and keeps nobody from the files of the others meanwhile."""

    def pause(self, timeout: float) -> bool:
        """Waits until nobody uses the files, and keeps everybody from them until `resume`. False after `timeout` seconds in vain."""

    def close_files(self) -> None:
        """After `pause`, before `resume`."""

    def resume(self) -> None:
        """In the parent and in the child, in the thread that called `pause`, whatever became of that: also twice."""

    def abandon(self) -> None:
        """In a child that was forked with the files open, since nothing was paused or closed: forgets whatever is the parent's, its locks
        too, and closes nothing. Is paused no more, unless it asks for that again."""


def take_all(timeout: float, *locks: threading.RLock) -> bool:
    """All of them within `timeout` seconds, or none."""
    until = time.monotonic() + timeout
    for taken, lock in enumerate(locks):
        if not lock.acquire(timeout=max(0.0, until - time.monotonic())):
            let_go(*locks[:taken])
            return False
    return True


def let_go(*locks: threading.RLock) -> None:
    """Of locks that this thread may have. They know whose they are: nobody else can tell whether an interrupt came before one was taken or
    after."""
    for lock in locks:
        with suppress(RuntimeError):
            lock.release()


class Pause(NamedTuple):
    """What one fork keeps everybody from: all that was paused for it, or was about to be, and of that what could be closed."""

    openers: list[Opener]
    closed: list[Opener]


class Forking(threading.local):
    """The fork that this thread is about to make. A hook that is interrupted does not keep Python from forking: a thread that was waiting
    for another one's fork just then has paused nothing itself, and resumes nothing."""

    def __init__(self) -> None:
        self.pause = Pause([], [])


class Process:
    """`number` tells this process from all that it was forked from, directly or not. The id that the system gives it need not: it is given
    again when a process has ended."""

    __slots__ = ("_begun", "_calls", "_counted", "_forking", "_guard", "_inherited", "_openers", "number")

    def __init__(self) -> None:
        self.number = 0
        self._counted = self._begun = os.getpid()
        self._calls: set[WeakMethod[Callable[[], object]]] = set()
        self._openers: WeakSet[Opener] = WeakSet()
        self._inherited: list[object] = []
        self._forking = Forking()
        self._guard = threading.RLock()
        os.register_at_fork(before=self._pause)
        for _ in range(INTERRUPTS + 1):
            os.register_at_fork(after_in_parent=self._resume, after_in_child=self._begin)

    def call_in_child(self, method: Callable[[], object]) -> None:
        """Of each forked child, before anything else happens there, as long as its object lives. It may be interrupted and called again."""
        self._calls.add(WeakMethod(method, self._calls.discard))

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
        openers = list(self._openers)
        for in_use_for_long in (True, False):
            until = time.monotonic() + PATIENCE
            for opener in openers:
                if opener.in_use_for_long == in_use_for_long:
                    self._close(opener, until)

    def _close(self, opener: Opener, until: float) -> None:
        pause = self._forking.pause
        pause.openers.append(opener)
        if not opener.pause(max(0.0, until - time.monotonic())):
            log.warning("this process is forked while a store is in use: the child may be refused by it")
            return
        try:
            opener.close_files()
            pause.closed.append(opener)
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody may be kept out after the fork
            log.warning("a store could not be closed for a fork: %s", type(error).__name__)

    def _resume(self) -> None:
        openers, closed = self._forking.pause
        closed.clear()
        while openers:
            openers[-1].resume()
            openers.pop()
        let_go(self._guard)

    def _begin(self) -> None:
        """In a child. Where the host's server forks without Python's `os.fork`, nothing was paused."""
        pid = os.getpid()
        if self._begun == pid:
            return
        if self._counted != pid:
            self.number += 1
            self._counted = pid
        self._guard = threading.RLock()
        closed = self._forking.pause.closed
        for opener in list(self._openers):
            if opener in closed:
                opener.resume()
            else:
                self._openers.discard(opener)
                opener.abandon()
        for call in list(self._calls):
            if (method := call()) is not None:
                method()
        self._forking = Forking()
        self._begun = pid


THIS = Process()
"""The one state of a module in this library: a hook at forks is never taken back, so there is one for everybody."""
