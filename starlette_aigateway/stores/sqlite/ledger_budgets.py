"""The budgets of scopes, read beside the writer."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Final

from ...accounts import Budget
from ...policy.budgets import WINDOWS, day_number, periods_of
from ...types import NO_CAPS, Caps
from .ledger_credits import running_credit

BALANCES: Final = "SELECT period, spent, held FROM balances WHERE scope = ? AND period IN (?, ?, ?)"


def read_budgets(connection: sqlite3.Connection, scopes: Mapping[str, Caps | None], now: float) -> list[Budget]:
    """Day, month and total of each scope, at `now` or the ledger's latest day, whichever is later."""
    (latest,) = connection.execute("SELECT value FROM meta WHERE name = 'day'").fetchone()
    periods = periods_of(max(day_number(now), latest))
    budgets = []
    for scope, given in scopes.items():
        caps = stored_caps(connection, scope) if given is None else given
        credit = running_credit(connection, scope, now)
        figures = {period: (spent, held) for period, spent, held in connection.execute(BALANCES, (scope, *periods)).fetchall()}
        for window, period, cap in zip(WINDOWS, periods, caps, strict=True):
            spent, held = figures.get(period, (0, 0))
            extra = 0 if cap is None else credit
            budgets.append(Budget(scope=scope, window=window, period=period, cap=cap, spent=spent, held=held, credit=extra))
    return budgets


def stored_caps(connection: sqlite3.Connection, scope: str) -> Caps:
    row = connection.execute("SELECT day, month, total FROM caps WHERE scope = ?", (scope,)).fetchone()
    return NO_CAPS if row is None else Caps(*row)
