"""Random bytes for ids, a pool at a time: each look at the system's source gives up the interpreter, three times a call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

POOL = 4096


class Pool(threading.local):
    """Bytes of `source`, each given once. Every thread has a pool of its own, and a forked child does not go on with its parent's."""

    def __init__(self, source: Callable[[int], bytes]) -> None:
        self._source = source
        self._bytes = b""
        self._next = 0
        self._pid = 0

    def __call__(self, count: int) -> bytes:
        end = self._next + count
        if end > len(self._bytes) or self._pid != os.getpid():
            self._bytes = self._source(max(POOL, count))
            self._pid = os.getpid()
            self._next, end = 0, count
        taken = self._bytes[self._next : end]
        self._next = end
        return taken
