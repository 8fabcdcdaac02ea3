"""Temporary top-ups: given, taken back, read back."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from ...accounts import Credit, HoldRequest
from ...errors import InvalidArgument
from .ledger_inserts import INSERT_CREDITS
from .ledger_memory import Memory
from .ledger_schema import Row, RunningCredit, as_json

COLUMNS: Final = "id, scope, amount, created_at, expires_at, actor, note, ended_at"
ONE: Final = f"SELECT {COLUMNS} FROM credits WHERE id = ?"  # noqa: S608  # a constant
SUMS: Final = "SELECT coalesce(sum(amount), 0) FROM credits WHERE scope = ? AND ended_at IS NULL AND expires_at > ?"
END: Final = "UPDATE credits SET ended_at = ? WHERE id = ? AND ended_at IS NULL"
MAX_SUM: Final = 10**18
"""Nano-USD that running credits may add to a cap: with the largest cap it stays within 64 bits."""


def find_credit(connection: sqlite3.Connection, credit_id: str) -> Credit | None:
    row = connection.execute(ONE, (credit_id,)).fetchone()
    return None if row is None else _credit(row)


def running_credit(connection: sqlite3.Connection, scope: str, now: float) -> int:
    """Nano-USD that running credits add to each cap of `scope` at `now`."""
    (amount,) = connection.execute(SUMS, (scope, now)).fetchone()
    return int(amount)


def list_credits(connection: sqlite3.Connection, scope: str | None, limit: int, before: str | None) -> Sequence[Credit]:
    """Newest first: ids are minted in the order of time."""
    terms = [term for term, given in (("scope = ?", scope), ("id < ?", before)) if given is not None]
    where = f" WHERE {' AND '.join(terms)}" if terms else ""
    sql = f"SELECT {COLUMNS} FROM credits{where} ORDER BY id DESC LIMIT ?"  # noqa: S608  # constants, values are bound
    values = [value for value in (scope, before) if value is not None]
    return [_credit(row) for row in connection.execute(sql, (*values, limit)).fetchall()]


class CreditDesk:
    """The credits of one batch. What it decides is in its `entries` and, after `flush`, in the table."""

    def __init__(self, connection: sqlite3.Connection, memory: Memory, entries: list[Row]) -> None:
        self._connection = connection
        self._memory = memory
        self._entries = entries
        self._new: list[Credit] = []
        self._ended: list[tuple[float, str]] = []

    def lapse(self, request: HoldRequest, now: float) -> None:
        """Takes back what is over. For good: a clock that steps back finds it ended."""
        for claim in request.scopes:
            for credit in self._memory.credits.get(claim.scope, ())[:]:
                if credit.expires_at <= now:
                    self._end(credit, now)

    def add(self, credit: Credit) -> Credit:
        known = self._find(credit.id)
        if known is not None:
            return known
        waiting = sum(new.amount for new in self._new if new.scope == credit.scope)
        if running_credit(self._connection, credit.scope, credit.created_at) + waiting + credit.amount > MAX_SUM:
            raise InvalidArgument(f"the running credits of one scope are at most {MAX_SUM} nano-USD together", param="amount")
        self._new.append(credit)
        self._entries.append((credit.id, "credit", credit.created_at, credit.amount, None, as_json([credit.scope]), None))
        self._memory.run(RunningCredit(credit.id, credit.scope, credit.amount, credit.expires_at))
        return credit

    def end(self, credit_id: str, now: float) -> Credit | None:
        known = self._find(credit_id)
        if known is None or known.ended_at is not None:
            return known
        gone = next((at for at, name in self._ended if name == credit_id), None)
        if gone is None:
            gone = now
            self._end(RunningCredit(known.id, known.scope, known.amount, known.expires_at), now)
        return replace(known, ended_at=gone)

    def flush(self) -> None:
        INSERT_CREDITS(self._connection, [(c.id, c.scope, c.amount, c.created_at, c.expires_at, c.actor, c.note) for c in self._new])
        if self._ended:
            self._connection.executemany(END, self._ended)

    def _find(self, credit_id: str) -> Credit | None:
        return find_credit(self._connection, credit_id) or next((new for new in self._new if new.id == credit_id), None)

    def _end(self, credit: RunningCredit, now: float) -> None:
        self._memory.end(credit)
        self._ended.append((now, credit.id))
        self._entries.append((credit.id, "credit", now, -credit.amount, None, as_json([credit.scope]), None))


def _credit(row: Row) -> Credit:
    return Credit(id=row[0], scope=row[1], amount=row[2], created_at=row[3], expires_at=row[4], actor=row[5], note=row[6], ended_at=row[7])
