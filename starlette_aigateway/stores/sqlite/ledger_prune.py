"""Pruning: entries of holds that are settled for good give way to one `carry` entry for each scope and period.

A `carry` entry has its scope as `hold`, its period as `day`, and as `amount` what was spent there by the entries that it stands for. One
more, without a scope and a period, has the sum of all that was booked, and as `scopes` how many bookings that were: the usage records
that belong to them stay, and still have to add up. Their row numbers are below zero: in a replay they come before all else.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Final

import msgspec

from ...policy.budgets import periods_from
from .ledger_ops import Prune, Pruned
from .ledger_schema import ADJUSTED, Limit, as_json

AT_ONCE = 2000
"""Entries that are looked at in one turn of the writer: some milliseconds."""

ENTRIES: Final = "SELECT seq, hold, kind, at, amount, day, scopes FROM entries WHERE seq >= ? AND kind IN ({}) ORDER BY seq LIMIT ?"
HOLD_KINDS: Final = ENTRIES.format("'hold', 'settle', 'release', 'expire', 'adjust'")
BOUNDS: Final = "SELECT min(0, coalesce((SELECT min(seq) FROM entries), 0)), coalesce((SELECT max(seq) FROM entries), 0)"
"""Two questions: SQLite answers one for both ends by walking all that lies between."""
UNFINISHED: Final = """
SELECT id FROM holds WHERE id IN (SELECT value FROM json_each(?1))
UNION ALL SELECT value FROM json_each(?2) WHERE EXISTS (SELECT 1 FROM usage WHERE id = value || ?3)
"""
"""Of the holds `?1`, those that wait for a late settlement; of the expired `?2`, those whose late settlement is an entry elsewhere."""
CARRIED: Final = """
SELECT seq, hold, day, amount, scopes FROM json_each(?) AS pair CROSS JOIN entries
ON kind = 'carry' AND hold = json_extract(pair.value, '$[0]') AND day = json_extract(pair.value, '$[1]')
"""
TOTAL: Final = ("", "")
DELETE: Final = "DELETE FROM entries WHERE seq IN (SELECT value FROM json_each(?))"
INSERT: Final = "INSERT INTO entries (seq, hold, kind, at, amount, day, scopes) VALUES (?, ?, 'carry', ?, ?, ?, ?)"
SET: Final = "UPDATE meta SET value = ? WHERE name = ?"

decode_limits = msgspec.json.Decoder(list[Limit]).decode


class _Story:
    """The entries of one hold, as far as they were seen. `expired`: that is the last of them."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.scopes: tuple[str, ...] = ()
        self.day: str | None = None
        self.booked = 0
        self.bookings = 0
        self.ended = False
        self.expired = False
        self.last_at = 0.0

    def add(self, seq: int, kind: str, at: float, amount: int, day: str | None, scopes: str | None) -> None:
        self.seqs.append(seq)
        self.last_at = max(self.last_at, at)
        if kind == "hold":
            self.day, self.scopes = day, tuple(limit.scope for limit in decode_limits(scopes or "[]"))
            return
        self.booked += amount
        self.bookings += 1
        self.ended = True
        self.expired = kind == "expire"


def prune(connection: sqlite3.Connection, op: Prune) -> Pruned:
    """One turn, inside the writer's transaction. The last entry of all stays, so that row numbers go on from it."""
    first, last = connection.execute(BOUNDS).fetchone()
    rows = connection.execute(HOLD_KINDS, (op.start or 1, AT_ONCE)).fetchall()
    stories: dict[str, _Story] = {}
    for seq, hold_id, *entry in rows:
        stories.setdefault(hold_id, _Story()).add(seq, *entry)
    expired = [hold_id for hold_id, story in stories.items() if story.expired]
    rest = connection.execute(UNFINISHED, (as_json(list(stories)), as_json(expired), ADJUSTED)).fetchall()
    unfinished = {hold_id for (hold_id,) in rest}
    done = [
        story
        for hold_id, story in stories.items()
        if story.ended and story.day is not None and story.last_at < op.before and hold_id not in unfinished and last not in story.seqs
    ]
    if done:
        _carry(connection, done, first)
    after = rows[-1][0] + 1 if len(rows) == AT_ONCE and rows[-1][3] < op.before else None
    return Pruned(sum(len(story.seqs) for story in done), after)


def _carry(connection: sqlite3.Connection, done: list[_Story], first: int) -> None:
    """Replaces `done`, and the carries that are there for the same scopes and periods. `first` is the lowest row number in use."""
    spent: Counter[tuple[str, str]] = Counter()
    bookings = 0
    for story in done:
        for scope in story.scopes:
            for period in periods_from(story.day or ""):
                spent[scope, period] += story.booked
        spent[TOTAL] += story.booked
        bookings += story.bookings
    gone = [seq for story in done for seq in story.seqs]
    through = max(gone)
    at = max(story.last_at for story in done)
    for seq, scope, period, amount, count in connection.execute(CARRIED, (as_json(list(spent)),)).fetchall():
        spent[scope, period] += amount
        bookings += int(count or 0)
        gone.append(seq)
    connection.execute(SET, (1, "carrying"))
    connection.execute(DELETE, (as_json(gone),))
    connection.execute(SET, (0, "carrying"))
    for place, ((scope, period), amount) in enumerate(sorted(spent.items()), 1):
        connection.execute(INSERT, (first - place, scope, at, amount, period, str(bookings) if (scope, period) == TOTAL else None))
    connection.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'carried'", (through,))
