"""Rolling up: usage records of days that are over give way to their sums, one row for each UTC day and combination of what reports tell
apart. Nothing else knows such a record any more, so those of holds that may still change stay: the ones that have entries left.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from operator import add
from typing import Final, TypeAlias

from ...policy.budgets import SECONDS_PER_DAY, day_from
from .ledger_ops import RolledUp, RollUp
from .ledger_schema import ADJUSTED, DAY_STEP, ROLLED_UP, SUMMED, as_json, day_base, seq_base

AT_ONCE = 64
"""Records that are looked at in one turn of the writer: some milliseconds."""

HELD_AT_ONCE = 256
"""Holds with entries that one turn knows of. Days that have more such holds before them wait."""

SUMS: Final = ", ".join(SUMMED)
HELD: Final = "SELECT hold, day FROM entries WHERE kind = 'hold' AND seq > 0 ORDER BY seq LIMIT ?"
"""Their days never fall: a hold is made in the latest day of all."""
RECORDS: Final = f"""
SELECT seq, id, CAST(created_at AS INTEGER) / {SECONDS_PER_DAY}, principal, tenant, key_id, provider, model, outcome, {SUMS}
FROM usage WHERE seq >= ? AND seq < ? ORDER BY seq LIMIT ?
"""  # noqa: S608  # constants
KNOWN: Final = f"""
SELECT seq / {DAY_STEP}, principal, tenant, key_id, provider, model, outcome, seq FROM json_each(?) AS pair CROSS JOIN rollups
ON principal = json_extract(pair.value, '$[0]') AND seq >= json_extract(pair.value, '$[1]') AND seq < json_extract(pair.value, '$[2]')
"""  # noqa: S608  # constants
LAST: Final = "SELECT max(seq) FROM rollups WHERE seq >= ? AND seq < ?"
ADD: Final = f"UPDATE rollups SET records = records + ?, {', '.join(f'{name} = {name} + ?' for name in SUMMED)} WHERE seq = ?"  # noqa: S608
INSERT: Final = f"""
INSERT INTO rollups (records, {SUMS}, principal, tenant, key_id, provider, model, outcome, seq) VALUES ({",".join("?" * (8 + len(SUMMED)))})
"""  # noqa: S608  # constants
DELETE: Final = "DELETE FROM usage WHERE seq IN (SELECT value FROM json_each(?))"
REACHED: Final = "UPDATE meta SET value = max(value, ?) WHERE name = ?"

WIDTH: Final = 7
Group: TypeAlias = "tuple[int, str, str | None, str | None, str, str, str]"
"""Day, principal, tenant, key, provider, model, outcome."""

Sums: TypeAlias = Sequence[int]
"""How many records, and what they sum up to in the order of `SUMMED`."""


def roll_up(connection: sqlite3.Connection, op: RollUp) -> RolledUp:
    """One turn, inside the writer's transaction."""
    held = connection.execute(HELD, (HELD_AT_ONCE,)).fetchall()
    through = op.day if len(held) < HELD_AT_ONCE else min(op.day, day_from(held[-1][1]))
    end = seq_base(float(through * SECONDS_PER_DAY))
    rows = connection.execute(RECORDS, (op.start or 0, end, AT_ONCE)).fetchall()
    waiting = {hold_id for hold_id, _ in held}
    sums: dict[Group, Sums] = {}
    gone = []
    for seq, record_id, *record in rows:
        group, amounts = tuple(record[:WIDTH]), record[WIDTH:]
        if waiting.isdisjoint((record_id, record_id.removesuffix(ADJUSTED))) and all(isinstance(amount, int) for amount in amounts):
            gone.append(seq)
            sums[group] = tuple(map(add, sums.get(group, NOTHING), (1, *amounts)))
    if gone:
        _keep(connection, sums)
        connection.execute(DELETE, (as_json(gone),))
        connection.execute(REACHED, (through, ROLLED_UP))
    return RolledUp(len(gone), rows[-1][0] + 1 if len(rows) == AT_ONCE else None)


NOTHING: Final = (0,) * (1 + len(SUMMED))


def _keep(connection: sqlite3.Connection, sums: Mapping[Group, Sums]) -> None:
    """Adds to the rows that are there for a group, and makes one where there is none."""
    places = [(principal, day_base(day), day_base(day + 1)) for day, principal in {group[:2] for group in sums}]
    known: dict[Group, int] = {tuple(group): seq for *group, seq in connection.execute(KNOWN, (as_json(places),)).fetchall()}
    following = _free(connection, {group[0] for group in sums if group not in known})
    changed, new = [], []
    for group, amounts in sums.items():
        if group in known:
            changed.append((*amounts, known[group]))
        else:
            new.append((*amounts, *group[1:], following[group[0]]))
            following[group[0]] += 1
    connection.executemany(ADD, changed)
    connection.executemany(INSERT, new)


def _free(connection: sqlite3.Connection, days: Iterable[int]) -> dict[int, int]:
    """The first row number of each day that is not in use."""
    following = {}
    for day in days:
        (last,) = connection.execute(LAST, (day_base(day), day_base(day + 1))).fetchone()
        following[day] = day_base(day) if last is None else last + 1
    return following
