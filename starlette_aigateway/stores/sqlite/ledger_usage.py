"""Usage reports: filters, totals, groups and one page of records, newest first."""

from __future__ import annotations

import sqlite3
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from typing import Final

from ...accounts import GROUPINGS, UsageGroup, UsageQuery, UsageReport, UsageTotals
from ...errors import InvalidRequest
from ...policy.budgets import END_OF_TIME
from .ledger_schema import SEQ_STEP, USAGE_COLUMNS, Prices, record_from, seq_base

MAX_PAGE = 1000
CURSOR_BYTES = 8

TOTALS: Final = (
    "count(*) FILTER (WHERE outcome NOT IN ('released', 'adjusted')), count(*) FILTER (WHERE outcome = 'cached'),"
    " coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0)"
)
GROUP_COLUMNS: Final = {
    "day": "strftime('%Y-%m-%d', created_at, 'unixepoch')",
    "month": "strftime('%Y-%m', created_at, 'unixepoch')",
    "model": "model",
    "provider": "provider",
    "principal": "principal",
    "tenant": "tenant",
    "key": "key_id",
    "outcome": "outcome",
}


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
        where, values = self.conditions()
        totals = connection.execute(f"SELECT {TOTALS} FROM usage{where}", values).fetchone()  # noqa: S608  # constants, values are bound
        sql, page_values = self.page()
        rows = connection.execute(sql, page_values).fetchall()
        page = rows[: self._query.limit]
        return UsageReport(
            totals=_totals(totals),
            groups=self._read_groups(connection, where, values),
            data=[record_from(row, self._prices) for row in page],
            next_cursor=encode_cursor(page[-1][0]) if len(rows) > len(page) else None,
        )

    def conditions(self, before: int | None = None) -> tuple[str, list[object]]:
        """The `WHERE` of all filters; `before` is the row number that a page ends at."""
        query = self._query
        terms: list[str] = []
        values: list[object] = []
        equal = (("principal", query.principal), ("tenant", query.tenant), ("key_id", query.key_id), ("model", query.model))
        for column, value in equal:
            if value is not None:
                terms.append(f"{column} = ?")
                values.append(value)
        if query.since is not None:
            terms += ["seq >= ?", "created_at >= ?"]
            values += [seq_base(query.since), query.since]
        if query.until is not None:
            terms += ["seq < ?", "created_at < ?"]
            values += [seq_base(query.until) + SEQ_STEP, query.until]
        if before is not None:
            terms.append("seq < ?")
            values.append(before)
        return (" WHERE " + " AND ".join(terms) if terms else ""), values

    def page(self) -> tuple[str, list[object]]:
        where, values = self.conditions(self._before)
        sql = f"SELECT {USAGE_COLUMNS} FROM usage{where} ORDER BY seq DESC LIMIT ?"  # noqa: S608  # constants, values are bound
        return sql, [*values, self._query.limit + 1]

    def _read_groups(self, connection: sqlite3.Connection, where: str, values: list[object]) -> list[UsageGroup]:
        if not self._groups:
            return []
        columns = ", ".join(GROUP_COLUMNS[name] for name in self._groups)
        positions = ", ".join(str(number) for number in range(1, len(self._groups) + 1))
        sql = f"SELECT {columns}, {TOTALS} FROM usage{where} GROUP BY {positions} ORDER BY {positions}"  # noqa: S608  # as above
        width = len(self._groups)
        return [
            UsageGroup(by=dict(zip(self._groups, row[:width], strict=True)), totals=_totals(row[width:]))
            for row in connection.execute(sql, values).fetchall()
        ]


def _totals(row: tuple[int, ...]) -> UsageTotals:
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
