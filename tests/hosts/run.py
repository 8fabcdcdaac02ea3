"""Runs cells beside each other: most of a cell's time is waiting, for a process to start and for a drain to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from .cells import Cell, serve
from .checks import CHECKS, Visitor
from .switchboard import switchboard

AT_ONCE = 6


def run(cell: Cell) -> None:
    """Raises whatever is not as it was promised."""
    with switchboard() as board:
        with serve(cell, board) as running:
            visitor = Visitor(cell, running, board)
            with visitor.client:
                for check in CHECKS:
                    check(visitor)
        if cell.has_lifespan:
            board.wait("stopped")
        counted = (len(board.heard("started")), len(board.heard("stopped")))
        assert counted == (1, 1 if cell.has_lifespan else 0), f"started and stopped {counted} times"


class Fleet:
    """The runs of all cells that were asked for, begun in their order."""

    def __init__(self, cells: Iterable[Cell], run: Callable[[Cell], None] = run) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, "cell")
        self._runs: dict[str, Future[None]] = {cell.name: self._pool.submit(run, cell) for cell in cells}

    def result(self, cell: Cell) -> None:
        self._runs[cell.name].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
