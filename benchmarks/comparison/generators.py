"""What makes the load: wrk, or the loop of `load.py` in a process of its own."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import msgspec

from . import cores
from .load import PATIENCE, Load, Plan, first_number
from .servers import environment

SCRIPT = Path(__file__).with_name("wrk.lua")
SLACK = PATIENCE + 10.0
"""Seconds after its own end at which a generator is stopped."""


class LoadFailed(Exception):
    """A generator ended without figures; says what it wrote."""


class Generator(Protocol):
    name: str

    def run(self, plan: Plan, where: set[int] | None) -> Load: ...


class Wrk:
    name = "wrk"

    def run(self, plan: Plan, where: set[int] | None) -> Load:
        env = {
            **os.environ,
            "LOAD_BODY": plan.body,
            "LOAD_HEADERS": "\n".join(f"{name}: {value}" for name, value in plan.headers.items()),
            "LOAD_FIRST": str(first_number()) if plan.unique else "",
        }
        options = ["--threads", "1", "--connections", str(plan.connections), "--duration", f"{math.ceil(plan.seconds)}s"]
        url = f"http://127.0.0.1:{plan.port}{plan.path}"
        command = ["wrk", *options, "--timeout", f"{PATIENCE:.0f}s", "--script", str(SCRIPT), url]
        output, cpu = measured(command, b"", env, plan.seconds, where)
        figures = [line for line in output.decode().splitlines() if line.startswith("{")]
        if not figures:
            raise LoadFailed(f"wrk told no figures: {output.decode(errors='replace')[-500:]}")
        return msgspec.convert({**json.loads(figures[-1]), "cpu": cpu}, Load)


class Loop:
    name = "the load loop in Python"

    def run(self, plan: Plan, where: set[int] | None) -> Load:
        command = [sys.executable, "-m", "comparison.load"]
        output, _ = measured(command, msgspec.json.encode(plan), environment({}), plan.seconds, where)
        return msgspec.json.decode(output, type=Load)


def choose(use_wrk: bool) -> Generator:
    return Wrk() if use_wrk and shutil.which("wrk") else Loop()


def measured(command: list[str], given: bytes, env: dict[str, str], seconds: float, where: set[int] | None) -> tuple[bytes, float]:
    """What `command` writes, and the seconds of CPU that it used."""
    before = children_cpu()
    with cores.on(where):
        done = subprocess.run(command, check=False, input=given, capture_output=True, env=env, timeout=seconds + SLACK)
    if done.returncode != 0:
        raise LoadFailed(f"{command[0]} failed: {done.stderr.decode(errors='replace')[-500:]}")
    return done.stdout, children_cpu() - before


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
