"""What a client may make the gateway wait for, hold in memory and compute: over real sockets, on a real server."""

from __future__ import annotations

import ast
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import pytest

from starlette_aigateway import AIGateway, Chunk, Completion, CompletionRequest, InvalidRequest, Price, Principal, Timeouts, Usage
from starlette_aigateway.errors import RequestTooLarge
from starlette_aigateway.http import bodies
from starlette_aigateway.http.bodies import MAX_VALUES, decode_object
from starlette_aigateway.providers import EchoProvider

from .serving import serve
from .test_hosts import Booked

HOUR = 3600.0
MB = 2**20
USER = b"x-user: ada\r\n"


async def by_name(connection: Any) -> Principal | None:
    name = connection.headers.get("x-user")
    return None if name is None else Principal(name)


@contextmanager
def door(**settings: Any) -> Iterator[tuple[str, int]]:
    gateway = AIGateway.in_memory(
        **{"providers": [EchoProvider()], "prices": {"echo": Price(1, 1), "m": Price(1, 1)}, "resolve_principal": by_name, **settings}
    )
    with serve(gateway) as url:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        yield parts.hostname, parts.port


@contextmanager
def sent(address: tuple[str, int], data: bytes, *, buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(20)
        connection.connect(address)
        connection.sendall(data)
        yield connection


def until_closed(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def answer(connection: socket.socket) -> bytes:
    """Status line, headers and the body of the announced length."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = connection.recv(65536)
        assert part, got
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")).split(b":")[1])
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def head(path: str, *lines: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n".encode() + b"".join(lines) + b"\r\n"


def length(size: int) -> bytes:
    return f"content-length: {size}\r\n".encode()


# -- before the body -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"], ids=["at once", "expect"])
@pytest.mark.parametrize(
    ("path", "lines", "status", "code"),
    [
        ("/complete", length(10 * MB), 401, "invalid_api_key"),
        ("/complete", length(10 * MB) + b"authorization: Bearer aigw_typo\r\n", 401, "invalid_api_key"),
        ("/complete", USER + length(11 * MB), 413, "request_too_large"),
        ("/complete", USER + length(10**15), 413, "request_too_large"),
        ("/nowhere", USER + length(10 * MB), 404, "not_found"),
        ("/me", USER + length(10 * MB), 405, "method_not_allowed"),
        ("/keys", USER + length(10 * MB), 404, "not_found"),
    ],
)
def test_what_is_refused_is_answered_before_a_byte_of_the_body_is_sent(
    path: str, lines: bytes, status: int, code: str, expect: bytes
) -> None:
    with door(timeouts=Timeouts(receive=HOUR)) as address, sent(address, head(path, lines, expect)) as connection:
        got = answer(connection)
        assert got.startswith(f"HTTP/1.1 {status} ".encode()), got
        assert code.encode() in got


def test_a_body_of_another_type_is_refused_before_it_is_sent() -> None:
    request = b"POST /complete HTTP/1.1\r\nhost: g\r\ncontent-type: text/plain\r\nexpect: 100-continue\r\n" + USER + length(MB) + b"\r\n"
    with door() as address, sent(address, request) as connection:
        assert answer(connection).startswith(b"HTTP/1.1 415 ")


def test_a_body_that_is_wanted_is_asked_for() -> None:
    body = b'{"model":"echo","messages":[{"role":"user","content":"x"}]}'
    with door() as address, sent(address, head("/complete", USER, length(len(body)), b"expect: 100-continue\r\n")) as connection:
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


# -- while the body comes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b'{"model":"ec'], ids=["nothing", "a part"])
def test_a_body_that_does_not_come_in_time_is_408_and_the_connection_is_closed(begun: bytes) -> None:
    with door(timeouts=Timeouts(receive=0.2)) as address, sent(address, head("/complete", USER, length(100)) + begun) as connection:
        got = until_closed(connection)
        assert got.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in got
        assert b"connection: close" in got.lower()


def test_a_body_without_an_announced_length_is_counted_and_cut_off() -> None:
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with door(max_body_bytes=MB) as address, sent(address, head("/complete", USER, b"transfer-encoding: chunked\r\n")) as connection:
        try:
            while True:
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it would have gone on for ever


@pytest.mark.anyio
async def test_a_body_in_tiny_pieces_takes_no_more_memory_than_its_bytes() -> None:
    seen: list[int] = []

    async def receive() -> dict[str, Any]:
        seen.append(1)
        return {"type": "http.request", "body": b" ", "more_body": len(seen) < 1000}

    assert await bodies.read(receive, b"", 1000, HOUR) == b" " * 1000
    seen.clear()
    with pytest.raises(RequestTooLarge):
        await bodies.read(receive, b"", 999, HOUR)
    seen.clear()
    with pytest.raises(RequestTooLarge):
        await bodies.read(receive, b"9" * 5000, 999, HOUR)
    assert not seen


# -- what is in the body -------------------------------------------------------------------------------------------------


def fill(before: bytes, unit: bytes, after: bytes) -> bytes:
    return before + b",".join([unit] * (10 * MB // (len(unit) + 1))) + after


NESTED: dict[str, bytes] = {
    "arrays in arrays": b"[" * (10 * MB),
    "objects in objects": b'{"a":' * (2 * MB),
    "ten megabytes of arrays": fill(b'{"a":[', b"[]", b"]}"),
    "of numbers": fill(b'{"a":[', b"1", b"]}"),
    "of messages": fill(b'{"messages":[', b'{"role":"user"}', b"]}"),
    "of texts": fill(b'{"a":[', b'""', b"]}"),
    "of texts that hold commas": fill(b'{"a":[', b'",,,,"', b"]}"),
    "of fields": fill(b"{", b'"k":0', b"}"),
    "of quotes in a text without end": b'{"a":[' + b"1," * MAX_VALUES + b'"' + b'\\"' * (4 * MB),
    "of texts without end": b'{"a":[' + b"1," * MAX_VALUES + b'"' * (8 * MB + 1),
}


@pytest.mark.parametrize("body", NESTED.values(), ids=NESTED.keys())
def test_a_body_that_is_made_to_be_costly_is_refused_before_it_costs(body: bytes) -> None:
    started = time.thread_time()
    with pytest.raises(InvalidRequest) as caught:
        decode_object(body)
    assert caught.value.code in ("request_too_large", "invalid_json")
    assert time.thread_time() - started < 1.0  # seconds of this thread alone; made into values, each takes several


def test_commas_and_brackets_in_texts_are_no_values() -> None:
    text = ',[{\\"\\\\' * 300_000
    body = b'{"model":"m","messages":[{"role":"user","content":"' + text.encode() + b'"}]}'
    assert len(decode_object(body)["messages"][0]["content"]) == 5 * 300_000
    exact = b'{"a":[' + b",".join([b'"a,b"'] * (MAX_VALUES - 1)) + b"]}"
    assert len(decode_object(exact)["a"]) == MAX_VALUES - 1
    with pytest.raises(RequestTooLarge):
        decode_object(exact[:-2] + b',"c","d"]}')


# -- a client that stops reading -----------------------------------------------------------------------------------------


class Flood:
    """A stream of far more than any buffer on the way holds."""

    name = "flood"
    models = ("m",)

    async def complete(self, request: CompletionRequest) -> Completion:
        raise AssertionError("only streamed")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        for _ in range(1000):
            yield Chunk(delta={"content": "x" * 16_384})
        yield Chunk(finish_reason="stop")
        yield Chunk(usage=Usage(input_tokens=10, output_tokens=5))


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
def test_a_client_that_stops_reading_its_stream_is_settled_and_closed(on_disconnect: str) -> None:
    booked = Booked()
    body = b'{"model":"m","stream":true,"max_tokens":10000000,"messages":[{"role":"user","content":"x"}]}'
    timeouts = Timeouts(send=0.2, drain=20)
    with (
        door(providers=[Flood()], timeouts=timeouts, observers=[booked], on_disconnect=on_disconnect, max_drain_bytes=100 * MB) as address,
        sent(address, head("/complete", USER, length(len(body))) + body, buffer=4096) as connection,
    ):
        assert booked.arrived.wait(20), "while not a byte has been read"
        (record,) = booked.records
        if on_disconnect == "drain":
            assert (record.outcome, record.usage) == ("completed", Usage(input_tokens=10, output_tokens=5))
        else:
            assert record.outcome == "estimated"
        got = until_closed(connection)
        assert got.startswith(b"HTTP/1.1 200 ")
        assert b"event: done" not in got


def test_a_slow_provider_is_no_client_that_stops_reading() -> None:
    release = threading.Event()

    class Slow(Flood):
        async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
            yield Chunk(delta={"content": "first"})
            await anyio.to_thread.run_sync(release.wait)
            yield Chunk(delta={"content": "last"}, finish_reason="stop")

    body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}'
    request = head("/complete", USER, length(len(body)), b"connection: close\r\n") + body
    with door(providers=[Slow()], timeouts=Timeouts(send=0.05)) as address, sent(address, request) as connection:
        got = b""
        while b"first" not in got:
            got += connection.recv(65536)
        assert not release.wait(0.3)
        release.set()
        assert b"event: done" in got + until_closed(connection)


# -- what the package is made of -----------------------------------------------------------------------------------------


SOURCES = sorted((Path(__file__).parents[1] / "starlette_aigateway").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_base_http_middleware_and_no_context_variable_anywhere(path: Path) -> None:
    """The first buffers and breaks cancellation; the second is another one in the task that settles a stream than where it was set."""
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not (names | imported | modules) & {"BaseHTTPMiddleware", "ContextVar", "contextvars", "starlette.middleware.base", "RunVar"}
