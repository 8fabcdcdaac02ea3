"""Which thresholds of a cap a batch has reached."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import msgspec

from ...accounts import Window
from ...events import BudgetReached
from ...policy.budgets import WINDOWS, Books, Periods, thresholds_reached
from ...types import NO_CAPS, Caps
from .ledger_schema import as_json

FIGURES: Final = """
SELECT json_group_array(json_array(scope, period, spent, told)) FROM json_each(?) AS pair CROSS JOIN balances
ON scope = json_extract(pair.value, '$[0]') AND period = json_extract(pair.value, '$[1]')
"""
TELL: Final = "UPDATE balances SET told = ? WHERE scope = ? AND period = ?"

decode_figures = msgspec.json.Decoder(list[tuple[str, str, int, int]]).decode


class Watch:
    """The capped budgets that a batch has looked at or changed, each under the last cap that it was seen with: that of the hold which was
    asked for, settled or expired. `thresholds` are percents, ascending."""

    def __init__(self, thresholds: Sequence[int]) -> None:
        self._thresholds = thresholds
        self._caps: dict[tuple[str, str], tuple[Window, int]] = {}

    def add(self, scope: str, periods: Periods, caps: Caps) -> None:
        if caps is NO_CAPS:
            return
        for window, period, cap in zip(WINDOWS, periods, caps, strict=True):
            if cap is not None:
                self._caps[scope, period] = window, cap

    def reached(self, connection: sqlite3.Connection, books: Books) -> list[BudgetReached]:
        """Those that nobody was told before; they are told by this. Figures that the batch has not read are read now."""
        if not self._thresholds or not self._caps:
            return []
        found: list[BudgetReached] = []
        unknown = []
        for pair in self._caps:
            balance = books.balances.get(pair)
            if balance is not None and balance.known:
                found += self._of(connection, *pair, balance.spent, balance.told)
            else:
                unknown.append(pair)
        if unknown:
            (figures,) = connection.execute(FIGURES, (as_json(unknown),)).fetchone()
            for row in decode_figures(figures):
                found += self._of(connection, *row)
        return found

    def _of(self, connection: sqlite3.Connection, scope: str, period: str, spent: int, told: int) -> list[BudgetReached]:
        window, cap = self._caps[scope, period]
        thresholds = thresholds_reached(spent, cap, self._thresholds, told)
        if not thresholds:
            return []
        connection.execute(TELL, (thresholds[-1], scope, period))
        return [
            BudgetReached(scope=scope, window=window, period=period, threshold=threshold, cap=cap, spent=spent) for threshold in thresholds
        ]
