"""The transport over aiohttp (the extra `[fast]`): the fast one, on asyncio only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL

from ..errors import ProviderError, ProviderTimeout
from ..protocols import HTTPRequest
from .transport import PerLoop, Sending

KEEP_ALIVE_SECONDS = 55.0
READ_BUFFER_BYTES = 2**18
PLAIN_BODY_BYTES = 2**20


class AiohttpTransport:
    """As `Transport` says. Connections are kept alive, their number is not limited, TLS is verified, cookies are dropped.

    aiohttp sends a request again only if its method is idempotent (RFC 9110, section 9.2.2), so never a POST.
    """

    def __init__(self, *, trust_env: bool = False) -> None:
        self._trust_env = trust_env
        self._sessions = PerLoop(self._open, _close)

    def send(self, request: HTTPRequest, *, connect: float, read: float) -> Sending:
        return Sending(partial(self._send, request, connect, read))

    @asynccontextmanager
    async def _send(self, request: HTTPRequest, connect: float, read: float, sending: Sending) -> AsyncIterator[AiohttpAnswer]:
        session = await self._sessions.get()
        with _translated():
            response = await session.post(
                URL(request.url, encoded=True),  # as it was given, not normalised
                data=_body(request.body),
                headers={"accept-encoding": "identity", **request.headers},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, connect=connect, sock_connect=connect, sock_read=read),
                trace_request_ctx=sending,
            )
        try:
            yield AiohttpAnswer(response)
        finally:
            response.release()  # back to the pool if it was read to its end, else aiohttp closes the connection

    async def aclose(self) -> None:
        await self._sessions.aclose()

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=self._trust_env,
            trace_configs=[_tracing()],
        )


def _tracing() -> aiohttp.TraceConfig:
    """Tells each `Sending` when its connection is made. Of one that was open before nothing is told."""
    tracing = aiohttp.TraceConfig()

    async def connects(session: aiohttp.ClientSession, request: SimpleNamespace, _: object) -> None:
        request.trace_request_ctx.connects()

    async def connected(session: aiohttp.ClientSession, request: SimpleNamespace, _: object) -> None:
        request.trace_request_ctx.sends()

    tracing.on_connection_create_start.append(connects)
    tracing.on_connection_create_end.append(connected)
    return tracing


class AiohttpAnswer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}

    async def read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for data in self.chunks():
            size += len(data)
            if size > limit:
                raise ProviderError(f"the provider's answer is longer than {limit} bytes", status=self.status)
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def chunks(self) -> AsyncIterator[bytes]:
        content = self._response.content
        while True:
            with _translated():
                data = await content.readany()
            if not data:
                return
            yield data


def _body(body: bytes) -> bytes | BytesIO:
    return body if len(body) <= PLAIN_BODY_BYTES else BytesIO(body)  # aiohttp warns of longer ones, which it would write in one go


async def _close(session: aiohttp.ClientSession) -> None:
    await session.close()


@contextmanager
def _translated() -> Iterator[None]:
    """aiohttp's errors as ours. What it raises while it connects is certain not to have been sent; of all else nothing is certain."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise ProviderTimeout("the provider could not be reached in time", billed="no") from error
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
        raise ProviderError("the provider could not be reached", billed="no") from error
    except TimeoutError as error:
        raise ProviderTimeout("the provider was silent for too long") from error
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        raise ProviderError("the connection to the provider broke") from error
