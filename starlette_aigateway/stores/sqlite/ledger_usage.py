"""Usage reports: filters, totals, groups and one page of records, newest first."""

from __future__ import annotations

import sqlite3
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Sequence
from typing import Final

from ...accounts import GROUPINGS, UsageGroup, UsageQuery, UsageReport, UsageTotals
from ...errors import InvalidRequest
from ...policy.budgets import END_OF_TIME, SECONDS_PER_DAY
from .ledger_schema import ROLLED_UP, USAGE_COLUMNS, Prices, record_from
from .ledger_sums import NOTHING, RECORDS, Filters, Names, read_sums

MAX_PAGE = 1000
CURSOR_BYTES = 8
REACHED: Final = f"SELECT coalesce(max(value), 0) FROM meta WHERE name = '{ROLLED_UP}'"  # noqa: S608  # a constant


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
            if name not in GROUPINGS:
                raise InvalidRequest(f"group_by takes {', '.join(GROUPINGS)}", param="group_by")
        self._groups = tuple(dict.fromkeys(query.group_by))
        self._before = None if query.cursor is None else decode_cursor(query.cursor)

    def read(self, connection: sqlite3.Connection) -> UsageReport:
        (rolled_up,) = connection.execute(REACHED).fetchone()
        sums = read_sums(connection, self._query, self._groups, rolled_up) if self._query.totals else {}
        sql, values = self.page(rolled_up)
        rows = connection.execute(sql, values).fetchall()
        page = rows[: self._query.limit]
        return UsageReport(
            totals=_totals([sum(column) for column in zip(*sums.values(), strict=True)] or NOTHING),
            groups=[
                UsageGroup(by=dict(zip(self._groups, names, strict=True)), totals=_totals(sums[names]))
                for names in (sorted(sums, key=_order) if self._groups else ())
            ],
            data=[record_from(row, self._prices) for row in page],
            next_cursor=encode_cursor(page[-1][0]) if len(rows) > len(page) else None,
            rolled_up_before=float(rolled_up * SECONDS_PER_DAY) if rolled_up else None,
        )

    def page(self, rolled_up: int = 0) -> tuple[str, list[object]]:
        """The statement for one record more than the page has, and its values. Days before `rolled_up` count as a whole."""
        filters = Filters(self._query, rolled_up)
        terms = filters.terms(RECORDS)
        low, high = filters.rows(RECORDS)
        for term, row in (("seq >= ?", low), ("seq < ?", high), ("seq < ?", self._before)):
            if row is not None:
                terms.append((term, row))
        where = f" WHERE {' AND '.join(term for term, _ in terms)}" if terms else ""
        sql = f"SELECT {USAGE_COLUMNS} FROM usage{where} ORDER BY seq DESC LIMIT ?"  # noqa: S608  # constants, values are bound
        return sql, [*(value for _, value in terms), self._query.limit + 1]


def _order(names: Names) -> list[tuple[bool, str]]:
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
