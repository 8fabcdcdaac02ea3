"""A small buffer between one task that produces and one that consumes, in one event loop."""

from __future__ import annotations

from typing import Generic, TypeVar

from .wakeup import Wakeup, wakeup

T = TypeVar("T")


class Channel(Generic[T]):
    """At most `size` items wait. Made for one producer and one consumer: on the path of every chunk of a stream, the general kind with its
    checkpoints costs as much as the rest of the way."""

    def __init__(self, size: int) -> None:
        self._items: list[T] = []
        self._size = size
        self._reader: Wakeup | None = None
        self._writer: Wakeup | None = None
        self._closed = False
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
        reader = self._reader
        if reader is not None:
            self._reader = None
            reader.ring()
        return len(self._items) < self._size

    async def room(self) -> None:
        """Waits until there is room, or the consumer has left."""
        while self.full and not self.abandoned:
            self._writer = wakeup()
            await self._writer.wait()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._wake_reader()

    async def take(self) -> list[T]:
        """All that waits, at least one item; nothing once there will be no more."""
        while not self._items:
            if self._closed:
                break
            self._reader = wakeup()
            await self._reader.wait()
        items, self._items = self._items, []
        if self._writer is not None:
            self._wake_writer()
        return items

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
        if self._reader is not None:
            self._reader.ring()
            self._reader = None
