"""`AIGateway`: where everything is composed, the in-process API, and an ASGI app to mount."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import anyio
import anyio.to_thread
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from .administration import Administration
from .caller import Caller
from .composition import Composition
from .embedded import remove_with, temporary_path
from .errors import ConfigurationError, InvalidArgument
from .http.lifespan import Lifespan
from .quotes import Quote
from .settings import SettingFields, check_names
from .streams import AnswerStream
from .types import (
    Answer,
    CacheControl,
    CallOptions,
    CompletionRequest,
    Principal,
)


class AIGateway(Administration):
    """An AI gateway inside your app: mount it, or call it in process; both are metered alike.

    `providers` are tried in order. `data_dir` holds keys, ledger, windows, prompts and cache of one host; each may be replaced by
    a store of your own (`keys`, `tenants`, `price_store`, `prompts`, `ledger`, `responses`, `windows`, `idempotency`,
    `audit_store`); with all of them no `data_dir` is needed. `idempotency_policy` says how long, and up to which size, answers are kept for
    repeated idempotency keys.
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

    def __init__(self, **settings: Unpack[SettingFields]) -> None:
        check_names(settings)
        self._settings = settings
        self._entered: dict[int, list[AbstractAsyncContextManager[None]]] = {}
        self._adopt(Composition(**settings))

    def _adopt(self, composition: Composition) -> None:
        """Works through `composition` from now on."""
        super().__init__(composition.stores)
        self._composition = composition

    @classmethod
    def in_memory(cls, **settings: Unpack[SettingFields]) -> AIGateway:
        """A gateway for tests: real stores in a temporary directory, which is gone when the gateway is."""
        if "data_dir" in settings:
            raise ConfigurationError("in_memory(...) has a directory of its own; data_dir belongs to AIGateway(...)", param="data_dir")
        settings["data_dir"] = path = temporary_path()
        gateway = cls(**settings)
        remove_with(gateway, path)
        return gateway

    def __repr__(self) -> str:
        return f"AIGateway(name={self.name!r}, providers={list(self._composition.providers)})"

    # -- composition -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._composition.name

    def register_provider(self, provider: object) -> None:
        """Adds a provider after those that are there. Only before the start. Raises `ConfigurationError` for one that is malformed
        and for a name that is taken."""
        self._composition.register_provider(provider)

    async def ready(self) -> None:
        """Starts the gateway in this process, if nothing has started it yet."""
        await self._composition.ready()

    async def check_ready(self) -> None:
        """Raises `StorageUnavailable` if a call could not be metered now."""
        await self._composition.check_ready()

    def lifespan(self, app: object = None) -> AbstractAsyncContextManager[None]:
        """For the host's lifespan. Stores are open, and work that outlives a request has an owner, while it lasts."""
        return self._composition.lifecycle.lifespan()

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
        served = await self._composition.in_process.complete(principal, request, options, self.mint_request_id())
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
        async with self._composition.in_process.stream(principal, request, options, self.mint_request_id()) as stream:
            yield stream

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
        return await self._composition.pipeline.quotes.quote(principal, request, options, stream=stream)

    async def _principal(self, who: Principal | str) -> Principal:
        if isinstance(who, Principal):
            await self.ready()
            return who
        return await self.authenticate(who)

    def mint_request_id(self) -> str:
        """A new `req_…`, in the order of time."""
        return self._composition.mint_request_id()

    def acting_as(self, principal: Principal) -> Caller:
        """The gateway as `principal` sees it, for jobs and for whoever knows already who acts."""
        if not isinstance(principal, Principal):
            raise InvalidArgument(f"principal must be a Principal, not {type(principal).__name__}", param="principal")

        async def known() -> Principal:
            return principal

        return Caller(self._composition.in_process, self, known, self.mint_request_id)

    def lazy_caller(self, connection: HTTPConnection) -> Caller:
        """The gateway as whoever sent this request sees it; who that is, is found out at its first use."""

        async def resolved() -> Principal:
            await self.ready()
            return await self._composition.door.principal(connection)

        return Caller(self._composition.in_process, self, resolved, self.mint_request_id)

    async def caller(self, scope: Mapping[str, Any] | HTTPConnection) -> Caller:
        """The gateway as whoever sent this request sees it. Raises `AuthenticationError`."""
        caller = self.lazy_caller(scope if isinstance(scope, HTTPConnection) else HTTPConnection(dict(scope)))
        await caller.principal()
        return caller

    # -- ASGI --------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await Lifespan(self.lifespan)(scope, receive, send)
        else:
            await self._composition.http(scope, receive, send)


def _options(idempotency_key: str | None, timeout: float | None, tags: Mapping[str, str] | None, cache: CacheControl | None) -> CallOptions:
    return CallOptions(
        idempotency_key=idempotency_key, timeout=timeout, tags=tags if tags is not None else {}, cache=cache or CacheControl()
    )
