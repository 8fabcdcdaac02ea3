"""From a call that was let in to a booked answer: hold, call, settle or release, at one target after another.

All of this runs inside a job that belongs to the gateway (`background.py`): it is cancelled only at its own deadline, after its caller
has left. What touches the ledger is shielded on top of that, so that a hold that was granted is resolved by whoever asked for it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic

import anyio
from anyio.lowlevel import checkpoint
from msgspec.structs import replace

from .accounts import Hold, HoldRequest, Settlement, UsageRecord
from .attempt import Attempt, Pulse, ReaderLeft, lease
from .background import Job, shut_down
from .calls import Call, Done, Offer, PricedTarget
from .errors import (
    CostUnbounded,
    NoProviderAvailable,
    PriceUnknown,
    ProviderError,
    ProviderRejected,
    SpendCapExceeded,
    TooManyParallelRequests,
)
from .events import AttemptFailed, CallTolerated, Event
from .holds import Holds
from .policy import keys, metering
from .policy.routing import Circuit, Failure, GiveUp, RetryPolicy, Target, ails, next_step
from .pouring import pour
from .protocols import Clock, Ledger
from .streams import Relay, believed
from .types import Chunk, Completion, StreamItem, Timeouts
from .wires import openai_chat

MAX_CIRCUITS = 1024
log = logging.getLogger("starlette_aigateway")


class Attempts:
    """Tries the targets of a call until one succeeds, each under a hold of its own that is resolved exactly once."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        holds: Holds,
        clock: Clock,
        random: Callable[[int], bytes],
        timeouts: Timeouts,
        retries: RetryPolicy,
        emit: Callable[[Event], None],
        max_drain_bytes: int,
    ) -> None:
        self._ledger = ledger
        self._holds = holds
        self._clock = clock
        self._random = random
        self._timeouts = timeouts
        self._retries = retries
        self._emit = emit
        self._max_drain_bytes = max_drain_bytes
        self._circuits: dict[Target, Circuit] = {}

    def complete(self, call: Call, offer: Offer, job: Job[Done]) -> Awaitable[Done]:
        return self._first_success(call, offer, job, self._whole)

    async def _whole(self, attempt: Attempt) -> Done:
        with attempt:
            async with attempt.open() as answer:
                completion = await answer.completion()
        usage = metering.plausible(completion.usage)
        if usage is not None and not usage.output_tokens:
            usage = metering.plausible(usage, openai_chat.output_bytes([Chunk(delta=completion.message)]) > 0)
        settlement = attempt.whole(usage, partial(_output_bytes, completion), completion.model)
        record = await self._settle(attempt, settlement)
        if completion.usage is not settlement.usage:
            completion = replace(completion, usage=settlement.usage)
        return _done(attempt, settlement, record, completion)

    async def stream(self, call: Call, offer: Offer, job: Job[Done], relay: Relay) -> Done:
        async def run(attempt: Attempt) -> Done:
            meter = attempt.meter = relay.begin(attempt.priced.target.provider, attempt.lowered_to)
            pulse = Pulse(self._ledger, self._clock, attempt, self._timeouts)

            def take(given: StreamItem) -> bool:
                item = believed(given)
                return relay.pass_on(item, meter.see(item)) and monotonic() < pulse.due_at

            with attempt:
                async with attempt.open() as answer:
                    events = answer.events()
                    while await pour(events, take):
                        if monotonic() >= pulse.due_at:
                            await pulse.beat()
                        await self._held_up(relay, pulse)
            relay.flush()
            settlement = attempt.whole(meter.bill, meter.output_bytes, meter.model)
            record = await self._settle(attempt, settlement)
            return _done(attempt, settlement, record, None)

        job.given_up = relay.close
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
            if failures or self._circuits:
                attempt = await self._next(call, offer, job, failures, unresolved)
            else:
                attempt = await self._begin(call, offer, job, offer.targets[0].target, failures, None)
            target = attempt.priced.target
            job.asks = target.provider
            try:
                result = await run(attempt)
            except ProviderError as error:
                unresolved = await self._failed(job, attempt, error)
                failures.append(Failure(target, error, monotonic()))
                if relay is not None and relay.committed:
                    await self._give_back(job, unresolved)
                    raise
            except BaseException as error:
                await self._abandoned(attempt)
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
        try:
            plan = replace(call.plan, targets=offer.plan)
            if failures and await self._caller_left(call, job):
                raise _exhausted(failures[-1].error)
            step = next_step(plan, failures, now=monotonic(), deadline=call.deadline, policy=self._retries, opens_at=self._opens_at)
            if isinstance(step, GiveUp):
                _lament(call, failures, step.error)
                raise _exhausted(step.error)
            if step.delay == 0:
                return await self._probe(call, offer, job, step.target, failures, unresolved)
        except BaseException:  # nobody knows whether it went with what was asked of the ledger; a second release changes nothing
            await self._give_back(job, unresolved)
            raise
        await self._give_back(job, unresolved)
        await anyio.sleep(step.delay)
        if await self._caller_left(call, job):
            raise _exhausted(failures[-1].error)
        return await self._probe(call, offer, job, step.target, failures, None)

    async def _caller_left(self, call: Call, job: Job[Done]) -> bool:
        """Nobody is charged for another attempt that nobody waits for."""
        present = call.options.present
        if present is not None and not job.abandoned and not await present():
            job.abandon()
        return job.abandoned

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
            await self._holds.release(job, hold)

    async def _abandoned(self, attempt: Attempt) -> None:
        settlement = attempt.settlement or attempt.broken_off(None)
        if settlement is None:
            attempt.job.asks = None
            await self._holds.release(attempt.job, attempt.hold)
        else:
            await self._settle(attempt, settlement)

    async def _begin(
        self, call: Call, offer: Offer, job: Job[Done], target: Target, failures: Sequence[Failure], replaces: Hold | None
    ) -> Attempt:
        """Holds the money of one attempt. Raises the provider's error when a later hold does not fit."""
        if job.abandoned:
            raise shut_down()
        priced = offer.at(target)
        now = self._clock()
        request = offer.hold_request(
            call, priced, hold_id=keys.mint_id("use_", now, self._random), expires_at=now + lease(call, priced, self._timeouts)
        )
        if failures:
            replaced = replaces.id if replaces is not None else None
            request = replace(request, attempt=len(failures) + 1, admission=priced.ask.minimum, replaces=replaced)
        try:
            try:
                hold = await self._holds.reserve(job, request, now)
            except CostUnbounded as refused:
                offer, request = _bounded(offer, priced, request, refused)
                hold = await self._holds.reserve(job, request, now)
        except (SpendCapExceeded, TooManyParallelRequests, PriceUnknown) as refused:
            if failures:
                raise _exhausted(failures[-1].error) from refused
            raise
        if job.abandoned:
            await self._holds.release(job, hold)
            raise shut_down()
        if hold.would_refuse is not None and request.would_refuse is None:
            code = hold.would_refuse
            self._emit(CallTolerated(request_id=call.request_id, principal=call.principal.id, model=call.plan.model, code=code))
        return Attempt(call, offer, priced, request.attempt, hold, self._timeouts, job)

    async def _failed(self, job: Job[Done], attempt: Attempt, error: ProviderError) -> Hold | None:
        """Books a failure. Gives the hold back where the provider charged nothing: it is still to be released."""
        job.asks = None
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
        settlement = attempt.broken_off(error)
        if settlement is None:
            return attempt.hold
        await self._settle(attempt, settlement)
        return None

    def _settle(self, attempt: Attempt, settlement: Settlement) -> Awaitable[UsageRecord | None]:
        attempt.job.asks = None
        if attempt.call.bill is not None:
            attempt.call.bill.booked = True
        attempt.settlement = settlement
        return self._holds.settle(attempt.job, attempt.hold, settlement)

    async def _held_up(self, relay: Relay, pulse: Pulse) -> None:
        """A reader that is slow is waited for. What comes once nobody reads is drained within the bound of bytes, and without keeping the
        event loop to itself."""
        if relay.channel.full:
            await pulse.wait_for(relay)
        if relay.left:
            if relay.drained > self._max_drain_bytes:
                raise ReaderLeft
            await checkpoint()

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


def _bounded(offer: Offer, priced: PricedTarget, request: HoldRequest, refused: CostUnbounded) -> tuple[Offer, HoldRequest]:
    """A cap that was set since the call was let in, or by workers with other settings, asks for a bound: then with one, if there is."""
    if request.bounded:
        raise refused
    if priced.obstacle is not None:
        raise priced.obstacle from refused
    return replace(offer, bounded=True), replace(request, bounded=True)


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


def _lament(call: Call, failures: Sequence[Failure], error: ProviderError) -> None:
    """For the operator: nobody answered, and who was asked last. What an upstream said is not repeated."""
    if failures and not isinstance(_exhausted(error), ProviderRejected):
        cause = type(error.__cause__).__name__ if error.__cause__ is not None else "no cause told"
        log.warning(
            "call %s for %r was answered by no provider; the last was %s, after %d attempts: %s (%s)",
            call.request_id, call.plan.model, failures[-1].target.provider, len(failures), error.message, cause,
        )  # fmt: skip
