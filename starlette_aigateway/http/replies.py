"""Answers whose headers are made as the bytes that go out: Starlette's `Response` takes text, and encodes each name and each value."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Header: TypeAlias = tuple[bytes, bytes]
"""Name, in lower case, and value."""

JSON: Header = (b"content-type", b"application/json")
NO_STORE: Header = (b"cache-control", b"no-store")
CLIENT_LEFT = 499
"""The status that nginx logs for it (https://nginx.org/en/docs/http/ngx_http_core_module.html); no client ever sees it."""


class Reply(Response):
    """Whole JSON. `headers` are those of its own; type and length are added."""

    def __init__(self, body: bytes, headers: Iterable[Header] = (), status: int = 200) -> None:
        self.status_code = status
        self.background = None
        self.body = body
        self.raw_headers = [*headers, (b"content-length", b"%d" % len(body)), JSON]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


def as_text(headers: Iterable[Header]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


async def answer_nobody(send: Send) -> None:
    """What ends a request whose client has left before its answer began. Servers drop it; but middleware of the host waits for one, and
    some raises where there is none (Starlette's `BaseHTTPMiddleware`)."""
    with suppress(OSError):  # how a server may tell that the client is gone (ASGI 2.4)
        await send({"type": "http.response.start", "status": CLIENT_LEFT, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
