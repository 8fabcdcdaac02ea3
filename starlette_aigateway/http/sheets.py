"""Usage as CSV, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from ..accounts import UsageReport
from . import shapes

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")
NUMBERS = frozenset({"attempt", *shapes.TOKEN_FIELDS, "cost_usd", "latency_ms"})
"""Columns that are numbers of our own: an adjustment may be negative, and stays a number."""


def groups(report: UsageReport, group_by: Sequence[str]) -> str:
    """A header line, and a row for each group."""
    rows: list[Sequence[Any]] = [(*group_by, *shapes.TOTALS_FIELDS)]
    for group in report.groups:
        totals = shapes.totals(group.totals)
        rows.append((*(_cell(group.by[name]) for name in group_by), *(totals[name] for name in shapes.TOTALS_FIELDS)))
    return lines(rows)


def records(report: UsageReport) -> str:
    """A row for each record of the page, in the order of `shapes.RECORD_FIELDS`; no header line."""
    return lines(_flat(shapes.record(record)) for record in report.data)


def _flat(record: Mapping[str, Any]) -> list[Any]:
    return [record[name] if name in NUMBERS else _cell(record[name]) for name in shapes.RECORD_FIELDS]


def _cell(value: Any) -> str | None:
    """Text that a spreadsheet takes for text: what begins like a formula gets an apostrophe
    (https://owasp.org/www-community/attacks/CSV_Injection)."""
    if value is None:
        return None
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return f"'{text}" if text.lstrip().startswith(FORMULA) or text.startswith(FORMULA) else text


def lines(rows: Iterable[Sequence[Any]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue()
