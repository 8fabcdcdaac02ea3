"""One hold and one call at one target, and what keeps it alive while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from time import monotonic
from types import TracebackType
from typing import Any, Literal

import anyio
from msgspec.structs import replace

from .accounts import Hold, Settlement
from .background import Job
from .calls import Call, Offer, PricedTarget
from .errors import AIGatewayError, ProviderError, ProviderTimeout
from .policy import estimate, metering
from .protocols import Clock, Ledger, ProviderAnswer
from .streams import Meter, Relay
from .types import ProviderCall, Timeouts, Usage
from .wakeup import was_cancelled

LEASE_GRACE = 30.0
log = logging.getLogger("starlette_aigateway")


class ReaderLeft(Exception):  # an event, not a fault
    """Nobody reads the stream any more: the client has left and enough of the answer was drained, or it takes nothing for too long."""


class Attempt:
    """One hold and one call at one target. `output_bound` in tokens is sent, and the hold pays for it; None where nothing has to be
    bounded. `settlement` is how it was decided to book it: once, whatever happens then."""

    def __init__(self, call: Call, offer: Offer, priced: PricedTarget, number: int, hold: Hold, timeouts: Timeouts, job: Job[Any]) -> None:
        self.call = call
        self.offer = offer
        self.priced = priced
        self.number = number
        self.hold = hold
        self.meter: Meter | None = None
        self.settlement: Settlement | None = None
        self.job = job
        self.waits_for_reader = False
        self.unsent = False
        """Whether it broke off before the provider can have heard of it."""
        self._timeouts = timeouts
        self.output_bound = offer.output_bound(call.request, priced, hold.amount)
        self.timeout = timeout = silence(call, priced, timeouts)
        self._begun = monotonic()
        self._deadline = job.inner(timeout)
        self._opening: AbstractAsyncContextManager[ProviderAnswer] | None = None

    @property
    def kept_bound(self) -> int | None:
        """The output bound in tokens that the provider keeps: what is sent, or its own maximum where it does not obey that."""
        return self.output_bound if self.priced.provider.bounds_output else self.priced.provider.max_output_tokens

    @property
    def lowered_to(self) -> int | None:
        """The bound, where the budget afforded less output than was wanted."""
        bound = self.output_bound
        return bound if bound is not None and not self.priced.ask.given and bound < self.priced.ask.output_wanted else None

    @property
    def latency_ms(self) -> int:
        return round((monotonic() - self._begun) * 1000)

    @property
    def received(self) -> Usage | None:
        """What has come of a stream, its input at the bound; None if nothing has."""
        if self.meter is None or not self.meter.has_content:
            return None
        return metering.at_least(self._estimated(self.meter.output_bytes()), self.told)

    def _estimated(self, output_bytes: int) -> Usage:
        bound = self.kept_bound
        unseen = (bound or self.priced.ask.output_wanted) if self.priced.hidden else 0
        return estimate.received(output_bytes, input_tokens=self.offer.input_tokens, bound=bound, n=self.call.request.n, unseen=unseen)

    @property
    def told(self) -> Usage | None:
        """The most that a stream has told of its usage on the way."""
        return self.meter.usage if self.meter is not None else None

    def open(self) -> AbstractAsyncContextManager[ProviderAnswer]:
        """Asks the provider; to be entered within the attempt."""
        call = self.call
        provider_call = ProviderCall(
            request=replace(call.request, model=self.priced.target.upstream, max_tokens=self.output_bound),
            stream=call.stream,
            timeout=self.timeout,
            connect=self._timeouts.connect,
            read=self._timeouts.read,
            request_id=call.request_id,
        )
        self._opening = self.priced.provider.adapter.open(provider_call)
        return self._opening

    def __enter__(self) -> None:
        """Around everything that the provider does: whatever of it goes wrong comes out as a `ProviderError`."""
        self._deadline.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        deadline, provider = self._deadline, self.priced.target.provider
        opening, self._opening = self._opening, None
        self.unsent = error is not None and getattr(opening, "unsent", False) is True
        if error is None or isinstance(error, AIGatewayError | ReaderLeft) or not foreign(error):
            deadline.__exit__(kind, error, trace)
            if deadline.cancelled_caught and self.waits_for_reader:
                raise ReaderLeft from None
            if deadline.cancelled_caught:
                billed: Literal["no", "unknown"] = "no" if self.unsent else "unknown"
                raise ProviderTimeout(f"{provider} did not answer within {self.timeout:g} seconds", billed=billed) from None
        else:
            deadline.__exit__(None, None, None)
            raise ProviderError(f"{provider} failed unexpectedly", billed="unknown") from error

    def heard(self, now: float) -> None:
        """The provider sent something: its next silence may last as long again, within the call's own deadline."""
        self._deadline.anew(min(self.timeout, self.call.deadline - now))

    def broken_off(self, error: ProviderError | None) -> Settlement | None:
        """For an answer that was not read to its end: the provider failed, or, for None, the client left. None: nothing was charged.
        Where the whole bill had come by then, that is booked."""
        if error is None and self.unsent:
            return None
        price, latency_ms = self.priced.price, self.latency_ms
        meter = self.meter
        said = meter is not None and meter.has_output
        unknown = error is None or (error.billed != "no" and metering.plausible(error.billed, said) is None)
        if unknown and meter is not None and meter.final and self.call.request.n in (None, 1):
            usage = meter.bill
            if usage is not None:
                return self.whole(usage, meter.output_bytes, meter.model)
        if error is None:
            return metering.abandoned(self.hold, price, received=self.received, latency_ms=latency_ms)
        return metering.failed(self.hold, price, error, received=self.received, latency_ms=latency_ms, has_output=said, told=self.told)

    def whole(self, usage: Usage | None, output_bytes: Callable[[], int], model: str | None) -> Settlement:
        """For an answer that came whole, with the `usage` that was reported, if one was."""
        return metering.completed(
            self.hold,
            self.priced.price,
            usage if usage is not None else self._estimated(output_bytes()),
            bounded=self.kept_bound is not None,
            reported=usage is not None,
            told=self.told,
            model=model,
            latency_ms=self.latency_ms,
        )


class Pulse:
    """Keeps a running stream alive: its lease, renewed when a third of it has passed, and the deadline of its silence. Looked at for
    every chunk, so it does something once a second at the most: from `due_at` on, by the monotonic clock."""

    def __init__(self, ledger: Ledger, clock: Clock, attempt: Attempt, timeouts: Timeouts) -> None:
        self._ledger = ledger
        self._clock = clock
        self._attempt = attempt
        self._patience = timeouts.storage
        self._length = length = lease(attempt.call, attempt.priced, timeouts)
        self.interval = min(1.0, length / 3, attempt.timeout / 4)
        self._renewed = monotonic()
        self.due_at = self._renewed + self.interval

    async def beat(self) -> None:
        now = monotonic()
        self.due_at = now + self.interval
        self._attempt.heard(now)
        if now - self._renewed >= self._length / 3:
            self._renewed = now
            await self._renew()

    async def _renew(self) -> None:
        now = self._clock()
        try:
            with anyio.move_on_after(self._patience):
                await self._ledger.renew(self._attempt.hold.id, now + self._length, now=now)
                return
        except Exception as error:  # noqa: BLE001  # whatever a ledger does, it must not cut off the stream that runs
            log.debug("a lease could not be renewed: %s", type(error).__name__)
        log.warning("the lease of a running stream could not be renewed; it is tried again")

    async def wait_for(self, relay: Relay) -> None:
        """Until a slow reader has taken something, or has left: that is no silence of the provider's."""
        self._attempt.waits_for_reader = True
        while relay.channel.full and not relay.left:
            with anyio.move_on_after(max(self.interval, 0.001)):
                await relay.channel.room()
            await self.beat()
        self._attempt.waits_for_reader = False


def foreign(error: BaseException) -> bool:
    """Whether an exception out of a provider's code is its own failure, also a cancellation that nobody asked this task for; any of
    those means that the request was sent and nothing is known."""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return not was_cancelled()
    return not isinstance(error, KeyboardInterrupt | SystemExit)


def silence(call: Call, priced: PricedTarget, timeouts: Timeouts) -> float:
    """Seconds without a sign of the provider, within the call's deadline."""
    longest, left = priced.provider.timeout or timeouts.read, call.deadline - monotonic()
    seconds = left if left < longest else longest
    return seconds if seconds > 0.001 else 0.001


def lease(call: Call, priced: PricedTarget, timeouts: Timeouts) -> float:
    """Seconds. A stream renews its lease whenever a third has passed and something came, so the longest silence has to fit in the rest."""
    longest = silence(call, priced, timeouts)
    return 2 * longest + LEASE_GRACE if call.stream else longest + LEASE_GRACE
