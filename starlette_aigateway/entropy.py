"""Random bytes for ids, many ids' worth at a time: each look at the system's source gives up the interpreter, three times a call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .process import THIS

OF_AN_ID = 10
"""Bytes; what `policy.keys.mint_id` asks for. Any other number comes from the source itself."""

POOL = 400
"""Ids."""


class Pool:
    """Bytes of `source`, each given once, to whichever thread. A forked child does not go on with its parent's."""

    def __init__(self, source: Callable[[int], bytes]) -> None:
        self._source = source
        self._shares: deque[bytes] = deque()
        self._process = -1

    def __call__(self, count: int) -> bytes:
        if count != OF_AN_ID:
            return self._source(count)
        if self._process == THIS.number:
            try:
                return self._shares.popleft()
            except IndexError:  # they are used up
                pass
        return self._refill()

    def _refill(self) -> bytes:
        """Where two threads do it at once, the shares of one of them are given to nobody."""
        drawn = self._source(OF_AN_ID * POOL)
        self._shares = deque([drawn[at : at + OF_AN_ID] for at in range(OF_AN_ID, len(drawn), OF_AN_ID)])
        self._process = THIS.number
        return drawn[:OF_AN_ID]
