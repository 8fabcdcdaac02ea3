"""Opening a connection: names, addresses, TLS. Whatever fails here was certainly not sent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias, TypeVar

from aiohappyeyeballs import AddrInfoType, start_connection

from ...errors import ProviderError, ProviderTimeout
from .head import Origin

NEXT_ADDRESS_SECONDS = 0.25  # RFC 8305, section 5

P = TypeVar("P", bound=asyncio.Protocol)
_Place: TypeAlias = tuple[str, int]


@cache
def tls_context() -> ssl.SSLContext:
    """Verifies against the certificates that the system, or `SSL_CERT_FILE`, names."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class Dialer:
    """Opens connections in one event loop."""

    def __init__(self) -> None:
        self._lookups: dict[_Place, asyncio.Task[Sequence[AddrInfoType]]] = {}

    async def dial(self, origin: Origin, make: Callable[[], P], seconds: float) -> P:
        """A connection to `origin` with the protocol of `make`, within `seconds`. Raises `ProviderError(billed="no")`."""
        try:
            async with asyncio.timeout(seconds):
                addresses = await self._addresses((origin.host, origin.port))
                return await _connected(addresses, origin, make)
        except TimeoutError as error:
            raise ProviderTimeout("the provider could not be reached in time", billed="no") from error
        except (
            OSError,
            RuntimeError,
            UnicodeError,
        ) as error:  # uvloop's failures are RuntimeErrors, of a host that is no name UnicodeErrors
            raise ProviderError("the provider could not be reached", billed="no") from error

    async def aclose(self) -> None:
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)

    async def _addresses(self, place: _Place) -> Sequence[AddrInfoType]:
        """Of several at once that look up the same name, one asks, in a task of its own: none may take it from the others."""
        with contextlib.suppress(OSError):  # a name, and no address
            return socket.getaddrinfo(*place, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        lookup = self._lookups.get(place)
        if lookup is None:
            lookup = self._lookups[place] = asyncio.create_task(_look_up(place))
            lookup.add_done_callback(lambda task: self._looked_up(place, task))
        return await asyncio.shield(lookup)

    def _looked_up(self, place: _Place, lookup: asyncio.Task[Sequence[AddrInfoType]]) -> None:
        del self._lookups[place]
        if not lookup.cancelled():
            lookup.exception()  # who asked may be gone: it has been seen


async def _look_up(place: _Place) -> Sequence[AddrInfoType]:
    return await asyncio.get_running_loop().getaddrinfo(*place, type=socket.SOCK_STREAM)


async def _connected(addresses: Sequence[AddrInfoType], origin: Origin, make: Callable[[], P]) -> P:
    sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS)
    try:
        loop = asyncio.get_running_loop()
        if not origin.tls:
            return (await loop.create_connection(make, sock=sock))[1]
        name = origin.host.rstrip(".")
        return (await loop.create_connection(make, sock=sock, ssl=tls_context(), server_hostname=name))[1]
    except BaseException:
        sock.close()
        raise
