"""One call on its way through the pipeline: what was found out before the first attempt, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from msgspec import Struct

from . import money, replay
from .accounts import HoldRequest, ScopeClaim, UsageRecord
from .errors import AIGatewayError
from .policy import estimate
from .policy.caching import CachedAnswer, CachedCompletion
from .policy.estimate import Ask
from .policy.routing import Plan, Target
from .policy.windows import WindowClaim, WindowState
from .providers.simple import RegisteredProvider
from .standing import Standing
from .types import Answer, CacheStatus, CallOptions, Completion, CompletionRequest, Native, Price, Principal
from .weight import Weight


class PricedTarget(Struct, frozen=True, gc=False):
    """A planned target with everything that an attempt at it needs: its adapter, its price and what has to be held. `hidden`: it may make
    tokens that it does not send (reasoning). `obstacle` is why no cap could be held at it, if one has to be."""

    target: Target
    provider: RegisteredProvider
    price: Price | None
    ask: Ask
    hidden: bool = False
    obstacle: AIGatewayError | None = None


class Offer(Struct, frozen=True, kw_only=True, gc=False):
    """What a call may cost at each of its targets, and the `scopes` that pay. `input_tokens` is the upper bound of its input; `bounded`
    says that the output of every attempt is to be bounded, since a cap has to be held. Without `enforce` limits are only reported, and
    `passed_over` is the refusal that the call would have got for a cost that is not known."""

    targets: tuple[PricedTarget, ...]
    scopes: tuple[ScopeClaim, ...]
    input_tokens: int
    bounded: bool
    enforce: bool = True
    passed_over: AIGatewayError | None = None

    def at(self, target: Target) -> PricedTarget:
        for priced in self.targets:
            if priced.target == target:
                return priced
        raise LookupError(target)

    @property
    def plan(self) -> tuple[Target, ...]:
        return tuple([priced.target for priced in self.targets])

    @property
    def admission(self) -> int:
        """Nano-USD that the dearest target needs at the least."""
        return max([priced.ask.minimum for priced in self.targets])

    def output_bound(self, request: CompletionRequest, priced: PricedTarget, granted: int) -> int | None:
        """The output bound in tokens, in each choice, that is sent and that `granted` nano-USD pay for; None where nothing has to be
        bounded."""
        ask = priced.ask
        if ask.given or not self.bounded:
            return request.max_tokens
        if granted >= ask.wanted:
            return ask.output_wanted
        return estimate.affordable(granted, self.input_tokens, request.n, priced.price, ask.output_wanted)

    def hold_request(self, call: Call, priced: PricedTarget, *, hold_id: str, expires_at: float) -> HoldRequest:
        """What the first attempt of `call`, if it is at `priced`, asks of the ledger."""
        principal, targets = call.principal, self.targets
        return HoldRequest(
            hold_id,
            call.request_id,
            1,
            self.scopes,
            principal.id,
            principal.tenant_id,
            principal.key_id,
            priced.target.provider,
            model=call.plan.model,
            price=priced.price,
            minimum=priced.ask.minimum,
            wanted=priced.ask.wanted,
            admission=targets[0].ask.minimum if len(targets) == 1 else self.admission,
            expires_at=expires_at,
            prompt=call.prompt,
            tags=call.options.tags,
            enforce=self.enforce,
            bounded=self.bounded or not self.enforce,
            would_refuse=call.would_refuse or (None if self.passed_over is None else self.passed_over.code),
        )


class Bill:
    """Whether a call may have cost anything: `booked` is set before the first of its attempts is settled. Kept by a call whose outcome has
    to be known though it failed (`idempotency.py`)."""

    __slots__ = ("booked",)

    def __init__(self) -> None:
        self.booked = False


class Call(Struct, frozen=True, gc=False):
    """A call that was let in. `standing` tells whose limits hold for it; `started` and `deadline` are on the monotonic clock,
    `admitted_at` is Unix seconds; `stored` is the cached answer to it, else there is the `weight` of its request. `would_refuse` is the
    code of a window's refusal that was only reported."""

    # Not `kw_only`, as `accounts.HoldRequest`.
    request_id: str
    principal: Principal
    request: CompletionRequest
    options: CallOptions
    stream: bool
    plan: Plan
    standing: Standing
    claims: tuple[WindowClaim, ...]
    windows: Sequence[WindowState]
    cache_key: str | None
    stored: CachedAnswer | None
    weight: Weight | None
    started: float
    admitted_at: float
    deadline: float
    prompt: str | None
    bill: Bill | None = None
    would_refuse: str | None = None

    @property
    def created(self) -> int:
        """Unix seconds, as the OpenAI wire dates an answer."""
        return int(self.admitted_at)

    @property
    def cache_status(self) -> CacheStatus:
        """Of an answer that does not come from the cache."""
        return "miss" if self.cache_key is not None else "bypass"


class Done(Struct, frozen=True, kw_only=True, gc=False):
    """A successful attempt, booked. `record` is None if the ledger could not be reached in time: the lease will book it.

    `lowered_to` is the output bound in tokens where the budget afforded less than was wanted; `bound_imposed` says that the gateway sent
    a bound that the caller had not asked for. `completion` is None for a stream.
    """

    provider: str
    record: UsageRecord | None
    cost: int
    lowered_to: int | None
    bound_imposed: bool
    completion: Completion | None = None


class Served(Struct, frozen=True, kw_only=True, gc=False):
    """A whole answer and what the door says about it; `created` is Unix seconds. The completion of a cached answer is decoded only when
    somebody looks at it; `call` is the one that it answers."""

    request_id: str
    created: int
    provider: str
    cost: int
    cache: CacheStatus
    windows: Sequence[WindowState]
    age: float | None = None
    lowered_to: int | None = None
    completion: Completion | None = None
    stored: CachedAnswer | None = None
    call: Call | None = None
    replayed: bool = False

    @property
    def native(self) -> Native | None:
        if self.completion is not None:
            return self.completion.native
        content = self.stored.content if self.stored is not None else None
        return content.native if isinstance(content, CachedCompletion) else None

    @property
    def cost_usd(self) -> Decimal:
        return money.dollars(self.cost)

    @property
    def answer(self) -> Answer:
        completion = self.completion
        if completion is None:
            assert self.stored is not None
            completion = replay.completion_of(self.stored)
        return Answer(
            message=completion.message,
            finish_reason=completion.finish_reason,
            usage=completion.usage,
            model=completion.model,
            id=completion.id,
            native=completion.native,
            provider=self.provider,
            cost_usd=self.cost_usd,
            cached=self.cache == "hit",
            request_id=self.request_id,
            replayed=self.replayed,
        )
