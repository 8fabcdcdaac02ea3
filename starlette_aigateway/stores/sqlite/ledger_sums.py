"""Totals and groups of usage: over the records and over what older ones were rolled up to.

A rollup counts as at the midnight that its day begins with: a range has a day that is rolled up if it has that midnight. So ranges that
adjoin still add up. As long as a day is only rolled up in part, its records count in the same way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from operator import add
from typing import Final, NamedTuple, TypeAlias

from ...accounts import GROUPINGS, UsageQuery
from ...policy.budgets import SECONDS_PER_DAY, periods_of
from .ledger_schema import DAY_STEP, SEQ_STEP, day_base, seq_base

Name: TypeAlias = "str | None"
Names: TypeAlias = tuple[Name, ...]
Totals: TypeAlias = "tuple[int, ...]"
"""Calls, cached calls, input tokens, output tokens, cost."""

NOTHING: Final = (0,) * 5
WIDTH: Final = len(NOTHING)
TOTALS: Final = (
    "coalesce({records} FILTER (WHERE outcome NOT IN ('released', 'adjusted')), 0),"
    " coalesce({records} FILTER (WHERE outcome = 'cached'), 0),"
    " coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0)"
)
ENDS: Final = "SELECT (SELECT min(seq) FROM {table}), (SELECT max(seq) FROM {table})"
PERIODS: Final = ("day", "month")
COLUMNS: Final = {name: "key_id" if name == "key" else name for name in GROUPINGS if name not in PERIODS}
MS_PER_DAY: Final = SECONDS_PER_DAY * 1000


class Source(NamedTuple):
    """A table with sums: what counts the records in it, and the row numbers of a UTC day (days since 1970)."""

    table: str
    records: str
    begin: Callable[[int], int]
    day: Callable[[int], int]


RECORDS: Final = Source("usage", "count(*)", lambda day: day * MS_PER_DAY * SEQ_STEP, lambda seq: seq // SEQ_STEP // MS_PER_DAY)
ROLLUPS: Final = Source("rollups", "sum(records)", day_base, lambda seq: seq // DAY_STEP)


class Filters:
    """What a query asks for, where days before `rolled_up` (days since 1970) count as a whole."""

    def __init__(self, query: UsageQuery, rolled_up: int) -> None:
        asked = (("principal", query.principal), ("tenant", query.tenant), ("key_id", query.key_id), ("model", query.model))
        self._equal = [(f"{column} = ?", value) for column, value in asked if value is not None]
        self._since, self._until = (_meant(moment, rolled_up) for moment in (query.since, query.until))

    def terms(self, source: Source) -> list[tuple[str, object]]:
        """Conditions of a `WHERE`, and the value of each; but for the row numbers."""
        terms: list[tuple[str, object]] = [*self._equal]
        if source is RECORDS and self._since is not None:
            terms.append(("created_at >= ?", self._since))
        if source is RECORDS and self._until is not None:
            terms.append(("created_at < ?", self._until))
        return terms

    def rows(self, source: Source) -> tuple[int | None, int | None]:
        """The first row number, and the one that is behind the last."""
        if source is ROLLUPS:
            low, high = (None if moment is None else day_base(_next_midnight(moment)) for moment in (self._since, self._until))
            return low, high
        return (
            None if self._since is None else seq_base(self._since),
            None if self._until is None else seq_base(self._until) + SEQ_STEP,
        )


def _next_midnight(moment: float) -> int:
    """The first day (days since 1970) that begins at `moment` or later."""
    return -int(-moment // SECONDS_PER_DAY)


def _meant(moment: float | None, rolled_up: int) -> float | None:
    if moment is None or moment >= rolled_up * SECONDS_PER_DAY:
        return moment
    return float(_next_midnight(moment) * SECONDS_PER_DAY)


def read_sums(connection: sqlite3.Connection, query: UsageQuery, groups: Sequence[str], rolled_up: int) -> dict[Names, Totals]:
    """By the names of the groups, each as in `groups`; without groups, by no name."""
    sums: dict[Names, Totals] = {}
    filters = Filters(query, rolled_up)
    periods, columns = [name for name in groups if name in PERIODS], [name for name in groups if name in COLUMNS]
    for source in (RECORDS, ROLLUPS) if rolled_up else (RECORDS,):
        terms = filters.terms(source)
        sql, values = _statement(source, [term for term, _ in terms], columns), [value for _, value in terms]
        for day, low, high in _parts(connection, source, filters, whole=not groups):
            named = periods_of(day)._asdict()
            when = tuple([named[period] for period in periods])
            for row in connection.execute(sql, (*values, low, high)):
                names = when + row[WIDTH:]
                before = sums.get(names)
                sums[names] = row[:WIDTH] if before is None else tuple(map(add, before, row))
    places = [[*periods, *columns].index(name) for name in groups]
    return {tuple([names[place] for place in places]): totals for names, totals in sums.items()}


def _statement(source: Source, terms: Sequence[str], columns: Sequence[str]) -> str:
    """The plus keeps SQLite from walking all of an index, so as to need no sorting of the few rows that are asked for."""
    totals = TOTALS.format(records=source.records)
    selected = "".join(f", +{COLUMNS[name]}" for name in columns)
    where = " AND ".join([*terms, "seq >= ? AND seq < ?"])
    grouped = ", ".join(str(WIDTH + place) for place in range(1, len(columns) + 1))
    grouping = f" GROUP BY {grouped}" if columns else " HAVING count(*) > 0"
    return f"SELECT {totals}{selected} FROM {source.table} WHERE {where}{grouping}"  # noqa: S608  # constants, values are bound


def _parts(connection: sqlite3.Connection, source: Source, filters: Filters, *, whole: bool) -> Iterator[tuple[int, int, int]]:
    """A day, the first of its row numbers that is asked for, and the one behind the last; or `whole`, with any day. Day by day there is
    little to sort at a time, and which day and month a row belongs to is known."""
    first, last = connection.execute(ENDS.format(table=source.table)).fetchone()
    if first is None:
        return
    since, until = filters.rows(source)
    low = first if since is None else max(first, since)
    high = last + 1 if until is None else min(last + 1, until)
    while low < high:
        day = source.day(low)
        end = high if whole else min(high, source.begin(day + 1))
        yield day, low, end
        low = end
