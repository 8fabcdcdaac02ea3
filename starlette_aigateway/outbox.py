"""What the ledger could not be told in time: how holds end. Kept in this process and told again until the ledger takes it.

With a lifespan a task of the gateway does that; on a bare mount, whoever asks for the next hold does it in passing. Telling it twice
changes nothing (`Ledger.settle`, `Ledger.release`), so whatever is in doubt is told again. A hold whose lease ran out meanwhile is booked
in full by then; its late settlement is the difference (`adjusted`).

At most `MAX_WAITING` wait. Beyond that no new hold is granted (503): what calls in the air add to it is all that it can still grow by.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TypeAlias

import anyio

from .accounts import Settlement, UsageRecord
from .errors import RequestError, StorageUnavailable
from .events import CallRecorded, Event
from .policy import metering
from .process import THIS
from .protocols import Clock, Ledger
from .wakeup import Wakeup, wakeup

MAX_WAITING = 10_000
AT_ONCE = 64
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
log = logging.getLogger("starlette_aigateway")

End: TypeAlias = Settlement | None
"""How a hold ends: None gives it back."""


class Outbox:
    """`patience` is the longest wait in seconds for the ledger to take one of them."""

    def __init__(self, ledger: Ledger, clock: Clock, emit: Callable[[Event], None], *, patience: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._emit = emit
        self._patience = patience
        self._waiting: dict[str, End] = {}
        self._alarm: Wakeup | None = None
        self._passing = False
        self._not_before = -math.inf
        self._pause = FIRST_PAUSE
        self._last_words: weakref.finalize[..., Outbox] | None = None
        THIS.call_in_child(self._forget_parent)

    async def tell(self, hold_id: str, end: End) -> UsageRecord | None:
        """Ends the hold, and forgets what waits for it. Raises what the ledger raises."""
        record: UsageRecord | None = None
        if end is None:
            await self._ledger.release(hold_id, now=self._clock())
        else:
            try:
                record = await self._ledger.settle(hold_id, end, now=self._clock())
            except RequestError as refused:
                log.warning("hold %s is settled without what the ledger refused to store: %s", hold_id, refused.message)
                record = await self._ledger.settle(hold_id, metering.storable(end), now=self._clock())
        if self._waiting:
            self._waiting.pop(hold_id, None)
        if record is not None:
            self._emit(CallRecorded(record=record))
        return record

    def put(self, hold_id: str, end: End) -> None:
        """The first end that is put stays: a hold resolves once."""
        self._waiting.setdefault(hold_id, end)
        if self._last_words is None:
            self._last_words = weakref.finalize(self, lament, self._waiting)
        alarm = self._alarm
        if alarm is not None:
            try:
                alarm.schedule(alarm.ring)
            except RuntimeError:  # the worker's event loop is closed: calls do its work in passing
                self._alarm = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def admit(self) -> None:
        """Raises `StorageUnavailable` where so much waits that no new hold may be granted."""
        if len(self._waiting) >= MAX_WAITING:
            raise StorageUnavailable("the ledger has to take what earlier calls cost first", retry_after=self._pause)

    async def deliver(self) -> None:
        """Tells everything that waits once, some at a time, as long as the ledger takes any of it."""
        waiting = [*self._waiting.items()]
        for begin in range(0, len(waiting), AT_ONCE):
            before = len(self._waiting)
            await self._deliver_some(waiting[begin : begin + AT_ONCE])
            if len(self._waiting) >= before:
                return

    async def _deliver_some(self, some: Sequence[tuple[str, End]]) -> None:
        async with anyio.create_task_group() as group:
            for hold_id, end in some:
                group.start_soon(self.try_once, hold_id, end)

    async def try_once(self, hold_id: str, end: End) -> None:
        try:
            with anyio.move_on_after(self._patience):
                await self.tell(hold_id, end)
        except Exception as error:  # noqa: BLE001  # whatever a ledger raises, what it has not taken waits on
            log.debug("hold %s still waits for the ledger: %s", hold_id, type(error).__name__)

    async def pass_by(self) -> None:
        """On a bare mount: one pass by whoever comes, not before the pause after the last one is over."""
        if self._alarm is not None or self._passing or monotonic() < self._not_before:
            return
        self._passing = True
        try:
            await self.deliver()
        finally:
            self._passing = False
            self._next_pause()
            self._not_before = monotonic() + (self._pause if self._waiting else 0.0)

    async def work(self) -> None:
        """With a lifespan: delivers for as long as it runs; one worker at a time."""
        if self._alarm is not None:
            return
        try:
            while True:
                self._alarm = wakeup()
                if not self._waiting:
                    await self._alarm.wait()
                await self.deliver()
                self._next_pause()
                if self._waiting:
                    await anyio.sleep(self._pause)
        finally:
            self._alarm = None

    def _forget_parent(self) -> None:
        """In a forked child: what waits is the parent's to tell, whose worker stayed behind."""
        self._waiting.clear()
        self._alarm, self._passing = None, False

    def _next_pause(self) -> None:
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._waiting else FIRST_PAUSE

    async def finish(self, seconds: float) -> None:
        """At the end: the last tries, for `seconds` at most. What the ledger did not take by then is told to the log, and waits on."""
        with anyio.move_on_after(seconds):
            while self._waiting:
                await self.deliver()
                if self._waiting:
                    await anyio.sleep(FIRST_PAUSE)
        if self._last_words is not None:
            self._last_words.detach()
            self._last_words = None
            lament(self._waiting)


def lament(waiting: Mapping[str, End]) -> None:
    """The process ends, or may end now. A lease books a hold that was granted in full."""
    for hold_id, end in waiting.items():
        if end is None:
            log.error("hold %s could not be released", hold_id)
        else:
            log.error("hold %s could not be settled: %d nano-USD", hold_id, end.amount)
