"""A gateway in a server process of its own, in front of a billing upstream.

`python -m tests.faults.storm_gateway SETTINGS`: serves on the listening socket that it inherits; see `Settings`, given as JSON.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import hypercorn.asyncio
import hypercorn.config
import msgspec
import uvicorn
from msgspec import Struct
from starlette.applications import Starlette
from starlette.routing import Mount

from starlette_aigateway import AIGateway, AIGatewayMiddleware, CachePolicy, Price, Principal, RetryPolicy, Timeouts
from starlette_aigateway.drains import OnDisconnect
from starlette_aigateway.providers import OpenAIProvider

MOUNT = "/gateway"
ROOT = Path(__file__).parents[2]
Server = Literal["uvicorn", "hypercorn"]


class Settings(Struct, frozen=True, kw_only=True):
    """`descriptor` is the listening socket's; `owned` is with a lifespan, otherwise the gateway is mounted bare. `drain` and `graceful`,
    the server's own patience with connections at its end, are seconds."""

    data_dir: str
    upstream: str
    descriptor: int = -1
    server: Server = "uvicorn"
    on_disconnect: OnDisconnect = "drain"
    owned: bool = True
    drain: float = 30.0
    graceful: int = 1
    max_drains: int = 1000


async def who_it_says(connection: Any) -> Principal:
    return Principal(connection.headers["x-user"], hard_cap_usd=100)


def app_for(settings: Settings) -> Any:
    gateway = AIGateway(
        data_dir=settings.data_dir,
        providers=[OpenAIProvider(api_key="k", base_url=settings.upstream, name="upstream", models=["m"])],
        prices={"m": Price("1000", "2000")},
        resolve_principal=who_it_says,
        on_disconnect=settings.on_disconnect,
        max_drains=settings.max_drains,
        timeouts=Timeouts(drain=settings.drain),
        retries=RetryPolicy(rounds=1),
        cache=CachePolicy(enabled=False),
    )
    if settings.owned:
        return AIGatewayMiddleware(Starlette(), gateway, path=MOUNT)
    return Starlette(routes=[Mount(MOUNT, gateway)])


def serve(settings: Settings) -> None:
    app = app_for(settings)
    if settings.server == "uvicorn":
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=settings.graceful)
        uvicorn.Server(config).run([socket.socket(fileno=settings.descriptor)])
        return
    served = hypercorn.config.Config()
    served.bind = [f"fd://{settings.descriptor}"]
    served.graceful_timeout = settings.graceful
    asyncio.run(hypercorn.asyncio.serve(app, served))


@contextmanager
def gateway_process(settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process, once it is ready, and the port that it serves on. It is killed if it has not ended by itself."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        described = msgspec.structs.replace(settings, descriptor=listener.fileno())
        command = [sys.executable, "-m", "tests.faults.storm_gateway", msgspec.json.encode(described).decode()]
        with subprocess.Popen(command, cwd=ROOT, pass_fds=[listener.fileno()]) as process:
            try:
                httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}{MOUNT}/readyz", timeout=30).raise_for_status()
                yield process, listener.getsockname()[1]
            finally:
                process.kill()


if __name__ == "__main__":
    serve(msgspec.json.decode(sys.argv[1], type=Settings))
