"""The ASGI lifespan protocol, of the gateway and of a host inside of it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

from starlette.types import Message, Receive, Scope, Send

from ..errors import ConfigurationError

AnyASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]
"""Each framework types scope, receive and send in its own way (Quart by typed dictionaries); all of them mean ASGI."""

log = logging.getLogger("starlette_aigateway")


class Lifespan:
    """The lifespan of `host` inside of `ours`. A host that has none gets one here. Serves one lifespan scope."""

    def __init__(self, ours: Callable[[], AbstractAsyncContextManager[None]], host: AnyASGIApp | None = None) -> None:
        self._ours = ours
        self._host = host
        self._started = False
        self._answered = False
        self._failure_of_host: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What keeps us from starting or stopping is told to the server; what the host raises leaves as it came."""
        startup = await receive()
        try:
            async with self._ours():
                self._started = True
                last = await self._run_host(scope, startup, receive, send)
        except Exception as error:
            if error is self._failure_of_host:
                raise
            phase = "shutdown" if self._started else "startup"
            await send({"type": f"lifespan.{phase}.failed", "message": in_words(error)})
            return
        if last is not None:
            await send(last)

    async def _run_host(self, scope: Scope, startup: Message, receive: Receive, send: Send) -> Message | None:
        """Gives back the host's last message: it goes out when the gateway has stopped too."""
        first: list[Message] = [startup]
        last: Message | None = None

        async def replay() -> Message:
            return first.pop() if first else await receive()

        async def hold_back(message: Message) -> None:
            nonlocal last
            if message["type"].startswith("lifespan.shutdown."):
                last = message
                return
            self._answered = True
            await send(message)

        try:
            if self._host is not None:
                await self._host(scope, replay, hold_back)
        except BaseException as error:
            if self._answered or not isinstance(error, Exception):
                self._failure_of_host = error
                raise
            log.info("the host seems to have no lifespan: %s: %s", type(error).__name__, error)
        if not self._answered:
            await self._stand_in(receive, send)
            return {"type": "lifespan.shutdown.complete"}
        return last

    async def _stand_in(self, receive: Receive, send: Send) -> None:
        """For a host that does not know the lifespan protocol."""
        self._answered = True
        await send({"type": "lifespan.startup.complete"})
        await receive()


def in_words(error: BaseException) -> str:
    """For whoever reads the server's log, with the reason behind it. A wrong configuration says itself what is wrong."""
    cause = error.__cause__
    return str(error) if cause is None or isinstance(error, ConfigurationError) else f"{error}: {type(cause).__name__}: {cause}"
