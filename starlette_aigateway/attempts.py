"""From a call that was let in to a booked answer: hold, call, settle or release, at one target after another.

All of this runs inside a job that belongs to the gateway (`background.py`): it is cancelled only at its own deadline, after its caller
has left. What touches the ledger is shielded on top of that, so that a hold that was granted is resolved by whoever asked for it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import TypeVar

import anyio
from anyio.lowlevel import checkpoint
from msgspec.structs import replace

from .accounts import Hold, HoldRequest, Settlement, UsageRecord
from .background import Job, shut_down
from .calls import Call, Done, Offer, PricedTarget
from .errors import (
    AIGatewayError,
    NoProviderAvailable,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    SpendCapExceeded,
    StorageUnavailable,
)
from .events import AttemptFailed, CallRecorded, Event
from .policy import estimate, keys, metering
from .policy.routing import Circuit, Failure, GiveUp, RetryPolicy, Target, Try, ails, next_step
from .protocols import Clock, Ledger, ProviderAnswer
from .streams import DRAIN_BYTES, Meter, Relay
from .types import Chunk, Completion, ProviderCall, Timeouts, Usage
from .wakeup import was_cancelled
from .wires import openai_chat

T = TypeVar("T")
LEASE_GRACE = 30.0
MAX_CIRCUITS = 1024
log = logging.getLogger("starlette_aigateway")


class ReaderLeft(Exception):  # an event, not a fault
    """Nobody reads the stream any more: the client has left and enough of the answer was drained, or it takes nothing for too long."""


class Attempt:
    """One hold and one call at one target."""

    def __init__(self, call: Call, offer: Offer, priced: PricedTarget, number: int, hold: Hold, timeouts: Timeouts) -> None:
        self.call = call
        self.offer = offer
        self.priced = priced
        self.number = number
        self.hold = hold
        self.meter: Meter | None = None
        self.waits_for_reader = False
        self._timeouts = timeouts
        self.timeout = timeout = _attempt_timeout(call, priced, timeouts)
        self._begun = monotonic()
        self._scope = anyio.CancelScope(deadline=anyio.current_time() + timeout)

    @property
    def output_bound(self) -> int | None:
        """The output bound in tokens that is sent and that the hold pays for; None where nothing has to be bounded."""
        return self.offer.output_bound(self.call.request, self.priced, self.hold.amount)

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
        return self._estimated(self.meter.output_bytes())

    def _estimated(self, output_bytes: int) -> Usage:
        return estimate.received(output_bytes, input_tokens=self.offer.input_tokens, bound=self.output_bound, n=self.call.request.n)

    @asynccontextmanager
    async def answer(self) -> AsyncIterator[ProviderAnswer]:
        """The provider's open answer. Whatever it does wrong comes out as a `ProviderError`."""
        request = replace(self.call.request, model=self.priced.target.upstream, max_tokens=self.output_bound)
        provider_call = ProviderCall(
            request=request,
            stream=self.call.stream,
            timeout=self.timeout,
            connect=self._timeouts.connect,
            read=self._timeouts.read,
            request_id=self.call.request_id,
        )
        with self._scope:
            try:
                async with self.priced.provider.adapter.open(provider_call) as answer:
                    yield answer
            except (AIGatewayError, ReaderLeft):
                raise
            except BaseException as error:
                if not foreign(error):
                    raise
                raise ProviderError(f"{self.priced.target.provider} failed unexpectedly", billed="unknown") from error
        if self._scope.cancelled_caught and self.waits_for_reader:
            raise ReaderLeft
        if self._scope.cancelled_caught:
            raise ProviderTimeout(f"{self.priced.target.provider} did not answer within {self.timeout:g} seconds", billed="unknown")

    def heard(self, now: float) -> None:
        """The provider sent something: its next silence may last as long again, within the call's own deadline."""
        self._scope.deadline = anyio.current_time() + min(self.timeout, self.call.deadline - now)

    def settlement(self, usage: Usage | None, output_bytes: Callable[[], int], model: str | None) -> Settlement:
        """For an answer that came whole, with the `usage` that was reported, if one was."""
        return metering.completed(
            self.hold,
            self.priced.price,
            usage if usage is not None else self._estimated(output_bytes()),
            bounded=self.output_bound is not None,
            reported=usage is not None,
            model=model,
            latency_ms=self.latency_ms,
        )


class Pulse:
    """Keeps a running stream alive: its lease, renewed when a third of it has passed, and the deadline of its silence. Looked at for
    every chunk, so it does something once a second at the most."""

    def __init__(self, ledger: Ledger, clock: Clock, attempt: Attempt, length: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._attempt = attempt
        self._length = length
        self.interval = min(1.0, length / 3, attempt.timeout / 4)
        self._beat = self._renewed = monotonic()

    @property
    def due(self) -> bool:
        return monotonic() - self._beat >= self.interval

    async def beat(self) -> None:
        self._beat = now = monotonic()
        self._attempt.heard(now)
        if now - self._renewed >= self._length / 3:
            self._renewed = now
            await self._renew()

    async def _renew(self) -> None:
        now = self._clock()
        try:
            await self._ledger.renew(self._attempt.hold.id, now + self._length, now=now)
        except StorageUnavailable:
            log.warning("the lease of a running stream could not be renewed; it is tried again")

    async def wait_for(self, relay: Relay) -> None:
        """Until a slow reader has taken something, or has left: that is no silence of the provider's."""
        self._attempt.waits_for_reader = True
        while relay.channel.full and not relay.left:
            with anyio.move_on_after(max(self.interval, 0.001)):
                await relay.channel.room()
            await self.beat()
        self._attempt.waits_for_reader = False


class Attempts:
    """Tries the targets of a call until one succeeds, each under a hold of its own that is resolved exactly once."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        clock: Clock,
        random: Callable[[int], bytes],
        timeouts: Timeouts,
        retries: RetryPolicy,
        emit: Callable[[Event], None],
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._random = random
        self._timeouts = timeouts
        self._retries = retries
        self._emit = emit
        self._circuits: dict[Target, Circuit] = {}

    async def complete(self, call: Call, offer: Offer, job: Job[Done]) -> Done:
        async def run(attempt: Attempt) -> Done:
            async with attempt.answer() as answer:
                completion = await answer.completion()
            usage = metering.plausible(completion.usage)
            settlement = attempt.settlement(usage, lambda: _output_bytes(completion), completion.model)
            record = await self._settle(job, attempt, settlement)
            return _done(attempt, settlement, record, replace(completion, usage=settlement.usage))

        return await self._first_success(call, offer, job, run)

    async def stream(self, call: Call, offer: Offer, job: Job[Done], relay: Relay) -> Done:
        async def run(attempt: Attempt) -> Done:
            meter = attempt.meter = relay.begin(attempt.priced.target.provider, attempt.lowered_to)
            pulse = Pulse(self._ledger, self._clock, attempt, _lease(call, attempt.priced, self._timeouts))
            async with attempt.answer() as answer:
                async for item in answer.events():
                    relay.pass_on(item, meter.see(item))
                    if pulse.due:
                        await pulse.beat()
                    if relay.channel.full:
                        await pulse.wait_for(relay)
                    if relay.left:
                        await drained(relay)
            relay.flush()
            settlement = attempt.settlement(metering.plausible(meter.usage), meter.output_bytes, meter.model)
            record = await self._settle(job, attempt, settlement)
            return _done(attempt, settlement, record, None)

        try:
            return await self._first_success(call, offer, job, run, relay)
        finally:
            relay.close()

    async def _first_success(
        self, call: Call, offer: Offer, job: Job[Done], run: Callable[[Attempt], Awaitable[Done]], relay: Relay | None = None
    ) -> Done:
        failures: list[Failure] = []
        unresolved: Hold | None = None
        while True:
            attempt = await self._next(call, offer, job, failures, unresolved)
            target = attempt.priced.target
            try:
                result = await run(attempt)
            except ProviderError as error:
                unresolved = await self._failed(job, attempt, error)
                failures.append(Failure(target, error, monotonic()))
                if relay is not None and relay.committed:
                    await self._give_back(job, unresolved)
                    raise
            except BaseException as error:
                await self._abandoned(job, attempt)
                if isinstance(error, ReaderLeft):
                    raise NoProviderAvailable("the stream was given up: nobody read it for too long", retryable=False) from None
                raise
            else:
                if circuit := self._circuits.get(target):
                    circuit.succeeded()
                return result

    async def _next(self, call: Call, offer: Offer, job: Job[Done], failures: Sequence[Failure], unresolved: Hold | None) -> Attempt:
        """The next attempt. The hold of a failed one that charged nothing is released in the same transaction where the next follows at
        once, and before anything else otherwise. Raises the last error when nothing is left to try."""
        plan = replace(call.plan, targets=offer.plan)
        step = next_step(plan, failures, now=monotonic(), deadline=call.deadline, policy=self._retries, opens_at=self._opens_at)
        if isinstance(step, Try) and step.delay == 0:
            try:
                return await self._probe(call, offer, job, step.target, failures, unresolved)
            except StorageUnavailable:
                await self._give_back(job, unresolved)
                raise
        await self._give_back(job, unresolved)
        if isinstance(step, GiveUp):
            raise _exhausted(step.error)
        await anyio.sleep(step.delay)
        return await self._probe(call, offer, job, step.target, failures, None)

    async def _probe(
        self, call: Call, offer: Offer, job: Job[Done], target: Target, failures: Sequence[Failure], replaces: Hold | None
    ) -> Attempt:
        """Where the circuit of `target` was open, this attempt tries it for all: the others go on passing it over until it is through."""
        circuit = self._circuits.get(target)
        opened_at = circuit.probe(monotonic()) if circuit is not None else None
        try:
            return await self._begin(call, offer, job, target, failures, replaces)
        except BaseException:
            if circuit is not None and opened_at is not None:
                circuit.opened_at = opened_at
            raise

    async def _give_back(self, job: Job[Done], hold: Hold | None) -> None:
        if hold is not None:
            await self._release(job, hold)

    async def _abandoned(self, job: Job[Done], attempt: Attempt) -> None:
        settlement = metering.abandoned(attempt.hold, attempt.priced.price, received=attempt.received, latency_ms=attempt.latency_ms)
        await self._settle(job, attempt, settlement)

    async def _begin(
        self, call: Call, offer: Offer, job: Job[Done], target: Target, failures: Sequence[Failure], replaces: Hold | None
    ) -> Attempt:
        """Holds the money of one attempt. Raises the provider's error when a later hold does not fit."""
        priced = offer.at(target)
        now = self._clock()
        request = offer.hold_request(
            call, priced, hold_id=keys.mint_id("use_", now, self._random), expires_at=now + _lease(call, priced, self._timeouts)
        )
        if failures:
            replaced = replaces.id if replaces is not None else None
            request = replace(request, attempt=len(failures) + 1, admission=priced.ask.minimum, replaces=replaced)
        try:
            hold = await self._reserve(job, request, now)
        except SpendCapExceeded as refused:
            if failures:
                raise _exhausted(failures[-1].error) from refused
            raise
        if job.abandoned:
            await self._release(job, hold)
            raise shut_down()
        return Attempt(call, offer, priced, request.attempt, hold, self._timeouts)

    async def _reserve(self, job: Job[Done], request: HoldRequest, now: float) -> Hold:
        """A hold that is granted while its caller leaves is released here, not left to expire."""
        with job.critical(2 * self._timeouts.storage):
            return await self._ledger.reserve(request, now=now)
        raise StorageUnavailable("the ledger did not answer in time", retry_after=1.0)

    async def _failed(self, job: Job[Done], attempt: Attempt, error: ProviderError) -> Hold | None:
        """Books a failure. Gives the hold back where the provider charged nothing: it is still to be released."""
        target = attempt.priced.target
        if ails(error):
            self._circuit(target).failed(monotonic())
        self._emit(
            AttemptFailed(
                request_id=attempt.call.request_id,
                attempt=attempt.number,
                provider=target.provider,
                model=attempt.call.plan.model,
                code=error.code,
                status=error.status,
            )
        )
        settlement = metering.failed(attempt.hold, attempt.priced.price, error, received=attempt.received, latency_ms=attempt.latency_ms)
        if settlement is None:
            return attempt.hold
        await self._settle(job, attempt, settlement)
        return None

    async def _settle(self, job: Job[Done], attempt: Attempt, settlement: Settlement) -> UsageRecord | None:
        """Retried while the ledger is away. None: it stayed away; the lease will book the hold in full."""
        if attempt.call.bill is not None:
            attempt.call.bill.booked = True
        record = await self._resolve(job, attempt.hold, lambda: self._ledger.settle(attempt.hold.id, settlement, now=self._clock()))
        if record is not None:
            self._emit(CallRecorded(record=record))
        return record

    async def _release(self, job: Job[Done], hold: Hold) -> None:
        await self._resolve(job, hold, lambda: self._ledger.release(hold.id, now=self._clock()))

    async def _resolve(self, job: Job[Done], hold: Hold, resolve: Callable[[], Awaitable[T]]) -> T | None:
        with job.critical(self._timeouts.settle):
            while True:
                try:
                    return await resolve()
                except StorageUnavailable:
                    await anyio.sleep(0.1)
        log.error("hold %s could not be resolved; its lease will book it in full", hold.id)
        return None

    def _circuit(self, target: Target) -> Circuit:
        circuit = self._circuits.get(target)
        if circuit is None:
            if len(self._circuits) >= MAX_CIRCUITS:
                del self._circuits[next(iter(self._circuits))]
            circuit = self._circuits[target] = Circuit()
        return circuit

    def _opens_at(self, target: Target) -> float | None:
        circuit = self._circuits.get(target)
        return None if circuit is None else circuit.opens_at(monotonic())


async def drained(relay: Relay) -> None:
    """One more item that nobody reads: within the bound of bytes, and without keeping the event loop to itself."""
    if relay.drained > DRAIN_BYTES:
        raise ReaderLeft
    await checkpoint()


def foreign(error: BaseException) -> bool:
    """Whether an exception out of a provider's code is its own failure, also a cancellation that nobody asked this task for; any of
    those means that the request was sent and nothing is known."""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return not was_cancelled()
    return not isinstance(error, KeyboardInterrupt | SystemExit)


def _attempt_timeout(call: Call, priced: PricedTarget, timeouts: Timeouts) -> float:
    """Seconds without a sign of the provider, within the call's deadline."""
    return max(0.001, min(priced.provider.timeout or timeouts.read, call.deadline - monotonic()))


def _lease(call: Call, priced: PricedTarget, timeouts: Timeouts) -> float:
    """Seconds. A stream renews its lease whenever a third has passed and something came, so the longest silence has to fit in the rest."""
    silence = _attempt_timeout(call, priced, timeouts)
    return 2 * silence + LEASE_GRACE if call.stream else silence + LEASE_GRACE


def _done(attempt: Attempt, settlement: Settlement, record: UsageRecord | None, completion: Completion | None) -> Done:
    return Done(
        provider=attempt.priced.target.provider,
        record=record,
        cost=settlement.amount,  # the record of a late settlement holds the correction alone
        lowered_to=attempt.lowered_to,
        bound_imposed=attempt.output_bound is not None and not attempt.priced.ask.given,
        completion=completion,
    )


def _output_bytes(completion: Completion) -> int:
    """Bytes of everything that the answer says, all choices included."""
    if completion.native is not None:
        return len(completion.native.body)
    return openai_chat.output_bytes([Chunk(delta=completion.message)])


def _exhausted(error: ProviderError) -> ProviderError:
    """The last failure, as the caller sees it: a provider's rate limit is no fault of the caller's."""
    if type(error) is ProviderError and error.status in (400, 413, 422):
        return ProviderRejected(error.message, retryable=False, billed=error.billed, status=error.status, details=error.details)
    if error.status != 429:
        return error
    return NoProviderAvailable(
        "every provider of this model is over its rate limit", retryable=True, billed="no", status=429, retry_after=error.retry_after
    )
