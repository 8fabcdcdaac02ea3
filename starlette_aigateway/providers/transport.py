"""The HTTP client seam: which client there is, and one pool of connections for each event loop and process.

Where asyncio runs, httptools or else aiohttp, if they are installed; else `httpx2`, HTTPX's maintained continuation, else `httpx`. Each
stands in a module of its own, which is imported at the first call.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from ..errors import ConfigurationError
from ..protocols import HTTPAnswer, HTTPRequest, Transport

T = TypeVar("T")

CLOSE_SECONDS = 5.0
HTTPX_LIBRARIES = ("httpx2", "httpx")


def default_transport(*, trust_env: bool = False) -> Transport:
    """A transport that chooses its client at each call, by the event loop that it runs in. `trust_env` takes proxies and `.netrc` from the
    environment; by default they are ignored, because a proxy would read every prompt."""
    return DefaultTransport(trust_env=trust_env)


def as_transport(transport: object) -> Transport:
    """What a host gave as `transport=`: a `Transport`, an `httpx.AsyncClient` or an `httpx2.AsyncClient` (which stays the host's to
    close), or None for the default. Raises `ConfigurationError`."""
    if transport is None:
        return default_transport()
    for library in HTTPX_LIBRARIES:
        module = sys.modules.get(library)
        if module is not None and isinstance(transport, module.AsyncClient):
            from .transport_httpx import HttpxTransport  # only hosts that use it load it

            return HttpxTransport(library=library, client=transport)
    if callable(getattr(transport, "send", None)) and callable(getattr(transport, "aclose", None)) and not isinstance(transport, type):
        return cast("Transport", transport)
    raise ConfigurationError(
        f"transport must be a Transport, an httpx.AsyncClient or an httpx2.AsyncClient, not {type(transport).__name__}", param="transport"
    )


class Sending:
    """What a transport gives for one request that it sends with a generator, `send`, which says to this when it `connects` and when it
    `sends`. `unsent` is true in between, unless something went out before."""

    __slots__ = ("_send", "_sends", "_sent", "unsent")

    def __init__(self, send: Callable[[Sending], AbstractAsyncContextManager[HTTPAnswer]]) -> None:
        self._send = send
        self._sends = self.unsent = False

    def connects(self) -> None:
        self.unsent = not self._sends

    def sends(self) -> None:
        self._sends, self.unsent = True, False

    async def __aenter__(self) -> HTTPAnswer:
        self._sent = self._send(self)
        return await self._sent.__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        return await self._sent.__aexit__(kind, error, trace)


class DefaultTransport:
    """See `default_transport`. `aclose` closes the pools of the event loop that it is called in."""

    def __init__(self, *, trust_env: bool = False) -> None:
        self._trust_env = trust_env
        self._asyncio: Transport | None = None
        self._other: Transport | None = None

    def send(self, request: HTTPRequest, *, connect: float, read: float) -> AbstractAsyncContextManager[HTTPAnswer]:
        return self._chosen().send(request, connect=connect, read=read)

    async def aclose(self) -> None:
        for transport in {self._asyncio, self._other} - {None}:
            await cast("Transport", transport).aclose()

    def _chosen(self) -> Transport:
        if runs_asyncio():
            if self._asyncio is None:
                self._asyncio = _fast(self._trust_env) or self._httpx()
            return self._asyncio
        return self._httpx()

    def _httpx(self) -> Transport:
        if self._other is None:
            from .transport_httpx import HttpxTransport  # not loaded where a faster one does the work

            self._other = HttpxTransport(trust_env=self._trust_env)
        return self._other


def _fast(trust_env: bool) -> Transport | None:
    """The fastest of what the extra `[fast]` brings and is there. Only aiohttp knows of proxies."""
    if not trust_env:
        try:
            from .transport_httptools import HttptoolsTransport  # needs httptools and aiohappyeyeballs
        except ImportError:
            pass
        else:
            return HttptoolsTransport()
    try:
        from .transport_aiohttp import AiohttpTransport  # needs aiohttp
    except ImportError:
        return None
    return AiohttpTransport(trust_env=trust_env)


def runs_asyncio() -> bool:
    """Whether the running task is asyncio's (and not trio's, as a guest on asyncio's loop)."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


class PerLoop(Generic[T]):
    """One resource for each event loop and process: opened at its first use there, closed by `aclose` in that loop, or with the loop.

    An async generator holds the resource, because event loops close those that are still open when they end (`asyncio.run`,
    `trio.run`); so nothing is left behind where a host never calls `aclose`. What was inherited over a fork is not touched: closing
    it would speak on the parent's connections.
    """

    def __init__(self, open_one: Callable[[], T], close_one: Callable[[T], Awaitable[None]]) -> None:
        self._open = open_one
        self._close = close_one
        self._held: dict[object, tuple[T, AsyncGenerator[T, None]]] = {}
        self._inherited: list[Any] = []
        self._pid = os.getpid()

    def held(self, loop: object) -> T | None:
        """What `get` would give without opening one."""
        held = self._held.get(loop) if self._pid == os.getpid() else None
        return None if held is None else held[0]

    async def get(self) -> T:
        if self._pid != os.getpid():
            self._inherited.append(self._held)
            self._held, self._pid = {}, os.getpid()
        loop = current_token().native_token
        held = self._held.get(loop)
        if held is not None:
            return held[0]
        self._forget_closed_loops()
        life = self._life(loop)
        resource = await anext(life)
        self._held[loop] = (resource, life)
        return resource

    async def aclose(self) -> None:
        held = self._held.pop(current_token().native_token, None)
        if held is not None:
            await held[1].aclose()

    async def _life(self, loop: object) -> AsyncGenerator[T, None]:
        resource = self._open()
        try:
            yield resource
        finally:
            held = self._held.get(loop)
            if held is not None and held[0] is resource:
                del self._held[loop]
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._close(resource)

    def _forget_closed_loops(self) -> None:
        for loop in list(self._held):
            if isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed():
                del self._held[loop]
