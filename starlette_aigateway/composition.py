"""Everything that one gateway is made of, put together from its settings. The only place that names concrete backends.

`AIGateway` works through one composition and may change it for another (`testing.override`): nothing in here knows the gateway.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import anyio
import anyio.to_thread
from limits.aio.storage import Storage

from .accounts import GATEWAY_SCOPE
from .administration import Administration
from .background import Background
from .bookkeeping import Stores
from .drains import MAX_DRAIN_BYTES, MAX_DRAINS, Drains, OnDisconnect
from .embedded import Embedded, directory_of
from .entropy import Pool
from .errors import ConfigurationError
from .http.app import HTTPApp
from .http.door import AuthorizeAdmin, Door, ResolvePrincipal
from .http.origins import Origins
from .idempotency import Idempotency
from .lifecycle import Lifecycle
from .limiter import Limiter
from .observing import Observers, Tap, ToldPipeline
from .outbox import Outbox
from .pipeline import Pipeline
from .policy import keys as key_policy
from .policy.budgets import THRESHOLDS, check_thresholds
from .policy.caching import CachePolicy
from .policy.estimate import MIN_OUTPUT_TOKENS
from .policy.idempotency import IdempotencyPolicy
from .policy.pricing import ConfiguredPrices, PriceBook
from .policy.retention import Retention
from .policy.routing import RetryPolicy
from .protocols import AuditStore, Clock, IdempotencyStore, KeyStore, Ledger, Observer, PriceStore, PromptStore, ResponseCache, TenantStore
from .providers.simple import RegisteredProvider, adapt
from .public_prices import PublicPrices
from .retention import Retainer
from .services import Services
from .settings import MAX_BODY_BYTES
from .trail import Trail
from .types import (
    ImageTokens,
    Limits,
    Timeouts,
)


class Composition(Administration):
    """The arguments are those of `AIGateway` (`settings.SettingFields`), which has
    checked their types. `tap` is told every event at once, before any observer.

    Constructing opens nothing. Raises `ConfigurationError` and `InvalidArgument`, naming the argument.
    """

    def __init__(
        self,
        *,
        providers: Iterable[object] = (),
        data_dir: str | os.PathLike[str] | None = None,
        prices: ConfiguredPrices | None = None,
        resolve_principal: ResolvePrincipal | None = None,
        authorize_admin: AuthorizeAdmin | None = None,
        trusted_origins: Collection[str] = (),
        limits: Limits | None = None,
        default_limits: Limits | None = None,
        cache: CachePolicy | None = None,
        timeouts: Timeouts | None = None,
        observers: Sequence[Observer] = (),
        keys: KeyStore | None = None,
        tenants: TenantStore | None = None,
        price_store: PriceStore | None = None,
        prompts: PromptStore | None = None,
        ledger: Ledger | None = None,
        responses: ResponseCache | None = None,
        windows: Storage | None = None,
        idempotency: IdempotencyStore | None = None,
        idempotency_policy: IdempotencyPolicy | None = None,
        audit_store: AuditStore | None = None,
        retention: Retention | None = None,
        retries: RetryPolicy | None = None,
        public_prices: bool = False,
        default_max_tokens: int | None = None,
        min_output_tokens: int = MIN_OUTPUT_TOKENS,
        allow_unbounded: Collection[str] = (),
        image_tokens: ImageTokens | None = None,
        limiter_fail_open: bool = False,
        enforce: bool = True,
        budget_thresholds: Sequence[int] = THRESHOLDS,
        max_body_bytes: int = MAX_BODY_BYTES,
        on_disconnect: OnDisconnect = "drain",
        max_drain_bytes: int = MAX_DRAIN_BYTES,
        max_drains: int = MAX_DRAINS,
        name: str = "default",
        clock: Clock = time.time,
        random: Callable[[int], bytes] = os.urandom,
        tap: Tap | None = None,
    ) -> None:
        timeouts = timeouts or Timeouts()
        embedded = Embedded(directory_of(data_dir), timeouts, clock, cache or CachePolicy())
        stores = [keys, tenants, price_store, prompts, ledger, responses, windows, idempotency, audit_store]
        if data_dir is None and any(store is None for store in stores):
            raise ConfigurationError(
                "data_dir is required: a directory of this host for keys, ledger and cache; or use AIGateway.in_memory(...) in tests",
                param="data_dir",
            )
        self.name = name
        self.ledger: Ledger = ledger or embedded.ledger(check_thresholds(budget_thresholds))
        self.stores = Stores(
            keys=keys or embedded.keys(),
            tenants=tenants or embedded.tenants(),
            prices=price_store or embedded.prices(),
            prompts=prompts or embedded.prompts(),
            ledger=self.ledger,
            trail=Trail(audit_store or embedded.audit(), clock, random),
            default_limits=default_limits,
            clock=clock,
            random=random,
        )
        super().__init__(self.stores)
        self._limits = limits or Limits()
        self.embedded = embedded if data_dir is not None else None
        self.providers: dict[str, RegisteredProvider] = {}
        self.observers = Observers(observers, tap)
        self.ledger.listen(self.observers.emit)
        self._ids = Pool(random)
        self._public_prices = PublicPrices(clock=clock) if public_prices else None
        self.background = Background(
            Drains(
                timeouts.drain,
                on_disconnect=on_disconnect,
                at_most=max_drains,
            ),
            patience=timeouts.settle + 2 * timeouts.storage,
        )
        self.outbox = Outbox(self.ledger, clock, self.observers.emit, patience=2 * timeouts.storage)
        self.responses: ResponseCache = responses or embedded.responses()
        self._storage: Storage = windows or embedded.windows()
        self._idempotency: IdempotencyStore = idempotency or embedded.idempotency()
        retainer = Retainer(self.ledger, self._idempotency, retention or Retention(), clock=clock, random=random)
        self.lifecycle = Lifecycle(self._start, self.background, self.outbox, self.observers, retainer, settle=timeouts.settle)
        limiter = Limiter(self._storage, clock=clock, fail_open=limiter_fail_open)
        for provider in providers:
            self.register_provider(provider)
        self.pipeline = Pipeline(
            Services(
                providers=self.providers,
                ledger=self.ledger,
                limiter=limiter,
                responses=self.responses,
                prompts=self._prompts,
                tenants=self._tenants,
                stored_prices=self._stored_prices,
                prices=PriceBook(prices, self._public_prices),
                background=self.background,
                outbox=self.outbox,
                max_drain_bytes=max_drain_bytes,
                clock=clock,
                random=self._ids,
                emit=self.observers.emit,
                limits=self._limits,
                default_limits=default_limits,
                cache=cache or CachePolicy(),
                timeouts=timeouts,
                retries=retries or RetryPolicy(),
                default_max_tokens=default_max_tokens,
                min_output_tokens=min_output_tokens,
                allow_unbounded=frozenset(allow_unbounded),
                image_tokens=image_tokens or ImageTokens(),
                enforce=enforce,
                idempotency=Idempotency(
                    self._idempotency, idempotency_policy or IdempotencyPolicy(), clock=clock, random=random, timeouts=timeouts
                ),
            )
        )
        self.in_process = ToldPipeline(self.pipeline, self.observers)
        self.door = Door(
            authenticate=self._authenticate_ready,
            recognise=self.recognised,
            resolve_principal=resolve_principal,
            authorize_admin=authorize_admin,
            origins=Origins(trusted_origins),
            limiter=limiter,
        )
        self.http = HTTPApp(
            pipeline=self.pipeline,
            administration=self,
            door=self.door,
            observers=self.observers,
            lifecycle=self.lifecycle,
            check=self.check_ready,
            mint_request_id=self.mint_request_id,
            max_body_bytes=max_body_bytes,
            receive_seconds=timeouts.receive,
        )

    def register_provider(self, provider: object) -> None:
        """Adds a provider after those that are there. Only before the start. Raises `ConfigurationError` for one that is malformed
        and for a name that is taken."""
        registered = adapt(provider)
        if registered.name in self.providers:
            raise ConfigurationError(f"two providers are named {registered.name!r}; give one of them another name=", param="providers")
        if self.lifecycle.started:
            raise ConfigurationError("providers are registered before the gateway starts", param="providers")
        self.providers[registered.name] = registered

    async def _start(self, opened: AsyncExitStack) -> None:
        if self.embedded is not None:
            await self.embedded.open(opened)
        stores = (
            self._keys, self._tenants, self._stored_prices, self._prompts, self.ledger, self.responses, self._storage,
            self._idempotency, self._trail.store,
            *(registered.provider for registered in self.providers.values()),
        )  # fmt: skip
        for store in {id(store): store for store in stores}.values():
            if isinstance(store, AbstractAsyncContextManager):
                await opened.enter_async_context(store)
        if self._public_prices is not None:
            await anyio.to_thread.run_sync(self._public_prices.load)
        await self.ledger.set_caps(GATEWAY_SCOPE, self._limits.caps)

    async def ready(self) -> None:
        """Starts the gateway in this process, if nothing has started it yet."""
        await self.lifecycle.ensure()

    async def check_ready(self) -> None:
        """Raises `StorageUnavailable` if a call could not be metered now."""
        await self.ready()
        await self.ledger.ping()
        self.outbox.admit()

    def mint_request_id(self) -> str:
        """A new `req_…`, in the order of time."""
        return key_policy.mint_id("req_", self._clock(), self._ids)
