"""Calls that were answered from the cache before. What the very same bytes mean is read once: neither a body nor its cached answer is
decoded again. Who asks, what is configured and how old the answer is are looked at each time."""

from __future__ import annotations

from msgspec import Struct

from .calls import Call
from .policy.caching import CachedAnswer
from .types import CompletionRequest

MAX_BODY = 8192
MAX_VALUE = 8192
"""Bytes of one body and of the value that the cache keeps for it; larger ones are read anew each time."""

MAX_BODIES = 512
MAX_SHARERS = 64
"""Tenants, or principals without one, that are remembered for one body: each has answers of its own."""


class Kept(Struct):
    """Where the cache keeps the answer, and the bytes that it gave last with what they mean: one value, for threads to see both or none."""

    key: str
    read: tuple[bytes, CachedAnswer] | None = None


class Repeat(Struct, frozen=True):
    """`request` is valid and refers to no prompt. It is shared by all calls with the same body: it goes to no provider, and nobody changes
    anything in it. `kept` is by who shares the answer (`Standing.shared_by`)."""

    request: CompletionRequest
    kept: dict[str, Kept]


class Repeats:
    """Bodies that were learnt last, at most `MAX_BODIES`."""

    def __init__(self) -> None:
        self._known: dict[bytes, Repeat] = {}

    def get(self, body: bytes) -> Repeat | None:
        return self._known.get(body)

    def learn(self, body: bytes, call: Call) -> None:
        """`call` is what `body` meant, and was answered from the cache."""
        key = call.cache_key
        if key is None or call.prompt is not None or len(body) > MAX_BODY:
            return
        known = self._known
        repeat = known.get(body)
        if repeat is None:
            while len(known) >= MAX_BODIES:
                known.pop(next(iter(known)), None)
            repeat = known[body] = Repeat(call.request, {})
        if len(repeat.kept) >= MAX_SHARERS:
            repeat.kept.clear()
        repeat.kept[call.standing.shared_by] = Kept(key)
