"""One run: the servers up, each case probed and warmed, then loaded in rounds that take turns."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import cases, cores, generators
from .cases import Case
from .load import NUMBER, Load, Plan, first_number
from .servers import BENCHMARKS, UVICORN_READY, Server, ended, environment, uvicorn

WARM_SECONDS = 1
QUIET = 0.05
"""Seconds over which servers that use no CPU are taken for at rest."""
MAX_REST = 5.0


class WrongAnswer(Exception):
    """A server does not do what it is measured for."""


class Settings(NamedTuple):
    rounds: int
    seconds: float
    connections: int
    latency: float
    """Seconds that the upstream takes before it answers."""
    cases: list[str]
    workers: list[int]
    """Numbers of worker processes above one that are measured as well."""
    use_wrk: bool


class Sample(NamedTuple):
    """One case in one round. CPU in cores (seconds per second) and, of the server, in microseconds per request."""

    load: Load
    cpu_us: float
    server_cores: float
    upstream_cores: float
    load_cores: float
    strays: int
    """Calls that went to the upstream and should not have, or the other way round."""

    @property
    def rate(self) -> float:
        return self.load.requests / self.load.seconds

    @property
    def errors(self) -> int:
        return self.load.refused + self.load.broken + self.strays


class Row(NamedTuple):
    case: Case
    samples: list[Sample]

    def median(self, of: Callable[[Sample], float]) -> float:
        return statistics.median(map(of, self.samples))


class Outcome(NamedTuple):
    rows: list[Row]
    memory: dict[str, tuple[float, float]]
    """MiB of each server after its start and after all load."""
    generator: str
    cores: cores.Cores


class Bench:
    """All servers and what is known of them. `tell` is called with what happens now."""

    def __init__(self, settings: Settings, work: Path, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._work = work
        self._tell = tell
        self._cores = cores.choose()
        self._generator = generators.choose(settings.use_wrk)
        self._cases = cases.chosen(settings.cases, settings.workers)
        names = dict.fromkeys(case.server for case in self._cases)
        self._upstream = Server("upstream", work / "upstream.log", "ready")
        self._servers = {name: Server(name, work / f"{name}.log", UVICORN_READY, workers_of(name)) for name in names}
        self._key = ""

    def run(self) -> Outcome:
        with ended([*self._servers.values(), self._upstream]):
            self._start()
            for case in self._cases:
                self._tell(f"warming up: {case.label}")
                self._probe(case)
                self._load(case, min(WARM_SECONDS, self._settings.seconds))
            rows = [Row(case, []) for case in self._cases]
            for number in range(self._settings.rounds):
                for row in rows:
                    self._tell(f"round {number + 1} of {self._settings.rounds}: {row.case.label}")
                    row.samples.append(self._sample(row.case))
            for case in self._cases:
                self._probe(case)
            memory = {name: (server.memory_before, server.memory()) for name, server in self._servers.items()}
        return Outcome(rows, memory, self._generator.name, self._cores)

    def _start(self) -> None:
        self._tell("starting the servers")
        command = [sys.executable, "-m", "comparison.upstream", "--latency", str(self._settings.latency), "--port"]
        self._upstream.start(lambda port: [*command, str(port)], {}, self._cores.load)
        env = {"UPSTREAM": f"http://127.0.0.1:{self._upstream.ports[0]}/v1", "WORK": str(self._work)}
        made = subprocess.run(
            [sys.executable, str(BENCHMARKS / "app.py")], env=environment(env), capture_output=True, text=True, check=True, timeout=60
        )
        self._key = made.stdout.strip()
        for name, server in self._servers.items():
            app = "app:app" if is_gateway(name) else f"comparison.{name}:app"
            own = {**env, "DATA_DIR": str(self._work / name)} if is_gateway(name) else env
            server.start(partial(uvicorn, app), own, self._cores.server if workers_of(name) == 1 else self._cores.every)
        for server in [self._upstream, *self._servers.values()]:
            server.wait_until_ready()

    def _plan(self, case: Case, seconds: float) -> Plan:
        gateway = is_gateway(case.server)
        return Plan(
            ports=self._servers[case.server].ports,
            path=f"/ai{cases.CALL}" if gateway else cases.CALL,
            headers={"authorization": f"Bearer {self._key}"} if gateway else {},
            body=cases.body(case.stream),
            unique=case.unique,
            connections=self._settings.connections,
            seconds=seconds,
        )

    def _probe(self, case: Case) -> None:
        """One call, whose answer is read: 200, a whole answer or a whole stream."""
        plan = self._plan(case, 0)
        body = plan.body.replace(NUMBER, f"{first_number() if case.unique else 0:016d}")
        connection = http.client.HTTPConnection("127.0.0.1", plan.ports[0], timeout=30)
        try:
            connection.request("POST", plan.path, body, {"content-type": "application/json", **plan.headers})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        finally:
            connection.close()
        whole = text.endswith("data: [DONE]\n\n") and '"usage"' in text if case.stream else isinstance(json.loads(text), dict)
        if answer.status != 200 or not whole:
            raise WrongAnswer(f"{case.label} answered {answer.status}: {text[:500]}\n{self._servers[case.server].tail()}")

    def _load(self, case: Case, seconds: float) -> Load:
        load = self._generator.run(self._plan(case, seconds), self._cores.load)
        if load.requests == 0:
            raise WrongAnswer(f"{case.label} answered nothing in {load.seconds:.1f} seconds\n{self._servers[case.server].tail()}")
        return load

    def _sample(self, case: Case) -> Sample:
        self._rest()
        server = self._servers[case.server]
        calls, cpu, upstream = self._calls(), server.cpu(), self._upstream.cpu()
        load = self._load(case, self._settings.seconds)
        cpu, upstream = server.cpu() - cpu, self._upstream.cpu() - upstream
        reached = self._calls() - calls
        strays = max(0, load.requests - reached) if case.reaches else reached
        return Sample(load, cpu / load.requests * 1e6, cpu / load.seconds, upstream / load.seconds, load.cpu / load.seconds, strays)

    def _rest(self) -> None:
        """Until what the last load left behind is done: calls that were in the air, writes to the cache."""
        deadline = time.monotonic() + MAX_REST
        used = self._used()
        while time.monotonic() < deadline:
            time.sleep(QUIET)
            before, used = used, self._used()
            if used - before < QUIET / 10:
                return

    def _used(self) -> float:
        return sum(server.cpu() for server in self._servers.values())

    def _calls(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream.ports[0], timeout=10)
        try:
            connection.request("GET", "/")
            return int(connection.getresponse().read())
        finally:
            connection.close()


def is_gateway(name: str) -> bool:
    return name.startswith("gateway")


def workers_of(name: str) -> int:
    return int(name.partition("_")[2] or 1)


def rows_by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.case.name: row for row in rows}
