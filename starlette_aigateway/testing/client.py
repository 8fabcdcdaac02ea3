"""`ASGIClient`: an app in process, with streams that come as they are made and a client that can leave at any point."""

from __future__ import annotations

import json as json_module
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import unquote

import anyio
from msgspec import Struct
from starlette.datastructures import Headers
from starlette.types import Scope

from .exchange import Exchange
from .hosted import HostedLifespan

Content: TypeAlias = "bytes | Iterable[bytes] | AsyncIterator[bytes]"
HTTP_PORT = 80


class WholeAnswer(Struct, frozen=True):
    """An answer that was read to its end."""

    status: int
    headers: Headers
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json_module.loads(self.body)


class ASGIClient:
    """A client of any ASGI app, in the event loop of the test; on asyncio and on trio.

        async with ASGIClient(app) as client:
            async with client.stream("POST", "/ask", json={...}) as answer:
                assert answer.status == 200
                async for event in answer.events(): ...

    As a context manager it runs the lifespan of the app; an app that knows none is served without. Where an answer's block ends before the
    answer does, the client has left. Then, and whenever else a block ends, the app has `patience` seconds to return; one that goes on is an
    `AssertionError`. What an app raises is raised in the test, with `raise_errors=False` only where there is no whole answer.

    `headers` go with every request. `closed_send` says what the app meets that sends to a client who has left: `"ignore"`, as with most
    servers, or `"raise"`, an `OSError` as of ASGI 2.4.
    """

    def __init__(
        self,
        app: Any,
        *,
        headers: Mapping[str, str] | None = None,
        root_path: str = "",
        patience: float = 10.0,
        raise_errors: bool = True,
        closed_send: Literal["ignore", "raise"] = "ignore",
    ) -> None:
        self._app = app
        self._headers = dict(headers or {})
        self._root_path = root_path
        self._patience = patience
        self._raise_errors = raise_errors
        self._raise_when_left = closed_send == "raise"
        self._state: dict[str, Any] | None = None
        self._lifespan = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._state = {}
        await self._lifespan.enter_async_context(HostedLifespan(self._app, self._state, self._patience).running())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._lifespan.__aexit__(kind, error, trace)
        self._state = None

    # -- requests ----------------------------------------------------------------------------------------------------

    def stream(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, content: Content = b"", json: Any = None
    ) -> AbstractAsyncContextManager[Exchange]:
        """A request whose status and headers have come when the block begins; its body is still to be read. `content` may come in pieces:
        then the body is sent chunk by chunk, each when the app asks for it. `path` may have a query."""
        return self._stream(self._exchange(method, path, headers, content, json))

    def open(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, content: Content = b"", json: Any = None
    ) -> AbstractAsyncContextManager[Exchange]:
        """The same before anything has come: for a client that leaves while it sends, or before the answer begins."""
        return self._opened(self._exchange(method, path, headers, content, json))

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, content: Content = b"", json: Any = None
    ) -> WholeAnswer:
        """A request and its whole answer."""
        async with self.stream(method, path, headers=headers, content=content, json=json) as answer:
            return WholeAnswer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, *, headers: Mapping[str, str] | None = None) -> WholeAnswer:
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, *, headers: Mapping[str, str] | None = None, content: Content = b"", json: Any = None) -> WholeAnswer:
        return await self.request("POST", path, headers=headers, content=content, json=json)

    @asynccontextmanager
    async def _stream(self, exchange: Exchange) -> AsyncIterator[Exchange]:
        async with self._opened(exchange):
            await exchange.head()
            yield exchange

    @asynccontextmanager
    async def _opened(self, exchange: Exchange) -> AsyncIterator[Exchange]:
        failure: BaseException | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(exchange.run)
            try:
                yield exchange
            except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
                failure = error
            exchange.disconnect()
            with anyio.move_on_after(self._patience):
                await exchange.returned()
            stuck = not exchange.ended
            group.cancel_scope.cancel()
        if failure is not None:
            exchange.explain(failure)
            raise failure
        if self._raise_errors:
            exchange.check()
        assert not stuck, f"the app went on for {self._patience:g} seconds after its client had left"

    def _exchange(self, method: str, path: str, headers: Mapping[str, str] | None, content: Content, json: Any) -> Exchange:
        sent = {"host": "testserver", **{name.lower(): value for name, value in {**self._headers, **(headers or {})}.items()}}
        if json is not None:
            content = json_module.dumps(json).encode()
            sent.setdefault("content-type", "application/json")
        if isinstance(content, bytes):
            if content:
                sent.setdefault("content-length", str(len(content)))
        else:
            sent.setdefault("transfer-encoding", "chunked")
        return Exchange(self._app, self._scope(method, path, sent), _pieces(content), raise_when_left=self._raise_when_left)

    def _scope(self, method: str, path: str, headers: Mapping[str, str]) -> Scope:
        raw, _, query = path.partition("?")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4" if self._raise_when_left else "2.3"},
            "http_version": "1.1",
            "method": method.upper(),
            "scheme": "http",
            "path": self._root_path + unquote(raw),
            "raw_path": (self._root_path + raw).encode(),
            "query_string": query.encode(),
            "root_path": self._root_path,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("testserver", HTTP_PORT),
            "extensions": {},
        }
        if self._state is not None:
            scope["state"] = self._state.copy()
        return scope


async def _pieces(content: Content) -> AsyncIterator[bytes]:
    if isinstance(content, bytes):
        if content:
            yield content
    elif isinstance(content, AsyncIterator):
        async for piece in content:
            yield piece
    else:
        for piece in content:
            yield piece
