"""Letting a call in: what it asks for, who may ask for it, what is known of it already, and what it may cost.

Everything here comes before the first attempt. A call that is refused here has used nothing and is billed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic

from msgspec import Struct
from msgspec.structs import replace

from .accounts import GATEWAY_SCOPE
from .answers import Answers
from .calls import Bill, Call, Done, Offer, PricedTarget
from .errors import AIGatewayError, CostUnbounded, InvalidRequest, NotFound, PriceUnknown, ProviderError, RateLimitExceeded
from .events import CallTolerated
from .policy import caching, estimate, keys, models, pricing, prompts, routing
from .policy.defaults import with_defaults
from .policy.estimate import Encoded
from .policy.pricing import stored_price
from .policy.routing import Plan, Target
from .prices import Price
from .providers.simple import RegisteredProvider
from .repeats import Repeat
from .services import Services
from .standing import Standing, Standings
from .types import CallOptions, CompletionRequest, Limits, Principal, PromptRef, Tenant, WindowState
from .weight import weigh
from .wires import openai_chat

MAX_PLANS = 1024
NO_LIMITS = Limits()


class Route(Struct, frozen=True):
    """A planned target: its provider, its price where none is stored, and whether its model may make tokens that it does not send."""

    target: Target
    provider: RegisteredProvider
    price: Price | None
    reasons: bool


class Routes(Struct, frozen=True):
    """The plan of one model, and everything about its targets that is the same for every call."""

    plan: Plan
    routes: tuple[Route, ...]


class Admission:
    """Renders, plans, authorizes, looks up and limits; prices what is not answered already."""

    def __init__(self, services: Services, answers: Answers) -> None:
        self._s = services
        self._answers = answers
        self._standings = Standings(services.limits, services.default_limits, services.cache.scope)
        self._routes: dict[str, Routes] = {}
        self._renderer = prompts.Renderer()

    def limits(self, principal: Principal) -> Limits:
        """The limits that hold for `principal`, defaults included."""
        return with_defaults(principal, self._s.default_limits)

    async def windows(self, principal: Principal) -> Sequence[WindowState]:
        """The sliding windows of `principal` and of its tenant as they are now; takes nothing. Raises `StorageUnavailable`."""
        standing = self._standings.of(principal, await self._tenant(principal))
        return await self._s.limiter.peek([claim for claim in standing.windows if claim.scope != GATEWAY_SCOPE])

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
        return await self.let_in(await self.asked(principal, request, options, request_id, stream=stream, bill=bill))

    async def let_in(self, call: Call) -> Call:
        """Takes the windows of a call that was `asked`."""
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
        plain = openai_chat.validate(request)
        requested = request.model
        prompt: str | None = None
        if request.prompt is not None:
            request, prompt, plain = await self._render(principal, request, request.prompt)
        plan = self._planned(request.model).plan
        keys.authorize(principal, requested or request.model)
        standing = self._standings.of(principal, NO_LIMITS if principal.tenant is None else await self._tenant(principal))
        sent = estimate.encoded(request)
        cache_key = self._cache_key(standing, request, options, plan, sent, stream=stream)
        stored = await self._answers.lookup(cache_key, options)
        weight = None if stored is not None else weigh(request, sent, self._s.image_tokens, self._s.allow_unbounded, plain=plain)
        timeout = self._s.timeouts.call
        return Call(
            request_id,
            principal,
            request,
            options,
            stream,
            plan,
            standing=standing,
            claims=standing.requests if weight is None else standing.claims(weight.window_tokens),
            windows=(),
            cache_key=cache_key,
            stored=stored,
            weight=weight,
            started=started,
            admitted_at=self._s.clock(),
            deadline=started + (timeout if options.timeout is None else min(timeout, options.timeout)),
            prompt=prompt,
            bill=bill,
        )

    async def again(self, principal: Principal, repeat: Repeat, options: CallOptions, request_id: str) -> Call | None:
        """`admit`, where the answer is at hand: what depends on nothing but the body is known. Else None, and nothing was taken."""
        services, started, request = self._s, monotonic(), repeat.request
        plan = self._planned(request.model).plan
        keys.authorize(principal, request.model)
        standing = self._standings.of(principal, NO_LIMITS if principal.tenant is None else await self._tenant(principal))
        kept = repeat.kept.get(standing.shared_by)
        stored = None if kept is None else self._answers.recall(kept, options)
        if kept is None or stored is None or not services.enforce:
            return None
        claims = standing.requests
        windows = await services.limiter.admit(claims)
        return Call(
            request_id,
            principal,
            request,
            options,
            False,  # no stream
            plan,
            standing=standing,
            claims=claims,
            windows=windows,
            cache_key=kept.key,
            stored=stored,
            weight=None,
            started=started,
            admitted_at=services.clock(),
            deadline=started + services.timeouts.call,
            prompt=None,
        )

    async def _render(self, principal: Principal, request: CompletionRequest, reference: PromptRef) -> tuple[CompletionRequest, str, bool]:
        """The request with its prompt's messages and settings, which prompt that is, and whether it is plain text now; what the caller
        sets itself wins over a setting."""
        prompt = await self._s.prompts.get(reference.name, version=reference.version, label=reference.label, tenant=principal.tenant_id)
        if prompt is None:
            wanted = f"version {reference.version}" if reference.version is not None else f"label {reference.label or prompts.PRODUCTION!r}"
            raise NotFound(f"there is no prompt {reference.name!r} with {wanted}", code="prompt_not_found", param="prompt")
        messages = (*self._renderer.render(prompt, reference.variables), *request.messages)
        rendered = prompts.applied(prompt, request, messages)
        plain = openai_chat.validate(rendered)
        return rendered, f"{prompt.name}@{prompt.version}", plain

    def _planned(self, model: str) -> Routes:
        return self._routes.get(model) or self._plan(model)

    def _plan(self, model: str) -> Routes:
        plan = routing.plan(model, tuple(self._s.providers.values()))
        planned = Routes(plan, tuple(self._route(model, target) for target in plan.targets))
        if len(self._routes) >= MAX_PLANS:
            self._routes.clear()
        self._routes[model] = planned
        return planned

    def _route(self, model: str, target: Target) -> Route:
        provider = self._s.providers[target.provider]
        price = self._s.prices.unstored(target.provider, target.upstream, model)
        return Route(target, provider, price, provider.reasons(model, target.upstream))

    async def _tenant(self, principal: Principal) -> Limits:
        if principal.tenant is None:
            return NO_LIMITS
        if isinstance(principal.tenant, Tenant):
            return principal.tenant
        return await self._s.tenants.get(principal.tenant) or NO_LIMITS

    def _cache_key(
        self, standing: Standing, request: CompletionRequest, options: CallOptions, plan: Plan, sent: Encoded, *, stream: bool
    ) -> str | None:
        """None: the call wants neither to read nor to store, or the cache is off."""
        if not self._s.cache.enabled or not (options.cache.read or options.cache.store):
            return None
        return caching.cache_key(request, stream=stream, plan=plan.fingerprint, scope=standing.shared_by, sent=sent)

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
        request, weight, capped, enforce = call.request, call.weight, call.standing.capped, self._s.enforce
        assert weight is not None, "a cached answer has no price"
        unbounded = None if weight.refused is None else _unbounded(weight.refused)
        if unbounded is not None and capped and enforce:
            raise unbounded
        stored = await self._s.stored_prices.all()
        priced: list[PricedTarget] = []
        obstacles: list[AIGatewayError] = []
        for route in self._planned(call.plan.model).routes:
            target, provider = route.target, route.provider
            price = (stored_price(target.provider, target.upstream, call.plan.model, stored) if stored else None) or route.price
            obstacle = _obstacle(call.plan.model, provider, price)
            if obstacle is not None and capped:
                obstacles.append(obstacle)
                if enforce:
                    continue
            ask = estimate.ask(
                request,
                weight.input_tokens,
                price=price,
                default_max_tokens=self._s.default_max_tokens,
                model_maximum=provider.max_output_tokens,
                obeyed=provider.bounds_output,
                min_output_tokens=self._s.min_output_tokens,
            )
            hidden = weight.thinks or route.reasons or pricing.bills_reasoning(price)
            priced.append(PricedTarget(target, provider, price, ask, hidden, unbounded or obstacle))
        passed_over: AIGatewayError | None = unbounded if capped else None
        if passed_over is None and len(obstacles) == len(call.plan.targets):
            passed_over = next((one for one in obstacles if isinstance(one, CostUnbounded)), obstacles[0])
            if enforce:
                raise passed_over
        return Offer(
            targets=tuple(priced),
            scopes=call.standing.scopes,
            input_tokens=weight.input_tokens,
            bounded=capped and enforce,
            enforce=enforce,
            passed_over=passed_over,
        )

    async def give_tokens_back(self, call: Call, error: AIGatewayError) -> None:
        """A call that used nothing leaves the windows of tokens as they were. What may have been billed stays counted as estimated."""
        if not isinstance(error, ProviderError) or error.billed == "no":
            await self._s.limiter.correct(call.claims, 0, admitted_at=call.admitted_at)

    async def correct_windows(self, call: Call, done: Done) -> None:
        if done.record is not None:
            usage = done.record.usage
            await self._s.limiter.correct(call.claims, usage.input_tokens + usage.output_tokens, admitted_at=call.admitted_at)


def _unbounded(parameter: str) -> CostUnbounded:
    return CostUnbounded(
        f"{parameter} has no upper bound of cost, and this account has a spend cap; leave it out, or have the host allow it "
        f"with allow_unbounded={{{openai_chat.kind_of(parameter)!r}}}",
        param=parameter,
    )


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
