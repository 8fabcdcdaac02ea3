"""Which core is whose: the server under load has one for itself, and the load and the upstream have another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Cores(NamedTuple):
    """None is wherever the system puts it. `told` says why, if the server shares its core."""

    server: set[int] | None
    load: set[int] | None
    every: set[int] | None
    told: str


def choose() -> Cores:
    if sys.platform != "linux":
        return Cores(None, None, None, "processes cannot be pinned to cores on this system: server, upstream and load may share one")
    usable = os.sched_getaffinity(0)
    server = min(usable)
    others = usable - _siblings(server) or usable - {server}
    if not others:
        return Cores(None, None, None, "there is one core: server, upstream and load share it")
    return Cores({server}, others, usable, "")


def _siblings(core: int) -> set[int]:
    """The hardware threads of one core take from each other."""
    try:
        listed = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return {core}
    found = {core}
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


@contextmanager
def on(cores: set[int] | None) -> Iterator[None]:
    """What is started in the block runs on `cores`: a process has its parent's from its first moment on."""
    if sys.platform != "linux" or cores is None:
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
