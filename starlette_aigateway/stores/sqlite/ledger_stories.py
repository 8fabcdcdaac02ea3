"""What became of holds, read beside the writer: their entries, from the first to the one that settled them for good.

Entries never change, and none is ever added to a hold that is neither open nor waits for a late settlement. So what was read stays true,
however much is written meanwhile; only others who prune may have replaced it already.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from .ledger_ops import Story
from .ledger_schema import ADJUSTED, Limit, as_json

LOOK_AT = 500
"""Entries that are read at a time: about a millisecond."""

ENTRIES: Final = """
SELECT seq, hold, kind, at, amount, day, scopes FROM entries
WHERE seq > ? AND kind IN ('hold', 'settle', 'release', 'expire', 'adjust') ORDER BY seq LIMIT ?
"""
LAST: Final = "SELECT max(seq) FROM entries"
UNFINISHED: Final = """
SELECT id FROM holds WHERE id IN (SELECT value FROM json_each(?1))
UNION ALL SELECT value FROM json_each(?1) WHERE EXISTS (SELECT 1 FROM usage WHERE id = value || ?2)
"""
"""Of expired holds, those that wait for a late settlement, and those whose late settlement is an entry elsewhere."""

decode_limits = msgspec.json.Decoder(list[Limit]).decode


class _Begun:
    """A hold that was not seen to end, or only to expire."""

    __slots__ = ("booked", "day", "last_at", "scopes", "seqs")

    def __init__(self, day: str, scopes: tuple[str, ...]) -> None:
        self.day = day
        self.scopes = scopes
        self.seqs: list[int] = []
        self.booked = 0
        self.last_at = -math.inf

    def add(self, seq: int, at: float, booked: int) -> None:
        self.seqs.append(seq)
        self.booked += booked
        self.last_at = max(self.last_at, at)

    def ended(self) -> Story:
        return Story(tuple(self.seqs), self.scopes, self.day, self.booked, len(self.seqs) - 1, self.last_at)


class Stories:
    """A walk over the entries, which ends with those of the time `before`. Each `step` gives the holds that it has seen to be settled
    for good before it, but for the one with the last entry of all: that stays, so that row numbers go on from it."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._place = 0
        self._begun: dict[str, _Begun] = {}
        self._expired: dict[str, _Begun] = {}
        self.over = False

    def step(self, connection: sqlite3.Connection) -> Sequence[Story]:
        (last,) = connection.execute(LAST).fetchone()
        rows = connection.execute(ENTRIES, (self._place, LOOK_AT)).fetchall()
        told = [story for row in rows for story in self._tell(*row)]
        if rows:
            self._place = rows[-1][0]
        if len(rows) < LOOK_AT or rows[-1][3] >= self._before:
            self.over = True
            told += self._final(connection)
        return [story for story in told if story.last_at < self._before and story.seqs[-1] != last]

    def _tell(self, seq: int, hold_id: str, kind: str, at: float, amount: int, day: str | None, scopes: str | None) -> Iterator[Story]:
        if kind == "hold":
            if day is not None and hold_id not in self._begun:
                self._begun[hold_id] = begun = _Begun(day, tuple([limit.scope for limit in decode_limits(scopes or "[]")]))
                begun.add(seq, at, 0)
            return
        begun_or_expired = (self._expired if kind == "adjust" else self._begun).pop(hold_id, None)
        if begun_or_expired is None:
            return
        begun_or_expired.add(seq, at, amount)
        if kind == "expire":
            self._expired[hold_id] = begun_or_expired
        else:
            yield begun_or_expired.ended()

    def _final(self, connection: sqlite3.Connection) -> Iterator[Story]:
        """The expired ones that nothing is added to any more."""
        rows = connection.execute(UNFINISHED, (as_json(list(self._expired)), ADJUSTED)).fetchall()
        unfinished = {hold_id for (hold_id,) in rows}
        for hold_id, expired in self._expired.items():
            if hold_id not in unfinished:
                yield expired.ended()
