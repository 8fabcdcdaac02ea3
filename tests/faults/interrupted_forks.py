"""Forks that are interrupted in their hooks, wherever Python looks for signals there: both processes go on after each.

    python -m tests.faults.interrupted_forks DIRECTORY [STEP]

Every `STEP`-th place, each in one fork; Python drops what a hook raises, and forks. Prints how many places there are. Exits with 1 where a
process is stuck, and says which one and where.
"""

from __future__ import annotations

import dis
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import anyio

import starlette_aigateway
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.ledger_kit import NOON, hold_request

PACKAGE = str(Path(starlette_aigateway.__file__).parent)
LOOKS_FOR_SIGNALS = {dis.opmap[name] for name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD") if name in dis.opmap}
PATIENCE = 10.0
"""Seconds after which a process is stuck."""


class Interrupt:
    """A `KeyboardInterrupt` in the hooks of one fork, at the `at`-th place. `before` are the places in front of the fork."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.passed = 0
        self.before: int | None = None
        self.raised = False
        self._looked: dict[FrameType, bool] = {}

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if self.before is None and frame.f_code.co_name in ("_resume", "_begin"):
            self.before = self.passed
        self._look()
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            if self._looked.get(frame):
                self._look()
            self._looked[frame] = frame.f_code.co_code[frame.f_lasti] in LOOKS_FOR_SIGNALS
        return self._step

    def _look(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            self.raised = True
            raise KeyboardInterrupt

    @property
    def raised_after(self) -> bool:
        return self.raised and self.before is not None and self.at > self.before


class Stores:
    def __init__(self, directory: Path) -> None:
        self._ledger = SQLiteLedger(directory / "ledger.db")
        self._config = ConfigDatabase(directory / "config.db")
        self._cache = DiskResponseCache(directory / "cache", memory_entries=0)

    async def begin(self) -> None:
        await self._cache.put(key("a"), b"a", 60)
        await self._cache.flush()
        await self._use("first")

    async def _use(self, name: str) -> None:
        await self._ledger.reserve(hold_request(name, 1), now=NOON)
        await self._ledger._readers.run(lambda connection: connection.execute("SELECT 1").fetchone())
        self._config.read(lambda connection: connection.execute("SELECT 1").fetchone())
        assert await self._cache.get(key("a")) == b"a", "not found on disk"

    def go_on(self, name: str) -> bool:
        """In a thread of its own: a lock that this one was left with must not look free."""
        done: list[str] = []

        def use() -> None:
            anyio.run(self._use, name)
            done.append(name)

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return bool(done)


def main(directory: Path, step: int) -> int:
    stores = Stores(directory)
    anyio.run(stores.begin)
    sys.unraisablehook = lambda unraisable: None
    at = step
    while True:
        interrupt = Interrupt(at)
        sys.settrace(interrupt.enter)
        child = os.fork()
        sys.settrace(None)
        if child == 0:
            os._exit(0 if not interrupt.raised_after or stores.go_on(f"child {at}") else 1)
        if os.waitpid(child, 0)[1]:
            print(f"the child is stuck after an interrupt at {at}")
            return 1
        if not stores.go_on(f"parent {at}"):
            print(f"the parent is stuck after an interrupt at {at}")
            return 1
        if not interrupt.raised:
            print(interrupt.passed)
            return 0
        at += step


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    sys.stdout.flush()
    os._exit(status)
