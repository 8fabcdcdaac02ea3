"""Observers hear what happened, behind a bounded queue: none of them can hold up a call, or fail it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import anyio

from .calls import Served
from .events import Event
from .patience import within
from .pipeline import Pipeline
from .protocols import Observer
from .streams import AnswerStream
from .types import CallOptions, CompletionRequest, Principal
from .wakeup import Wakeup, ring, wakeup, was_cancelled

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
        self.untold = self._queue
        """What no observer was told of yet; empty where there are none."""
        self._workers: dict[object, Wakeup] = {}
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
        for waiting in [*self._workers.values()]:
            ring(waiting)

    async def work(self) -> None:
        """Tells the observers for as long as it runs. Each lifespan has a worker, so that one is left when another lifespan ends."""
        if not self._observers:
            return
        mine = object()
        try:
            while True:
                waiting = self._workers[mine] = wakeup()
                await self.flush()
                await waiting.wait()
        finally:
            self._workers.pop(mine, None)

    @property
    def worked(self) -> bool:
        """Whether a worker tells the observers; without one, whoever emitted has to `flush`."""
        return bool(self._workers)

    async def flush(self) -> None:
        while True:
            try:
                event = self._queue.popleft()
            except IndexError:  # also where another thread was faster
                return
            for observer in self._observers:
                await _tell(observer, event)

    async def tell(self) -> None:
        """For whoever emitted, at the end: tells the observers, where nobody else does."""
        if self._queue and not self._workers:
            with anyio.move_on_after(OBSERVER_SECONDS, shield=True):
                await self.flush()


class ToldPipeline:
    """The pipeline for calls in process: at the end of each, observers are told of it. Over HTTP that is done after the answer."""

    def __init__(self, pipeline: Pipeline, observers: Observers) -> None:
        self._pipeline = pipeline
        self._observers = observers
        self.quotes = pipeline.quotes
        self.send_seconds = pipeline.send_seconds
        self.ends_with_its_caller = pipeline.ends_with_its_caller

    async def complete(self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str) -> Served:
        try:
            return await self._pipeline.complete(principal, request, options, request_id)
        finally:
            await self._observers.tell()

    @asynccontextmanager
    async def stream(
        self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> AsyncIterator[AnswerStream]:
        try:
            async with self._pipeline.stream(principal, request, options, request_id) as stream:
                yield stream
        finally:
            await self._observers.tell()


async def _tell(observer: Observer, event: Event) -> None:
    try:
        if await within(OBSERVER_SECONDS, _heard(observer, event)) is None:
            raise TimeoutError
    except anyio.get_cancelled_exc_class() as error:
        if was_cancelled():
            raise
        log.warning("an observer failed: %s", type(error).__name__)
    except Exception as error:  # noqa: BLE001  # an observer is the host's code and must not break the gateway
        log.warning("an observer failed: %s", type(error).__name__)


async def _heard(observer: Observer, event: Event) -> bool:
    await observer(event)
    return True
