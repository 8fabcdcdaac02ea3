"""The processes under load: each in a process group of its own, which ends with the run, however that ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """One of them: `processes` of one kind, each on a port of its own. `ready` is what each writes when it serves."""

    def __init__(self, name: str, log: Path, ready: str, processes: int = 1) -> None:
        self.name = name
        self.ports = [free_port() for _ in range(processes)]
        self.memory_before = 0.0
        self._log = log
        self._ready = ready
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Callable[[int], Sequence[str]], env: Mapping[str, str], where: set[int] | None) -> None:
        """Runs `command(port)` for each of the ports."""
        with self._log.open("ab") as log, cores.on(where):
            for port in self.ports:
                self._processes.append(
                    subprocess.Popen(
                        command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(env), start_new_session=True
                    )
                )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._said().count(self._ready) < len(self.ports) or not all(map(listens, self.ports)):
            if any(process.poll() is not None for process in self._processes):
                raise NotStarted(f"{self.name} ended while it started. {self.tail()}")
            if time.monotonic() > deadline:
                raise NotStarted(f"{self.name} was not ready within {START_SECONDS:g} seconds. {self.tail()}")
            time.sleep(0.02)
        self.memory_before = self.memory()

    def tail(self) -> str:
        lines = self._said().splitlines()[-TAIL:]
        return "It wrote:\n" + "\n".join(f"    {line}" for line in lines) if lines else "It wrote nothing."

    def cpu(self) -> float:
        """Seconds, of all its processes and their children."""
        return sum(meters.cpu_seconds(process.pid) for process in self._processes)

    def memory(self) -> float:
        """MiB, of all its processes and their children."""
        return sum(meters.memory_mib(process.pid) for process in self._processes)

    def ask_to_stop(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends all of its processes, also those that outlive the ones that were started."""
        self.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._processes = []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError, PermissionError):  # macOS has the latter for a group of zombies
                os.killpg(process.pid, number)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")


def uvicorn(app: str, port: int) -> list[str]:
    """uvicorn with the fastest loop and parser that are installed."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", "--app-dir", str(BENCHMARKS), app, *where, "--no-access-log"]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
