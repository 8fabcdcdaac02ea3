"""Temporary top-ups, read back."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from ...accounts import Credit
from .ledger_schema import Row

COLUMNS: Final = "id, scope, amount, created_at, expires_at, actor, note, ended_at"
ONE: Final = f"SELECT {COLUMNS} FROM credits WHERE id = ?"  # noqa: S608  # a constant
SUMS: Final = "SELECT coalesce(sum(amount), 0) FROM credits WHERE scope = ? AND ended_at IS NULL AND expires_at > ?"
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


def _credit(row: Row) -> Credit:
    return Credit(id=row[0], scope=row[1], amount=row[2], created_at=row[3], expires_at=row[4], actor=row[5], note=row[6], ended_at=row[7])
