"""A server that forks its workers after it has imported the app, as gunicorn does with `--preload`: `python -m tests.prefork`.

With `USED=1` the parent has called the gateway before, and left it as it was. Prints one line of JSON when it has forked: what the parent
had open by then beyond what it began with. Ends its workers when its input ends.
"""

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import uvicorn

from starlette_aigateway import CompletionRequest, Principal

WORKERS = 2


def descriptors() -> set[str]:
    """What this process has open, by the names that the system has for it."""
    folder = Path("/proc/self/fd" if Path("/proc/self/fd").exists() else "/dev/fd")
    return {one.name for one in folder.iterdir()}


async def use(gateway: Any) -> None:
    for number in range(3):
        await gateway.complete(Principal("parent"), CompletionRequest(model="echo", messages=[{"role": "user", "content": f"{number}"}]))


def main() -> None:
    before = descriptors()
    from tests.worker_app import app, gateway

    opened = sorted(descriptors() - before)
    if os.environ.get("USED"):
        anyio.run(use, gateway)
    listener = socket.create_server(("127.0.0.1", 0))
    data_dir = Path(os.environ["DATA_DIR"])
    facts = {"opened": opened, "threads": threading.active_count(), "files": sorted(path.name for path in data_dir.glob("*"))}
    children = []
    for _ in range(WORKERS):
        child = os.fork()
        if child == 0:
            uvicorn.Server(uvicorn.Config(app, log_config=None)).run([listener])
            os._exit(0)
        children.append(child)
    print(json.dumps({**facts, "port": listener.getsockname()[1]}), flush=True)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGTERM)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
