"""The second half of the audit: every booking has its usage record, and none is below what the provider reported."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Final

from ...accounts import Finding, UsageRecord
from ...policy.pricing import cost
from .ledger_schema import USAGE_COLUMNS, Prices, record_from

UNMATCHED: Final = """
SELECT hold, kind, amount, usage.cost FROM entries
LEFT JOIN usage ON usage.id = CASE kind WHEN 'adjust' THEN hold || '.adjust' ELSE hold END
WHERE kind IN ('settle', 'release', 'expire', 'adjust') AND (
  usage.id IS NULL OR usage.cost <> amount
  OR CASE kind
     WHEN 'release' THEN outcome <> 'released'
     WHEN 'expire' THEN outcome <> 'expired'
     WHEN 'adjust' THEN outcome <> 'adjusted'
     ELSE outcome IN ('released', 'expired', 'adjusted', 'cached') END)
"""
OTHER_PRICE: Final = """
SELECT hold, entries.price, usage.price FROM entries JOIN usage ON usage.id = hold
WHERE kind = 'hold' AND entries.price IS NOT NULL AND entries.price IS NOT usage.price
"""
BOOKED: Final = """
SELECT coalesce(sum(CASE kind WHEN 'carry' THEN CAST(scopes AS INTEGER) ELSE 1 END), 0), coalesce(sum(amount), 0) FROM entries
WHERE kind IN ('settle', 'release', 'expire', 'adjust') OR (kind = 'carry' AND hold = '')
"""
RECORDED: Final = "SELECT count(*), coalesce(sum(cost), 0) FROM usage WHERE outcome <> 'cached'"
COSTLY_HITS: Final = "SELECT id, cost FROM usage WHERE outcome = 'cached' AND cost <> 0"
BILLED: Final = f"SELECT {USAGE_COLUMNS} FROM usage WHERE outcome IN ('completed', 'overrun', 'estimated', 'ambiguous')"  # noqa: S608  # a constant
REPORTED_EVERY = 1000


def check_records(connection: sqlite3.Connection, progress: Callable[[int], None] | None = None) -> Iterator[Finding]:
    for hold_id, kind, amount, recorded in connection.execute(UNMATCHED):
        found = "there is no record of it" if recorded is None else f"its record does not match: cost {recorded}"
        yield Finding("I2", hold_id, f"a {kind} booked {amount}; {found}")
    for hold_id, held_at, settled_at in connection.execute(OTHER_PRICE):
        yield Finding("I2", hold_id, f"held at the price {held_at}, settled at {settled_at}")
    booked, recorded = connection.execute(BOOKED).fetchone(), connection.execute(RECORDED).fetchone()
    if booked != recorded:
        yield Finding(
            "I2", "usage", f"{recorded[0]} records sum up to {recorded[1]}, {booked[0]} resolutions in the entries to {booked[1]}"
        )
    for record_id, amount in connection.execute(COSTLY_HITS):
        yield Finding("I2", record_id, f"a cached answer cost {amount}")
    prices = Prices()
    for number, row in enumerate(connection.execute(BILLED), 1):
        yield from _billed(record_from(row, prices), held=row[-1])
        if progress is not None and number % REPORTED_EVERY == 0:
            progress(number)


def _billed(record: UsageRecord, *, held: int) -> Iterator[Finding]:
    """At least what the provider reported was booked; of what is not known, at least what was held for it or estimated."""
    used = cost(record.usage, record.price)
    least = {"completed": used, "overrun": used, "estimated": min(used, held), "ambiguous": held}[record.outcome]
    if record.cost < least:
        yield Finding("I4", record.id, f"{record.outcome} at {record.cost}, below the {least} that it comes to")
