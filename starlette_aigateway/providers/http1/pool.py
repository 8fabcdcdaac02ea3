"""The connections of one event loop."""

from __future__ import annotations

import asyncio

from ...errors import ProviderError
from .connection import Connection
from .dialing import Dialer
from .head import Origin


class Pool:
    """Keeps connections that came to rest, by where they lead; the one that was used last goes out first. Their number is not limited."""

    def __init__(self) -> None:
        self._dialer = Dialer()
        self._resting: dict[Origin, list[Connection]] = {}
        self._open: dict[Connection, Origin] = {}
        self._closed = False
        self._all_gone = asyncio.Event()

    def take(self, origin: Origin) -> Connection | None:
        """A connection on which nothing has happened since it was given back."""
        resting = self._resting.get(origin)
        while resting:
            connection = resting.pop()
            if connection.usable:
                return connection
            connection.abort()
        return None

    async def open(self, origin: Origin, seconds: float) -> Connection:
        """A new connection, within `seconds`. Raises `ProviderError(billed="no")`."""
        connection = await self._dialer.dial(origin, lambda: Connection(self._gone), seconds)
        if self._closed or not connection.usable:
            connection.abort()
            raise ProviderError("the provider closed the connection at once", billed="no")
        self._open[connection] = origin
        return connection

    def give_back(self, connection: Connection) -> None:
        """After an exchange, whatever became of it."""
        if connection.rest():
            if self._closed:
                connection.abort()
            else:
                self._resting.setdefault(self._open[connection], []).append(connection)

    async def aclose(self) -> None:
        """Closes all connections, those in use too, and returns when they are gone."""
        self._closed = True
        await self._dialer.aclose()
        for connection in list(self._open):
            connection.abort()
        if self._open:
            await self._all_gone.wait()

    def _gone(self, connection: Connection) -> None:
        origin = self._open.pop(connection, None)
        resting = self._resting.get(origin, []) if origin is not None else []
        if connection in resting:
            resting.remove(connection)
        if self._closed and not self._open:
            self._all_gone.set()
