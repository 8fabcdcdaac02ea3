"""Transports: the contract over each client, and what is special about each."""

import gc
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import anyio
import httpx
import httpx2
import pytest
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.tls import TLSStream

from starlette_aigateway.errors import ConfigurationError, ProviderError
from starlette_aigateway.protocols import Transport
from starlette_aigateway.providers.http1.dialing import tls_context
from starlette_aigateway.providers.transport import DefaultTransport, PerLoop, Sending, as_transport, default_transport
from starlette_aigateway.providers.transport_aiohttp import AiohttpTransport
from starlette_aigateway.providers.transport_httptools import HttptoolsTransport
from starlette_aigateway.providers.transport_httpx import HttpxTransport
from starlette_aigateway.testing.transport import PATIENCE, Exchange, Handler, RawServer, TransportContract, post, raw_server

from .mute_server import mute_server

SELF_SIGNED = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg7qZTMMIlGBB+UKID
RgdbG/4yBkhL7cwHkHz6vq0wo7ehRANCAARjEQkGcA/zvr2+daod8dJRtR9jTOfT
wghNdNwvi+tGWHtuLtw/Y0wdOdbj0wRYkmL0b66L6xrNq3pSxELv/lXy
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUKjCUzjcPbwhd9ndM/1h81n160BcwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzA5NDczM1oYDzIxMjYxMDMw
MDk0NzMzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARjEQkGcA/zvr2+daod8dJRtR9jTOfTwghNdNwvi+tGWHtuLtw/Y0wd
Odbj0wRYkmL0b66L6xrNq3pSxELv/lXyo28wbTAdBgNVHQ4EFgQU8yST4shq5AbV
s+WX6F3Baj+CjwEwHwYDVR0jBBgwFoAU8yST4shq5AbVs+WX6F3Baj+CjwEwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgSOSGywQnL70X8DnsmrnIbFfb428dXzJRroE2/BwgNakCIQCZ
76bEE+W+s9IYnCpqi4sFL5pyg53TMBG1kgtZhixpmw==
-----END CERTIFICATE-----
"""

pytestmark = pytest.mark.anyio
TRANSPORT_HTTPTOOLS = "starlette_aigateway.providers.transport_httptools"


@pytest.fixture
def self_signed(tmp_path: Path) -> Path:
    path = tmp_path / "self-signed.pem"
    path.write_text(SELF_SIGNED)
    return path


class TestAiohttp(TransportContract):
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    async def transport(self) -> AsyncIterator[Transport]:
        transport = AiohttpTransport()
        yield transport
        await transport.aclose()


class TestHttptools(TransportContract):
    @pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
        return "asyncio", {"use_uvloop": request.param}

    @pytest.fixture
    async def transport(self) -> AsyncIterator[Transport]:
        transport = HttptoolsTransport()
        yield transport
        await transport.aclose()


class TestHttptoolsOverTLS(TestHttptools):
    @pytest.fixture(autouse=True)
    def trusted(self, monkeypatch: pytest.MonkeyPatch, self_signed: Path) -> Iterator[None]:
        monkeypatch.setenv("SSL_CERT_FILE", str(self_signed))
        tls_context.cache_clear()
        yield
        tls_context.cache_clear()

    def server(self, handle: Handler) -> AbstractAsyncContextManager[RawServer]:
        return raw_server(handle, tls=self.certified)

    @pytest.fixture(autouse=True)
    def certify(self, self_signed: Path) -> None:
        self.certified = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.certified.load_cert_chain(self_signed)


UNFINISHED = pytest.mark.filterwarnings("ignore:Async generator 'http.*was garbage collected:ResourceWarning")
"""httpx nests generators that it does not close one by one when an answer is left early; trio says so and then closes them."""


@UNFINISHED
class TestHttpx2(TransportContract):
    @pytest.fixture
    async def transport(self) -> AsyncIterator[Transport]:
        transport = HttpxTransport(library="httpx2")
        yield transport
        await transport.aclose()


@UNFINISHED
class TestHttpx(TransportContract):
    @pytest.fixture
    async def transport(self) -> AsyncIterator[Transport]:
        transport = HttpxTransport(library="httpx")
        yield transport
        await transport.aclose()


async def call(transport: Transport, url: str) -> int:
    async with transport.send(post(url), connect=PATIENCE, read=PATIENCE) as answer:
        await answer.read(1000)
        return answer.status


async def test_the_default_is_httptools_on_asyncio_and_httpx2_elsewhere(anyio_backend: str) -> None:
    chosen = DefaultTransport()._chosen()
    assert type(chosen) is (HttptoolsTransport if anyio_backend == "asyncio" else HttpxTransport)
    assert not isinstance(chosen, HttpxTransport) or chosen._httpx is httpx2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_proxies_of_the_environment_are_aiohttps(anyio_backend: str) -> None:
    assert type(DefaultTransport(trust_env=True)._chosen()) is AiohttpTransport


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("missing", ["httptools", "aiohappyeyeballs"])
async def test_without_httptools_the_default_is_aiohttp(anyio_backend: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("starlette_aigateway.providers.http1", TRANSPORT_HTTPTOOLS))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    assert type(DefaultTransport()._chosen()) is AiohttpTransport


async def test_without_what_is_fast_the_default_is_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TRANSPORT_HTTPTOOLS, None)
    monkeypatch.setitem(sys.modules, "starlette_aigateway.providers.transport_aiohttp", None)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    transport = DefaultTransport()
    async with raw_server(Exchange.answer) as server:
        assert await call(transport, server.url) == 200
    chosen = transport._chosen()
    assert isinstance(chosen, HttpxTransport)
    assert chosen._httpx is httpx
    await transport.aclose()


def test_without_any_client_the_host_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigurationError, match="install"):
        HttpxTransport()


@pytest.mark.parametrize("library", [httpx, httpx2])
async def test_a_client_of_the_hosts_is_used_and_stays_open(library: object) -> None:
    async with library.AsyncClient(headers={"x-host": "1"}, follow_redirects=True) as client:  # type: ignore[attr-defined]  # two modules of the same names
        transport = as_transport(client)

        async def handle(exchange: Exchange) -> None:
            await exchange.answer(status="307 Temporary Redirect", headers=b"location: /elsewhere\r\n")

        async with raw_server(handle) as server:
            assert await call(transport, server.url) == 307
        await transport.aclose()
        assert not client.is_closed
        assert b"x-host: 1" in server.exchanges[0].head


def test_a_transport_of_the_hosts_is_taken_as_it_is() -> None:
    transport = default_transport()
    assert as_transport(transport) is transport


@pytest.mark.parametrize("wrong", ["http", 5, httpx.Client, AiohttpTransport])
def test_what_is_no_transport_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        as_transport(wrong)
    assert caught.value.param == "transport"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_transport_serves_several_event_loops_and_leaves_nothing_behind(backend: str) -> None:
    transport = default_transport()

    async def once() -> int:
        async with raw_server(Exchange.answer) as server:
            return await call(transport, server.url)

    for _ in range(2):
        assert anyio.run(once, backend=backend) == 200
    gc.collect()  # an unclosed session would warn, and a warning is an error here


def test_a_loop_that_ends_closes_its_connections() -> None:
    transport = AiohttpTransport()
    sessions = []

    async def once() -> None:
        sessions.append(await transport._sessions.get())

    anyio.run(once)
    assert sessions[0].closed
    assert not transport._sessions._held


async def test_what_was_inherited_over_a_fork_is_neither_used_nor_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []

    async def close(resource: object) -> None:
        closed.append(resource)

    pool = PerLoop(object, close)
    before = await pool.get()
    assert await pool.get() is before
    parent = os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: parent + 1)
        inherited = await pool.get()
        assert inherited is not before
        await pool.aclose()
        assert closed == [inherited]


@pytest.mark.parametrize("trust_env", [False, True])
async def test_proxies_of_the_environment_are_used_only_if_asked_for(trust_env: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handle(exchange: Exchange) -> None:
        await exchange.answer(status="418 Proxy")

    async with raw_server(handle) as proxy, raw_server(Exchange.answer) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        transport = default_transport(trust_env=trust_env)
        assert await call(transport, server.url) == (418 if trust_env else 200)
        await transport.aclose()


UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed .*:ResourceWarning")
"""httpx leaves the socket of a handshake that is cancelled to the garbage collector."""

each_transport = pytest.mark.parametrize(
    ("anyio_backend", "make"),
    [
        ("asyncio", HttptoolsTransport),
        (("asyncio", {"use_uvloop": True}), HttptoolsTransport),
        ("asyncio", AiohttpTransport),
        pytest.param("asyncio", lambda: HttpxTransport(library="httpx2"), marks=UNCLOSED),
        pytest.param("asyncio", lambda: HttpxTransport(library="httpx"), marks=UNCLOSED),
        pytest.param("trio", lambda: HttpxTransport(library="httpx2"), marks=UNCLOSED),
        pytest.param("trio", lambda: HttpxTransport(library="httpx"), marks=UNCLOSED),
    ],
)


@each_transport
async def test_what_is_given_up_while_it_connects_says_that_nothing_was_sent(make: Callable[[], Transport], anyio_backend: str) -> None:
    async with mute_server() as server:
        transport = make()
        sending = transport.send(post(server.url), connect=PATIENCE, read=PATIENCE)

        async def send() -> None:
            async with sending:
                raise AssertionError("nobody answered")

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(send)
                await server.reached.wait()
                group.cancel_scope.cancel()
        await transport.aclose()
    assert getattr(sending, "unsent", False) is True
    gc.collect()  # what is left open is told of here


async def test_what_connects_again_after_it_has_sent_is_not_unsent() -> None:
    """As a client of the host's does that answers a challenge."""
    sending = Sending(lambda _: nullcontext())  # type: ignore[arg-type, return-value]  # never entered
    said = []
    for step in (sending.connects, sending.sends, sending.connects):
        step()
        said.append(sending.unsent)
    assert said == [True, False, False]


@each_transport
async def test_an_untrusted_certificate_is_refused_before_anything_is_sent(
    make: Callable[[], Transport], anyio_backend: str, self_signed: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(self_signed)
    received: list[bytes] = []

    async def serve(stream: SocketStream) -> None:
        async with stream:
            try:
                tls = await TLSStream.wrap(stream, ssl_context=context)
                received.append(await tls.receive())
            except (ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream):
                return

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        transport = make()
        with pytest.raises(ProviderError) as caught:
            await call(transport, f"https://localhost:{listener.extra(SocketAttribute.local_port)}")
        await transport.aclose()
        group.cancel_scope.cancel()
    assert (caught.value.billed, received) == ("no", [])


def test_importing_the_providers_loads_no_http_client() -> None:
    script = (
        "import sys, starlette_aigateway.providers; print([m for m in ('httpx', 'httpx2', 'aiohttp', 'httptools') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
