"""What a gateway was asked and what it booked, while `override` lasts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from decimal import Decimal
from types import TracebackType
from typing import Self

from msgspec import Struct

from ..accounts import UsageRecord
from ..events import CallRecorded, CallRefused, Event
from ..protocols import ProviderAnswer
from ..providers.simple import RegisteredProvider
from ..types import CompletionRequest, ProviderCall
from ..wakeup import Wakeup, ring_all, wakeup


class RecordedCall(Struct, frozen=True, kw_only=True):
    """One attempt at a provider. `request` is what that got: its own name of the model, the bound that was held for, the rendered
    prompt."""

    provider: str
    request: CompletionRequest
    stream: bool
    request_id: str


class Recorded:
    """`calls` are in the order in which providers were asked, `records` in that in which they were booked, the free ones of cached
    answers included. `refusals` are the calls that no provider was asked for. `events` is everything that observers are told."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self.records: list[UsageRecord] = []
        self.refusals: list[CallRefused] = []
        self.events: list[Event] = []
        self._waiting: list[Wakeup] = []

    @property
    def cost_usd(self) -> Decimal:
        """Of all records together."""
        return sum((record.cost_usd for record in self.records), Decimal(0))

    async def booked(self, count: int) -> Sequence[UsageRecord]:
        """Waits until there are `count` records: a stream that its client left is booked a little later."""
        while len(self.records) < count:
            waiting = wakeup()
            self._waiting.append(waiting)
            await waiting.wait()
        return self.records

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, CallRefused):
            self.refusals.append(event)
        if isinstance(event, CallRecorded):
            self.records.append(event.record)
            waiting, self._waiting = self._waiting, []
            ring_all(waiting)


class RecordedProvider:
    """A registered provider as an adapter that notes down each call."""

    def __init__(self, provider: RegisteredProvider, recorded: Recorded) -> None:
        self.name = provider.name
        self.models = provider.models
        self.timeout = provider.timeout
        self.max_output_tokens = provider.max_output_tokens
        self.bounds_output = provider.bounds_output
        self._provider = provider
        self._recorded = recorded
        self._entered: list[AsyncExitStack] = []

    def serves(self, model: str) -> bool:
        return self._provider.serves(model) is not None

    def reasons(self, model: str) -> bool:
        return self._provider.reasons(model, model)

    def open(self, call: ProviderCall) -> AbstractAsyncContextManager[ProviderAnswer]:
        self._recorded.calls.append(RecordedCall(provider=self.name, request=call.request, stream=call.stream, request_id=call.request_id))
        return self._provider.adapter.open(call)

    async def __aenter__(self) -> Self:
        entered = AsyncExitStack()
        if isinstance(self._provider.provider, AbstractAsyncContextManager):
            await entered.enter_async_context(self._provider.provider)
        self._entered.append(entered)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._entered.pop().__aexit__(kind, error, trace)
