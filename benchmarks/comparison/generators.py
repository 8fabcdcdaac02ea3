"""What makes the load: wrk, or the loop of `load.py` in a process of its own."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from . import cores
from .load import PATIENCE, Load, Plan, first_number
from .servers import environment

SCRIPT = Path(__file__).with_name("wrk.lua")
SLACK = PATIENCE + 10.0
"""Seconds after its own end at which a generator is stopped."""

APART = 10**8
"""Between the first numbers of two generators at work at once: more than either sends."""


class LoadFailed(Exception):
    """A generator ended without figures; says what it wrote."""


class Generator(Protocol):
    name: str

    def run(self, plan: Plan, where: set[int] | None) -> Load: ...


class Command(NamedTuple):
    arguments: Sequence[str]
    env: dict[str, str]
    given: bytes = b""


class Wrk:
    """One wrk for each port, at the same time."""

    name = "wrk"

    def run(self, plan: Plan, where: set[int] | None) -> Load:
        before = children_cpu()
        outputs = carried_out([self._command(plan, place) for place in range(len(plan.ports))], plan.seconds, where)
        return together([self._load(output) for output in outputs], children_cpu() - before)

    def _command(self, plan: Plan, place: int) -> Command:
        least, more = divmod(plan.connections, len(plan.ports))
        options = ["--threads", "1", "--connections", str(max(1, least + (place < more))), "--duration", f"{math.ceil(plan.seconds)}s"]
        url = f"http://127.0.0.1:{plan.ports[place]}{plan.path}"
        env = {
            **os.environ,
            "LOAD_BODY": plan.body,
            "LOAD_HEADERS": "\n".join(f"{name}: {value}" for name, value in plan.headers.items()),
            "LOAD_FIRST": str(first_number() + place * APART) if plan.unique else "",
        }
        return Command(["wrk", *options, "--timeout", f"{PATIENCE:.0f}s", "--script", str(SCRIPT), url], env)

    def _load(self, output: bytes) -> Load:
        figures = [line for line in output.decode(errors="replace").splitlines() if line.startswith("{")]
        if not figures:
            raise LoadFailed(f"wrk told no figures: {output.decode(errors='replace')[-500:]}")
        return msgspec.convert({**json.loads(figures[-1]), "cpu": 0.0}, Load)


class Loop:
    name = "the load loop in Python"

    def run(self, plan: Plan, where: set[int] | None) -> Load:
        command = Command([sys.executable, "-m", "comparison.load"], environment({}), msgspec.json.encode(plan))
        (output,) = carried_out([command], plan.seconds, where)
        return msgspec.json.decode(output, type=Load)


def choose(use_wrk: bool) -> Generator:
    return Wrk() if use_wrk and shutil.which("wrk") else Loop()


def together(loads: Sequence[Load], cpu: float) -> Load:
    """The sum; the latencies are those of the slowest."""
    p50, p95, p99, seconds = (max(getattr(load, name) for load in loads) for name in ("p50", "p95", "p99", "seconds"))
    requests, refused, broken = (sum(getattr(load, name) for load in loads) for name in ("requests", "refused", "broken"))
    return Load(requests, seconds, p50, p95, p99, refused, broken, cpu)


def carried_out(commands: Sequence[Command], seconds: float, where: set[int] | None) -> list[bytes]:
    """What `commands` write, at work at the same time; none of them is left."""
    running: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + seconds + SLACK
    pipe = subprocess.PIPE
    try:
        with cores.on(where):
            running.extend(subprocess.Popen(one.arguments, stdin=pipe, stdout=pipe, stderr=pipe, env=one.env) for one in commands)
        outputs = []
        for process, command in zip(running, commands, strict=True):
            output, complaints = process.communicate(command.given, timeout=deadline - time.monotonic())
            if process.returncode != 0:
                raise LoadFailed(f"{command.arguments[0]} failed: {complaints.decode(errors='replace')[-500:]}")
            outputs.append(output)
        return outputs
    except subprocess.TimeoutExpired as late:
        raise LoadFailed(f"the load did not end within {late.timeout:.0f} seconds") from None
    finally:
        for process in running:
            process.kill()
            process.wait()


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
