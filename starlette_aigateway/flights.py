"""Single flight: identical calls that run at the same time share one answer."""

from __future__ import annotations

from anyio.lowlevel import current_token

from .calls import Done
from .wakeup import Latch


class Flight:
    """A call in the air. `done` is what it brought, once `landed` is set; None if it failed or may not be shared."""

    def __init__(self) -> None:
        self.landed = Latch()
        self.done: Done | None = None


class Flights:
    """The calls in the air, by event loop and cache key: a call of another loop cannot be waited for."""

    def __init__(self) -> None:
        self._flights: dict[tuple[int, str], Flight] = {}

    def find(self, key: str) -> Flight | None:
        return self._flights.get((_loop(), key))

    def take_off(self, key: str) -> Flight:
        flight = self._flights[_loop(), key] = Flight()
        return flight

    def land(self, key: str, done: Done | None) -> None:
        flight = self._flights.pop((_loop(), key))
        flight.done = done
        flight.landed.set()


def _loop() -> int:
    return id(current_token().native_token)
