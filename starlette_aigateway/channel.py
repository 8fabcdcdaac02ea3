"""A small buffer between one task that produces and one that consumes, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Generic, TypeVar

from .wakeup import Wakeup, running_asyncio_loop, wakeup

T = TypeVar("T")


class Channel(Generic[T]):
    """At most `size` items wait. Made for one producer and one consumer: on the path of every chunk of a stream, the general kind with its
    checkpoints costs as much as the rest of the way. On asyncio the consumer waits for a bare future, the cheapest there is."""

    def __init__(self, size: int) -> None:
        self._items: list[T] = []
        self._size = size
        self._loop = running_asyncio_loop()
        self._future: asyncio.Future[None] | None = None
        self._reader: Wakeup | None = None
        self._writer: Wakeup | None = None
        self.closed = False
        self.abandoned = False

    @property
    def full(self) -> bool:
        return len(self._items) >= self._size

    def put(self, item: T) -> bool:
        """Whether there is room for more. It never waits and never refuses: a producer that respects `size` awaits `room` where there is
        none."""
        if self.abandoned:
            return True
        self._items.append(item)
        if self._future is not None:
            waiting, self._future = self._future, None
            if not waiting.done():
                waiting.set_result(None)
        elif self._reader is not None:
            self._wake_reader()
        return len(self._items) < self._size

    async def room(self) -> None:
        """Waits until there is room, or the consumer has left."""
        while self.full and not self.abandoned:
            self._writer = wakeup()
            await self._writer.wait()

    def close(self) -> None:
        """Nothing more comes."""
        self.closed = True
        self._wake_reader()

    async def take(self) -> list[T]:
        """All that waits, at least one item; nothing once there will be no more."""
        while not (items := self.taken()) and not self.closed:
            await self.arrival()
        return items

    def taken(self) -> list[T]:
        """All that waits, if anything does."""
        items = self._items
        if items:
            self._items = []
            if self._writer is not None:
                self._wake_writer()
        return items

    def arrival(self) -> Awaitable[None]:
        """Until an item comes, or the end."""
        if self._loop is not None:
            self._future = self._loop.create_future()
            return self._future
        self._reader = wakeup()
        return self._reader.wait()

    def leave(self) -> None:
        """The consumer takes nothing more; what waits is forgotten."""
        self.abandoned = True
        self._items.clear()
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writer is not None:
            self._writer.ring()
            self._writer = None

    def _wake_reader(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
        if self._reader is not None:
            self._reader.ring()
            self._reader = None
