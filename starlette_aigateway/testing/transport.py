"""What every `Transport` promises, over a real socket, and the raw HTTP server that misbehaves as it is told."""

from __future__ import annotations

import gzip
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream, Listener, SocketAttribute
from anyio.streams.tls import TLSListener

from ..errors import ProviderError, ProviderTimeout
from ..protocols import HTTPAnswer, HTTPRequest, Transport

PATIENCE = 20.0
BLINK = 0.1


@dataclass(slots=True)
class Exchange:
    """One request as it came in, and the socket to answer on. `connection` counts from 1."""

    stream: ByteStream
    connection: int
    head: bytes
    body: bytes

    async def answer(self, body: bytes = b"{}", *, status: str = "200 OK", headers: bytes = b"") -> None:
        await self.stream.send(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n%s\r\n%s" % (status.encode(), len(body), headers, body))

    async def start_chunked(self) -> None:
        await self.stream.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.stream.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def wait_closed(self) -> None:
        """Returns when the other side has closed the connection."""
        try:
            while True:
                await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return


@dataclass(slots=True)
class RawServer:
    """Its address, and what it saw."""

    url: str
    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0


Handler = Callable[[Exchange], Awaitable[None]]


@asynccontextmanager
async def raw_server(handle: Handler, *, greeting: bytes = b"", tls: ssl.SSLContext | None = None) -> AsyncIterator[RawServer]:
    """Serves `handle` on a free port of the loopback: it may write whatever bytes it likes; when it closes the stream, no further
    request of that connection is read. `greeting` is sent before any request came. With `tls` it speaks HTTPS."""
    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = plain.extra(SocketAttribute.local_port)  # noqa: S610  # anyio's, not Django's
    server = RawServer(f"{'http' if tls is None else 'https'}://127.0.0.1:{port}")
    listener: Listener[Any] = plain if tls is None else TLSListener(plain, tls, standard_compatible=False)

    async def serve(stream: ByteStream) -> None:
        server.connections += 1
        number = server.connections
        try:
            async with stream:
                if greeting:
                    await stream.send(greeting)
                while True:
                    head, body = await _read_request(stream)
                    exchange = Exchange(stream, number, head, body)
                    server.exchanges.append(exchange)
                    await handle(exchange)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield server
        group.cancel_scope.cancel()


async def _read_request(stream: ByteStream) -> tuple[bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        received += await stream.receive()
    head, _, body = received.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += await stream.receive()
    return head, body


def post(url: str, body: bytes = b'{"a":1}') -> HTTPRequest:
    return HTTPRequest(url, {"content-type": "application/json", "x-test": "1"}, body)


async def collect(answer: HTTPAnswer) -> bytes:
    return b"".join([data async for data in answer.chunks()])


class TransportContract:
    """Subclass it with a fixture `transport`, and mark it `anyio`. Every call is a POST.

    `server` may be overridden, with `raw_server(handle, tls=…)` for a transport that trusts the certificate.
    """

    def server(self, handle: Handler) -> AbstractAsyncContextManager[RawServer]:
        return raw_server(handle)

    async def fails(self, transport: Transport, url: str, *, connect: float = PATIENCE, read: float = PATIENCE) -> ProviderError:
        with pytest.raises(ProviderError) as caught, anyio.fail_after(PATIENCE):
            async with transport.send(post(url), connect=connect, read=read) as answer:
                await collect(answer)
        assert url not in str(caught.value)
        return caught.value

    async def test_a_request_arrives_as_it_was_given(self, transport: Transport) -> None:
        async with self.server(Exchange.answer) as server:
            request = HTTPRequest(f"{server.url}/v1/chat?x=%2F", {"authorization": "Bearer k", "x-a": "b"}, b'{"a": "\xe2\x80\xa8"}')
            async with transport.send(request, connect=PATIENCE, read=PATIENCE) as answer:
                await answer.read(100)
        (seen,) = server.exchanges
        lines = seen.head.split(b"\r\n")
        assert lines[0] == b"POST /v1/chat?x=%2F HTTP/1.1"
        assert {b"authorization: bearer k", b"x-a: b"} <= {line.lower() for line in lines}
        assert seen.body == request.body

    async def test_an_answer_has_its_status_lower_case_headers_and_body(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(b'{"ok":true}', headers=b"X-Request-ID: r1\r\n")

        async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            assert answer.status == 200
            assert answer.headers["x-request-id"] == "r1"
            assert await answer.read(100) == b'{"ok":true}'

    async def test_an_error_status_is_an_answer(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(b"no", status="503 Service Unavailable", headers=b"retry-after: 7\r\n")

        async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            assert (answer.status, answer.headers["retry-after"]) == (503, "7")
            assert await answer.read(100) == b"no"

    async def test_a_redirect_is_not_followed(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(status="307 Temporary Redirect", headers=b"location: /elsewhere\r\n")

        async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            assert answer.status == 307
        assert len(server.exchanges) == 1

    async def test_a_refused_connection_was_certainly_not_billed(self, transport: Transport) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            error = await self.fails(transport, f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert (error.billed, error.retryable, error.status) == ("no", True, None)

    async def test_a_host_without_address_was_certainly_not_billed(self, transport: Transport) -> None:
        error = await self.fails(transport, "http://nowhere.invalid")  # RFC 6761, section 6.4
        assert (error.billed, error.retryable) == ("no", True)

    async def test_a_failed_tls_handshake_was_certainly_not_billed(self, transport: Transport) -> None:
        async with raw_server(Exchange.answer, greeting=b"no TLS here\r\n") as server:
            error = await self.fails(transport, server.url.replace("http:", "https:"))
        assert (error.billed, error.retryable, server.exchanges) == ("no", True, [])

    async def test_a_handshake_without_answer_ends_with_the_connect_timeout(self, transport: Transport) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            error = await self.fails(transport, f"https://127.0.0.1:{silent.getsockname()[1]}", connect=BLINK)
        assert isinstance(error, ProviderTimeout)
        assert error.billed == "no"

    async def test_silence_after_the_request_is_a_timeout_and_nothing_is_known(self, transport: Transport) -> None:
        async with self.server(Exchange.wait_closed) as server:
            error = await self.fails(transport, server.url, read=BLINK)
        assert isinstance(error, ProviderTimeout)
        assert error.billed == "unknown"

    async def test_silence_within_the_body_is_a_timeout_and_nothing_is_known(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.start_chunked()
            await exchange.chunk(b"a")
            await exchange.wait_closed()

        async with self.server(handle) as server:
            error = await self.fails(transport, server.url, read=BLINK)
        assert isinstance(error, ProviderTimeout)
        assert error.billed == "unknown"

    @pytest.mark.parametrize(
        "sent",
        [
            b"",
            b"garbage\r\n\r\n",
            b"HTTP/1.1 200",
            b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ncut",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc",
            b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc",
        ],
    )
    async def test_of_a_broken_answer_nothing_is_known(self, transport: Transport, sent: bytes) -> None:
        async def handle(exchange: Exchange) -> None:
            if sent:
                await exchange.stream.send(sent)
            await exchange.stream.aclose()

        async with self.server(handle) as server:
            error = await self.fails(transport, server.url)
        assert (error.billed, len(server.exchanges)) == ("unknown", 1)

    async def test_a_stream_arrives_while_it_is_being_sent(self, transport: Transport) -> None:
        got_first = anyio.Event()

        async def handle(exchange: Exchange) -> None:
            await exchange.start_chunked()
            await exchange.chunk(b"first")
            await got_first.wait()
            await exchange.chunk(b"second")
            await exchange.stream.send(b"0\r\n\r\n")

        with anyio.fail_after(PATIENCE):
            async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                chunks = answer.chunks()
                assert await anext(chunks) == b"first"
                got_first.set()
                assert b"".join([data async for data in chunks]) == b"second"

    async def test_a_body_beyond_the_limit_is_not_read_on(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.start_chunked()
            while True:
                await exchange.chunk(b"x" * 1000)

        with anyio.fail_after(PATIENCE):
            async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                with pytest.raises(ProviderError) as caught:
                    await answer.read(10_000)
        assert caught.value.billed == "unknown"

    async def test_a_body_as_long_as_the_limit_is_read(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(b"x" * 10_000)

        async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            assert len(await answer.read(10_000)) == 10_000

    async def test_a_compressed_body_comes_decoded(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(gzip.compress(b'{"a":1}'), headers=b"content-encoding: gzip\r\n")

        async with self.server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            assert await answer.read(100) == b'{"a":1}'

    async def test_a_connection_is_used_again(self, transport: Transport) -> None:
        async with self.server(Exchange.answer) as server:
            for _ in range(3):
                async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                    await answer.read(100)
        assert (server.connections, len(server.exchanges)) == (1, 3)

    async def test_a_request_is_never_sent_again_on_a_connection_that_broke(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            if len(server.exchanges) == 1:
                await exchange.answer()
            else:
                await exchange.stream.aclose()

        async with self.server(handle) as server:
            async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                await answer.read(100)
            error = await self.fails(transport, server.url)
        assert (error.billed, len(server.exchanges), server.connections) == ("unknown", 2, 1)

    async def test_leaving_an_unfinished_answer_closes_its_connection(self, transport: Transport) -> None:
        closed = anyio.Event()

        async def handle(exchange: Exchange) -> None:
            await exchange.start_chunked()
            await exchange.chunk(b"a")
            await exchange.wait_closed()
            closed.set()

        with anyio.fail_after(PATIENCE):
            async with self.server(handle) as server:
                async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                    assert await anext(answer.chunks()) == b"a"
                await closed.wait()

    async def test_a_cancelled_call_closes_its_connection(self, transport: Transport) -> None:
        arrived, closed = anyio.Event(), anyio.Event()

        async def handle(exchange: Exchange) -> None:
            arrived.set()
            await exchange.wait_closed()
            closed.set()

        async def call(url: str) -> None:
            async with transport.send(post(url), connect=PATIENCE, read=PATIENCE):
                pass

        with anyio.fail_after(PATIENCE):
            async with self.server(handle) as server, anyio.create_task_group() as group:
                group.start_soon(call, server.url)
                await arrived.wait()
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await closed.wait()

    async def test_nothing_is_said_to_be_unsent_that_has_come_in(self, transport: Transport) -> None:
        said: list[bool] = []

        async def handle(exchange: Exchange) -> None:
            said.append(getattr(sending, "unsent", False))
            await exchange.answer()

        async with self.server(handle) as server:
            for _ in range(2):
                sending = transport.send(post(server.url), connect=PATIENCE, read=PATIENCE)
                async with sending as answer:
                    await answer.read(100)
        assert said == [False, False]

    async def test_cookies_are_not_kept(self, transport: Transport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(headers=b"set-cookie: a=b; path=/\r\n")

        async with self.server(handle) as server:
            for _ in range(2):
                async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                    await answer.read(100)
        assert all(b"cookie" not in exchange.head.lower() for exchange in server.exchanges)

    async def test_a_long_body_arrives_whole(self, transport: Transport) -> None:
        body = b"x" * (3 * 2**20)
        async with (
            self.server(Exchange.answer) as server,
            transport.send(post(server.url, body), connect=PATIENCE, read=PATIENCE) as answer,
        ):
            await answer.read(100)
        assert server.exchanges[0].body == body

    async def test_calls_do_not_wait_for_each_other(self, transport: Transport) -> None:
        together, everybody = 150, anyio.Event()

        async def handle(exchange: Exchange) -> None:
            if len(server.exchanges) == together:
                everybody.set()
            await everybody.wait()
            await exchange.answer()

        async def call() -> None:
            async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                await answer.read(100)

        with anyio.fail_after(PATIENCE):
            async with self.server(handle) as server, anyio.create_task_group() as group:
                for _ in range(together):
                    group.start_soon(call)
                await everybody.wait()

    async def test_it_works_again_after_it_was_closed(self, transport: Transport) -> None:
        async with self.server(Exchange.answer) as server:
            for _ in range(2):
                async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                    await answer.read(100)
                await transport.aclose()
        assert server.connections == 2
