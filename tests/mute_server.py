"""An HTTPS server that takes connections and never says anything: whoever connects to it has sent nothing of a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio
from anyio.abc import SocketAttribute, SocketStream


class MuteServer(NamedTuple):
    """`reached` when somebody began a handshake."""

    url: str
    reached: anyio.Event


@asynccontextmanager
async def mute_server() -> AsyncIterator[MuteServer]:
    reached = anyio.Event()

    async def serve(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            reached.set()
            await anyio.sleep_forever()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield MuteServer(f"https://127.0.0.1:{listener.extra(SocketAttribute.local_port)}", reached)
        group.cancel_scope.cancel()
