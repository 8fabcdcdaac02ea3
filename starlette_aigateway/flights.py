"""Single flight: identical calls that run at the same time share one answer."""

from __future__ import annotations

from .calls import Done
from .wakeup import Latch, current_loop


class Flight:
    """A call in the air. `done` is what it brought, once `landed` is set; None if it failed or may not be shared. `waiting` counts those
    who wait for it beside its own caller."""

    def __init__(self, key: tuple[int, str]) -> None:
        self.key = key
        self.landed = Latch()
        self.done: Done | None = None
        self.waiting = 0

    def awaited(self) -> bool:
        return self.waiting > 0

    async def wait(self) -> None:
        self.waiting += 1
        try:
            await self.landed.wait()
        finally:
            self.waiting -= 1


class Flights:
    """The calls in the air, by event loop and cache key: a call of another loop cannot be waited for."""

    def __init__(self) -> None:
        self._flights: dict[tuple[int, str], Flight] = {}

    def join(self, key: str) -> tuple[Flight, bool]:
        """The flight of `key`, and whether it takes off now."""
        place = id(current_loop()), key
        flight = self._flights.get(place)
        if flight is not None:
            return flight, False
        flight = self._flights[place] = Flight(place)
        return flight, True

    def land(self, flight: Flight, done: Done | None) -> None:
        """Only once: one whose call was given up has landed when that ends."""
        if flight.landed.is_set:
            return
        del self._flights[flight.key]
        flight.done = done
        flight.landed.set()
