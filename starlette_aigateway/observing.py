"""Observers hear what happened, behind a bounded queue: none of them can hold up a call, or fail it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import anyio

from .events import Event
from .protocols import Observer
from .wakeup import was_cancelled

QUEUE = 1024
OBSERVER_SECONDS = 5.0
log = logging.getLogger("starlette_aigateway")

Tap: TypeAlias = Callable[[Event], None]
"""Told of an event in the very moment that it happens; it must neither wait nor raise."""


class Observers:
    def __init__(self, observers: Sequence[Observer], tap: Tap | None = None) -> None:
        self._observers = tuple(observers)
        self._tap = tap
        self._queue: deque[Event] = deque(maxlen=QUEUE)
        self._wake: anyio.Event | None = None
        self._lost = False

    def emit(self, event: Event) -> None:
        """Never waits. A full queue drops its oldest event, and says so once in the log."""
        if self._tap is not None:
            self._tap(event)
        if not self._observers:
            return
        if len(self._queue) == QUEUE and not self._lost:
            self._lost = True
            log.warning("observers are slower than calls: events are being dropped")
        self._queue.append(event)
        if self._wake is not None:
            self._wake.set()

    async def work(self) -> None:
        """Tells the observers for as long as it runs; one worker at a time."""
        if not self._observers or self._wake is not None:
            return
        try:
            while True:
                self._wake = anyio.Event()
                await self.flush()
                await self._wake.wait()
        finally:
            self._wake = None

    @property
    def worked(self) -> bool:
        """Whether a worker tells the observers; without one, whoever emitted has to `flush`."""
        return self._wake is not None

    async def flush(self) -> None:
        while self._queue:
            event = self._queue.popleft()
            for observer in self._observers:
                await _tell(observer, event)


async def _tell(observer: Observer, event: Event) -> None:
    try:
        with anyio.fail_after(OBSERVER_SECONDS):
            await observer(event)
    except anyio.get_cancelled_exc_class() as error:
        if was_cancelled():
            raise
        log.warning("an observer failed: %s", type(error).__name__)
    except Exception as error:  # noqa: BLE001  # an observer is the host's code and must not break the gateway
        log.warning("an observer failed: %s", type(error).__name__)
