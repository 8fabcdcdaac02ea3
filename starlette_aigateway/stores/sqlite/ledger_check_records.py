"""The second half of the audit: every booking has its usage record, and none is below what the provider reported."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Final, get_args

import msgspec

from ...accounts import Finding, Outcome, UsageRecord
from ...errors import AIGatewayError
from ...policy.pricing import cost
from .ledger_schema import ADJUSTED, USAGE_COLUMNS, Prices, record_from

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
OTHER_PAYER: Final = """
SELECT late.id, late.principal, late.tenant, usage.principal, usage.tenant
FROM usage AS late JOIN usage ON usage.id = substr(late.id, 1, length(late.id) - length(?))
WHERE late.outcome = 'adjusted' AND (late.principal <> usage.principal OR late.tenant IS NOT usage.tenant)
"""
BOOKED: Final = """
SELECT coalesce(sum(CASE kind WHEN 'carry' THEN CAST(scopes AS INTEGER) ELSE 1 END), 0), coalesce(sum(amount), 0) FROM entries
WHERE kind IN ('settle', 'release', 'expire', 'adjust') OR (kind = 'carry' AND hold = '')
"""
RECORDED: Final = """
SELECT coalesce(sum(records), 0), coalesce(sum(cost), 0) FROM (
  SELECT count(*) AS records, sum(cost) AS cost FROM usage WHERE outcome <> 'cached'
  UNION ALL SELECT sum(records), sum(cost) FROM rollups WHERE outcome <> 'cached')
"""
COSTLY_HITS: Final = "SELECT id, cost FROM usage WHERE outcome = 'cached' AND cost <> 0"
BILLED: Final = f"SELECT {USAGE_COLUMNS} FROM usage WHERE outcome IN ('completed', 'overrun', 'estimated', 'ambiguous')"  # noqa: S608  # a constant
FOREIGN = "holds what no gateway wrote"
OUTCOMES = get_args(Outcome)
COUNTS = (
    *("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation_1h_input_tokens"),
    *("reasoning_output_tokens", "held"),
)
UNWRITTEN_COLUMNS = ("outcome", "cost", *COUNTS)
NO_COUNT = " OR ".join(f"typeof({name}) <> 'integer' OR {name} < 0" for name in COUNTS)
UNWRITTEN: Final = (
    f"SELECT id, {', '.join(UNWRITTEN_COLUMNS)} FROM usage"  # noqa: S608  # constants
    f" WHERE outcome NOT IN {OUTCOMES} OR typeof(cost) <> 'integer' OR {NO_COUNT}"
)
"""SQLite keeps any value in any column."""
REPORTED_EVERY = 1000


def check_records(connection: sqlite3.Connection, progress: Callable[[int], None] | None = None) -> Iterator[Finding]:
    for hold_id, kind, amount, recorded in connection.execute(UNMATCHED):
        found = "there is no record of it" if recorded is None else f"its record does not match: cost {recorded}"
        yield Finding("I2", hold_id, f"a {kind} booked {amount}; {found}")
    for record_id, *late, principal, tenant in connection.execute(OTHER_PAYER, (ADJUSTED,)):
        yield Finding("I2", record_id, f"adjusted for {late[0]} of {late[1]}, expired for {principal} of {tenant}")
    booked, recorded = connection.execute(BOOKED).fetchone(), connection.execute(RECORDED).fetchone()
    if booked != recorded:
        yield Finding(
            "I2", "usage", f"{recorded[0]} records sum up to {recorded[1]}, {booked[0]} resolutions in the entries to {booked[1]}"
        )
    for record_id, amount in connection.execute(COSTLY_HITS):
        yield Finding("I2", record_id, f"a cached answer cost {amount}")
    foreign = set()
    for record_id, *values in connection.execute(UNWRITTEN):
        foreign.add(record_id)
        yield Finding("I2", str(record_id), f"{FOREIGN}: {', '.join(_unwritten(values))}")
    yield from _check_billed(connection, foreign, progress)


def _unwritten(values: Sequence[object]) -> Iterator[str]:
    for column, value in zip(UNWRITTEN_COLUMNS, values, strict=True):
        is_written = value in OUTCOMES if column == "outcome" else isinstance(value, int) and (value >= 0 or column == "cost")
        if not is_written:
            yield f"{column} {value!r}"


def _check_billed(connection: sqlite3.Connection, foreign: Container[str], progress: Callable[[int], None] | None) -> Iterator[Finding]:
    """All records that a provider may bill for, but the `foreign` ones."""
    prices = Prices()
    for number, row in enumerate(connection.execute(BILLED), 1):
        if row[1] not in foreign:
            try:
                yield from _billed(record_from(row, prices), held=row[-1])
            except (msgspec.MsgspecError, AIGatewayError, TypeError, ValueError) as error:  # whatever a text that is no price leads to
                yield Finding("I2", str(row[1]), f"{FOREIGN}: {error}")
        if progress is not None and number % REPORTED_EVERY == 0:
            progress(number)


def _billed(record: UsageRecord, *, held: int) -> Iterator[Finding]:
    """At least what the provider reported was booked; of what is not known, at least what was held for it or estimated."""
    used = cost(record.usage, record.price)
    least = {"completed": used, "overrun": used, "estimated": min(used, held), "ambiguous": held}[record.outcome]
    if record.cost < least:
        yield Finding("I4", record.id, f"{record.outcome} at {record.cost}, below the {least} that it comes to")
