"""Inserts of many rows in few statements."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Final

from .ledger_schema import ABSENT, USAGE_COLUMNS, USAGE_TEXTS, USAGE_WIDTH, Row, as_json


class Insert:
    """An insert of any number of rows in few statements, whose texts are few as well, so that SQLite keeps them prepared.

    In the columns at the places `optional`, which hold texts, `ABSENT` stands for NULL: binding None costs sqlite3 0.3 µs, in which it
    looks for an adapter in vain."""

    SIZES = (64, 32, *range(16, 0, -1))

    def __init__(self, head: str, width: int, tail: str = "", *, optional: Collection[int] = ()) -> None:
        cells = [f"nullif(?, {ABSENT})" if place in optional else "?" for place in range(width)]
        row = f"({', '.join(cells)})"
        self._texts = {size: f"{head} VALUES {','.join([row] * size)} {tail}" for size in self.SIZES}

    def __call__(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        start = 0
        while left := len(rows) - start:
            size = left if left in self._texts else next(size for size in self.SIZES if size <= left)
            connection.execute(self._texts[size], rows[start] if size == 1 else list(chain.from_iterable(rows[start : start + size])))
            start += size


def delete_holds(connection: sqlite3.Connection, ids: Sequence[str]) -> None:
    if len(ids) == 1:
        connection.execute("DELETE FROM holds WHERE id = ?", ids)
    else:
        connection.execute("DELETE FROM holds WHERE id IN (SELECT value FROM json_each(?))", (as_json(ids),))


INSERT_HOLDS: Final = Insert("INSERT OR REPLACE INTO holds (id, expires_at, expired, facts)", 4)
INSERT_ENTRIES: Final = Insert("INSERT INTO entries (hold, kind, at, amount, day, scopes, price)", 7, optional=(4, 5, 6))
INSERT_USAGE: Final = Insert(f"INSERT INTO usage ({USAGE_COLUMNS})", USAGE_WIDTH, optional=USAGE_TEXTS)
INSERT_CREDITS: Final = Insert("INSERT INTO credits (id, scope, amount, created_at, expires_at, actor, note)", 7)
INSERT_CAPS: Final = Insert("INSERT OR REPLACE INTO caps (scope, day, month, total)", 4)
CHANGE_BALANCES: Final = Insert(
    "INSERT INTO balances (scope, period, spent, held, open)",
    5,
    "ON CONFLICT (scope, period) DO UPDATE SET spent = spent + excluded.spent, held = held + excluded.held, open = open + excluded.open",
)
