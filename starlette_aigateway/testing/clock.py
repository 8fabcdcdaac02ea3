"""A clock that stands still until a test moves it."""

from __future__ import annotations

START = 1_700_000_040.0
"""Begins a minute, so that buckets of a minute begin here."""


class FakeClock:
    """Unix seconds that move only when told: `AIGateway.in_memory(clock=FakeClock())`."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 6)
