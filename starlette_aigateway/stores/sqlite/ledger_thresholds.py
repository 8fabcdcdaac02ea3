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
        self._looked_at: dict[tuple[int, Periods], tuple[tuple[str, ...], tuple[Caps, ...]]] = {}
        self._seen: dict[tuple[str, Periods, Caps], None] = {}
        self._caps: dict[tuple[str, str], tuple[Window, int]] = {}

    def add(self, scopes: tuple[str, ...], periods: Periods, caps: tuple[Caps, ...] | None) -> None:
        """The same tuple of caps, which holds of the same claims share, is looked at once."""
        if caps is not None:
            key = id(caps), periods
            self._looked_at.pop(key, None)  # what was seen last stands last
            self._looked_at[key] = scopes, caps

    def reached(self, connection: sqlite3.Connection, books: Books) -> list[BudgetReached]:
        """Those that nobody was told before; they are told by this. Figures that the batch has not read are read now."""
        self._see()
        if not self._thresholds or not self._may_be_reached(books):
            return []
        self._caps = {
            (scope, period): (window, cap)
            for scope, periods, caps in self._seen
            for window, period, cap in zip(WINDOWS, periods, caps, strict=True)
            if cap is not None
        }
        return self._found(connection, books)

    def _see(self) -> None:
        for (_, periods), (scopes, all_caps) in self._looked_at.items():
            for scope, caps in zip(scopes, all_caps, strict=True):
                if caps is not NO_CAPS:
                    seen = scope, periods, caps
                    self._seen.pop(seen, None)
                    self._seen[seen] = None

    def _may_be_reached(self, books: Books) -> bool:
        """Whether any is at the lowest threshold, told or not, or is not known."""
        lowest = self._thresholds[0]
        for scope, periods, caps in self._seen:
            for period, cap in zip(periods, caps, strict=True):
                if cap is not None:
                    balance = books.balances.get((scope, period))
                    if balance is None or balance.spent * 100 >= lowest * cap:
                        return True
        return False

    def _found(self, connection: sqlite3.Connection, books: Books) -> list[BudgetReached]:
        found: list[BudgetReached] = []
        unknown = []
        for pair in self._caps:
            balance = books.balances.get(pair)
            if balance is not None:
                found += (reached := self._of(connection, *pair, balance.spent, balance.told))
                balance.told = max([balance.told, *(one.threshold for one in reached)])
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
