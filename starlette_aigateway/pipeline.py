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

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import anyio

from . import replay
from .accounts import GATEWAY_SCOPE, ScopeClaim, UsageRecord, principal_scope, tenant_scope
from .attempts import Attempts
from .background import Background, Job, Work
from .calls import Bill, Call, Done, Offer, PricedTarget, Served
from .errors import AIGatewayError, CostUnbounded, NotFound, PriceUnknown, ProviderError, ProviderTimeout
from .events import CallRecorded, CallRefused, Event
from .flights import Flights
from .idempotency import Idempotency, ReplayedStream, kept_hit, kept_live, kept_whole, served_again
from .limiter import Limiter
from .policy import caching, estimate, idempotency, keys, models, prompts, routing
from .policy.caching import CachedAnswer, CachedCompletion, CachedEvents, CachePolicy
from .policy.defaults import with_defaults
from .policy.idempotency import KeptAnswer, Outcome
from .policy.pricing import PriceBook
from .policy.routing import Plan, RetryPolicy
from .policy.windows import WindowClaim
from .protocols import Clock, Ledger, PriceStore, PromptStore, ResponseCache, TenantStore
from .providers.simple import RegisteredProvider
from .streams import AnswerStream, LiveStream, Relay, StoredStream
from .types import (
    CallOptions,
    CompletionRequest,
    Limits,
    Principal,
    Tenant,
    Timeouts,
    Usage,
    WindowState,
)
from .wires import openai_chat

MAX_PLANS = 1024
NO_LIMITS = Limits()
log = logging.getLogger("starlette_aigateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that the pipeline works with; composed in `gateway.py`."""

    providers: Mapping[str, RegisteredProvider]
    ledger: Ledger
    limiter: Limiter
    responses: ResponseCache
    prompts: PromptStore
    tenants: TenantStore
    stored_prices: PriceStore
    prices: PriceBook
    background: Background
    clock: Clock
    random: Callable[[int], bytes]
    emit: Callable[[Event], None]
    limits: Limits
    default_limits: Limits | None
    cache: CachePolicy
    timeouts: Timeouts
    retries: RetryPolicy
    default_max_tokens: int | None
    min_output_tokens: int
    allow_unbounded: frozenset[str]
    idempotency: Idempotency


class Pipeline:
    def __init__(self, services: Services) -> None:
        self._s = services
        self._plans: dict[str, Plan] = {}
        self._flights = Flights()
        self._renderer = prompts.Renderer()
        self._cache_faults: set[str] = set()
        self._attempts = Attempts(
            ledger=services.ledger,
            clock=services.clock,
            random=services.random,
            timeouts=services.timeouts,
            retries=services.retries,
            emit=services.emit,
        )

    async def complete(self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str) -> Served:
        """A whole answer. Raises any of the errors in `errors.py`, their `request_id` set."""
        answer = self._answer if options.idempotency_key is None else self._answer_once
        try:
            return await answer(principal, request, options, request_id)
        except AIGatewayError as error:
            self._tell(error, principal, request, request_id)
            raise

    def stream(
        self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> AbstractAsyncContextManager[AnswerStream]:
        """An open stream, past its first content: what refuses the call, or fails at every provider, is raised before the block."""
        open_stream = self._stream if options.idempotency_key is None else self._stream_once
        return open_stream(principal, request, options, request_id)

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
        call = await self._admit(principal, request, options, request_id, stream=False, bill=bill)
        if call.stored is not None:
            return await self._serve_stored(call, call.stored)
        return await self._fly(call, await self._offer(call), job)

    @asynccontextmanager
    async def _stream(
        self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> AsyncIterator[AnswerStream]:
        with self._telling(principal, request, request_id):
            call = await self._admit(principal, request, options, request_id, stream=True)
            stored = call.stored
            if stored is not None:
                await self._record_free(call, stored.provider, stored.content.model, stored.usage)
            else:
                offer = await self._offer(call)
        if stored is not None:
            yield self._stored_stream(call, stored)
            return
        relay = Relay(keep=self._s.cache.max_entry_bytes)

        async def work(job: Job[Done]) -> Done:
            return await self._attempt_stream(call, offer, job, relay)

        async with self._s.background.start(work, self._limit(call.deadline)) as job:
            try:
                with self._telling(principal, request, request_id):
                    await relay.opened.wait()
                    if relay.closed:
                        await job.result()
                yield LiveStream(job, relay, call)
            finally:
                relay.channel.leave()

    # -- under an idempotency key ------------------------------------------------------------------------------------

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
            call = await self._admit(principal, request, options, request_id, stream=True, bill=bill)
            admitted.append(call)
            stored = call.stored
            if stored is not None:
                await self._record_free(call, stored.provider, stored.content.model, stored.usage)
                return self._stored_stream(call, stored)
            return await self._attempt_stream(call, await self._offer(call), job, relay)

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

    # -- what a principal may know ------------------------------------------------------------------------------------

    def limits(self, principal: Principal) -> Limits:
        """The limits that hold for `principal`, defaults included."""
        return with_defaults(principal, self._s.default_limits)

    async def windows(self, principal: Principal) -> Sequence[WindowState]:
        """The sliding windows of `principal` and of its tenant as they are now; takes nothing. Raises `StorageUnavailable`."""
        owners = self._owners(principal, self.limits(principal), await self._tenant(principal))
        claims: list[WindowClaim] = []
        for scope, limits in owners:
            if scope != GATEWAY_SCOPE and limits.requests_per_minute is not None:
                claims.append(WindowClaim(scope, "requests", limits.requests_per_minute))
            if scope != GATEWAY_SCOPE and limits.tokens_per_minute is not None:
                claims.append(WindowClaim(scope, "tokens", limits.tokens_per_minute))
        return await self._s.limiter.peek(claims)

    async def models(self, principal: Principal) -> Mapping[str, str]:
        """The model names that `principal` is shown, and the provider that is asked first for each."""
        priced = self._s.prices.configured.keys() | (await self._s.stored_prices.all()).keys()
        return models.listed(tuple(self._s.providers.values()), priced, principal.allowed_models)

    # -- before the first attempt ------------------------------------------------------------------------------------

    async def _admit(
        self,
        principal: Principal,
        request: CompletionRequest,
        options: CallOptions,
        request_id: str,
        *,
        stream: bool,
        bill: Bill | None = None,
    ) -> Call:
        """Renders, plans, authorizes, looks the answer up and limits; what comes out may be answered."""
        started = monotonic()
        openai_chat.validate(request)
        requested = request.model
        request, prompt = await self._render(principal, request)
        plan = self._plan(request.model)
        keys.authorize(principal, requested or request.model)
        limits = with_defaults(principal, self._s.default_limits)
        tenant = await self._tenant(principal)
        cache_key = self._cache_key(principal, request, options, plan, stream=stream)
        stored = await self._lookup(cache_key, options)
        owners = self._owners(principal, limits, tenant)
        claims = self._claims(owners, request, free=stored is not None)
        windows = await self._s.limiter.admit(claims)
        return Call(
            request_id=request_id,
            principal=principal,
            request=request,
            options=options,
            stream=stream,
            plan=plan,
            owners=owners,
            claims=claims,
            windows=windows,
            cache_key=cache_key,
            stored=stored,
            started=started,
            admitted_at=self._s.clock(),
            deadline=started + min(self._s.timeouts.call, options.timeout or self._s.timeouts.call),
            prompt=prompt,
            bill=bill,
        )

    async def _render(self, principal: Principal, request: CompletionRequest) -> tuple[CompletionRequest, str | None]:
        """The request with its prompt's messages and settings; what the caller sets itself wins over a setting."""
        reference = request.prompt
        if reference is None:
            return request, None
        prompt = await self._s.prompts.get(reference.name, version=reference.version, label=reference.label, tenant=principal.tenant_id)
        if prompt is None:
            wanted = f"version {reference.version}" if reference.version is not None else f"label {reference.label or prompts.PRODUCTION!r}"
            raise NotFound(f"there is no prompt {reference.name!r} with {wanted}", code="prompt_not_found", param="prompt")
        messages = (*self._renderer.render(prompt, reference.variables), *request.messages)
        rendered = prompts.applied(prompt, request, messages)
        openai_chat.validate(rendered)
        return rendered, f"{prompt.name}@{prompt.version}"

    def _plan(self, model: str) -> Plan:
        plan = self._plans.get(model)
        if plan is None:
            plan = routing.plan(model, tuple(self._s.providers.values()))
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[model] = plan
        return plan

    async def _tenant(self, principal: Principal) -> Limits:
        if principal.tenant is None:
            return NO_LIMITS
        if isinstance(principal.tenant, Tenant):
            return principal.tenant
        return await self._s.tenants.get(principal.tenant) or NO_LIMITS

    def _claims(self, owners: Sequence[tuple[str, Limits]], request: CompletionRequest, *, free: bool) -> tuple[WindowClaim, ...]:
        """The windows that a call has to pass; an answer that is `free` takes no tokens."""
        claims: list[WindowClaim] = []
        tokens: int | None = None
        for scope, owner in owners:
            if owner.requests_per_minute is not None:
                claims.append(WindowClaim(scope, "requests", owner.requests_per_minute))
            if owner.tokens_per_minute is not None and not free:
                tokens = tokens or estimate.tokens_for_window(request, request.max_tokens)
                claims.append(WindowClaim(scope, "tokens", owner.tokens_per_minute, tokens))
        return tuple(claims)

    def _owners(self, principal: Principal, limits: Limits, tenant: Limits) -> Sequence[tuple[str, Limits]]:
        """Whose limits hold, in the fixed order in which all of them are taken."""
        if principal.tenant_id is None:
            return ((principal_scope(principal.id), limits), (GATEWAY_SCOPE, self._s.limits))
        return (
            (principal_scope(principal.id), limits),
            (tenant_scope(principal.tenant_id), tenant),
            (GATEWAY_SCOPE, self._s.limits),
        )

    # -- answers that cost nothing -----------------------------------------------------------------------------------

    def _cache_key(self, principal: Principal, request: CompletionRequest, options: CallOptions, plan: Plan, *, stream: bool) -> str | None:
        """None: the call wants neither to read nor to store, or the cache is off."""
        if not self._s.cache.enabled or not (options.cache.read or options.cache.store):
            return None
        return caching.cache_key(request, stream=stream, plan=plan.fingerprint, scope=caching.shared_by(self._s.cache.scope, principal))

    async def _lookup(self, key: str | None, options: CallOptions) -> CachedAnswer | None:
        if key is None or not options.cache.read:
            return None
        try:
            value = await self._s.responses.get(key)
        except Exception as error:  # noqa: BLE001  # whatever a cache does is a miss, never an error of the call
            self._cache_failed(error)
            return None
        stored = None if value is None else caching.decode(value)
        if stored is None or not caching.fresh(stored, options.cache, self._s.clock(), self._s.cache.ttl):
            return None
        return stored

    async def _serve_stored(self, call: Call, stored: CachedAnswer) -> Served:
        await self._record_free(call, stored.provider, stored.content.model, stored.usage)
        return Served(
            request_id=call.request_id,
            provider=stored.provider,
            cost=0,
            created=call.created,
            cache="hit",
            windows=call.windows,
            age=caching.age(stored, self._s.clock()),
            stored=stored,
        )

    def _stored_stream(self, call: Call, stored: CachedAnswer) -> StoredStream:
        return StoredStream(replay.items_of(stored), call, stored, age=caching.age(stored, self._s.clock()))

    async def _record_free(self, call: Call, provider: str, response_model: str | None, usage: Usage | None) -> None:
        """The record of an answer at cost zero."""
        now = self._s.clock()
        record = UsageRecord(
            id=keys.mint_id("use_", now, self._s.random),
            request_id=call.request_id,
            attempt=1,
            created_at=now,
            principal=call.principal.id,
            tenant=call.principal.tenant_id,
            key_id=call.principal.key_id,
            provider=provider,
            model=call.plan.model,
            response_model=response_model,
            usage=usage or Usage(input_tokens=0, output_tokens=0),
            cost=0,
            price=None,
            outcome="cached",
            latency_ms=round((monotonic() - call.started) * 1000),
            prompt=call.prompt,
            tags=call.options.tags,
        )
        await self._s.ledger.record(record)
        self._s.emit(CallRecorded(record=record))

    # -- answers of a provider ---------------------------------------------------------------------------------------

    def _refuse_unbounded(self, request: CompletionRequest) -> None:
        parameter = openai_chat.unbounded_parameter(request)
        if parameter is not None and parameter not in self._s.allow_unbounded:
            raise CostUnbounded(
                f"{parameter} has no upper bound of cost, and this account has a spend cap; leave it out, or have the host allow it "
                f"with allow_unbounded={{{parameter!r}}}",
                param=parameter,
            )

    async def _offer(self, call: Call) -> Offer:
        try:
            return await self._priced(call)
        except AIGatewayError as error:
            await self._give_tokens_back(call, error)
            raise

    async def _priced(self, call: Call) -> Offer:
        """The targets with their prices and with what each has to hold. Under a cap, those that cannot be held are left out."""
        plan, request = call.plan, call.request
        capped = any(owner.capped for _, owner in call.owners)
        if capped:
            self._refuse_unbounded(request)
        input_tokens = estimate.input_bound(request, extra=openai_chat.inline_images(request) * openai_chat.MAX_IMAGE_TOKENS)
        stored = await self._s.stored_prices.all()
        priced = []
        unbounded = 0
        for target in plan.targets:
            provider = self._s.providers[target.provider]
            price = self._s.prices.lookup(target.provider, target.upstream, plan.model, stored)
            if capped and price is None:
                continue
            if capped and not provider.bounds_output and provider.max_output_tokens is None:
                unbounded += 1
                continue
            ask = estimate.ask(
                request,
                input_tokens,
                price=price,
                default_max_tokens=self._s.default_max_tokens,
                model_maximum=provider.max_output_tokens,
                min_output_tokens=self._s.min_output_tokens,
            )
            priced.append(PricedTarget(target, provider, price, ask))
        if priced:
            return Offer(targets=tuple(priced), scopes=_scopes(call), input_tokens=input_tokens, bounded=capped)
        if unbounded:
            raise CostUnbounded(
                f"no provider of {plan.model!r} can bound its output, and this account has a spend cap; the host may give the provider "
                "max_output_tokens",
                param="model",
            )
        raise PriceUnknown(f"the host has set no price for the model {plan.model!r}, and this account has a spend cap", param="model")

    async def _fly(self, call: Call, offer: Offer, job: Job[Any] | None) -> Served:
        """Runs the call, or waits for an identical one that is in the air."""
        key = call.cache_key
        if key is None or not (call.options.cache.read and call.options.cache.store) or not self._s.background.shared:
            return self._served(call, await self._run(call, job, lambda job: self._attempt(call, offer, job)))
        flight = self._flights.find(key)
        if flight is not None:
            with anyio.move_on_after(call.deadline - monotonic()):
                await flight.landed.wait()
            if not flight.landed.is_set():
                raise ProviderTimeout("an identical call was waited for, and did not end in time", billed="no")
            if flight.done is not None and flight.done.completion is not None:
                return await self._serve_joined(call, flight.done)
            return self._served(call, await self._run(call, job, lambda job: self._attempt(call, offer, job)))
        self._flights.take_off(key)
        return self._served(call, await self._run(call, job, lambda job: self._lead(call, offer, key, job)))

    def _run(self, call: Call, job: Job[Any] | None, work: Work[Done]) -> Awaitable[Done]:
        """In `job`, where the call already has one."""
        return work(job) if job is not None else self._s.background.run(work, self._limit(call.deadline))

    def _limit(self, deadline: float) -> float:
        """Seconds after which the job of a call is given up in any case, also by stores that never answer."""
        timeouts = self._s.timeouts
        return deadline - monotonic() + timeouts.drain + timeouts.settle + 2 * timeouts.storage

    async def _lead(self, call: Call, offer: Offer, key: str, job: Job[Done]) -> Done:
        done: Done | None = None
        try:
            done = await self._attempt(call, offer, job)
            return done
        finally:
            self._flights.land(key, done if done is not None and _shareable(done) else None)

    async def _attempt(self, call: Call, offer: Offer, job: Job[Done]) -> Done:
        try:
            done = await self._attempts.complete(call, offer, job)
        except AIGatewayError as error:
            await self._give_tokens_back(call, error)
            raise
        await self._keep(call, done)
        return done

    async def _attempt_stream(self, call: Call, offer: Offer, job: Job[Done], relay: Relay) -> Done:
        try:
            done = await self._attempts.stream(call, offer, job, relay)
        except AIGatewayError as error:
            await self._give_tokens_back(call, error)
            raise
        await self._keep_stream(call, done, relay)
        return done

    async def _give_tokens_back(self, call: Call, error: AIGatewayError) -> None:
        """A call that used nothing leaves the windows of tokens as they were. What may have been billed stays counted as estimated."""
        if not isinstance(error, ProviderError) or error.billed == "no":
            await self._s.limiter.correct(call.claims, 0, admitted_at=call.admitted_at)

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

    # -- after an answer ---------------------------------------------------------------------------------------------

    async def _keep(self, call: Call, done: Done) -> None:
        completion = done.completion
        if completion is not None:
            await self._store(call, done, caching.kept(completion))
        await self._correct_windows(call, done)

    async def _keep_stream(self, call: Call, done: Done, relay: Relay) -> None:
        if relay.meter.whole and call.cache_key is not None:
            with suppress(ProviderError):  # a chunk that cannot be read has been passed on as it came; it is not kept
                await self._store(call, done, replay.kept(relay.meter.items))
        await self._correct_windows(call, done)

    async def _store(self, call: Call, done: Done, content: CachedCompletion | CachedEvents) -> None:
        if call.cache_key is None or not call.options.cache.store:
            return
        answer = CachedAnswer(stored_at=self._s.clock(), provider=done.provider, model=call.plan.model, content=content)
        value = caching.encode(answer)
        if value is not None and caching.storable(
            answer.finish_reason,
            complete=answer.finish_reason is not None,
            bound_lowered=done.bound_imposed,
            size=len(value),
            policy=self._s.cache,
        ):
            try:
                await self._s.responses.put(call.cache_key, value, self._s.cache.ttl)
            except Exception as error:  # noqa: BLE001  # the answer is there and is paid for
                self._cache_failed(error)

    def _cache_failed(self, error: Exception) -> None:
        """Says once what kind of failure it was."""
        kind = type(error).__name__
        if kind not in self._cache_faults:
            self._cache_faults.add(kind)
            log.warning("the response cache failed (%s); calls go on without it", kind)

    async def _correct_windows(self, call: Call, done: Done) -> None:
        if done.record is not None:
            usage = done.record.usage
            await self._s.limiter.correct(call.claims, usage.input_tokens + usage.output_tokens, admitted_at=call.admitted_at)

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


def _scopes(call: Call) -> tuple[ScopeClaim, ...]:
    """Caps of None are stored ones: those of a tenant by name and of the gateway are read inside the ledger's transaction."""
    tenant = call.principal.tenant
    return tuple(
        ScopeClaim(
            scope,
            owner.caps if place == 0 or (place == 1 and isinstance(tenant, Tenant)) else None,
            owner.max_parallel_requests,
        )
        for place, (scope, owner) in enumerate(call.owners)
    )


def _shareable(done: Done) -> bool:
    """An answer that a bound of the gateway's own cut short is this caller's alone."""
    completion = done.completion
    return completion is not None and not caching.cut_short(completion.finish_reason, bound_lowered=done.bound_imposed)
