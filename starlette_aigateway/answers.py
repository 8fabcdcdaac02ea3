"""Answers that were given before: looked up before a call may cost anything, kept after it."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Protocol, runtime_checkable

from . import replay
from .calls import Call, Done
from .errors import ProviderError
from .policy import caching
from .policy.caching import CachedAnswer, CachedCompletion, CachedEvents, CachePolicy
from .protocols import Clock, ResponseCache
from .repeats import MAX_VALUE, Kept
from .streams import Relay
from .types import CallOptions

log = logging.getLogger("starlette_aigateway")


@runtime_checkable
class RemembersAnswers(Protocol):
    """What a `ResponseCache` may offer besides."""

    def recall(self, key: str) -> bytes | None:
        """What `get` would give, where that is in memory; else None. The same bytes are the same object, as far as that can be."""


class Answers:
    """What the response cache holds, under the host's policy. Whatever the cache does wrong is a miss."""

    def __init__(self, responses: ResponseCache, policy: CachePolicy, clock: Clock) -> None:
        self._responses = responses
        self._recall = responses.recall if isinstance(responses, RemembersAnswers) else None
        self._policy = policy
        self._clock = clock
        self._faults: set[str] = set()

    async def lookup(self, key: str | None, options: CallOptions) -> CachedAnswer | None:
        if key is None or not options.cache.read:
            return None
        try:
            value = await self._responses.get(key)
        except Exception as error:  # noqa: BLE001  # whatever a cache does is a miss, never an error of the call
            self._failed(error)
            return None
        stored = None if value is None else caching.decode(value)
        if stored is None or not caching.fresh(stored, options.cache, self._clock(), self._policy.ttl):
            return None
        return stored

    def recall(self, kept: Kept, options: CallOptions) -> CachedAnswer | None:
        """What `lookup` would find, where nothing has to be waited for to know; else None."""
        if self._recall is None or not options.cache.read:
            return None
        try:
            value = self._recall(kept.key)
        except Exception as error:  # noqa: BLE001  # as in `lookup`
            self._failed(error)
            return None
        if value is None:
            kept.read = None
            return None
        read = kept.read
        if read is not None and read[0] is value:
            stored: CachedAnswer | None = read[1]
        elif (stored := caching.decode(value)) is not None and len(value) <= MAX_VALUE:
            kept.read = (value, stored)
        if stored is None or not caching.fresh(stored, options.cache, self._clock(), self._policy.ttl):
            return None
        return stored

    async def keep(self, call: Call, done: Done) -> None:
        completion = done.completion
        if completion is not None:
            await self._store(call, done, caching.kept(completion))

    async def keep_stream(self, call: Call, done: Done, relay: Relay) -> None:
        if relay.meter.whole and call.cache_key is not None:
            with suppress(ProviderError):  # a chunk that cannot be read has been passed on as it came; it is not kept
                await self._store(call, done, replay.kept(relay.meter.items))

    async def _store(self, call: Call, done: Done, content: CachedCompletion | CachedEvents) -> None:
        if call.cache_key is None or not call.options.cache.store:
            return
        answer = CachedAnswer(stored_at=self._clock(), provider=done.provider, model=call.plan.model, content=content)
        value = caching.encode(answer)
        if value is not None and caching.storable(
            answer.finish_reason,
            complete=answer.finish_reason is not None,
            bound_lowered=done.bound_imposed,
            size=len(value),
            policy=self._policy,
        ):
            try:
                await self._responses.put(call.cache_key, value, self._policy.ttl)
            except Exception as error:  # noqa: BLE001  # the answer is there and is paid for
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Says once what kind of failure it was."""
        kind = type(error).__name__
        if kind not in self._faults:
            self._faults.add(kind)
            log.warning("the response cache failed (%s); calls go on without it", kind)
