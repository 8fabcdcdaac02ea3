"""The part of the audit that is about what records were rolled up to. That they add up with the entries, `ledger_check_records.py` says."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final, get_args

from ...accounts import Finding, Outcome
from .ledger_schema import DAY_STEP, ROLLED_UP, SUMMED

OUTCOMES: Final = get_args(Outcome)
FREE: Final = ("cached", "released")
REACHED: Final = "SELECT max(value) FROM meta WHERE name = ? AND typeof(value) = 'integer' AND value >= 0"
NO_COUNT: Final = " OR ".join(f"typeof({name}) <> 'integer' OR {name} < 0" for name in ("records - 1", *SUMMED) if name != "cost")
UNWRITTEN: Final = (
    f"SELECT seq, records, {', '.join(SUMMED)}, outcome FROM rollups"  # noqa: S608  # constants
    f" WHERE outcome NOT IN {OUTCOMES} OR typeof(cost) <> 'integer' OR (outcome IN {FREE} AND cost <> 0) OR {NO_COUNT}"
)
"""SQLite keeps any value in any column."""
EARLY: Final = "SELECT count(*), max(seq) FROM rollups WHERE seq >= ?"


def check_rollups(connection: sqlite3.Connection) -> Iterator[Finding]:
    (reached,) = connection.execute(REACHED, (ROLLED_UP,)).fetchone()
    if reached is None:
        yield Finding("I4", "meta", f"{ROLLED_UP} is not a day: nobody knows which days count as a whole")
    rows, last = connection.execute(EARLY, ((reached or 0) * DAY_STEP,)).fetchone()
    if rows:
        yield Finding("I2", f"rollup {last}", f"{rows} rollups are of day {reached or 0} or later, which no record was rolled up of")
    for seq, *values in connection.execute(UNWRITTEN):
        yield Finding("I2", f"rollup {seq}", f"holds what no gateway wrote: {', '.join(map(str, values))}")
