"""A clock that stands still until a test moves it."""

from __future__ import annotations

from ..wakeup import Wakeup, ring_all, wakeup

START = 1_700_000_040.0
"""Begins a minute, so that buckets of a minute begin here."""


class FakeClock:
    """Unix seconds that move only when told: `AIGateway.in_memory(clock=FakeClock())`. It may be moved from another thread."""

    def __init__(self, now: float = START) -> None:
        self.now = now
        self._sleeping: dict[Wakeup, float] = {}
        self._watching: list[Wakeup] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 6)
        ring_all([sleeper for sleeper, until in [*self._sleeping.items()] if until <= self.now])

    async def sleep(self, seconds: float) -> None:
        """Waits until the clock has been moved on by so many seconds."""
        sleeper = wakeup()
        self._sleeping[sleeper] = until = round(self.now + seconds, 6)
        watching, self._watching = self._watching, []
        ring_all(watching)
        try:
            if until > self.now:
                await sleeper.wait()
        finally:
            del self._sleeping[sleeper]

    async def slept_on(self, count: int = 1) -> None:
        """Waits until `count` wait for it to move."""
        while len(self._sleeping) < count:
            watcher = wakeup()
            self._watching.append(watcher)
            await watcher.wait()
