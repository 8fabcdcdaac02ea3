"""Starting and stopping, in an app that somebody else wrote.

A `Mount` runs no lifespan of what it mounts, so a gateway has to start by itself at the first call. With a lifespan it also has an
owner for work that outlives a request. Lifespans may overlap and follow one another; stores are open while one of them lasts.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias

import anyio

from .background import Background
from .errors import AIGatewayError, StorageUnavailable
from .observing import Observers
from .outbox import Outbox
from .process import THIS
from .retention import Retainer
from .wakeup import Turn

Start: TypeAlias = Callable[[AsyncExitStack], Awaitable[None]]
log = logging.getLogger("starlette_aigateway")


class Lifecycle:
    """`start` opens everything and pushes onto the stack what has to be closed; it runs once per process, after fork. At the end, what the
    ledger has not taken yet is tried for `settle` seconds more."""

    def __init__(
        self, start: Start, background: Background, outbox: Outbox, observers: Observers, retainer: Retainer, *, settle: float
    ) -> None:
        self._start = start
        self._background = background
        self._outbox = outbox
        self._observers = observers
        self._retainer = retainer
        self._settle = settle
        self._process: int | None = None
        self._open = AsyncExitStack()
        self._lifespans = 0
        self._turns: dict[int, Turn] = {}

    @property
    def started(self) -> bool:
        return self._process == THIS.number

    async def ensure(self) -> None:
        """Starts what is not started yet; concurrent callers wait for it, whichever event loop they are in. What a failed start raises is
        raised, and the next caller tries again."""
        if self.started:
            return
        async with self._turn():
            if not self.started:
                await self._begin()

    def _turn(self) -> Turn:
        """Of this process: one that was forked while another thread had its turn would wait for it for ever."""
        return self._turns.setdefault(THIS.number, Turn())

    async def _begin(self) -> None:
        opened = AsyncExitStack()
        try:
            await self._start(opened)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await opened.aclose()
            if isinstance(error, AIGatewayError) or not isinstance(error, Exception):
                raise
            log.error("the gateway cannot start: %s: %s", type(error).__name__, error)
            raise StorageUnavailable("the gateway could not start", retry_after=1.0) from error
        if self._process is not None and self._process != THIS.number:
            self._lifespans = 0
        self._open, self._process = opened, THIS.number

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Started, and with an owner for background work. The last one to leave closes the stores."""
        await self._enter()
        try:
            async with self._background.owner() as group:
                group.start_soon(self._observers.work)
                group.start_soon(self._outbox.work)
                group.start_soon(self._retainer.work)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._leave()

    async def _enter(self) -> None:
        async with self._turn():
            if not self.started:
                await self._begin()
            self._lifespans += 1

    async def _leave(self) -> None:
        """Whoever enters meanwhile waits for the end of it and starts anew."""
        async with self._turn():
            self._lifespans -= 1
            if self._lifespans == 0:
                await self._outbox.finish(self._settle)
                await self._observers.flush()
                await self._close()

    async def _close(self) -> None:
        opened, self._open, self._process = self._open, AsyncExitStack(), None
        await opened.aclose()
