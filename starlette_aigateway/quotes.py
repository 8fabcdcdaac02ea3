"""What a call would cost and what would refuse it, said before it is made.

A quote goes the way of a call as far as nothing is taken: the same steps render, plan, authorize, look up and price it. Windows and
ledger are asked what they would answer. It takes nothing, holds nothing, books nothing, tells observers nothing and asks no provider.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from msgspec import Struct
from msgspec.structs import replace

from . import money
from .accounts import GATEWAY_SCOPE, Budget, Hold
from .admission import Admission
from .calls import Call, Offer, PricedTarget
from .errors import AIGatewayError, PriceUnknown, RateLimitExceeded, SpendCapExceeded
from .policy import keys
from .prices import Price
from .services import Services
from .types import CacheStatus, CallOptions, CompletionRequest, Principal, WindowState

LIMITS = (SpendCapExceeded, RateLimitExceeded, PriceUnknown)
"""What a quote reports where a call raises it; anything else that refuses the call is raised by the quote too."""


class QuotedTarget(Struct, frozen=True, kw_only=True):
    """What one attempt at one planned target may cost; nano-USD unless a name says `usd`.

    `input_tokens` is the upper bound of the input. `max_tokens` is the output bound in each choice that would be sent, None where none
    would be; `imposed`: the gateway chose it, as far as the budget affords it now. `minimum` is the least that an attempt has to hold,
    `worst_case` what it would hold; None where nobody has set a price. `bounded` is false where the provider can pass `worst_case`:
    no output bound is sent, or it does not obey one, or a parameter has no upper bound of cost.
    """

    provider: str
    model: str
    price: Price | None
    input_tokens: int
    max_tokens: int | None
    imposed: bool
    minimum: int | None
    worst_case: int | None
    bounded: bool

    @property
    def minimum_usd(self) -> Decimal | None:
        return _usd(self.minimum)

    @property
    def worst_case_usd(self) -> Decimal | None:
        return _usd(self.worst_case)


class Quote(Struct, frozen=True, kw_only=True):
    """What a call would meet if it were made now; nano-USD unless a name says `usd`. Nothing is reserved by it.

    `targets` are those that would be tried, in this order; none where the answer would come from the cache (`cache` is `hit`) or where
    none may be tried. `required` is what has to fit below every cap: the least that the dearest target needs. `worst_case` is the most
    that one attempt at any of them holds. Both are 0 for a cached answer, and None where a price is not known or nothing may be tried.

    `windows` are those that the call has to pass, as they are, and `budgets` what is spent, held and left, of the principal and of its
    tenant; those of the gateway as a whole count as well, and only show when they refuse. `would_refuse` is the first limit that would
    refuse the call, as the error that the call would raise, or None; it is told as well where limits are only reported (`enforce=False`).
    """

    model: str
    prompt: str | None
    cache: CacheStatus
    targets: tuple[QuotedTarget, ...]
    required: int | None
    worst_case: int | None
    windows: Sequence[WindowState]
    budgets: Sequence[Budget]
    would_refuse: AIGatewayError | None

    @property
    def cached(self) -> bool:
        return self.cache == "hit"

    @property
    def bounded(self) -> bool:
        """Whether `worst_case` is one: no target can pass it."""
        return self.cached or (bool(self.targets) and all(target.bounded for target in self.targets))

    @property
    def required_usd(self) -> Decimal | None:
        return _usd(self.required)

    @property
    def worst_case_usd(self) -> Decimal | None:
        return _usd(self.worst_case)


class Quotes:
    def __init__(self, services: Services, admission: Admission) -> None:
        self._s = services
        self._admission = admission

    async def quote(self, principal: Principal, request: CompletionRequest, options: CallOptions, *, stream: bool = False) -> Quote:
        """Raises what `complete` raises for a call that is malformed or not allowed, and `StorageUnavailable`; a limit that would
        refuse the call is in the quote. Of the `options` only `cache` counts: an idempotency key is not looked at."""
        call = await self._admission.asked(principal, request, options, "", stream=stream)
        refusal: AIGatewayError | None
        windows, refusal = await self._s.limiter.probe(call.claims)
        offer: Offer | None = None
        hold: Hold | None = None
        if call.stored is None:
            try:
                offer = await self._admission.priced(call)
                refusal = refusal or offer.passed_over
                hold = await self._held(call, offer)
            except LIMITS as error:
                refusal = refusal or error
        targets = () if offer is None else tuple(_quoted(call, offer, priced, hold) for priced in offer.targets)
        return Quote(
            model=call.plan.model,
            prompt=call.prompt,
            cache="hit" if call.stored is not None else call.cache_status,
            targets=targets,
            required=0 if call.stored is not None else _most([target.minimum for target in targets]),
            worst_case=0 if call.stored is not None else _most([target.worst_case for target in targets]),
            windows=[state for state in windows if state.claim.scope != GATEWAY_SCOPE],
            budgets=await self._budgets(call),
            would_refuse=refusal,
        )

    async def _held(self, call: Call, offer: Offer) -> Hold:
        """What the ledger would grant to the target that wants the most: any other would get as much, up to what it wants itself."""
        now = self._s.clock()
        dearest = max(offer.targets, key=lambda priced: priced.ask.wanted)
        request = offer.hold_request(call, dearest, hold_id=keys.mint_id("use_", now, self._s.random), expires_at=now)
        return await self._s.ledger.probe(replace(request, enforce=True, bounded=True), now=now)

    async def _budgets(self, call: Call) -> Sequence[Budget]:
        own = {claim.scope: claim.caps for claim in call.standing.scopes if claim.scope != GATEWAY_SCOPE}
        return await self._s.ledger.budgets(own, now=self._s.clock())


def _quoted(call: Call, offer: Offer, priced: PricedTarget, hold: Hold | None) -> QuotedTarget:
    ask, provider = priced.ask, priced.provider
    unbounded = call.weight is None or call.weight.unbounded
    granted = ask.wanted if hold is None else min(ask.wanted, hold.amount)
    max_tokens = offer.output_bound(call.request, priced, granted)
    obeyed = provider.bounds_output or provider.max_output_tokens is not None
    return QuotedTarget(
        provider=priced.target.provider,
        model=priced.target.upstream,
        price=priced.price,
        input_tokens=offer.input_tokens,
        max_tokens=max_tokens,
        imposed=max_tokens is not None and not ask.given,
        minimum=None if priced.price is None else ask.minimum,
        worst_case=None if priced.price is None else granted,
        bounded=priced.price is not None and max_tokens is not None and obeyed and not unbounded,
    )


def _most(amounts: Sequence[int | None]) -> int | None:
    """None where one is not known, or there is none."""
    known = [amount for amount in amounts if amount is not None]
    return max(known) if known and len(known) == len(amounts) else None


def _usd(amount: int | None) -> Decimal | None:
    return None if amount is None else money.dollars(amount)
