"""Letting a call in: what it asks for, who may ask for it, what is known of it already, and what it may cost.

Everything here comes before the first attempt. A call that is refused here has used nothing and is billed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic

from msgspec.structs import replace

from .accounts import GATEWAY_SCOPE, ScopeClaim, principal_scope, tenant_scope
from .answers import Answers
from .calls import Bill, Call, Done, Offer, PricedTarget
from .errors import AIGatewayError, CostUnbounded, InvalidRequest, NotFound, PriceUnknown, ProviderError, RateLimitExceeded
from .events import CallTolerated
from .policy import caching, estimate, keys, models, pricing, prompts, routing
from .policy.defaults import with_defaults
from .policy.routing import Plan
from .policy.windows import WindowClaim
from .prices import Price
from .providers.simple import RegisteredProvider
from .services import Services
from .types import CallOptions, CompletionRequest, Limits, Principal, Tenant, WindowState
from .wires import openai_chat

MAX_PLANS = 1024
NO_LIMITS = Limits()


class Admission:
    """Renders, plans, authorizes, looks up and limits; prices what is not answered already."""

    def __init__(self, services: Services, answers: Answers) -> None:
        self._s = services
        self._answers = answers
        self._plans: dict[str, Plan] = {}
        self._renderer = prompts.Renderer()

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

    async def admit(
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
        call = await self.asked(principal, request, options, request_id, stream=stream, bill=bill)
        try:
            windows = await self._s.limiter.admit(call.claims)
        except (RateLimitExceeded, InvalidRequest) as refusal:
            if self._s.enforce:
                raise
            self._tolerate(call, refusal.code)
            windows = await self._s.limiter.peek(call.claims)
            call = replace(call, claims=(), would_refuse=refusal.code)
        return replace(call, windows=windows, admitted_at=self._s.clock())

    def _tolerate(self, call: Call, code: str) -> None:
        """Limits are only reported: the call goes on, and observers hear which refusal it would have got."""
        self._s.emit(CallTolerated(request_id=call.request_id, principal=call.principal.id, model=call.plan.model, code=code))

    async def asked(
        self,
        principal: Principal,
        request: CompletionRequest,
        options: CallOptions,
        request_id: str,
        *,
        stream: bool,
        bill: Bill | None = None,
    ) -> Call:
        """A call that has not passed its windows yet: everything of `admit` that takes nothing."""
        started = monotonic()
        openai_chat.validate(request)
        requested = request.model
        request, prompt = await self._render(principal, request)
        plan = self._plan(request.model)
        keys.authorize(principal, requested or request.model)
        limits = with_defaults(principal, self._s.default_limits)
        tenant = await self._tenant(principal)
        cache_key = self._cache_key(principal, request, options, plan, stream=stream)
        stored = await self._answers.lookup(cache_key, options)
        owners = self._owners(principal, limits, tenant)
        claims = self._claims(owners, request, free=stored is not None)
        return Call(
            request_id=request_id,
            principal=principal,
            request=request,
            options=options,
            stream=stream,
            plan=plan,
            owners=owners,
            claims=claims,
            windows=(),
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
                tokens = tokens or self._window_tokens(request)
                claims.append(WindowClaim(scope, "tokens", owner.tokens_per_minute, tokens))
        return tuple(claims)

    def _window_tokens(self, request: CompletionRequest) -> int:
        images = openai_chat.images(request, self._s.image_tokens)
        return estimate.tokens_for_window(request, request.max_tokens, images=images.number, image_bytes=images.bytes)

    def _owners(self, principal: Principal, limits: Limits, tenant: Limits) -> Sequence[tuple[str, Limits]]:
        """Whose limits hold, in the fixed order in which all of them are taken."""
        if principal.tenant_id is None:
            return ((principal_scope(principal.id), limits), (GATEWAY_SCOPE, self._s.limits))
        return (
            (principal_scope(principal.id), limits),
            (tenant_scope(principal.tenant_id), tenant),
            (GATEWAY_SCOPE, self._s.limits),
        )

    def _cache_key(self, principal: Principal, request: CompletionRequest, options: CallOptions, plan: Plan, *, stream: bool) -> str | None:
        """None: the call wants neither to read nor to store, or the cache is off."""
        if not self._s.cache.enabled or not (options.cache.read or options.cache.store):
            return None
        return caching.cache_key(request, stream=stream, plan=plan.fingerprint, scope=caching.shared_by(self._s.cache.scope, principal))

    async def offer(self, call: Call) -> Offer:
        try:
            offer = await self.priced(call)
        except AIGatewayError as error:
            await self.give_tokens_back(call, error)
            raise
        if offer.passed_over is not None and call.would_refuse is None:
            self._tolerate(call, offer.passed_over.code)
        return offer

    async def priced(self, call: Call) -> Offer:
        """The targets with their prices and with what each has to hold. Under a cap, those that cannot be held are left out. Raises
        `CostUnbounded` and `PriceUnknown` where none is left; where limits are only reported, the offer says so."""
        plan, request = call.plan, call.request
        capped = any(owner.capped for _, owner in call.owners)
        unbounded = self._unbounded(request)
        if unbounded is not None and capped and self._s.enforce:
            raise unbounded
        images = openai_chat.images(request, self._s.image_tokens)
        input_tokens = estimate.input_bound(request, extra=images.tokens - images.bytes)
        thinks = openai_chat.asks_for_reasoning(request)
        stored = await self._s.stored_prices.all()
        priced = []
        obstacles: list[AIGatewayError] = []
        for target in plan.targets:
            provider = self._s.providers[target.provider]
            price = self._s.prices.lookup(target.provider, target.upstream, plan.model, stored)
            obstacle = _obstacle(plan.model, provider, price)
            if obstacle is not None and capped:
                obstacles.append(obstacle)
                if self._s.enforce:
                    continue
            ask = estimate.ask(
                request,
                input_tokens,
                price=price,
                default_max_tokens=self._s.default_max_tokens,
                model_maximum=provider.max_output_tokens,
                obeyed=provider.bounds_output,
                min_output_tokens=self._s.min_output_tokens,
            )
            hidden = thinks or provider.reasons(plan.model, target.upstream) or pricing.bills_reasoning(price)
            priced.append(PricedTarget(target, provider, price, ask, hidden, unbounded or obstacle))
        passed_over: AIGatewayError | None = unbounded if capped else None
        if passed_over is None and len(obstacles) == len(plan.targets):
            passed_over = next((one for one in obstacles if isinstance(one, CostUnbounded)), obstacles[0])
            if self._s.enforce:
                raise passed_over
        return Offer(
            targets=tuple(priced),
            scopes=scopes(call),
            input_tokens=input_tokens,
            bounded=capped and self._s.enforce,
            enforce=self._s.enforce,
            passed_over=passed_over,
        )

    def _unbounded(self, request: CompletionRequest) -> CostUnbounded | None:
        for parameter in openai_chat.unbounded_parameters(request):
            kind = openai_chat.kind_of(parameter)
            if kind not in self._s.allow_unbounded:
                return CostUnbounded(
                    f"{parameter} has no upper bound of cost, and this account has a spend cap; leave it out, or have the host allow it "
                    f"with allow_unbounded={{{kind!r}}}",
                    param=parameter,
                )
        return None

    async def give_tokens_back(self, call: Call, error: AIGatewayError) -> None:
        """A call that used nothing leaves the windows of tokens as they were. What may have been billed stays counted as estimated."""
        if not isinstance(error, ProviderError) or error.billed == "no":
            await self._s.limiter.correct(call.claims, 0, admitted_at=call.admitted_at)

    async def correct_windows(self, call: Call, done: Done) -> None:
        if done.record is not None:
            usage = done.record.usage
            await self._s.limiter.correct(call.claims, usage.input_tokens + usage.output_tokens, admitted_at=call.admitted_at)


def _obstacle(model: str, provider: RegisteredProvider, price: Price | None) -> AIGatewayError | None:
    """Why the worst case of a target is not known, so that no cap can be held at it."""
    if price is None:
        return PriceUnknown(
            f"the host has set no price for the model {model!r}, and this account has a spend cap; the host may set one with prices= or "
            "PUT /prices",
            param="model",
        )
    if provider.bounds_output or provider.max_output_tokens is not None:
        return None
    return CostUnbounded(
        f"no provider of {model!r} can bound its output, and this account has a spend cap; the host may give the provider "
        "max_output_tokens",
        param="model",
    )


def scopes(call: Call) -> tuple[ScopeClaim, ...]:
    """Who pays. The gateway's caps are None, which is the stored ones: all workers share them, also those with other settings. A
    tenant's are those that its record shows."""
    return tuple(
        ScopeClaim(scope, None if scope == GATEWAY_SCOPE else owner.caps, owner.max_parallel_requests) for scope, owner in call.owners
    )
