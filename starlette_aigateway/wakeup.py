"""How a thread wakes a task of an event loop: futures on asyncio, events elsewhere. One is made for each operation: it is cheap."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, TypeAlias

import anyio
from anyio.lowlevel import current_token
from msgspec import Struct

Schedule: TypeAlias = Callable[[Callable[[], object]], object]
log = logging.getLogger("starlette_aigateway")


class Wakeup(Protocol):
    """What a task waits for. `loop` tells the loops apart; `ring` is called in the loop, any number of times."""

    @property
    def loop(self) -> object: ...

    def wait(self) -> Awaitable[None]: ...

    def ring(self) -> None: ...

    def soon(self, callback: Callable[[], None]) -> None:
        """Runs `callback` in the loop, after what is ready to run there now; to be called in the loop."""

    def schedule(self, callback: Callable[[], None]) -> None:
        """Runs `callback` in the loop, from any thread. Raises `RuntimeError` where the loop is closed."""


def wakeup() -> Wakeup:
    """For the task that runs now."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return EventWakeup()
    return FutureWakeup(loop, loop.create_future())


class FutureWakeup(Struct, eq=False):
    loop: asyncio.AbstractEventLoop
    _future: asyncio.Future[None]

    def wait(self) -> Awaitable[None]:
        return self._future

    def ring(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def soon(self, callback: Callable[[], None]) -> None:
        self.loop.call_soon(callback)

    def schedule(self, callback: Callable[[], None]) -> None:
        self.loop.call_soon_threadsafe(callback)


class EventWakeup:
    __slots__ = ("_event", "_schedule", "loop")

    def __init__(self) -> None:
        self.loop: object = current_token().native_token
        self._event = anyio.Event()
        self._schedule: Schedule = self.loop.run_sync_soon  # type: ignore[attr-defined]  # trio's token

    def wait(self) -> Awaitable[None]:
        return self._event.wait()

    def ring(self) -> None:
        self._event.set()

    def soon(self, callback: Callable[[], None]) -> None:
        self._schedule(callback)

    def schedule(self, callback: Callable[[], None]) -> None:
        self._schedule(callback)


class Latch(Struct, eq=False):
    """An event that happens once, for any number of waiters of one event loop. The general kind costs four times as much."""

    is_set: bool = False
    _waiting: list[Wakeup] | None = None

    def set(self) -> None:
        self.is_set = True
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            for one in waiting:
                one.ring()

    def coming(self) -> Awaitable[None]:
        """For a latch that is not set yet."""
        waiting = wakeup()
        if self._waiting is None:
            self._waiting = [waiting]
        else:
            self._waiting.append(waiting)
        return waiting.wait()

    async def wait(self) -> None:
        if not self.is_set:
            await self.coming()


class Turn:
    """`async with turn:` one at a time in this process, whichever event loop a task is of. anyio's lock belongs to one loop.

    Raises `RuntimeError` in a task that has the turn already: it would wait for itself."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._holder: int | None = None
        self._waiting: list[Wakeup] = []

    async def __aenter__(self) -> None:
        while (waiting := self._take_or_queue()) is not None:
            await waiting.wait()

    def _take_or_queue(self) -> Wakeup | None:
        task = anyio.get_current_task().id
        with self._guard:
            if self._holder is None:
                self._holder = task
                return None
            if self._holder == task:
                raise RuntimeError("a task that has its turn asked for it again")
            waiting = wakeup()
            self._waiting.append(waiting)
            return waiting

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wakes all who wait, of whom the first takes the next turn: one that was cancelled meanwhile keeps it from nobody."""
        with self._guard:
            self._holder = None
            waiting, self._waiting = self._waiting, []
        ring_all(waiting)


def was_cancelled() -> bool:
    """Whether a cancellation that has just been caught was meant for this task. On asyncio a task also sees one when something that it
    waits for was cancelled; trio knows no such thing."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not asyncio
        return True
    return task is not None and task.cancelling() > 0


def ring(one: Wakeup) -> None:
    """Wakes one waiter, from a task of its own event loop or of another."""
    if current_loop() is one.loop:
        one.ring()
    else:
        _ring_in_loop([one])


def running_asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """None where it is not asyncio that runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def current_loop() -> object:
    """What tells the event loop that runs now from others: asyncio's own, or trio's token."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return current_token().native_token


def ring_all(wakeups: Sequence[Wakeup]) -> None:
    """Wakes every waiter, with one call into each event loop."""
    loops: dict[int, list[Wakeup]] = {}
    for one in wakeups:
        loops.setdefault(id(one.loop), []).append(one)
    for ringing in loops.values():
        _ring_in_loop(ringing)


def _ring_in_loop(wakeups: Sequence[Wakeup]) -> None:
    def ring() -> None:
        for one in wakeups:
            one.ring()

    try:
        wakeups[0].schedule(ring)
    except RuntimeError:  # closed while its operation was being committed; asyncio's own, and trio.RunFinishedError
        log.debug("a waiter's event loop is closed")
