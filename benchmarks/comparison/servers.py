"""The processes under load: each in a process group of its own, which ends with the run, however that ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from . import cores, meters

BENCHMARKS = Path(__file__).resolve().parents[1]
START_SECONDS = 30.0
STOP_SECONDS = 5.0
TAIL = 15
UVICORN_READY = "Application startup complete."


class NotStarted(Exception):
    """A server did not come up; says what it wrote."""


class Server:
    """One of them. `ready` is what it writes, once in each of its `workers`, when it serves."""

    def __init__(self, name: str, log: Path, ready: str, workers: int = 1) -> None:
        self.name = name
        self.port = free_port()
        self.memory_before = 0.0
        self._log = log
        self._ready = ready
        self._workers = workers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], env: Mapping[str, str], where: set[int] | None) -> None:
        with self._log.open("wb") as log, cores.on(where):
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(env), start_new_session=True
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._said().count(self._ready) < self._workers or not self._listens():
            if self._process is None or self._process.poll() is not None:
                raise NotStarted(f"{self.name} ended while it started. {self.tail()}")
            if time.monotonic() > deadline:
                raise NotStarted(f"{self.name} was not ready within {START_SECONDS:g} seconds. {self.tail()}")
            time.sleep(0.02)
        self.memory_before = self.memory()

    def tail(self) -> str:
        lines = self._said().splitlines()[-TAIL:]
        return "It wrote:\n" + "\n".join(f"    {line}" for line in lines) if lines else "It wrote nothing."

    def cpu(self) -> float:
        """Seconds, of all its processes."""
        return meters.cpu_seconds(self._process.pid) if self._process is not None else 0.0

    def memory(self) -> float:
        """MiB, of all its processes."""
        return meters.memory_mib(self._process.pid) if self._process is not None else 0.0

    def ask_to_stop(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends all of its processes, also those that outlive the one that was started."""
        if self._process is None:
            return
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):  # macOS has the latter for a group of zombies
                os.killpg(self._process.pid, number)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def uvicorn(app: str, port: int, workers: int = 1) -> list[str]:
    """uvicorn with the fastest loop and parser that are installed."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(BENCHMARKS), app, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--no-access-log", *(["--workers", str(workers)] if workers > 1 else [])]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def ended(servers: Sequence[Server]) -> Iterator[None]:
    """Ends `servers` with the block. A second Ctrl-C does not keep it from that."""
    try:
        yield
    finally:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for server in servers:
            server.ask_to_stop()
        for server in servers:
            server.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
