"""The way of one call, top to bottom. `complete` and `stream` share everything up to the attempt.

    claim      an idempotency key, if there is one: what follows then happens at most once, in one job
    render     prompt reference -> messages
    plan       model -> ordered, priced targets
    authorize  requested name vs allowed models
    lookup     a cached answer takes no tokens and no money
    limit      request and token windows
    serve      the cached answer, recorded at cost 0; else
    flight     an identical call in the air is waited for
    attempt    hold -> call -> settle | release, at one target after another
    keep       the answer goes into the cache

Values flow forward; each step takes what it needs and returns what it found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from typing import Any

import anyio

from . import replay
from .accounts import UsageRecord
from .admission import Admission
from .answers import Answers
from .attempts import Attempts
from .background import Job
from .calls import Bill, Call, Done, Offer, Served
from .errors import AIGatewayError, ProviderTimeout
from .events import CallRecorded, CallRefused
from .flights import Flight, Flights
from .holds import Holds
from .idempotency import ReplayedStream, kept_hit, kept_live, kept_whole, served_again
from .policy import caching, idempotency, keys
from .policy.caching import CachedAnswer
from .policy.idempotency import KeptAnswer, Outcome
from .quotes import Quotes
from .repeats import Repeat, Repeats
from .services import Services
from .streams import AnswerStream, LiveStream, Opened, Reading, Relay, StoredStream
from .types import CallOptions, CompletionRequest, Principal, Usage
from .wires import openai_chat


class Pipeline:
    def __init__(self, services: Services) -> None:
        self._s = services
        self.ends_with_its_caller = services.background.drains.on_disconnect == "cancel"
        """Whether a call is given up when its caller leaves, so that it has to be noticed at once."""
        self._flights = Flights()
        self.repeats = Repeats()
        self._answers = Answers(services.responses, services.cache, services.clock)
        self.admission = Admission(services, self._answers)
        self.quotes = Quotes(services, self.admission)
        self._attempts = Attempts(
            ledger=services.ledger,
            holds=Holds(services.ledger, services.outbox, services.timeouts),
            clock=services.clock,
            random=services.random,
            timeouts=services.timeouts,
            retries=services.retries,
            emit=services.emit,
            max_drain_bytes=services.max_drain_bytes,
        )

    @property
    def send_seconds(self) -> float:
        """How long the client of a stream may take nothing."""
        return self._s.timeouts.send

    async def complete(self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str) -> Served:
        """A whole answer. Raises any of the errors in `errors.py`, their `request_id` set."""
        answer = self._answer if options.idempotency_key is None else self._answer_once
        try:
            return await answer(principal, request, options, request_id)
        except AIGatewayError as error:
            self._tell(error, principal, request, request_id)
            raise

    async def again(self, principal: Principal, repeat: Repeat, options: CallOptions, request_id: str) -> Served | None:
        """The cached answer to a call like one that was answered from the cache before. None where it is not at hand, or not this caller's:
        then nothing has happened yet, and `complete` has to be asked. Raises as that does."""
        try:
            call = await self.admission.again(principal, repeat, options, request_id)
            if call is None or call.stored is None:
                return None
            record = self._free_record(call, call.stored.provider, call.stored.content.model, call.stored.usage)
            await self._s.ledger.record(record)
        except AIGatewayError as error:
            self._tell(error, principal, repeat.request, request_id)
            raise
        self._s.emit(CallRecorded(record=record))
        return self._hit(call, call.stored)

    def stream(
        self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> AbstractAsyncContextManager[AnswerStream]:
        """An open stream, past its first content: what refuses the call, or fails at every provider, is raised before the block."""
        if options.idempotency_key is not None:
            return self._stream_once(principal, request, options, request_id)
        return Opened(lambda: self._stream(principal, request, options, request_id))

    async def _answer(
        self,
        principal: Principal,
        request: CompletionRequest,
        options: CallOptions,
        request_id: str,
        job: Job[Any] | None = None,
        bill: Bill | None = None,
    ) -> Served:
        """In `job`, or in one of its own from the attempt on."""
        call = await self.admission.asked(principal, request, options, request_id, stream=False, bill=bill)
        call = await self.admission.let_in(call)
        if call.stored is not None:
            return await self._serve_stored(call, call.stored)
        return await self._fly(call, await self.admission.offer(call), job)

    async def _stream(
        self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> tuple[AnswerStream, Reading | None]:
        try:
            call = await self.admission.admit(principal, request, options, request_id, stream=True)
            stored = call.stored
            if stored is not None:
                await self._record_free(call, stored.provider, stored.content.model, stored.usage)
                return self._stored_stream(call, stored), None
            offer = await self.admission.offer(call)
            relay = Relay(keep=self._s.cache.max_entry_bytes)
            work = partial(self._attempt_stream, call, offer, relay)
            reading = Reading(self._s.background.start(work, self._limit(call.deadline)), relay)
            return LiveStream(await reading.__aenter__(), relay, call), reading
        except AIGatewayError as error:
            self._tell(error, principal, request, request_id)
            raise

    # -- under an idempotency key ----------------------------------------------------------------------------------------

    async def _answer_once(self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str) -> Served:
        openai_chat.validate(request)
        slot = idempotency.slot(principal, request, options, stream=False)

        async def work(job: Job[Served | KeptAnswer]) -> Served | KeptAnswer:
            return await self._s.idempotency.once(
                job, slot, lambda bill: self._answer(principal, request, options, request_id, job, bill), kept_whole
            )

        outcome = await self._s.background.run(work, self._limit_once(options))
        return served_again(outcome) if isinstance(outcome, KeptAnswer) else outcome

    @asynccontextmanager
    async def _stream_once(
        self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> AsyncIterator[AnswerStream]:
        relay = Relay(keep=max(self._s.cache.max_entry_bytes, self._s.idempotency.max_answer_bytes))
        admitted: list[Call] = []

        async def carry_out(job: Job[Any], bill: Bill) -> Done | StoredStream:
            call = await self.admission.admit(principal, request, options, request_id, stream=True, bill=bill)
            admitted.append(call)
            stored = call.stored
            if stored is not None:
                await self._record_free(call, stored.provider, stored.content.model, stored.usage)
                return self._stored_stream(call, stored)
            return await self._attempt_stream(call, await self.admission.offer(call), relay, job)

        def kept(result: Done | StoredStream) -> Outcome:
            return kept_hit(result) if isinstance(result, StoredStream) else kept_live(admitted[0], result, relay)

        async def work(job: Job[Any]) -> Done | StoredStream | KeptAnswer:
            try:
                return await self._s.idempotency.once(job, slot, lambda bill: carry_out(job, bill), kept)
            finally:
                relay.close()

        with self._telling(principal, request, request_id):
            openai_chat.validate(request)
            slot = idempotency.slot(principal, request, options, stream=True)
        async with self._s.background.start(work, self._limit_once(options)) as job:
            try:
                with self._telling(principal, request, request_id):
                    await relay.opened.wait()
                    ended = await job.result() if relay.closed else None
                if isinstance(ended, KeptAnswer):
                    yield ReplayedStream(ended)
                elif isinstance(ended, StoredStream):
                    yield ended
                else:
                    yield LiveStream(job, relay, admitted[0])
            finally:
                relay.channel.leave()

    def _limit_once(self, options: CallOptions) -> float:
        """As `_limit`, with the time for claiming the key, for what comes before the attempts, and for concluding the claim."""
        timeouts = self._s.timeouts
        deadline = monotonic() + min(timeouts.call, options.timeout or timeouts.call)
        return self._limit(deadline) + timeouts.settle + 4 * timeouts.storage

    # -- answers that cost nothing ---------------------------------------------------------------------------------------

    async def _serve_stored(self, call: Call, stored: CachedAnswer) -> Served:
        await self._record_free(call, stored.provider, stored.content.model, stored.usage)
        return self._hit(call, stored)

    def _hit(self, call: Call, stored: CachedAnswer) -> Served:
        return Served(
            request_id=call.request_id,
            provider=stored.provider,
            cost=0,
            created=call.created,
            cache="hit",
            windows=call.windows,
            age=caching.age(stored, self._s.clock()),
            stored=stored,
            call=call,
        )

    def _stored_stream(self, call: Call, stored: CachedAnswer) -> StoredStream:
        return StoredStream(replay.items_of(stored), call, stored, age=caching.age(stored, self._s.clock()))

    async def _record_free(self, call: Call, provider: str, response_model: str | None, usage: Usage | None) -> None:
        record = self._free_record(call, provider, response_model, usage)
        await self._s.ledger.record(record)
        self._s.emit(CallRecorded(record=record))

    def _free_record(self, call: Call, provider: str, response_model: str | None, usage: Usage | None) -> UsageRecord:
        """Of an answer at cost zero."""
        now = self._s.clock()
        return UsageRecord(
            keys.mint_id("use_", now, self._s.random),
            call.request_id,
            1,
            now,
            call.principal.id,
            call.principal.tenant_id,
            call.principal.key_id,
            provider,
            model=call.plan.model,
            response_model=response_model,
            usage=usage or Usage(input_tokens=0, output_tokens=0),
            cost=0,
            price=None,
            outcome="cached",
            latency_ms=round((monotonic() - call.started) * 1000),
            prompt=call.prompt,
            tags=call.options.tags,
            would_refuse=call.would_refuse,
        )

    # -- answers of a provider -------------------------------------------------------------------------------------------

    async def _fly(self, call: Call, offer: Offer, job: Job[Any] | None) -> Served:
        """Runs the call, or waits for an identical one that is in the air."""
        key = call.cache_key
        flight: Flight | None = None
        if key is not None and call.options.cache.read and call.options.cache.store and self._s.background.shared:
            flight, takes_off = self._flights.join(key)
            if not takes_off:
                with anyio.move_on_after(call.deadline - monotonic()):
                    await flight.wait()
                if not flight.landed.is_set:
                    raise ProviderTimeout("an identical call was waited for, and did not end in time", billed="no")
                if flight.done is not None and flight.done.completion is not None:
                    return await self._serve_joined(call, flight.done)
                flight = None
        work = partial(self._attempt, call, offer, flight)
        return self._served(call, await (self._s.background.run(work, self._limit(call.deadline)) if job is None else work(job)))

    def _limit(self, deadline: float) -> float:
        """Seconds after which the job of a call is given up in any case, also by stores that never answer."""
        timeouts = self._s.timeouts
        return deadline - monotonic() + timeouts.drain + timeouts.settle + 2 * timeouts.storage

    async def _attempt(self, call: Call, offer: Offer, flight: Flight | None, job: Job[Done]) -> Done:
        """Also for those who join `flight`, if it leads one."""
        if flight is not None:
            job.awaited = flight.awaited
            job.given_up = partial(self._flights.land, flight, None)
        shared: Done | None = None
        try:
            try:
                done = await self._attempts.complete(call, offer, job)
            except AIGatewayError as error:
                await self.admission.give_tokens_back(call, error)
                raise
            await self._answers.keep(call, done)
            self._tell_early(job, call, done)
            await self.admission.correct_windows(call, done)
            shared = done
        finally:
            if flight is not None:
                self._flights.land(flight, shared if shared is not None and _shareable(shared) else None)
        return done

    async def _attempt_stream(self, call: Call, offer: Offer, relay: Relay, job: Job[Done]) -> Done:
        try:
            done = await self._attempts.stream(call, offer, job, relay)
        except AIGatewayError as error:
            await self.admission.give_tokens_back(call, error)
            raise
        await self._answers.keep_stream(call, done, relay)
        self._tell_early(job, call, done)
        await self.admission.correct_windows(call, done)
        return done

    def _tell_early(self, job: Job[Done], call: Call, done: Done) -> None:
        """The windows are corrected behind an answer. Under an idempotency key, what the job brings is not known yet."""
        if call.options.idempotency_key is None:
            job.tell(done)

    async def _serve_joined(self, call: Call, done: Done) -> Served:
        completion = done.completion
        assert completion is not None
        await self._record_free(call, done.provider, completion.model, completion.usage)
        await self._s.limiter.correct(call.claims, 0, admitted_at=call.admitted_at)
        return Served(
            request_id=call.request_id,
            created=call.created,
            provider=done.provider,
            cost=0,
            cache="hit",
            windows=call.windows,
            age=0.0,
            completion=completion,
        )

    def _served(self, call: Call, done: Done) -> Served:
        return Served(
            request_id=call.request_id,
            created=call.created,
            provider=done.provider,
            cost=done.cost,
            cache=call.cache_status,
            windows=call.windows,
            lowered_to=done.lowered_to,
            completion=done.completion,
        )

    # -- errors ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _telling(self, principal: Principal, request: CompletionRequest, request_id: str) -> Iterator[None]:
        try:
            yield
        except AIGatewayError as error:
            self._tell(error, principal, request, request_id)
            raise

    def _tell(self, error: AIGatewayError, principal: Principal, request: CompletionRequest, request_id: str) -> None:
        """An error leaves with the id of its call, and observers hear of it."""
        error.request_id = request_id
        self._s.emit(CallRefused(request_id=request_id, principal=principal.id, model=request.model or None, code=error.code))


def _shareable(done: Done) -> bool:
    """An answer that a bound of the gateway's own cut short is this caller's alone."""
    completion = done.completion
    return completion is not None and not caching.cut_short(completion.finish_reason, bound_lowered=done.bound_imposed)
