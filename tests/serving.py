"""A real server for tests: `with serve(app) as base_url:` runs uvicorn in a thread on a free port of 127.0.0.1."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """Tells when it serves, or has failed to start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.settled.set()


@contextmanager
def serve(app: Any, **settings: Any) -> Iterator[str]:
    """Serves `app`, its lifespan included, until the block ends. `settings` are uvicorn's (`root_path="/below"`, `lifespan="off"`)."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    server = Server(uvicorn.Config(app, **{"log_config": None, "ws": "none", "timeout_graceful_shutdown": 5, **settings}))

    def run() -> None:
        with suppress(SystemExit):  # uvicorn exits when a start fails; `serve` tells that in the test's own thread
            server.run([listener])

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    try:
        server.settled.wait()
        assert server.started, "the app did not start: its lifespan failed"
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
