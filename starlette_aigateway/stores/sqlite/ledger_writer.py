"""Applies the batches of the ledger, and hands on to each what is known from those before."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from ...accounts import Hold
from ...errors import AIGatewayError
from .ledger_batch import Batch
from .ledger_memory import Memory
from .ledger_ops import Op, Reserve, Result, Told
from .ledger_schema import Prices


class BatchWriter:
    """Applies batches. What one has read and changed is known to the next, once `committed` was called after it and while nobody else
    commits. `thresholds` are the percents of a cap that are told."""

    def __init__(self, prices: Prices, thresholds: Sequence[int] = ()) -> None:
        self._prices = prices
        self._thresholds = thresholds
        self._day = 0
        self._known: Known | None = None
        self._applied: Known | None = None

    def apply(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | AIGatewayError]:
        known, self._known, self._applied = self._known, None, None
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        memory = known.memory if known is not None and known[:2] == (connection, version) else Memory(self._day)
        batch = Batch(connection, ops, self._prices, memory, self._thresholds)
        batch.load()
        outcomes = [batch.decide(op) for op in ops]
        batch.flush()
        reached = batch.reached()
        self._day = memory.day
        if batch.lasting and not memory.full:
            self._applied = Known(connection, version, memory)
        if reached:
            return [*outcomes[:-1], Told(outcomes[-1], reached)]
        return outcomes

    def committed(self) -> None:
        """What was applied last is in the file."""
        self._known = self._applied

    def probe(self, connection: sqlite3.Connection, op: Reserve) -> Hold:
        """What `op` would be granted in a batch of its own; nothing is written. For any thread."""
        batch = Batch(connection, [op], self._prices, Memory())
        batch.load()
        outcome = batch.decide(op)
        if isinstance(outcome, AIGatewayError):
            raise outcome
        assert isinstance(outcome, Hold)
        return outcome


class Known(NamedTuple):
    """A memory, and the connection and its version of the file that it is true for."""

    connection: sqlite3.Connection
    version: int
    memory: Memory
