"""The transport over HTTPX: on asyncio and trio, and over a client that the host brings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib import import_module
from typing import Any

from ..errors import ConfigurationError, ProviderError, ProviderTimeout
from ..protocols import HTTPRequest
from .transport import HTTPX_LIBRARIES, PerLoop, Sending

KEEP_ALIVE_SECONDS = 55.0
CONNECTS = frozenset({"connection.connect_tcp.started", "connection.connect_unix_socket.started"})
SENDS = ".send_request_headers.started"
"""Of HTTPX's trace (https://www.python-httpx.org/advanced/extensions/#trace). Of a proxy it is the first of both."""


class HttpxTransport:
    """As `Transport` says, over `library`: `httpx2` or `httpx`, None for the first of them that is installed.

    Connections are kept alive, their number is not limited, TLS is verified, cookies are dropped. With a `client` of the host's, its own
    settings hold, it is used in whatever loop runs, and it stays the host's to close; redirects are not followed all the same.
    """

    def __init__(self, *, library: str | None = None, client: Any = None, trust_env: bool = False) -> None:
        # httpx and httpx2 have the same names, but their classes are not related: the module is a value here, and so untyped.
        self._httpx: Any = _import(library)
        self._client = client
        self._trust_env = trust_env
        self._clients = PerLoop(self._open, _close)

    def send(self, request: HTTPRequest, *, connect: float, read: float) -> Sending:
        return Sending(partial(self._send, request, connect, read))

    @asynccontextmanager
    async def _send(self, request: HTTPRequest, connect: float, read: float, sending: Sending) -> AsyncIterator[HttpxAnswer]:
        client = self._client if self._client is not None else await self._clients.get()
        with self._translated():
            response = await client.send(
                client.build_request(
                    "POST",
                    request.url,
                    content=request.body,
                    headers={"accept-encoding": "identity", **request.headers},
                    timeout=self._httpx.Timeout(connect=connect, read=read, write=read, pool=connect),
                    extensions={"trace": partial(_trace, sending)},
                ),
                stream=True,
                follow_redirects=False,
            )
        answer = HttpxAnswer(response, self._translated)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def aclose(self) -> None:
        await self._clients.aclose()

    def _open(self) -> Any:
        return self._httpx.AsyncClient(
            limits=self._httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            trust_env=self._trust_env,
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """HTTPX's errors as ours. What it raises while it connects is certain not to have been sent; of all else nothing is certain."""
        httpx = self._httpx
        try:
            yield
        except (httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise ProviderTimeout("the provider could not be reached in time", billed="no") from error
        except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ProviderError("the provider could not be reached", billed="no") from error
        except httpx.TimeoutException as error:
            raise ProviderTimeout("the provider was silent for too long") from error
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise ProviderError("the connection to the provider broke") from error


class HttpxAnswer:
    def __init__(self, response: Any, translated: Any) -> None:
        self._response = response
        self._translated = translated
        self._chunks: AsyncGenerator[bytes, None] | None = None
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}

    async def read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for data in self.chunks():
            size += len(data)
            if size > limit:
                raise ProviderError(f"the provider's answer is longer than {limit} bytes", status=self.status)
            parts.append(data)
        return b"".join(parts)

    def chunks(self) -> AsyncGenerator[bytes, None]:
        self._chunks = self._read_chunks()
        return self._chunks

    async def aclose(self) -> None:
        if self._chunks is not None:
            await self._chunks.aclose()
        await self._response.aclose()

    async def _read_chunks(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._response.aiter_bytes()) as body:
            while True:
                with self._translated():
                    data = await anext(body, None)
                if data is None:
                    return
                if data:
                    yield data


async def _trace(sending: Sending, event: str, _: object) -> None:
    """Until its connection is made nothing is sent; where a client of the host's tells nothing, nothing is known."""
    if event in CONNECTS:
        sending.connects()
    elif event.endswith(SENDS):
        sending.sends()


def _import(library: str | None) -> Any:
    for name in HTTPX_LIBRARIES if library is None else (library,):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ConfigurationError("no HTTP client is installed; install httpx2, httpx or starlette_aigateway[fast]")


async def _close(client: Any) -> None:
    await client.aclose()
