"""What becomes of work whose caller has left: how long it may go on, and how much of it at a time."""

from __future__ import annotations

from typing import Literal, TypeAlias

OnDisconnect: TypeAlias = Literal["drain", "cancel"]
MAX_DRAIN_BYTES = 8 * 2**20
MAX_DRAINS = 256


class Drains:
    """With `on_disconnect="drain"` an answer is read on for `seconds`, so that its bill is exact; with `"cancel"`, not at all.

    At most `at_most` are read on at a time in this process, and it is the newest that gives way: were it the oldest, then with more
    callers leaving than there is room for, each drain would be cut off by later ones before its end, and no bill would be exact.
    """

    def __init__(self, seconds: float, *, on_disconnect: OnDisconnect = "drain", at_most: int = MAX_DRAINS) -> None:
        self.seconds = seconds
        self.on_disconnect = on_disconnect
        self._room = at_most if on_disconnect == "drain" else 0
        self._running: set[object] = set()

    def grace(self, work: object) -> float:
        """Seconds for which `work`, which its caller has just left, may go on. It counts until it has `ended`."""
        if len(self._running) >= self._room:
            return 0.0
        self._running.add(work)
        return self.seconds

    def ended(self, work: object) -> None:
        self._running.discard(work)

    def __len__(self) -> int:
        return len(self._running)
