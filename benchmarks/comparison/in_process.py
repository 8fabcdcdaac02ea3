"""Calls without a server, a socket and a provider: ASGI in, ASGI out, and upstream an answer that is at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp

from starlette_aigateway.protocols import HTTPAnswer, HTTPRequest

from .upstream import ANSWER

MOUNT = "/ai"


class Client:
    """Calls `app`, which is mounted at `MOUNT`, as a server that has the whole body already does."""

    def __init__(self, app: ASGIApp, raw_key: str) -> None:
        self._app = app
        self._headers = [
            (b"host", b"127.0.0.1"),
            (b"authorization", b"Bearer " + raw_key.encode()),
            (b"content-type", b"application/json"),
        ]
        self.answers: Counter[tuple[int, bytes]] = Counter()
        """How often each status and `x-cache` came."""

    async def call(self, route: str, body: bytes) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": f"{MOUNT}{route}", "root_path": MOUNT, "query_string": b"",
            "headers": [*self._headers, (b"content-length", b"%d" % len(body))],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive, self._send)

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.answers[message["status"], dict(message["headers"]).get(b"x-cache", b"")] += 1


class AtHand:
    """A `Transport` whose upstream answers every call at once, with the same bytes."""

    @asynccontextmanager
    async def send(self, request: HTTPRequest, *, connect: float, read: float) -> AsyncIterator[HTTPAnswer]:
        yield Answered()

    async def aclose(self) -> None:
        """Nothing is open."""


class Answered:
    status = 200
    headers: Mapping[str, str] = {"content-type": "application/json"}
    _body = ANSWER.partition(b"\r\n\r\n")[2]

    async def read(self, limit: int) -> bytes:
        return self._body

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._body
