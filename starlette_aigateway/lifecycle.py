"""Starting and stopping, in an app that somebody else wrote.

A `Mount` runs no lifespan of what it mounts, so a gateway has to start by itself at the first call. With a lifespan it also has an
owner for work that outlives a request. Lifespans may overlap and follow one another; stores are open while one of them lasts.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias

import anyio
from anyio.lowlevel import EventLoopToken, current_token

from .background import Background
from .observing import Observers
from .outbox import Outbox

Start: TypeAlias = Callable[[AsyncExitStack], Awaitable[None]]


class Lifecycle:
    """`start` opens everything and pushes onto the stack what has to be closed; it runs once per process, after fork. At the end, what the
    ledger has not taken yet is tried for `settle` seconds more."""

    def __init__(self, start: Start, background: Background, outbox: Outbox, observers: Observers, *, settle: float) -> None:
        self._start = start
        self._background = background
        self._outbox = outbox
        self._observers = observers
        self._settle = settle
        self._pid: int | None = None
        self._open = AsyncExitStack()
        self._lifespans = 0
        self._locks: dict[EventLoopToken, anyio.Lock] = {}

    @property
    def started(self) -> bool:
        return self._pid == os.getpid()

    async def ensure(self) -> None:
        """Starts what is not started yet; concurrent callers wait for it. What a failed start raises is raised, and the next caller
        tries again."""
        if self._pid == os.getpid():
            return
        async with self._lock():
            if self._pid != os.getpid():
                await self._begin()

    def _lock(self) -> anyio.Lock:
        """One lock for each event loop: a lock cannot be shared between them."""
        return self._locks.setdefault(current_token(), anyio.Lock())

    async def _begin(self) -> None:
        opened = AsyncExitStack()
        try:
            await self._start(opened)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await opened.aclose()
            raise
        if self._pid is not None and self._pid != os.getpid():
            self._lifespans = 0
        self._open, self._pid = opened, os.getpid()
        self._locks.clear()  # whoever waits has its lock in hand, and nobody asks for one again

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Started, and with an owner for background work. The last one to leave closes the stores."""
        await self.ensure()
        self._lifespans += 1
        try:
            async with self._background.owner() as group:
                group.start_soon(self._observers.work)
                group.start_soon(self._outbox.work)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            self._lifespans -= 1
            if self._lifespans == 0:
                with anyio.CancelScope(shield=True):
                    await self._outbox.finish(self._settle)
                    await self._observers.flush()
                    await self._close()

    async def _close(self) -> None:
        opened, self._open, self._pid = self._open, AsyncExitStack(), None
        await opened.aclose()
