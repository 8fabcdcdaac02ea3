"""Usage reports: filters, totals, groups and one page of records, newest first.

Totals and groups are over the records and over what older ones were rolled up to. A rollup counts as at the midnight that its day begins
with: a range has a day that is rolled up if it has that midnight. So ranges that adjoin still add up. As long as a day is only rolled up in
part, its records count in the same way.
"""

from __future__ import annotations

import sqlite3
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator, Sequence
from operator import add
from typing import Any, Final, NamedTuple, TypeAlias

from ...accounts import GROUPINGS, UsageGroup, UsageQuery, UsageReport, UsageTotals
from ...errors import InvalidRequest
from ...policy.budgets import END_OF_TIME, SECONDS_PER_DAY, periods_of
from .ledger_schema import DAY_STEP, ROLLED_UP, SEQ_STEP, USAGE_COLUMNS, Prices, day_base, record_from, seq_base

MAX_PAGE = 1000
CURSOR_BYTES = 8


class Source(NamedTuple):
    """A table that totals come from: how many records a row of it stands for, and which UTC day it belongs to (days since 1970)."""

    table: str
    records: str
    day: str


RECORDS: Final = Source("usage", "count(*)", f"CAST(created_at AS INTEGER) / {SECONDS_PER_DAY}")
ROLLUPS: Final = Source("rollups", "sum(records)", f"seq / {DAY_STEP}")
TOTALS: Final = (
    "coalesce({records} FILTER (WHERE outcome NOT IN ('released', 'adjusted')), 0),"
    " coalesce({records} FILTER (WHERE outcome = 'cached'), 0),"
    " coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0)"
)
REACHED: Final = f"SELECT coalesce(max(value), 0) FROM meta WHERE name = '{ROLLED_UP}'"  # noqa: S608  # a constant
GROUP_COLUMNS: Final = {
    "day": "{day}",
    "month": "{day}",
    "model": "model",
    "provider": "provider",
    "principal": "principal",
    "tenant": "tenant",
    "key": "key_id",
    "outcome": "outcome",
}

Name: TypeAlias = "str | None"
Totals: TypeAlias = "tuple[int, ...]"
"""In the order of `TOTALS`."""

NOTHING: Final = (0,) * 5


class UsageReader:
    """One query, checked. Raises `InvalidRequest` with `param` of `cursor`, `group_by`, `limit`, `since` or `until` at construction."""

    def __init__(self, query: UsageQuery, prices: Prices) -> None:
        self._query = query
        self._prices = prices
        if not 1 <= query.limit <= MAX_PAGE:
            raise InvalidRequest(f"limit must be between 1 and {MAX_PAGE}", param="limit")
        for name, moment in (("since", query.since), ("until", query.until)):
            if moment is not None and not abs(moment) < END_OF_TIME:
                raise InvalidRequest(f"{name} must be a moment in Unix seconds", param=name)
        for name in query.group_by:
            if name not in GROUP_COLUMNS:
                raise InvalidRequest(f"group_by takes {', '.join(GROUPINGS)}", param="group_by")
        self._groups = tuple(dict.fromkeys(query.group_by))
        self._before = None if query.cursor is None else decode_cursor(query.cursor)

    def read(self, connection: sqlite3.Connection) -> UsageReport:
        (rolled_up,) = connection.execute(REACHED).fetchone()
        sums = self._sums(connection, rolled_up)
        sql, values = self.page(rolled_up)
        rows = connection.execute(sql, values).fetchall()
        page = rows[: self._query.limit]
        return UsageReport(
            totals=_totals([sum(column) for column in zip(*sums.values(), strict=True)] or NOTHING),
            groups=[
                UsageGroup(by=dict(zip(self._groups, names, strict=True)), totals=_totals(sums[names]))
                for names in sorted(sums, key=_order)
            ]
            if self._groups
            else [],
            data=[record_from(row, self._prices) for row in page],
            next_cursor=encode_cursor(page[-1][0]) if len(rows) > len(page) else None,
            rolled_up_before=float(rolled_up * SECONDS_PER_DAY) if rolled_up else None,
        )

    def page(self, rolled_up: int = 0) -> tuple[str, list[object]]:
        """The statement for one record more than the page has, and its values."""
        where, values = self._where(rolled_up, self._before)
        sql = f"SELECT {USAGE_COLUMNS} FROM usage{where} ORDER BY seq DESC LIMIT ?"  # noqa: S608  # constants, values are bound
        return sql, [*values, self._query.limit + 1]

    def totals(self, rolled_up: int = 0) -> Iterator[tuple[str, list[object]]]:
        """The statements for names and totals of the groups, or for the totals alone, and their values. `rolled_up` is the day (days since
        1970) before which there may be rollups."""
        since = self._query.since
        yield self._grouped(RECORDS, *self._where(rolled_up))
        if rolled_up and (since is None or since < rolled_up * SECONDS_PER_DAY):
            yield self._grouped(ROLLUPS, *self._where_rolled_up())

    def _grouped(self, source: Source, where: str, values: list[object]) -> tuple[str, list[object]]:
        columns = [GROUP_COLUMNS[name].format(day=source.day) for name in self._groups]
        positions = ", ".join(str(number) for number in range(1, len(columns) + 1))
        selected = ", ".join([*columns, TOTALS.format(records=source.records)])
        grouped = f" GROUP BY {positions}" if columns else ""
        return f"SELECT {selected} FROM {source.table}{where}{grouped}", values  # noqa: S608  # constants, values are bound

    def _sums(self, connection: sqlite3.Connection, rolled_up: int) -> dict[tuple[Name, ...], Totals]:
        """By the names of the groups; without groups, by no name."""
        sums: dict[tuple[Name, ...], Totals] = {}
        width = len(self._groups)
        for sql, values in self.totals(rolled_up):
            for row in connection.execute(sql, values):
                names = tuple(map(_named, self._groups, row))
                sums[names] = tuple(map(add, sums.get(names, NOTHING), row[width:]))
        return sums

    def _where(self, rolled_up: int, before: int | None = None) -> tuple[str, list[object]]:
        """The `WHERE` of all filters over records; `before` is the row number that a page ends at."""
        terms, values = self._equal()
        since, until = (_counting_from(moment, rolled_up) for moment in (self._query.since, self._query.until))
        if since is not None:
            terms += ["seq >= ?", "created_at >= ?"]
            values += [seq_base(since), since]
        if until is not None:
            terms += ["seq < ?", "created_at < ?"]
            values += [seq_base(until) + SEQ_STEP, until]
        if before is not None:
            terms.append("seq < ?")
            values.append(before)
        return _clause(terms), values

    def _where_rolled_up(self) -> tuple[str, list[object]]:
        terms, values = self._equal()
        for comparison, moment in (("seq >= ?", self._query.since), ("seq < ?", self._query.until)):
            if moment is not None:
                terms.append(comparison)
                values.append(day_base(_next_midnight(moment)))
        return _clause(terms), values

    def _equal(self) -> tuple[list[str], list[object]]:
        query = self._query
        asked = (("principal", query.principal), ("tenant", query.tenant), ("key_id", query.key_id), ("model", query.model))
        given = [(column, value) for column, value in asked if value is not None]
        return [f"{column} = ?" for column, _ in given], [value for _, value in given]


def _clause(terms: Sequence[str]) -> str:
    return f" WHERE {' AND '.join(terms)}" if terms else ""


def _next_midnight(moment: float) -> int:
    """The first day (days since 1970) that begins at `moment` or later."""
    return -int(-moment // SECONDS_PER_DAY)


def _counting_from(moment: float | None, rolled_up: int) -> float | None:
    """What `moment` means where days before `rolled_up` count as a whole."""
    if moment is None or moment >= rolled_up * SECONDS_PER_DAY:
        return moment
    return float(_next_midnight(moment) * SECONDS_PER_DAY)


def _named(group: str, value: Any) -> Name:
    if group == "day":
        return periods_of(value).day
    if group == "month":
        return periods_of(value).month
    return None if value is None else str(value)


def _order(names: tuple[Name, ...]) -> list[tuple[bool, str]]:
    """As SQLite orders them: no name before any."""
    return [(name is not None, name or "") for name in names]


def _totals(row: Sequence[int]) -> UsageTotals:
    calls, cached_calls, input_tokens, output_tokens, cost = row
    return UsageTotals(calls=calls, cached_calls=cached_calls, input_tokens=input_tokens, output_tokens=output_tokens, cost=cost)


def encode_cursor(seq: int) -> str:
    return urlsafe_b64encode(seq.to_bytes(CURSOR_BYTES, signed=True)).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    try:
        raw = urlsafe_b64decode(cursor.encode("ascii") + b"=")
    except (Base64Error, UnicodeEncodeError):
        raw = b""
    if len(raw) != CURSOR_BYTES:
        raise InvalidRequest("cursor is not one that an earlier page gave", param="cursor")
    return int.from_bytes(raw, signed=True)
