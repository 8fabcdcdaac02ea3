"""Which hosts run on which servers, and how each server is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .processes import free_port, serving
from .switchboard import Switchboard

CHECKOUT = Path(__file__).resolve().parents[2]
ROOT_PATH = "/below"


@dataclass(frozen=True)
class Server:
    """`arguments` come before the app; `root_path` is the option of that name; `ready` is what it logs when it listens. `strips` says
    that its root path is what a proxy takes away: it puts it in front of the path itself."""

    name: str
    arguments: Sequence[str]
    address: str
    root_path: str
    ready: str
    strips: bool
    loop: str = "asyncio"


@dataclass(frozen=True)
class Host:
    """`module` has `app` and `gateway`; `on_trio` is the one that runs on trio. `stops`: whether the host alone gives the gateway a
    lifespan."""

    name: str
    module: str
    on_trio: str | None = None
    stops: bool = True


@dataclass(frozen=True)
class Cell:
    host: Host
    server: Server
    nested: bool

    @property
    def name(self) -> str:
        words = [*self.host.name.lower().replace(",", "").split(), "on", *self.server.name.split(), *(["nested"] if self.nested else [])]
        return "-".join(words)

    @property
    def has_lifespan(self) -> bool:
        """Whether something starts and stops the gateway."""
        return self.host.stops or self.nested

    @property
    def module(self) -> str:
        on_trio = self.server.loop == "trio" and self.host.on_trio
        return on_trio or self.host.module


SERVERS = (
    Server("uvicorn", ["-m", "uvicorn", "--no-access-log"], "--port {port}", "--root-path", "Uvicorn running on", strips=True),
    Server("hypercorn", ["-m", "hypercorn"], "--bind 127.0.0.1:{port}", "--root-path", "Running on", strips=False),
    Server(
        "hypercorn on trio", ["-m", "hypercorn", "--worker-class", "trio"], "--bind 127.0.0.1:{port}", "--root-path",
        "Running on", strips=False, loop="trio",
    ),
    Server("granian", ["-m", "granian", "--interface", "asgi"], "--port {port}", "--url-path-prefix", "Started worker-1", strips=False),
)  # fmt: skip

HOSTS = (
    Host("Starlette, bare mount", "starlette_mount", stops=False),
    Host("Starlette", "starlette_middleware"),
    Host("FastAPI", "fastapi_host"),
    Host("Quart", "quart_host", on_trio="quart_trio_host"),
    Host("Litestar", "litestar_host"),
    Host("Django", "django_host"),
    Host("ASGI function", "asgi_host"),
)

NOT_APPLICABLE: dict[tuple[str, str], str] = {
    (
        "Django",
        "hypercorn on trio",
    ): "Django's ASGI handler awaits `asyncio.gather`, which trio knows nothing of.",
}

CELLS = [
    Cell(host, server, nested)
    for host in HOSTS
    for server in SERVERS
    for nested in (False, True)
    if (host.name, server.name) not in NOT_APPLICABLE
]


def cell_of(test: pytest.Item) -> Cell | None:
    """The cell that a test is about."""
    if not isinstance(test, pytest.Function) or not hasattr(test, "callspec"):
        return None
    cell = test.callspec.params.get("cell")
    return cell if isinstance(cell, Cell) else None


@dataclass(frozen=True)
class Running:
    """A served cell. `outside` is what a client puts before every path; `stands_at` is where the gateway then is."""

    url: str
    outside: str
    stands_at: str


@contextmanager
def serve(cell: Cell, board: Switchboard) -> Iterator[Running]:
    """Stops the server by SIGTERM at the end and waits until it has ended."""
    port = free_port()
    server = cell.server
    app = "tests.hosts.nested:app" if cell.nested else f"tests.hosts.{cell.module}:app"
    command = [sys.executable, *server.arguments, *server.address.format(port=port).split()]
    if cell.nested:
        command += [server.root_path, ROOT_PATH]
    environment = {"SWITCHBOARD": str(board.port), "HOST": cell.module}
    with serving([*command, app], server.ready, CHECKOUT, environment):
        outside = "" if not cell.nested else "/outer" if server.strips else f"{ROOT_PATH}/outer"
        stands_at = f"{ROOT_PATH}/outer/api/ai-gateway" if cell.nested else "/api/ai-gateway"
        yield Running(f"http://127.0.0.1:{port}", outside, stands_at)
