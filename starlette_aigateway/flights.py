"""Single flight: identical calls that run at the same time share one answer."""

from __future__ import annotations

import anyio

from .calls import Done


class Flight:
    """A call in the air. `done` is what it brought, once `landed` is set; None if it failed or may not be shared."""

    def __init__(self) -> None:
        self.landed = anyio.Event()
        self.done: Done | None = None


class Flights:
    """The calls in the air, by cache key; of one event loop."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    def find(self, key: str) -> Flight | None:
        return self._flights.get(key)

    def take_off(self, key: str) -> Flight:
        flight = self._flights[key] = Flight()
        return flight

    def land(self, key: str, done: Done | None) -> None:
        flight = self._flights.pop(key)
        flight.done = done
        flight.landed.set()
