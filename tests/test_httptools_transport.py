"""The transport over httptools: its pool, its manners towards servers that misbehave, and that no cut of the bytes changes an answer."""

import asyncio
import gc
import gzip
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.errors import ProviderError, ProviderTimeout
from starlette_aigateway.protocols import HTTPRequest
from starlette_aigateway.providers.http1 import connection as connections
from starlette_aigateway.providers.http1 import dialing
from starlette_aigateway.providers.http1.answer import HEAD_BYTES, WINDOW_BYTES, Answer
from starlette_aigateway.providers.http1.connection import Connection
from starlette_aigateway.providers.http1.head import Origin, request_head
from starlette_aigateway.providers.transport_httptools import HttptoolsTransport
from starlette_aigateway.testing.transport import BLINK, PATIENCE, Exchange, Handler, collect, post, raw_server

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
READ_BYTES = 2**18  # what asyncio reads at once at the most


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def transport() -> AsyncIterator[HttptoolsTransport]:
    transport = HttptoolsTransport()
    yield transport
    await transport.aclose()
    gc.collect()  # a socket that was left open warns, and a warning is an error


async def call(transport: HttptoolsTransport, url: str, *, read: float = PATIENCE) -> bytes:
    with anyio.fail_after(PATIENCE):
        async with transport.send(post(url), connect=PATIENCE, read=read) as answer:
            return await answer.read(2**20)


async def failure(transport: HttptoolsTransport, url: str, *, read: float = PATIENCE) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await call(transport, url, read=read)
    return caught.value


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not true():
            await asyncio.sleep(0)


async def open_connections(transport: HttptoolsTransport) -> list[Connection]:
    return list((await transport.pool())._open)


def sends(*answers: bytes) -> Handler:
    """A server whose n-th exchange is answered by the n-th of `answers`, from then on by the last."""
    left = list(answers)

    async def handle(exchange: Exchange) -> None:
        await exchange.stream.send(left.pop(0) if len(left) > 1 else left[0])

    return handle


@asynccontextmanager
async def streams(serve: Callable[[SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """The address of a server that reads nothing by itself."""

    async def served(stream: SocketStream) -> None:
        async with stream:
            await serve(stream)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, served)
        yield f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        group.cancel_scope.cancel()


async def drained(stream: SocketStream) -> int:
    """The bytes that came until the other side closed."""
    size = 0
    try:
        while True:
            size += len(await stream.receive())
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return size


class TestWhichConnectionsAreUsedAgain:
    async def test_the_one_that_came_back_last_goes_out_first(self, transport: HttptoolsTransport) -> None:
        async with raw_server(Exchange.answer) as server:
            async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as first:
                await first.read(100)
                await call(transport, server.url)
            await call(transport, server.url)
            assert [exchange.connection for exchange in server.exchanges] == [1, 2, 1]

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n{}",
            OK + b"more",
            OK + OK,
            OK + b"H",
            CHUNKED + b"2\r\n{}\r\n0\r\n\r\n0\r\n\r\n",
        ],
    )
    async def test_none_whose_answer_says_so_or_had_more_behind_it(self, transport: HttptoolsTransport, answer: bytes) -> None:
        async with raw_server(sends(answer, OK)) as server:
            assert [await call(transport, server.url) for _ in range(2)] == [b"{}", b"{}"]
            assert [exchange.connection for exchange in server.exchanges] == [1, 2]

    async def test_none_that_the_other_side_closed_while_it_rested(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer()
            await exchange.stream.aclose()

        async with raw_server(handle) as server:
            for _ in range(2):
                await call(transport, server.url)
                pool = await transport.pool()
                await until(lambda pool=pool: not pool._open)  # type: ignore[misc]  # a lambda's default has no type
                assert not any(pool._resting.values())
            assert server.connections == 2

    async def test_none_on_which_something_came_that_nobody_asked_for(self, transport: HttptoolsTransport) -> None:
        resting, closed = anyio.Event(), anyio.Event()

        async def handle(exchange: Exchange) -> None:
            await exchange.answer()
            if exchange.connection == 1:
                await resting.wait()
                await exchange.stream.send(OK)
                await exchange.wait_closed()
                closed.set()

        async with raw_server(handle) as server:
            await call(transport, server.url)
            resting.set()
            await closed.wait()
            assert await call(transport, server.url) == b"{}"
            assert server.connections == 2

    async def test_none_that_rested_for_too_long(self, transport: HttptoolsTransport) -> None:
        async with raw_server(Exchange.answer) as server:
            await call(transport, server.url)
            (resting,) = await open_connections(transport)
            resting._heard -= connections.KEEP_ALIVE_SECONDS + 1
            await call(transport, server.url)
            assert server.connections == 2

    async def test_one_that_rested_for_too_long_is_closed(self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", BLINK)
        closed = anyio.Event()

        async def handle(exchange: Exchange) -> None:
            await exchange.answer()
            await exchange.wait_closed()
            closed.set()

        with anyio.fail_after(PATIENCE):
            async with raw_server(handle) as server:
                await call(transport, server.url)
                await closed.wait()

    async def test_none_whose_request_was_not_taken(self, transport: HttptoolsTransport) -> None:
        body, seen = b"x" * 2**26, []

        async def serve(stream: SocketStream) -> None:
            await stream.receive()
            await stream.send(OK)
            seen.append(await drained(stream))

        async with streams(serve) as url:
            async with transport.send(post(url, body), connect=PATIENCE, read=PATIENCE) as answer:
                assert await answer.read(100) == b"{}"
                (connection,) = await open_connections(transport)
                assert connection._transport is not None
                assert 0 < connection._transport.get_write_buffer_size() <= 2 * connections.PIECE_BYTES
            await until(lambda: seen)
        assert seen[0] < len(body)

    async def test_none_of_another_place(self, transport: HttptoolsTransport) -> None:
        async with raw_server(Exchange.answer) as one, raw_server(Exchange.answer) as other:
            await call(transport, one.url)
            await call(transport, other.url)
            assert (one.connections, other.connections) == (1, 1)


class TestSending:
    async def test_an_answer_may_begin_before_the_request_was_taken_whole(self, transport: HttptoolsTransport) -> None:
        body = b"x" * 2**24

        async def serve(stream: SocketStream) -> None:
            for _ in range(2):
                size = len((await stream.receive()).partition(b"\r\n\r\n")[2])
                await stream.send(CHUNKED + b"1\r\n{\r\n")
                while size < len(body):
                    size += len(await stream.receive())
                await stream.send(b"1\r\n}\r\n0\r\n\r\n")

        async with streams(serve) as url:
            for _ in range(2):
                with anyio.fail_after(PATIENCE):
                    async with transport.send(post(url, body), connect=PATIENCE, read=PATIENCE) as answer:
                        assert await answer.read(100) == b"{}"
                assert len(await open_connections(transport)) == 1

    async def test_a_server_that_takes_nothing_is_silent(self, transport: HttptoolsTransport) -> None:
        async with streams(lambda stream: anyio.sleep_forever()) as url:
            with pytest.raises(ProviderTimeout) as caught:
                async with transport.send(post(url, b"x" * 2**26), connect=PATIENCE, read=BLINK):
                    raise AssertionError
        assert caught.value.billed == "unknown"

    @pytest.mark.parametrize(
        ("url", "start"),
        [
            ("http://Host.example", "POST / HTTP/1.1\r\nhost: host.example\r\n"),
            ("http://host:80/a?b=%2F#c", "POST /a?b=%2F HTTP/1.1\r\nhost: host\r\n"),
            ("https://host:80?b", "POST /?b HTTP/1.1\r\nhost: host:80\r\n"),
            ("https://[::1]:8443/v1", "POST /v1 HTTP/1.1\r\nhost: [::1]:8443\r\n"),
        ],
    )
    def test_the_head_says_where_it_goes(self, url: str, start: str) -> None:
        expected = f"{start}accept-encoding: identity\r\nx-a: b\r\ncontent-length: "
        assert request_head(url, [("X-A", "b")]).start.decode() == expected

    def test_connections_are_shared_by_scheme_host_and_port(self) -> None:
        assert request_head("https://HOST/a", []).origin == request_head("https://host:443/b", []).origin == Origin(True, "host", 443)

    def test_headers_of_the_transports_own_may_be_given(self) -> None:
        start = request_head("http://host/", [("Host", "other"), ("Accept-Encoding", "gzip")]).start
        assert start == b"POST / HTTP/1.1\r\nhost: other\r\naccept-encoding: gzip\r\ncontent-length: "

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("x", "a\r\ny: b"),
            ("x", "a\nb"),
            ("x", "a\rb"),
            ("x", "a\x00"),
            ("x", "\ud800"),
            ("x y", "a"),
            ("x\r\ny", "a"),
            ("x:", "a"),
            ("", "a"),
            ("Content-Length", "1"),
            ("transfer-encoding", "chunked"),
        ],
    )
    async def test_a_header_that_would_break_the_head_is_never_sent(self, transport: HttptoolsTransport, name: str, value: str) -> None:
        async with raw_server(Exchange.answer) as server:
            with pytest.raises(ProviderError, match="header") as caught:
                async with transport.send(HTTPRequest(server.url, {name: value}, b"{}"), connect=PATIENCE, read=PATIENCE):
                    raise AssertionError
            assert (caught.value.billed, caught.value.retryable, server.connections) == ("no", False, 0)

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "/v1",
            "http:///v1",
            "ftp://host/",
            "http://host:99999/",
            "http://host/a b",
            "http://host/\r\nx",
            "http://u:p@host/",
            "http://hö.st/",
        ],
    )
    async def test_what_is_no_address_was_certainly_not_billed(self, transport: HttptoolsTransport, url: str) -> None:
        error = await failure(transport, url)
        assert (error.billed, error.retryable) == ("no", False)


class TestConnecting:
    async def test_a_name_is_looked_up_once_for_all_that_wait_for_it(
        self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lookups, go_on = [], anyio.Event()

        async def look_up(place: tuple[str, int]) -> Sequence[Any]:
            lookups.append(place)
            await go_on.wait()
            return await asyncio.get_running_loop().getaddrinfo("127.0.0.1", place[1], type=socket.SOCK_STREAM)

        monkeypatch.setattr(dialing, "_look_up", look_up)
        async with raw_server(Exchange.answer) as server:
            url = server.url.replace("127.0.0.1", "somewhere.test")
            tasks = [asyncio.create_task(call(transport, url)) for _ in range(10)]
            await until(lambda: lookups)
            tasks[0].cancel()  # who asked first goes, and takes nothing from the others
            await asyncio.sleep(0)
            go_on.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(lookups) == 1
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == [b"{}"] * 9

    async def test_the_next_address_is_tried(self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        async def look_up(place: tuple[str, int]) -> Sequence[Any]:
            loop = asyncio.get_running_loop()
            refused = await loop.getaddrinfo("127.0.0.1", bound.getsockname()[1], type=socket.SOCK_STREAM)
            return [*refused, *await loop.getaddrinfo("127.0.0.1", place[1], type=socket.SOCK_STREAM)]

        monkeypatch.setattr(dialing, "_look_up", look_up)
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            async with raw_server(Exchange.answer) as server:
                assert await call(transport, server.url.replace("127.0.0.1", "somewhere.test")) == b"{}"

    async def test_what_was_being_looked_up_is_given_up_when_it_is_closed(
        self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = anyio.Event()

        async def look_up(place: tuple[str, int]) -> Sequence[Any]:
            asked.set()
            await anyio.sleep_forever()
            return []

        monkeypatch.setattr(dialing, "_look_up", look_up)
        task = asyncio.create_task(call(transport, "http://somewhere.test"))
        await asked.wait()
        task.cancel()
        await asyncio.wait([task])
        before = len(asyncio.all_tasks())
        with anyio.fail_after(PATIENCE):
            await (await transport.pool()).aclose()
        assert len(asyncio.all_tasks()) == before - 1

    async def test_a_socket_that_came_to_nothing_is_closed(self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreadable() -> None:
            raise FileNotFoundError("the certificates")

        monkeypatch.setattr(dialing, "tls_context", unreadable)
        async with raw_server(Exchange.answer) as server:
            error = await failure(transport, server.url.replace("http:", "https:"))
            assert (error.billed, server.exchanges) == ("no", [])


class TestReading:
    async def test_interim_answers_are_skipped(self, transport: HttptoolsTransport) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nlink: a\r\nx-a: 1\r\n\r\n" + b"HTTP/1.1 100 Continue\r\n\r\n"
        async with raw_server(sends(early + OK)) as server:
            for _ in range(2):
                async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                    assert (answer.status, dict(answer.headers)) == (200, {"content-length": "2"})
                    assert await answer.read(2) == b"{}"
            assert server.connections == 1

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK,
            b"HTTP/1.1 099 What\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n{}",
        ],
    )
    async def test_what_was_not_asked_for_is_no_answer(self, transport: HttptoolsTransport, answer: bytes) -> None:
        async with raw_server(sends(answer)) as server:
            assert (await failure(transport, server.url)).billed == "unknown"
            pool = await transport.pool()
            await until(lambda: not pool._open)

    @pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
    async def test_some_answers_have_no_body(self, transport: HttptoolsTransport, status: bytes) -> None:
        async with raw_server(sends(b"HTTP/1.1 %s\r\n\r\n" % status)) as server:
            assert [await call(transport, server.url) for _ in range(2)] == [b"", b""]
            assert server.connections == 1

    async def test_a_body_without_length_ends_with_the_connection(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.stream.send(b"HTTP/1.1 200 OK\r\n\r\n{}")
            await exchange.stream.aclose()

        async with raw_server(handle) as server:
            assert await call(transport, server.url) == b"{}"

    async def test_what_came_before_the_connection_broke_is_given(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.stream.send(CHUNKED + b"2\r\n{}\r\nzz\r\n")

        async with raw_server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            chunks = answer.chunks()
            assert await anext(chunks) == b"{}"
            for _ in range(2):
                with pytest.raises(ProviderError):
                    await anext(chunks)

    async def test_a_slow_reader_holds_the_other_side_back(self, transport: HttptoolsTransport) -> None:
        body = b"x" * 2**24

        async def handle(exchange: Exchange) -> None:
            await exchange.answer(body)

        async with raw_server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            await until(lambda: answer._paused)
            assert WINDOW_BYTES < answer._size <= WINDOW_BYTES + READ_BYTES
            assert await collect(answer) == body

    async def test_a_slow_reader_is_not_the_other_sides_silence(
        self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked, go_on = anyio.Event(), anyio.Event()
        look = Connection._look

        async def handle(exchange: Exchange) -> None:
            await exchange.start_chunked()
            await exchange.chunk(b"a")
            await go_on.wait()
            await exchange.chunk(b"b")
            await exchange.stream.send(b"0\r\n\r\n")

        def looking(connection: Connection) -> None:
            look(connection)
            looked.set()

        monkeypatch.setattr(Connection, "_look", looking)
        async with raw_server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=BLINK) as answer:
            await looked.wait()
            go_on.set()
            assert await collect(answer) == b"ab"

    async def test_the_silence_of_a_call_is_its_own_and_not_that_of_the_call_before(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await (exchange.answer() if len(server.exchanges) == 1 else exchange.wait_closed())

        async with raw_server(handle) as server:
            await call(transport, server.url, read=1000.0)
            assert isinstance(await failure(transport, server.url, read=BLINK), ProviderTimeout)
            assert server.connections == 1

    async def test_an_answer_that_was_left_is_not_read_on(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.start_chunked()
            await exchange.wait_closed()

        async with raw_server(handle) as server:
            async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                pass
            with pytest.raises(ProviderError):
                await collect(answer)

    async def test_closing_the_transport_is_not_the_end_of_a_body(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.stream.send(b"HTTP/1.1 200 OK\r\n\r\n{")
            await exchange.wait_closed()

        async with raw_server(handle) as server, transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
            chunks = answer.chunks()
            assert await anext(chunks) == b"{"
            await transport.aclose()
            with pytest.raises(ProviderError) as caught:
                await anext(chunks)
        assert caught.value.billed == "unknown"


GZIPPED = gzip.compress(b"{}" * 99, mtime=0)
RAW_DEFLATE = zlib.compressobj(wbits=-zlib.MAX_WBITS)


class TestContentCodings:
    @pytest.mark.parametrize(
        ("coding", "body"),
        [
            (b"gzip", GZIPPED),
            (b"X-GZIP", GZIPPED),
            (b"deflate", zlib.compress(b"{}" * 99)),
            (b"deflate", RAW_DEFLATE.compress(b"{}" * 99) + RAW_DEFLATE.flush()),
            (b"identity", b"{}" * 99),
            (b"", b"{}" * 99),
        ],
    )
    async def test_are_decoded(self, transport: HttptoolsTransport, coding: bytes, body: bytes) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(body, headers=b"content-encoding: %b\r\n" % coding)

        async with raw_server(handle) as server:
            assert await call(transport, server.url) == b"{}" * 99

    @pytest.mark.parametrize(
        ("coding", "body"),
        [
            (b"gzip", GZIPPED[:-1]),
            (b"gzip", GZIPPED + b"more"),
            (b"deflate", b"{}"),
            (b"br", b"{}"),
            (b"gzip, gzip", gzip.compress(GZIPPED, mtime=0)),
        ],
    )
    async def test_that_are_broken_or_unknown_fail_and_nothing_is_known(
        self, transport: HttptoolsTransport, coding: bytes, body: bytes
    ) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(body, headers=b"content-encoding: %b\r\n" % coding)

        async with raw_server(handle) as server:
            error = await failure(transport, server.url)
        assert (error.billed, error.status) == ("unknown", 200)

    async def test_no_body_needs_no_decoding(self, transport: HttptoolsTransport) -> None:
        async with raw_server(sends(b"HTTP/1.1 204 No Content\r\ncontent-encoding: gzip\r\n\r\n")) as server:
            assert await call(transport, server.url) == b""

    async def test_a_small_body_that_stands_for_a_huge_one_is_not_read_on(self, transport: HttptoolsTransport) -> None:
        async def handle(exchange: Exchange) -> None:
            await exchange.answer(gzip.compress(bytes(2**26)), headers=b"content-encoding: gzip\r\n")

        async with raw_server(handle) as server:
            assert "longer" in str(await failure(transport, server.url))
            async with transport.send(post(server.url), connect=PATIENCE, read=PATIENCE) as answer:
                assert max([len(piece) async for piece in answer.chunks()]) <= READ_BYTES


class TestCancelling:
    """Wherever a call is cancelled, no connection stays behind."""

    async def cancelled(self, transport: HttptoolsTransport, url: str, reached: anyio.Event) -> None:
        task = asyncio.create_task(call(transport, url))
        with anyio.fail_after(PATIENCE):
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            pool = await transport.pool()
            await until(lambda: not pool._open)

    async def test_while_it_connects(self, transport: HttptoolsTransport) -> None:
        reached, closed = anyio.Event(), anyio.Event()

        async def serve(stream: SocketStream) -> None:
            await stream.receive()  # the client's part of the handshake
            reached.set()
            await drained(stream)
            closed.set()

        async with streams(serve) as url:
            await self.cancelled(transport, url.replace("http:", "https:"), reached)
            await closed.wait()

    @pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{"])
    async def test_while_it_waits(self, transport: HttptoolsTransport, sent: bytes) -> None:
        reached, closed = anyio.Event(), anyio.Event()

        async def handle(exchange: Exchange) -> None:
            if sent:
                await exchange.stream.send(sent)
            reached.set()
            await exchange.wait_closed()
            closed.set()

        async with raw_server(handle) as server:
            await self.cancelled(transport, server.url, reached)
            await closed.wait()

    async def test_while_its_request_is_being_taken(self, transport: HttptoolsTransport) -> None:
        reached, closed = anyio.Event(), anyio.Event()

        async def serve(stream: SocketStream) -> None:
            await stream.receive()
            reached.set()
            await drained(stream)
            closed.set()

        async def send(url: str) -> None:
            async with transport.send(post(url, b"x" * 2**26), connect=PATIENCE, read=PATIENCE):
                raise AssertionError

        async with streams(serve) as url:
            task = asyncio.create_task(send(url))
            await reached.wait()
            task.cancel()
            await asyncio.wait([task])
            await closed.wait()

    async def test_in_the_moment_in_which_the_answer_came(self, transport: HttptoolsTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        received = Connection.data_received

        def receiving(connection: Connection, data: bytes) -> None:
            received(connection, data)
            task.cancel()

        monkeypatch.setattr(Connection, "data_received", receiving)
        async with raw_server(Exchange.answer) as server:
            task = asyncio.create_task(call(transport, server.url))
            await asyncio.wait([task])
            assert task.cancelled()
            monkeypatch.undo()
            assert await call(transport, server.url) == b"{}"


class Deaf:
    """A line on which nobody ever waits."""

    def listen(self) -> asyncio.Future[None]:
        raise AssertionError("an answer that is whole was waited for")

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def outcome(pieces: Iterable[bytes]) -> tuple[int, dict[str, str], bytes, str | None]:
    """What a reader gets when these pieces came and the other side closed then."""
    answer = Answer(Deaf())
    for piece in pieces:
        answer.feed(piece)
    answer.ended()
    body, error = b"", None
    try:
        while True:
            body += done(anext(answer.chunks()))
    except StopAsyncIteration:
        pass
    except ProviderError as failed:
        error = str(failed)
    return answer.status, dict(answer.headers) if answer.status else {}, body, error


def done(waiting: Any) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        waiting.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({min(place, len(data)) for place in places}), len(data)]
    return [data[start:end] for start, end in pairwise(edges) if start < end]


ANSWERS = [
    OK,
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX-A: b \r\ncontent-length: 11\r\n\r\nhello world",
    CHUNKED + b"5;a=b\r\nhello\r\n6\r\n world\r\n0\r\nx-trailer: c\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nuntil the end",
    b"HTTP/1.0 503 Down\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nx-a: b\r\n\r\n",
    b"HTTP/1.1 429 Slow\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut",
]
places = st.lists(st.integers(0, 150), max_size=8)


class TestHoweverItIsCut:
    @given(st.sampled_from(ANSWERS), places)
    def test_an_answer_is_the_same(self, data: bytes, at: list[int]) -> None:
        assert outcome(cut(data, at)) == outcome([data])

    @given(st.sampled_from(ANSWERS), st.integers(0, 150), st.binary(max_size=4), st.integers(0, 4), places)
    def test_a_spoilt_answer_is_the_same(self, data: bytes, where: int, put: bytes, gone: int, at: list[int]) -> None:
        spoilt = data[:where] + put + data[where + gone :]
        assert outcome(cut(spoilt, at)) == outcome([spoilt])

    @pytest.mark.parametrize("data", ANSWERS)
    def test_byte_by_byte(self, data: bytes) -> None:
        assert outcome(cut(data, range(len(data)))) == outcome([data])

    @pytest.mark.parametrize("name", ["status", "x-trailer"])
    def test_trailers_are_no_headers(self, name: str) -> None:
        assert outcome([CHUNKED + b"0\r\n%b: a\r\n\r\n" % name.encode()])[1] == {"transfer-encoding": "chunked"}

    @pytest.mark.parametrize(
        ("start", "more"),
        [
            (b"HTTP/1.1 200 OK\r\nx-a: ", b"a" * 1000),
            (b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n" * 100),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
            (CHUNKED + b"0\r\nx-a: ", b"a" * 1000),
            (CHUNKED + b"1;a=", b"a" * 1000),
        ],
    )
    def test_what_never_comes_to_a_body_is_bounded(self, start: bytes, more: bytes) -> None:
        answer = Answer(Deaf())
        answer.feed(start)
        fed = 0
        while answer._error is None and fed < 10 * HEAD_BYTES:
            answer.feed(more)
            fed += len(more)
        assert HEAD_BYTES - 2000 < fed <= HEAD_BYTES + 2000
