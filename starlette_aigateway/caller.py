"""`Caller`: the gateway as one principal sees it. What a host's own routes and jobs hold in their hands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, Unpack

from starlette.requests import HTTPConnection

from .accounts import Budget, UsageReport
from .arguments import CallFields, OptionFields, read_call
from .bookkeeping import UsageFilters
from .errors import ConfigurationError, InvalidArgument
from .http.sse import Dialect, EventStream, EventStreamResponse
from .quotes import Quote
from .streams import AnswerStream
from .types import Answer, CompletionRequest, Principal

STATE_NAME = "aigateway"


class InProcess(Protocol):
    """What a `Caller` asks: the gateway, whose in-process API says what these do."""

    async def complete(self, who: Principal, request: CompletionRequest, **options: Unpack[OptionFields]) -> Answer: ...

    def stream(
        self, who: Principal, request: CompletionRequest, **options: Unpack[OptionFields]
    ) -> AbstractAsyncContextManager[AnswerStream]: ...

    async def stream_response(
        self,
        who: Principal,
        request: CompletionRequest,
        *,
        format: Dialect,  # noqa: A002  # the public name
        include_usage: bool,
        **options: Unpack[OptionFields],
    ) -> EventStreamResponse: ...

    async def event_stream(
        self,
        who: Principal,
        request: CompletionRequest,
        *,
        format: Dialect,  # noqa: A002  # the public name
        include_usage: bool,
        **options: Unpack[OptionFields],
    ) -> EventStream: ...

    async def quote(self, who: Principal, request: CompletionRequest, *, stream: bool, **options: Unpack[OptionFields]) -> Quote: ...

    async def budgets(self, principal: Principal) -> Sequence[Budget]: ...

    async def usage(self, **filters: Unpack[UsageFilters]) -> UsageReport: ...


class Caller:
    """Calls as one principal, limited and billed to it. Each takes the arguments of `CallFields`; parameters that are not named there go
    to the provider untouched. All raise the errors in `errors.py`: `InvalidArgument` names an argument that is wrong."""

    def __init__(self, gateway: InProcess, resolve: Callable[[], Awaitable[Principal]]) -> None:
        self._gateway = gateway
        self._resolve = resolve
        self._principal: Principal | None = None

    async def principal(self) -> Principal:
        """Who calls and who pays. Raises `AuthenticationError` where nobody is logged in. The host's login is asked once; a stored key is
        looked up at each call, so that revoking it also ends what a long-lived WebSocket or job does with it."""
        if self._principal is None or self._principal.key_id is not None:
            self._principal = await self._resolve()
        return self._principal

    async def complete(self, **call: Unpack[CallFields]) -> Answer:
        """A whole answer."""
        principal, asked = await self.principal(), read_call(call)
        return await self._gateway.complete(principal, asked.request, **asked.options)

    @asynccontextmanager
    async def stream(self, **call: Unpack[CallFields]) -> AsyncIterator[AnswerStream]:
        """The answer as a stream of `Chunk`s; `usage` and `cost_usd` are known after its end."""
        principal, asked = await self.principal(), read_call(call)
        async with self._gateway.stream(principal, asked.request, **asked.options) as stream:
            yield stream

    async def stream_response(
        self,
        *,
        format: Dialect = "native",  # noqa: A002  # the public name
        **call: Unpack[CallFields],
    ) -> EventStreamResponse:
        """A response to return from a route of Starlette, FastAPI, Litestar, or to call as an ASGI app. The call is let in before the
        headers go out: a refusal is its own status, not an empty 200. `usage` and `cost_usd` are known when it has been sent, in time
        for its `background` task."""
        principal, asked = await self.principal(), read_call(call)
        return await self._gateway.stream_response(
            principal, asked.request, format=format, include_usage=asked.include_usage, **asked.options
        )

    async def event_stream(
        self,
        *,
        format: Dialect = "native",  # noqa: A002  # the public name
        **call: Unpack[CallFields],
    ) -> EventStream:
        """The same for frameworks that have responses of their own (Quart, Django): its bytes and headers. What refuses the call is
        raised here, before there is a response. It has to be read or closed."""
        principal, asked = await self.principal(), read_call(call)
        return await self._gateway.event_stream(principal, asked.request, format=format, include_usage=asked.include_usage, **asked.options)

    async def quote(self, *, stream: bool = False, **call: Unpack[CallFields]) -> Quote:
        """What this call would cost and which limit would refuse it now, as `AIGateway.quote` tells it: nothing is taken, held or
        booked, and no provider is asked."""
        principal, asked = await self.principal(), read_call(call)
        return await self._gateway.quote(principal, asked.request, stream=stream, **asked.options)

    async def budgets(self) -> Sequence[Budget]:
        """Day, month and lifetime of this principal and of its tenant."""
        return await self._gateway.budgets(await self.principal())

    async def usage(self, **filters: Unpack[UsageFilters]) -> UsageReport:
        """This principal's own usage; the filters of `AIGateway.usage` but for `principal`."""
        if "principal" in filters:
            raise InvalidArgument("a caller sees its own usage; AIGateway.usage takes a principal", param="principal")
        filters["principal"] = (await self.principal()).id
        return await self._gateway.usage(**filters)


def caller_of(connection: HTTPConnection, state_name: str = STATE_NAME) -> Caller:
    """What `AIGatewayMiddleware` put into the state of this request. Raises `ConfigurationError` where it did not."""
    found = getattr(connection.state, state_name, None)
    if isinstance(found, Caller):
        return found
    renamed = "" if state_name == STATE_NAME else f", state_name={state_name!r}"
    raise ConfigurationError(
        f"nothing has put a gateway's caller into request.state.{state_name}:"
        f" app.add_middleware(AIGatewayMiddleware, gateway=gateway{renamed}) does",
        param="state_name",
    )
