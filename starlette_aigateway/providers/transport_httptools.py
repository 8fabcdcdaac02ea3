"""The transport over httptools and asyncio's own sockets (the extra `[fast]`): the fastest one, on asyncio only."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from types import TracebackType

from ..protocols import HTTPRequest
from .http1.answer import Answer
from .http1.head import Head, request_head
from .http1.pool import Pool
from .transport import PerLoop

HEADS = 128


class HttptoolsTransport:
    """As `Transport` says. Connections are kept alive, their number is not limited, TLS is verified, cookies are dropped, proxies are not
    known. No request is ever sent twice."""

    def __init__(self) -> None:
        self._pools = PerLoop(Pool, Pool.aclose)
        self._head = lru_cache(HEADS)(request_head)

    def send(self, request: HTTPRequest, *, connect: float, read: float) -> Exchange:
        return Exchange(self, request, connect, read)

    async def aclose(self) -> None:
        await self._pools.aclose()

    async def pool(self) -> Pool:
        return self._pools.held(asyncio.get_running_loop()) or await self._pools.get()

    def head(self, request: HTTPRequest) -> Head:
        return self._head(request.url, tuple(request.headers.items()))


class Exchange:
    """One request and its answer. Left early, at whichever await, its connection is closed. `unsent` until there is a connection."""

    __slots__ = ("_connect", "_connection", "_pool", "_read", "_request", "_transport", "unsent")

    def __init__(self, transport: HttptoolsTransport, request: HTTPRequest, connect: float, read: float) -> None:
        self._transport = transport
        self._request = request
        self._connect = connect
        self._read = read
        self.unsent = True

    async def __aenter__(self) -> Answer:
        origin, head = self._transport.head(self._request)
        self._pool = pool = await self._transport.pool()
        self._connection = connection = pool.take(origin) or await pool.open(origin, self._connect)
        self.unsent = False
        body = self._request.body
        answer = connection.ask(b"%b%d\r\n\r\n" % (head, len(body)), body, patience=self._read)
        try:
            await answer.head()
        except BaseException:
            pool.give_back(connection)
            raise
        return answer

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.give_back(self._connection)
