"""`AIGateway`: where everything is composed, the in-process API, and an ASGI app to mount."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import anyio
import anyio.to_thread
from msgspec.structs import replace
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from .administration import Administration
from .arguments import OptionFields, call_options, check_dialect, check_request
from .caller import Caller
from .composition import Composition
from .embedded import remove_with, temporary_path
from .errors import ConfigurationError, InvalidArgument
from .http.lifespan import Lifespan
from .http.sse import Dialect, EventStream, EventStreamResponse, id_headers, writer_of
from .observing import Tap
from .quotes import Quote
from .settings import STORES, SettingFields, check_settings
from .streams import AnswerStream
from .types import (
    KEY_ID_PREFIX,
    Answer,
    CallOptions,
    CompletionRequest,
    Key,
    Principal,
)


class AIGateway(Administration):
    """An AI gateway inside your app: mount it, or call it in process; both are metered alike.

    `providers` are tried in order. `data_dir` holds keys, ledger, windows, prompts and cache of one host; each may be replaced by
    a store of your own (`keys`, `tenants`, `price_store`, `prompts`, `ledger`, `responses`, `windows`, `idempotency`,
    `audit_store`); with all of them no `data_dir` is needed. `idempotency_policy` says how long, and up to which size, answers are kept for
    repeated idempotency keys; `retention`, after how long usage records are rolled up to their daily sums (never, if not given).
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
        check_settings(settings)
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

    @contextmanager
    def recomposed(self, tap: Tap | None = None, **changes: Unpack[SettingFields]) -> Iterator[None]:
        """Works through another composition while the block lasts: the settings until now with these `changes`, and stores in a temporary
        directory but for those that `changes` name. Calls that run already, and lifespans, go on with what they began with. For tests:
        `testing.override` is made of it. `tap` is told every event as it happens."""
        check_settings(changes)
        path = temporary_path()
        settings = SettingFields(**{**self._settings, **STORES, "data_dir": path, **changes})
        composition = Composition(tap=tap, **settings)
        remove = remove_with(composition, path)
        before = self._settings, self._composition
        self._settings = settings
        self._adopt(composition)
        try:
            yield
        finally:
            self._settings = before[0]
            self._adopt(before[1])
            if not composition.lifecycle.started:
                remove()

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

    async def complete(self, who: Principal | str, request: CompletionRequest, **options: Unpack[OptionFields]) -> Answer:
        """A whole answer for a principal or a raw key, limited and billed as over HTTP. Raises any of the errors in `errors.py`.

        With an `idempotency_key` the same call is carried out and billed once: again, it gets the same answer, `replayed`, for a day; while
        it runs it is a `Conflict`, and a key that was used for another call is an `UnprocessableRequest`."""
        checked, chosen = check_request(request), call_options(options)
        principal = await self._principal(who)
        served = await self._composition.in_process.complete(principal, checked, chosen, self.mint_request_id())
        return served.answer

    def stream(
        self, who: Principal | str, request: CompletionRequest, **options: Unpack[OptionFields]
    ) -> AbstractAsyncContextManager[AnswerStream]:
        """The same as a stream of `Chunk`s; `usage` and `cost_usd` are known after its end."""
        return self._stream(who, check_request(request), call_options(options), self.mint_request_id())

    @asynccontextmanager
    async def _stream(
        self, who: Principal | str, request: CompletionRequest, options: CallOptions, request_id: str
    ) -> AsyncIterator[AnswerStream]:
        principal = await self._principal(who)
        async with self._composition.in_process.stream(principal, request, options, request_id) as stream:
            yield stream

    async def stream_response(
        self,
        who: Principal | str,
        request: CompletionRequest,
        *,
        format: Dialect = "native",  # noqa: A002  # the public name
        include_usage: bool = False,
        **options: Unpack[OptionFields],
    ) -> EventStreamResponse:
        """The same as a response to return from a route, in one of the dialects of `/complete` and `/v1/chat/completions`. The call is let
        in when the response is served, before its headers go out."""
        checked, chosen, request_id = check_request(request), call_options(options), self.mint_request_id()
        return EventStreamResponse(
            lambda present: self._stream(who, checked, replace(chosen, present=present), request_id),
            writer_of(check_dialect(format), checked.model, include_usage),
            id_headers(request_id),
            patience=self._composition.pipeline.send_seconds,
            ends_with_its_caller=self._composition.pipeline.ends_with_its_caller,
        )

    async def event_stream(
        self,
        who: Principal | str,
        request: CompletionRequest,
        *,
        format: Dialect = "native",  # noqa: A002  # the public name
        include_usage: bool = False,
        **options: Unpack[OptionFields],
    ) -> EventStream:
        """The same, let in already, for frameworks that have responses of their own. It has to be read to its end or closed. On
        trio, outside of the gateway's lifespan, it raises `ConfigurationError`: the stream outlives this call, and has no owner there."""
        checked, chosen, request_id = check_request(request), call_options(options), self.mint_request_id()
        writer = writer_of(check_dialect(format), checked.model, include_usage)
        if not self._composition.background.movable:
            raise ConfigurationError("event_stream(...) on trio needs the gateway's lifespan: AIGatewayMiddleware, or gateway.lifespan()")
        opened = self._stream(who, checked, chosen, request_id)
        stream = await opened.__aenter__()
        return EventStream(opened, stream, writer(stream), request_id)

    async def quote(
        self, who: Principal | str, request: CompletionRequest, *, stream: bool = False, **options: Unpack[OptionFields]
    ) -> Quote:
        """What this call would cost at the most, which targets it would be tried at, what remains, whether it would be answered from the
        cache, and which limit would refuse it now. It takes, holds and books nothing, claims no idempotency key and asks no provider.
        Takes the arguments of `complete`, and raises as it does for what is no limit: a malformed call, a model that is unknown or not
        allowed, a store that cannot be reached."""
        checked, chosen = check_request(request), call_options(options)
        principal = await self._principal(who)
        return await self._composition.pipeline.quotes.quote(principal, checked, chosen, stream=stream)

    async def _principal(self, who: Principal | str) -> Principal:
        if isinstance(who, Principal):
            await self.ready()
            return who
        if not isinstance(who, str):
            raise InvalidArgument(f"who must be a Principal or a raw key, not {type(who).__name__}", param="who")
        return await self.authenticate(who)

    def mint_request_id(self) -> str:
        """A new `req_…`, in the order of time."""
        return self._composition.mint_request_id()

    # -- callers -----------------------------------------------------------------------------------------------------

    def acting_as(self, who: Principal | Key | str) -> Caller:
        """The gateway as `who` sees it, for jobs and for whoever knows already who acts: a principal, or a stored key (or its id,
        `key_…`). A stored key is looked up at each call: changed limits hold, and a revoked one raises `AuthenticationError`, also in the
        middle of a job."""
        if isinstance(who, Key) or (isinstance(who, str) and who.startswith(KEY_ID_PREFIX)):
            return Caller(self, partial(self.principal_of, who.id if isinstance(who, Key) else who))
        if not isinstance(who, Principal):
            raise InvalidArgument("who must be a Principal, or a stored key or its id (key_…); a raw key is neither", param="who")

        async def known() -> Principal:
            return who

        return Caller(self, known)

    def lazy_caller(self, connection: HTTPConnection) -> Caller:
        """The gateway as whoever sent this request sees it; who that is, is found out at its first use."""

        async def resolved() -> Principal:
            await self.ready()
            return await self._composition.door.principal(connection)

        return Caller(self, resolved)

    async def caller(self, scope: Mapping[str, Any] | HTTPConnection) -> Caller:
        """The gateway as whoever sent this request, or opened this WebSocket, sees it: `scope` is the ASGI scope or Starlette's request.
        Raises `AuthenticationError`, and what the host's login raises."""
        caller = self.lazy_caller(_connection(scope))
        await caller.principal()
        return caller

    # -- ASGI --------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await Lifespan(self.lifespan)(scope, receive, send)
        else:
            await self._composition.http(scope, receive, send)


def _connection(scope: object) -> HTTPConnection:
    if isinstance(scope, HTTPConnection):
        return scope
    if not isinstance(scope, Mapping) or scope.get("type") not in ("http", "websocket"):
        raise InvalidArgument("scope must be the ASGI scope of a request or a WebSocket, such as request.scope", param="scope")
    return HTTPConnection(scope if isinstance(scope, MutableMapping) else dict(scope))
