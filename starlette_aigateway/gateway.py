"""`AIGateway`: where everything is composed, the in-process API, and an ASGI app to mount."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from limits.aio.storage import Storage
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from .accounts import GATEWAY_SCOPE
from .administration import Administration
from .background import Background
from .caller import Caller
from .drains import MAX_DRAIN_BYTES, MAX_DRAINS, Drains, OnDisconnect
from .embedded import Embedded, directory_of
from .entropy import Pool
from .errors import ConfigurationError, InvalidArgument
from .http.app import HTTPApp
from .http.door import AuthorizeAdmin, Door, ResolvePrincipal
from .http.origins import Origins
from .idempotency import Idempotency
from .lifecycle import Lifecycle
from .limiter import Limiter
from .observing import Observers
from .outbox import Outbox
from .pipeline import Pipeline
from .policy import keys as key_policy
from .policy.budgets import THRESHOLDS, check_thresholds
from .policy.caching import CachePolicy
from .policy.estimate import MIN_OUTPUT_TOKENS
from .policy.idempotency import IdempotencyPolicy
from .policy.pricing import ConfiguredPrices, PriceBook
from .policy.routing import RetryPolicy
from .protocols import Clock, IdempotencyStore, KeyStore, Ledger, Observer, PriceStore, PromptStore, ResponseCache, TenantStore
from .providers.simple import RegisteredProvider, adapt
from .public_prices import PublicPrices
from .quotes import Quote
from .services import Services
from .streams import AnswerStream
from .types import (
    Answer,
    CacheControl,
    CallOptions,
    CompletionRequest,
    ImageTokens,
    Limits,
    Principal,
    Timeouts,
)

MAX_BODY_BYTES = 10 * 2**20


class AIGateway(Administration):
    """An AI gateway inside your app: mount it, or call it in process; both are metered alike.

    `providers` are tried in order. `data_dir` holds keys, ledger, windows, prompts and cache of one host; each may be replaced by
    a store of your own (`keys`, `tenants`, `price_store`, `prompts`, `ledger`, `responses`, `windows`, `idempotency`); with all of them no
    `data_dir` is needed. `idempotency_policy` says how long, and up to which size, answers are kept for repeated idempotency keys.
    `prices` are USD per million tokens, by model or `(provider, model)`; `public_prices=True` adds those of the extra `prices`.
    `limits` hold for the gateway as a whole, `default_limits` for principals and keys that bring none.

    `resolve_principal` turns a connection into a `Principal` by the host's own login; `authorize_admin` says who may use the admin
    routes, which do not exist without it. Pages of `trusted_origins` may change and spend things by a login that browsers send of
    themselves, such as a cookie, as the host's own pages may.

    `default_max_tokens` bounds the output of calls under a cap that give no bound; the budget may lower it down to `min_output_tokens`.
    `allow_unbounded` names parameters whose cost has no bound and that principals under a cap may use all the same:
    `web_search_options`, or `messages.content.image_url` for images by address. `image_tokens` bounds what an image that is sent along
    can cost.

    When a caller leaves before its answer is whole, `on_disconnect="drain"` reads the rest of it, so that the bill is exact: a stream for
    `Timeouts.drain` seconds and `max_drain_bytes` at the most, and at most `max_drains` answers at a time in this process; the newest gives
    way. Beyond that, and with `"cancel"` at once, the upstream is closed and the conservative estimate is booked: the bound of the input
    and the output that came (`estimated`), or the full hold where nothing came or a whole answer was asked for (`ambiguous`).

    With `enforce=False` limits are only reported: calls go on, everything is booked, and what a limit, a cap or an unknown cost would have
    refused is marked with the refusal's code (`would_refuse` in usage records, the event `CallTolerated`). Observers hear when what a
    scope has spent reaches one of the `budget_thresholds`, in percent of its cap.

    Constructing opens nothing and creates nothing. Raises `ConfigurationError` and `InvalidArgument`, naming the argument.
    """

    def __init__(
        self,
        *,
        providers: Iterable[object] = (),
        data_dir: str | os.PathLike[str] | None = None,
        prices: ConfiguredPrices | None = None,
        resolve_principal: ResolvePrincipal | None = None,
        authorize_admin: AuthorizeAdmin | None = None,
        trusted_origins: Iterable[str] = (),
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
        retries: RetryPolicy | None = None,
        public_prices: bool = False,
        default_max_tokens: int | None = None,
        min_output_tokens: int = MIN_OUTPUT_TOKENS,
        allow_unbounded: Iterable[str] = (),
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
    ) -> None:
        timeouts = timeouts or Timeouts()
        embedded = Embedded(directory_of(data_dir), timeouts, clock, cache or CachePolicy())
        stores = [keys, tenants, price_store, prompts, ledger, responses, windows, idempotency]
        if data_dir is None and any(store is None for store in stores):
            raise ConfigurationError(
                "data_dir is required: a directory of this host for keys, ledger and cache; or use AIGateway.in_memory(...) in tests",
                param="data_dir",
            )
        self.name = name
        self._ledger_store: Ledger = ledger or embedded.ledger(check_thresholds(budget_thresholds))
        super().__init__(
            keys=keys or embedded.keys(),
            tenants=tenants or embedded.tenants(),
            stored_prices=price_store or embedded.prices(),
            prompts=prompts or embedded.prompts(),
            ledger=self._ledger_store,
            default_limits=_limits(default_limits, "default_limits"),
            clock=clock,
            random=random,
        )
        self._limits = _limits(limits, "limits") or Limits()
        self._embedded = embedded if data_dir is not None else None
        self._providers: dict[str, RegisteredProvider] = {}
        self._observers = Observers(observers)
        self._ledger_store.listen(self._observers.emit)
        self._ids = Pool(random)
        self._public_prices = PublicPrices(clock=clock) if public_prices else None
        self._background = Background(
            Drains(timeouts.drain, on_disconnect=_on_disconnect(on_disconnect), at_most=_positive(max_drains, "max_drains") or MAX_DRAINS)
        )
        self._outbox = Outbox(self._ledger_store, clock, self._observers.emit, patience=2 * timeouts.storage)
        self._entered: dict[int, list[AbstractAsyncContextManager[None]]] = {}
        self._lifecycle = Lifecycle(self._start, self._background, self._outbox, self._observers, settle=timeouts.settle)
        self._responses: ResponseCache = responses or embedded.responses()
        self._storage: Storage = windows or embedded.windows()
        self._idempotency: IdempotencyStore = idempotency or embedded.idempotency()
        limiter = Limiter(self._storage, clock=clock, fail_open=limiter_fail_open)
        for provider in providers:
            self.register_provider(provider)
        self._pipeline = Pipeline(
            Services(
                providers=self._providers,
                ledger=self._ledger_store,
                limiter=limiter,
                responses=self._responses,
                prompts=self._prompts,
                tenants=self._tenants,
                stored_prices=self._stored_prices,
                prices=PriceBook(prices, self._public_prices),
                background=self._background,
                outbox=self._outbox,
                max_drain_bytes=_positive(max_drain_bytes, "max_drain_bytes") or MAX_DRAIN_BYTES,
                clock=clock,
                random=self._ids,
                emit=self._observers.emit,
                limits=self._limits,
                default_limits=default_limits,
                cache=cache or CachePolicy(),
                timeouts=timeouts,
                retries=retries or RetryPolicy(),
                default_max_tokens=_positive(default_max_tokens, "default_max_tokens"),
                min_output_tokens=_positive(min_output_tokens, "min_output_tokens") or MIN_OUTPUT_TOKENS,
                allow_unbounded=frozenset(allow_unbounded),
                image_tokens=_image_tokens(image_tokens),
                enforce=enforce,
                idempotency=Idempotency(
                    self._idempotency, idempotency_policy or IdempotencyPolicy(), clock=clock, random=random, timeouts=timeouts
                ),
            )
        )
        self._door = Door(
            authenticate=self.authenticate,
            resolve_principal=resolve_principal,
            authorize_admin=authorize_admin,
            origins=Origins(trusted_origins),
            limiter=limiter,
        )
        self._http = HTTPApp(
            pipeline=self._pipeline,
            administration=self,
            door=self._door,
            observers=self._observers,
            check=self.check_ready,
            mint_request_id=self.mint_request_id,
            max_body_bytes=max_body_bytes,
        )

    @classmethod
    def in_memory(cls, **settings: Any) -> AIGateway:
        """A gateway for tests: real stores in a temporary directory, which is gone when the gateway is."""
        path = Path(tempfile.gettempdir()) / f"aigateway-{os.getpid()}-{os.urandom(8).hex()}"
        gateway = cls(data_dir=path, **settings)
        weakref.finalize(gateway, _remove, path, os.getpid())
        return gateway

    def __repr__(self) -> str:
        return f"AIGateway(name={self.name!r}, providers={list(self._providers)})"

    # -- composition -------------------------------------------------------------------------------------------------

    def register_provider(self, provider: object) -> None:
        """Adds a provider after those that are there. Only before the start. Raises `ConfigurationError` for one that is malformed
        and for a name that is taken."""
        registered = adapt(provider)
        if registered.name in self._providers:
            raise ConfigurationError(f"two providers are named {registered.name!r}; give one of them another name=", param="providers")
        if self._lifecycle.started:
            raise ConfigurationError("providers are registered before the gateway starts", param="providers")
        self._providers[registered.name] = registered

    async def _start(self, opened: AsyncExitStack) -> None:
        if self._embedded is not None:
            await self._embedded.open(opened)
        stores = (
            self._keys, self._tenants, self._stored_prices, self._prompts, self._ledger_store, self._responses, self._storage,
            self._idempotency,
            *(registered.provider for registered in self._providers.values()),
        )  # fmt: skip
        for store in {id(store): store for store in stores}.values():
            if isinstance(store, AbstractAsyncContextManager):
                await opened.enter_async_context(store)
        if self._public_prices is not None:
            await anyio.to_thread.run_sync(self._public_prices.load)
        await self._ledger_store.set_caps(GATEWAY_SCOPE, self._limits.caps)

    async def ready(self) -> None:
        """Starts the gateway in this process, if nothing has started it yet."""
        await self._lifecycle.ensure()

    async def check_ready(self) -> None:
        """Raises `StorageUnavailable` if a call could not be metered now."""
        await self.ready()
        await self._ledger_store.ping()

    def lifespan(self, app: object = None) -> AbstractAsyncContextManager[None]:
        """For the host's lifespan. Stores are open, and work that outlives a request has an owner, while it lasts."""
        return self._lifecycle.lifespan()

    async def __aenter__(self) -> Self:
        entered = self.lifespan()
        await entered.__aenter__()
        self._entered.setdefault(anyio.get_current_task().id, []).append(entered)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        task = anyio.get_current_task().id
        entered = self._entered[task].pop()
        if not self._entered[task]:
            del self._entered[task]
        await entered.__aexit__(kind, error, trace)

    # -- calls -------------------------------------------------------------------------------------------------------

    async def complete(
        self,
        who: Principal | str,
        request: CompletionRequest,
        *,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
    ) -> Answer:
        """A whole answer for a principal or a raw key, limited and billed as over HTTP. Raises any of the errors in `errors.py`.

        With an `idempotency_key` the same call is carried out and billed once: again, it gets the same answer, `replayed`, for a day; while
        it runs it is a `Conflict`, and a key that was used for another call is an `UnprocessableRequest`."""
        options = _options(idempotency_key, timeout, tags, cache)
        principal = await self._principal(who)
        try:
            served = await self._pipeline.complete(principal, request, options, self.mint_request_id())
        finally:
            await self._tell()
        return served.answer

    @asynccontextmanager
    async def stream(
        self,
        who: Principal | str,
        request: CompletionRequest,
        *,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
    ) -> AsyncIterator[AnswerStream]:
        """The same as a stream of `Chunk`s; `usage` and `cost_usd` are known after its end."""
        options = _options(idempotency_key, timeout, tags, cache)
        principal = await self._principal(who)
        try:
            async with self._pipeline.stream(principal, request, options, self.mint_request_id()) as stream:
                yield stream
        finally:
            await self._tell()

    async def quote(
        self,
        who: Principal | str,
        request: CompletionRequest,
        *,
        stream: bool = False,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
    ) -> Quote:
        """What this call would cost at the most, which targets it would be tried at, what remains, whether it would be answered from the
        cache, and which limit would refuse it now. It takes, holds and books nothing, claims no idempotency key and asks no provider.
        Takes the arguments of `complete`, and raises as it does for what is no limit: a malformed call, a model that is unknown or not
        allowed, a store that cannot be reached."""
        options = _options(idempotency_key, timeout, tags, cache)
        principal = await self._principal(who)
        return await self._pipeline.quotes.quote(principal, request, options, stream=stream)

    async def _principal(self, who: Principal | str) -> Principal:
        if isinstance(who, Principal):
            await self.ready()
            return who
        return await self.authenticate(who)

    async def _tell(self) -> None:
        if not self._observers.worked:
            await self._observers.flush()

    def mint_request_id(self) -> str:
        """A new `req_…`, in the order of time."""
        return key_policy.mint_id("req_", self._clock(), self._ids)

    def acting_as(self, principal: Principal) -> Caller:
        """The gateway as `principal` sees it, for jobs and for whoever knows already who acts."""
        if not isinstance(principal, Principal):
            raise InvalidArgument(f"principal must be a Principal, not {type(principal).__name__}", param="principal")

        async def known() -> Principal:
            return principal

        return Caller(self._pipeline, self, known, self.mint_request_id)

    def lazy_caller(self, connection: HTTPConnection) -> Caller:
        """The gateway as whoever sent this request sees it; who that is, is found out at its first use."""

        async def resolved() -> Principal:
            await self.ready()
            return await self._door.principal(connection)

        return Caller(self._pipeline, self, resolved, self.mint_request_id)

    async def caller(self, scope: Mapping[str, Any] | HTTPConnection) -> Caller:
        """The gateway as whoever sent this request sees it. Raises `AuthenticationError`."""
        caller = self.lazy_caller(scope if isinstance(scope, HTTPConnection) else HTTPConnection(dict(scope)))
        await caller.principal()
        return caller

    # -- ASGI --------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _serve_lifespan(self.lifespan, receive, send)
        else:
            await self._http(scope, receive, send)


def _limits(limits: Limits | None, name: str) -> Limits | None:
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigurationError(f"{name} must be Limits(...), not {type(limits).__name__}", param=name)
    return limits


def _positive(value: int | None, name: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"{name} must be a positive integer", param=name)
    return value


def _on_disconnect(value: OnDisconnect) -> OnDisconnect:
    if value not in ("drain", "cancel"):
        raise ConfigurationError('on_disconnect must be "drain" or "cancel"', param="on_disconnect")
    return value


def _image_tokens(bounds: ImageTokens | None) -> ImageTokens:
    if bounds is not None and not isinstance(bounds, ImageTokens):
        raise ConfigurationError("image_tokens must be an ImageTokens", param="image_tokens")
    return bounds or ImageTokens()


def _options(idempotency_key: str | None, timeout: float | None, tags: Mapping[str, str] | None, cache: CacheControl | None) -> CallOptions:
    return CallOptions(
        idempotency_key=idempotency_key, timeout=timeout, tags=tags if tags is not None else {}, cache=cache or CacheControl()
    )


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


async def _serve_lifespan(lifespan: Callable[[], AbstractAsyncContextManager[None]], receive: Receive, send: Send) -> None:
    """The ASGI lifespan protocol, for a gateway that is the whole app."""
    await receive()
    try:
        async with lifespan():
            await send({"type": "lifespan.startup.complete"})
            await receive()
    except Exception as error:
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise
    await send({"type": "lifespan.shutdown.complete"})
