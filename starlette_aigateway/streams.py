"""A stream on its way from the provider to whoever reads it: metered where it arrives, passed on through a small buffer.

The job that reads the provider and the task that writes to the client are two. When the client leaves, the reader goes on within
bounds, so that the bill is exact; it only stops passing on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from . import money
from .background import Job
from .calls import Call, Done
from .channel import Channel
from .errors import AIGatewayError
from .policy import metering
from .policy.caching import CachedAnswer
from .policy.windows import WindowState
from .types import CacheStatus, Chunk, RawEvents, StreamItem, Usage
from .wakeup import Latch
from .wires import openai_chat

BUFFERED_ITEMS = 16


def believed(item: StreamItem) -> StreamItem:
    """Usage that cannot be true is none, for whoever reads the stream as for the bill."""
    if isinstance(item, RawEvents) or item.usage is None or metering.plausible(item.usage) is not None:
        return item
    return replace(item, usage=None)


class Meter:
    """What has come of one attempt's stream. Items are kept, up to `keep` bytes, for the cache and for estimates.

    `usage` is the most that was told by reports that can be true, which are cumulative. `covering`: no output came after the last of
    them, so it is what a whole answer is billed at. `final`: it also came with the end of the answer or after it, so it is the whole bill
    (of a single choice), however the stream goes on."""

    def __init__(self, keep: int) -> None:
        self.items: list[StreamItem] = []
        self.usage: Usage | None = None
        self.covering = False
        self.final = False
        self.finish_reason: str | None = None
        self.model: str | None = None
        self.has_content = False
        self.has_output = False
        self.whole = True
        self._room = keep
        self._unkept = 0

    def see(self, item: StreamItem) -> int:
        """Takes note of `item`, whose usage can be true if it has one; gives its size in bytes."""
        if isinstance(item, RawEvents):
            size = len(item.data)
            if not self.has_output:
                self.has_output = openai_chat.has_content(item)
                self.has_content = self.has_content or self.has_output
            self.covering = self.final = False
        else:
            size = len(item.native.body) if item.native is not None else openai_chat.output_bytes((item,))
            self.finish_reason = item.finish_reason or self.finish_reason
            if self.usage is not None or not self.has_output:
                self._look_for_output(item)
            if item.usage is not None:
                self._hear(item.usage)
            if not self.has_content:
                self.has_content = self.has_output or item.usage is not None or item.finish_reason is not None
            self.model = item.model or self.model
        if size <= self._room:
            self._room -= size
            self.items.append(item)
        else:
            self.whole = False
            self._unkept += size
        return size

    def _look_for_output(self, chunk: Chunk) -> None:
        if openai_chat.has_output(chunk):
            self.has_output = True
            self.covering = self.final = False

    def _hear(self, usage: Usage) -> None:
        """A report of less output than was told before says nothing of what came in between."""
        ended = self.finish_reason is not None
        if self.usage is None or usage.output_tokens >= self.usage.output_tokens:
            self.covering = ended or self.has_output
            self.final = ended
        self.usage = metering.together(self.usage, usage)

    @property
    def bill(self) -> Usage | None:
        """The usage that a whole answer is billed at; None where it has to be estimated."""
        usage = self.usage if self.covering else None
        return None if usage is None or (self.has_output and not usage.output_tokens) else usage

    def output_bytes(self) -> int:
        """UTF-8 bytes of the output that came; at least as many as its tokens."""
        return openai_chat.output_bytes(self.items) + self._unkept


class Relay:
    """The way from the job to the reader. Nothing goes out before the first content of an attempt, so that another provider can
    still answer instead; `opened` is set then, or when the job ends without."""

    def __init__(self, keep: int) -> None:
        self.channel: Channel[StreamItem] = Channel(BUFFERED_ITEMS)
        self.opened = Latch()
        self.closed = False
        self.provider = ""
        self.lowered_to: int | None = None
        self.meter = Meter(keep)
        self.drained = 0
        self._keep = keep
        self._withheld: list[StreamItem] = []

    def begin(self, provider: str, lowered_to: int | None) -> Meter:
        """An attempt starts: what an earlier one had sent before its first content is forgotten."""
        self.provider, self.lowered_to = provider, lowered_to
        self._withheld = []
        self.meter = Meter(self._keep)
        return self.meter

    @property
    def committed(self) -> bool:
        """Content of this attempt has gone out: no other provider may answer any more."""
        return self.opened.is_set

    @property
    def left(self) -> bool:
        """The reader has left; `drained` counts the bytes that came since."""
        return self.channel.abandoned

    def pass_on(self, item: StreamItem, size: int) -> bool:
        """Hands `item` to the reader. Whether that one is still there and takes more."""
        channel = self.channel
        if channel.abandoned:
            self.drained += size
            return False
        if self.opened.is_set:
            return channel.put(item)
        self._withheld.append(item)
        if self.meter.has_content:
            self.flush()
            self.opened.set()
        return not channel.full

    def flush(self) -> None:
        """What was withheld goes out: content has come, or the attempt has ended well without any."""
        for early in self._withheld:
            self.channel.put(early)
        self._withheld = []

    def close(self) -> None:
        self.channel.close()
        self.closed = True
        self.opened.set()


class AnswerStream:
    """A stream as its reader sees it: iterate over `Chunk`s. `usage`, `cost_usd` and `finish_reason` are known after its end.

    Leaving it early lets the gateway read the rest of the answer within bounds, so that the bill is exact. `replayed`: it is the stream of
    an earlier call with the same idempotency key; that one's are the cost and the request id, and this one was not billed.
    """

    def __init__(self, *, request_id: str, created: int, windows: Sequence[WindowState], provider: str, cache: CacheStatus) -> None:
        self.request_id = request_id
        self.created = created
        self.windows = windows
        self.provider = provider
        self.cache: CacheStatus = cache
        self.replayed = False
        self.age: float | None = None
        self.lowered_to: int | None = None
        self.usage: Usage | None = None
        self.cost_usd: Decimal | None = None
        self.finish_reason: str | None = None
        self.model: str | None = None
        self._undelivered: deque[StreamItem] = deque()
        self._decoded: deque[Chunk] = deque()

    @property
    def cached(self) -> bool:
        return self.cache == "hit"

    async def next_items(self) -> Sequence[StreamItem]:
        """All of the stream that has come since it was asked last, as it came, events that nothing has to look at still undecoded; waits
        for the first, and is empty at its end. Not to be mixed with the other ways to read it."""
        raise NotImplementedError

    async def next_item(self) -> StreamItem | None:
        """The next of them alone; None at the end. Not to be mixed with iteration."""
        if not self._undelivered:
            self._undelivered.extend(await self.next_items())
        return self._undelivered.popleft() if self._undelivered else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._decoded:
            item = await self.next_item()
            if item is None:
                raise StopAsyncIteration
            self._decoded.extend(openai_chat.chunks((item,)))
        return self._decoded.popleft()


class LiveStream(AnswerStream):
    """A stream that a provider is producing."""

    def __init__(self, job: Job[Done], relay: Relay, call: Call) -> None:
        super().__init__(
            request_id=call.request_id, created=call.created, windows=call.windows, provider=relay.provider, cache=call.cache_status
        )
        self.lowered_to = relay.lowered_to
        self._job = job
        self._relay = relay

    async def next_items(self) -> Sequence[StreamItem]:
        """Raises `ProviderError` where the provider failed in mid-stream."""
        channel = self._relay.channel
        while not (items := channel.taken()):
            if channel.closed:
                await self._end()
                break
            await channel.arrival()
        return items

    async def _end(self) -> None:
        try:
            done = await self._job.result()
        except AIGatewayError as error:
            error.request_id = self.request_id
            raise
        meter = self._relay.meter
        self.usage = done.record.usage if done.record else meter.usage
        self.cost_usd = money.dollars(done.cost)
        self.finish_reason = meter.finish_reason
        self.model = meter.model


class Reading(AbstractAsyncContextManager[Job[Done]]):
    """The block of a job whose stream is read within; it is entered once the stream has been opened. Its reader leaves with the block."""

    def __init__(self, block: AbstractAsyncContextManager[Job[Done]], relay: Relay) -> None:
        self._block = block
        self._relay = relay

    async def __aenter__(self) -> Job[Done]:
        job = await self._block.__aenter__()
        try:
            await self._relay.opened.wait()
            if self._relay.closed:
                await job.result()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return job

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._relay.channel.leave()
        await self._block.__aexit__(kind, error, trace)


class Opened(AbstractAsyncContextManager[AnswerStream]):
    """What `opening` brings, and the block that is left with it. A generator costs three times as much."""

    def __init__(self, opening: Callable[[], Awaitable[tuple[AnswerStream, Reading | None]]]) -> None:
        self._opening = opening
        self._reading: Reading | None = None

    async def __aenter__(self) -> AnswerStream:
        stream, self._reading = await self._opening()
        return stream

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._reading is not None:
            await self._reading.__aexit__(kind, error, trace)


class StoredStream(AnswerStream):
    """A cached answer as a stream, at cost zero."""

    def __init__(self, items: Sequence[StreamItem], call: Call, stored: CachedAnswer, *, age: float) -> None:
        super().__init__(request_id=call.request_id, created=call.created, windows=call.windows, provider=stored.provider, cache="hit")
        self.stored = stored
        self.age = age
        self._items = items
        self._meter = Meter(0)

    async def next_items(self) -> Sequence[StreamItem]:
        items, self._items = self._items, ()
        for item in items:
            self._meter.see(believed(item))
        if not items:
            meter = self._meter
            self.usage, self.finish_reason, self.model = meter.usage, meter.finish_reason, meter.model
            self.cost_usd = money.dollars(0)
        return items
