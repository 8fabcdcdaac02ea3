"""Pruning: entries of holds that are settled for good give way to one `carry` entry for each scope and each month and lifetime.

A `carry` entry has its scope as `hold`, its period as `day`, and as `amount` what was spent there by the entries that it stands for. One
more, without a scope and a period, has the sum of all that was booked, and as `scopes` how many bookings that were: the usage records
that belong to them stay, and still have to add up. Their row numbers are below zero: in a replay they come before all else.

What was spent in a day that is over decides nothing any more: no later hold counts in it. So such days are not carried, but what is gone
from the entries goes from their balances too, and with the last of it the balance itself: else there would be one left for each day of
every account. A day that may still be asked for, or that only a part is pruned of, is carried.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from ...policy.budgets import day_number, periods_from, periods_of
from .ledger_ops import Prune, Pruned, Story
from .ledger_schema import as_json

AT_ONCE = 100
"""Holds that are replaced in one turn of the writer: a few milliseconds."""

STATE: Final = "SELECT min(0, coalesce((SELECT min(seq) FROM entries), 0)), (SELECT value FROM meta WHERE name = 'day')"
THERE: Final = "SELECT seq FROM entries WHERE seq IN (SELECT value FROM json_each(?))"
CARRIED: Final = """
SELECT seq, hold, day, amount FROM json_each(?) AS pair CROSS JOIN entries
ON kind = 'carry' AND hold = json_extract(pair.value, '$[0]') AND day = json_extract(pair.value, '$[1]')
"""
DELETE: Final = "DELETE FROM entries WHERE seq IN (SELECT value FROM json_each(?))"
ADD: Final = "UPDATE entries SET amount = amount + ?, at = max(at, ?) WHERE seq = ?"
INSERT: Final = "INSERT INTO entries (seq, hold, kind, at, amount, day) VALUES (?, ?, 'carry', ?, ?, ?)"
COUNT: Final = "UPDATE entries SET scopes = CAST(coalesce(scopes, 0) + ? AS TEXT) WHERE kind = 'carry' AND hold = '' AND day = ''"
TAKE: Final = "UPDATE balances SET spent = spent - ? WHERE scope = ? AND period = ?"
FORGET: Final = """
DELETE FROM balances WHERE (scope, period) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?))
AND spent = 0 AND held = 0 AND open = 0
"""
SET: Final = "UPDATE meta SET value = ? WHERE name = ?"
CARRIED_UP_TO: Final = "UPDATE meta SET value = max(value, ?) WHERE name = 'carried'"

Spent: TypeAlias = Mapping[tuple[str, str], int]
"""Nano-USD by scope and period."""

TOTAL: Final = ("", "")


def prune(connection: sqlite3.Connection, op: Prune) -> Pruned:
    """One turn, inside the writer's transaction."""
    first, latest_day = connection.execute(STATE).fetchone()
    there = {seq for (seq,) in connection.execute(THERE, (as_json([seq for story in op.stories for seq in story.seqs]),)).fetchall()}
    stories = [story for story in op.stories if there.issuperset(story.seqs)]
    if stories:
        _replace(connection, stories, first, periods_of(min(day_number(op.before), latest_day)).day)
    return Pruned(sum(len(story.seqs) for story in stories))


def _replace(connection: sqlite3.Connection, done: Sequence[Story], first: int, open_from: str) -> None:
    """`first` is the lowest row number in use; days before `open_from` are over."""
    lasting: Counter[tuple[str, str]] = Counter()
    over: Counter[tuple[str, str]] = Counter()
    for story in done:
        day, month, total = periods_from(story.day)
        of_the_day = over if day < open_from else lasting
        for scope in story.scopes:
            of_the_day[scope, day] += story.booked
            lasting[scope, month] += story.booked
            lasting[scope, total] += story.booked
        lasting[TOTAL] += story.booked
    gone = [seq for story in done for seq in story.seqs]
    connection.execute(SET, (1, "carrying"))
    gone += _forget(connection, over)
    connection.execute(DELETE, (as_json(gone),))
    _carry(connection, lasting, first, max(story.last_at for story in done))
    connection.execute(COUNT, (sum(story.bookings for story in done),))
    connection.execute(SET, (0, "carrying"))
    connection.execute(CARRIED_UP_TO, (max(gone),))


def _carry(connection: sqlite3.Connection, spent: Spent, first: int, at: float) -> None:
    """Adds to the carries that are there, and makes one where there is none."""
    places = {(scope, period): seq for seq, scope, period, _ in connection.execute(CARRIED, (as_json(list(spent)),)).fetchall()}
    connection.executemany(ADD, [(spent[pair], at, seq) for pair, seq in places.items()])
    new = sorted(pair for pair in spent if pair not in places)
    connection.executemany(INSERT, [(first - place, pair[0], at, spent[pair], pair[1]) for place, pair in enumerate(new, 1)])


def _forget(connection: sqlite3.Connection, spent: Counter[tuple[str, str]]) -> Sequence[int]:
    """Takes what is gone from the balances of days that are over. Gives the row numbers of what was carried for them while they were
    not: it goes, too."""
    pairs = as_json(list(spent))
    carried = connection.execute(CARRIED, (pairs,)).fetchall()
    for _, scope, period, amount in carried:
        spent[scope, period] += amount
    connection.executemany(TAKE, [(amount, *pair) for pair, amount in spent.items()])
    connection.execute(FORGET, (pairs,))
    return [seq for seq, *_ in carried]
