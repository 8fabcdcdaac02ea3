"""Everything that the pipeline works with, composed in `composition.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .background import Background
from .events import Event
from .idempotency import Idempotency
from .limiter import Limiter
from .outbox import Outbox
from .policy.caching import CachePolicy
from .policy.pricing import PriceBook
from .policy.routing import RetryPolicy
from .protocols import Clock, Ledger, PriceStore, PromptStore, ResponseCache, TenantStore
from .providers.simple import RegisteredProvider
from .types import ImageTokens, Limits, Timeouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The stores, the settings and the seams of one gateway."""

    providers: Mapping[str, RegisteredProvider]
    ledger: Ledger
    limiter: Limiter
    responses: ResponseCache
    prompts: PromptStore
    tenants: TenantStore
    stored_prices: PriceStore
    prices: PriceBook
    background: Background
    outbox: Outbox
    max_drain_bytes: int
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
    image_tokens: ImageTokens
    enforce: bool
    idempotency: Idempotency
