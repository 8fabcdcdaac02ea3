"""Whether the client of a stream takes what it is sent. One that does not is told by nobody: the server only makes `send` wait."""

from __future__ import annotations

import logging
from time import monotonic

from starlette.types import Message, Send

log = logging.getLogger("starlette_aigateway")


class Pace:
    """A `send` that keeps in mind since when it has been waiting; setting a deadline for every chunk would cost as much as sending it."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._since: float | None = None

    async def send(self, message: Message) -> None:
        self._since = monotonic()
        try:
            await self._send(message)
        finally:
            self._since = None

    def left(self) -> float:
        """Seconds after which to look again, a quarter of the patience at the most; 0 once one `send` has waited for all of it."""
        waited = 0.0 if self._since is None else monotonic() - self._since
        if waited >= self._seconds:
            log.info("a client took nothing of its stream for %g seconds; the stream is ended", self._seconds)
            return 0.0
        return min(self._seconds - waited, self._seconds / 4)
