"""A call under an idempotency key: claimed before it begins, its outcome kept when it ends, and given again to whoever asks again.

All of it runs inside the call's job (`background.py`), so that it is concluded though its caller has left.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
from msgspec.structs import replace

from . import money, replay
from .background import Job
from .calls import Bill, Call, Done, Served
from .errors import StorageUnavailable
from .policy import caching
from .policy import idempotency as policy
from .policy.caching import CachedAnswer, CachedCompletion, CachedEvents
from .policy.idempotency import IdempotencyPolicy, KeptAnswer, KeptStream, NotKept, Outcome, Slot
from .protocols import Claim, Clock, IdempotencyStore
from .streams import AnswerStream, Relay, StoredStream
from .types import StreamItem, Timeouts

T = TypeVar("T")
LEASE = 60.0
"""Seconds for which a claim outlives its process. Renewed at every third of it, so that one renewal may fail."""

log = logging.getLogger("starlette_aigateway")


class Idempotency:
    """Carries out a call at most once per key, as far as it may be billed."""

    def __init__(
        self, store: IdempotencyStore, policy: IdempotencyPolicy, *, clock: Clock, random: Callable[[int], bytes], timeouts: Timeouts
    ) -> None:
        self._store = store
        self._policy = policy
        self._clock = clock
        self._random = random
        self._timeouts = timeouts

    @property
    def max_answer_bytes(self) -> int:
        return self._policy.max_answer_bytes

    async def once(self, job: Job[Any], slot: Slot, work: Callable[[Bill], Awaitable[T]], kept: Callable[[T], Outcome]) -> T | KeptAnswer:
        """What `work` brings, or the answer that was `kept` of an earlier call.

        Raises `Conflict` while that one runs, `UnprocessableRequest` for a key that was used for something else, the error of an earlier
        call that was billed, `StorageUnavailable` before anything is billed, and whatever `work` raises, which then frees the key unless
        it was billed.
        """
        holder = self._random(16).hex()
        claim = await self._claim(job, slot, holder)
        if claim.outcome is not None:
            return policy.replayed(policy.decode(claim.outcome))
        if claim.state != "claimed":
            raise policy.in_progress() if claim.state == "running" else policy.other_request()
        bill = Bill()
        try:
            async with self._renewing(slot, holder):
                result = await work(bill)
        except BaseException as error:
            await self._conclude(job, slot, holder, policy.failure(error, billed=bill.booked))
            raise
        await self._conclude(job, slot, holder, kept(result))
        return result

    async def _claim(self, job: Job[Any], slot: Slot, holder: str) -> Claim:
        """A claim that is granted while its caller leaves is not lost: the job goes on with it, or releases it. So is one of which the job
        did not learn, unless the store hangs."""
        patience = 2 * self._timeouts.storage
        now = self._clock()
        with job.critical(patience) as scope:
            try:
                return await self._store.claim(slot.key, slot.fingerprint, holder=holder, until=now + LEASE, now=now)
            except BaseException:
                if not scope.cancel_called:
                    await self._last_try(job, slot, holder, None)
                raise
        raise StorageUnavailable("the idempotency store did not answer in time", retry_after=1.0)

    @asynccontextmanager
    async def _renewing(self, slot: Slot, holder: str) -> AsyncIterator[None]:
        left: BaseException | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._renew, slot, holder)
            try:
                yield
            except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
                left = error
            group.cancel_scope.cancel()
        if left is not None:
            raise left

    async def _renew(self, slot: Slot, holder: str) -> None:
        while True:
            await anyio.sleep(LEASE / 3)
            try:
                await self._store.renew(slot.key, holder=holder, until=self._clock() + LEASE)
            except Exception as error:  # noqa: BLE001  # whatever a store does, it must not cut off the call that runs beside
                log.warning(
                    "a running call's claim on its idempotency key could not be renewed (%s); it is tried again", type(error).__name__
                )

    async def _conclude(self, job: Job[Any], slot: Slot, holder: str, outcome: Outcome | None) -> None:
        """Keeps `outcome`, or frees the key where there is none. Retried while the store is away."""
        value = None if outcome is None else policy.encode(outcome, max_bytes=self._policy.max_answer_bytes)
        try:
            with job.critical(self._timeouts.settle):
                while True:
                    try:
                        await self._write(slot, holder, value)
                    except Exception:  # noqa: BLE001  # whatever a store raises, what was billed must not be billed again
                        await anyio.sleep(0.1)
                    else:
                        return
        except BaseException:
            await self._last_try(job, slot, holder, value)
            raise
        log.error("the claim of a call on its idempotency key could not be concluded; when its lease ends, the key can be used again")

    async def _last_try(self, job: Job[Any], slot: Slot, holder: str, value: bytes | None) -> None:
        """For a job that is cut off: by an error, or because its event loop is being closed."""
        with job.critical(self._timeouts.storage), suppress(Exception):
            await self._write(slot, holder, value)

    async def _write(self, slot: Slot, holder: str, value: bytes | None) -> None:
        if value is None:
            await self._store.release(slot.key, holder=holder)
        elif not await self._store.keep(slot.key, value, holder=holder, until=self._clock() + self._policy.keep_seconds):
            log.warning("a call took longer than its claim on its idempotency key, and another one has it now")


# -- answers to keep ---------------------------------------------------------------------------------------------------


def kept_whole(served: Served) -> KeptAnswer:
    content: CachedCompletion | CachedEvents
    if served.completion is not None:
        content = caching.kept(served.completion)
    else:
        assert served.stored is not None
        content = served.stored.content
    return KeptAnswer(
        request_id=served.request_id,
        created=served.created,
        provider=served.provider,
        cost=served.cost,
        cache=served.cache,
        content=content,
        age=served.age,
        lowered_to=served.lowered_to,
        usage=content.usage,
    )


def kept_hit(stream: StoredStream) -> KeptAnswer:
    content = stream.stored.content
    return KeptAnswer(
        request_id=stream.request_id,
        created=stream.created,
        provider=stream.provider,
        cost=0,
        cache=stream.cache,
        content=content,
        age=stream.age,
        usage=content.usage,
        finish_reason=content.finish_reason,
        model=content.model,
    )


def kept_live(call: Call, done: Done, relay: Relay) -> Outcome:
    """Of a stream that came whole; one that is too large to hold in memory is not kept."""
    meter = relay.meter
    if not meter.whole:
        return NotKept()
    return KeptAnswer(
        request_id=call.request_id,
        created=call.created,
        provider=done.provider,
        cost=done.cost,
        cache=call.cache_status,
        content=policy.kept_stream(meter.items),
        lowered_to=done.lowered_to,
        usage=done.record.usage if done.record else meter.usage,
        finish_reason=meter.finish_reason,
        model=meter.model,
    )


# -- answers given again -----------------------------------------------------------------------------------------------


def served_again(kept: KeptAnswer) -> Served:
    """A whole answer as it was served before; it takes nothing from any window."""
    content = kept.content
    assert not isinstance(content, KeptStream), "streamed or not is a part of the fingerprint"
    completion = replay.completion_of(_cached(kept, content))
    return Served(
        request_id=kept.request_id,
        created=kept.created,
        provider=kept.provider,
        cost=kept.cost,
        cache=kept.cache,
        windows=(),
        age=kept.age,
        lowered_to=kept.lowered_to,
        completion=replace(completion, usage=kept.usage),
        replayed=True,
    )


class ReplayedStream(AnswerStream):
    """A stream as it was passed on before."""

    def __init__(self, kept: KeptAnswer) -> None:
        super().__init__(request_id=kept.request_id, created=kept.created, windows=(), provider=kept.provider, cache=kept.cache)
        self.replayed = True
        self.age = kept.age
        self.lowered_to = kept.lowered_to
        self._kept = kept
        self._items = _items(kept)

    async def next_items(self) -> Sequence[StreamItem]:
        items, self._items = self._items, ()
        if not items:
            kept = self._kept
            self.usage, self.finish_reason, self.model = kept.usage, kept.finish_reason, kept.model
            self.cost_usd = money.dollars(kept.cost)
        return items


def _items(kept: KeptAnswer) -> Sequence[StreamItem]:
    content = kept.content
    return policy.stream_items(content) if isinstance(content, KeptStream) else replay.items_of(_cached(kept, content))


def _cached(kept: KeptAnswer, content: CachedCompletion | CachedEvents) -> CachedAnswer:
    return CachedAnswer(stored_at=kept.created, provider=kept.provider, model=kept.model or "", content=content)
