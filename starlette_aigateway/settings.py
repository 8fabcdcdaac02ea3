"""What an `AIGateway` is told at its construction, and how it is checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from limits.aio.storage import Storage

from .checks import CHECKS
from .drains import OnDisconnect
from .errors import ConfigurationError
from .hints import did_you_mean
from .http.door import AuthorizeAdmin, ResolvePrincipal
from .policy.caching import CachePolicy
from .policy.idempotency import IdempotencyPolicy
from .policy.pricing import ConfiguredPrices
from .policy.retention import Retention
from .policy.routing import RetryPolicy
from .protocols import AuditStore, Clock, IdempotencyStore, KeyStore, Ledger, Observer, PriceStore, PromptStore, ResponseCache, TenantStore
from .types import (
    ImageTokens,
    Limits,
    Timeouts,
)

MAX_BODY_BYTES = 10 * 2**20


class SettingFields(TypedDict, total=False):
    """The keyword arguments of `AIGateway`, which says what they mean; their defaults are those of `Composition`."""

    providers: Iterable[object]
    data_dir: str | os.PathLike[str] | None
    prices: ConfiguredPrices | None
    resolve_principal: ResolvePrincipal | None
    authorize_admin: AuthorizeAdmin | None
    trusted_origins: Collection[str]
    limits: Limits | None
    default_limits: Limits | None
    cache: CachePolicy | None
    timeouts: Timeouts | None
    observers: Sequence[Observer]
    keys: KeyStore | None
    tenants: TenantStore | None
    price_store: PriceStore | None
    prompts: PromptStore | None
    ledger: Ledger | None
    responses: ResponseCache | None
    windows: Storage | None
    idempotency: IdempotencyStore | None
    idempotency_policy: IdempotencyPolicy | None
    audit_store: AuditStore | None
    retention: Retention | None
    retries: RetryPolicy | None
    public_prices: bool
    default_max_tokens: int | None
    min_output_tokens: int
    allow_unbounded: Collection[str]
    image_tokens: ImageTokens | None
    limiter_fail_open: bool
    enforce: bool
    budget_thresholds: Sequence[int]
    max_body_bytes: int
    on_disconnect: OnDisconnect
    max_drain_bytes: int
    max_drains: int
    name: str
    clock: Clock
    random: Callable[[int], bytes]


STORES: SettingFields = {
    "keys": None, "tenants": None, "price_store": None, "prompts": None, "ledger": None, "responses": None, "windows": None,
    "idempotency": None, "audit_store": None,
}  # fmt: skip
"""Every store as the embedded default."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises `ConfigurationError` for an argument that there is not, and it or `InvalidArgument` for one that is of no use."""
    for name, value in settings.items():
        if name not in CHECKS:
            hint = did_you_mean(name, CHECKS) or f"; there are {', '.join(sorted(CHECKS))}"
            raise ConfigurationError(f"AIGateway takes no argument {name!r}{hint}", param=name)
        CHECKS[name](value, name)
