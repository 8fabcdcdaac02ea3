"""Whether the client of a stream takes what it is sent. One that does not is told by nobody: the server only makes `send` wait."""

from __future__ import annotations

import logging
from time import monotonic

log = logging.getLogger("starlette_aigateway")


class Pace:
    """Since when a client has been taking nothing: whoever sends sets `since`, by the monotonic clock, and None once it was taken. A
    deadline for every chunk would cost as much as sending it."""

    def __init__(self, seconds: float) -> None:
        self.since: float | None = None
        self._seconds = seconds

    def left(self) -> float:
        """Seconds after which to look again, a quarter of the patience at the most; 0 once one `send` has waited for all of it."""
        waited = 0.0 if self.since is None else monotonic() - self.since
        if waited >= self._seconds:
            log.info("a client took nothing of its stream for %g seconds; the stream is ended", self._seconds)
            return 0.0
        return min(self._seconds - waited, self._seconds / 4)
