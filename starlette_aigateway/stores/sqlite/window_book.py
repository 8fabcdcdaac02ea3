"""The windows of one batch: read with one statement, changed in memory, written with two.

Rows travel as one JSON text in both directions, since each step of a statement gives up the interpreter lock, and a busy event loop
may keep it for milliseconds. An exact window is a row in `windows` and rows in `hits`, one for each batch that let something in: `cum`
is the running total after it. Whether a hit fits, and how long it has to wait, are look-ups by primary key and never a count.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from ...policy.windows import Demand, Fixed, Form, Moving, Sliding, Usage, Window

SWEEP_AFTER = 64
SWEEP_HITS = 2048

SCHEMA = (
    """
CREATE TABLE windows (
    key TEXT NOT NULL,
    form TEXT NOT NULL,
    seconds INTEGER NOT NULL,
    total INTEGER NOT NULL,
    past INTEGER NOT NULL,
    mark INTEGER NOT NULL,
    idle_at INTEGER NOT NULL,
    PRIMARY KEY (key, form, seconds)
) WITHOUT ROWID;
CREATE TABLE hits (
    key TEXT NOT NULL,
    seconds INTEGER NOT NULL,
    cum INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (key, seconds, cum)
) WITHOUT ROWID;
""",
)
"""`total`, `past` and `mark` are the fields of `Moving`, of `Sliding` or of `Fixed`; times are Unix microseconds."""

LOAD = """
SELECT json_group_array(json_array(j.key, w.total, CASE w.form WHEN 'moving' THEN coalesce((
    SELECT h.cum - h.amount FROM hits h
    WHERE h.key = w.key AND h.seconds = w.seconds AND h.cum > w.past AND h.at > :now - w.seconds * 1000000
    ORDER BY h.cum LIMIT 1), w.total) ELSE w.past END, w.mark))
FROM json_each(:windows) j CROSS JOIN windows w
ON w.key = json_extract(j.value, '$[0]') AND w.form = json_extract(j.value, '$[1]') AND w.seconds = json_extract(j.value, '$[2]')
"""
SAVE_HITS = """
INSERT INTO hits (key, seconds, cum, amount, at)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'), :now
FROM json_each(:hits)
"""
SAVE_WINDOWS = """
INSERT INTO windows (key, form, seconds, total, past, mark, idle_at)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'),
    json_extract(value, '$[4]'), json_extract(value, '$[5]'), json_extract(value, '$[6]')
FROM json_each(:windows) WHERE true
ON CONFLICT (key, form, seconds) DO UPDATE
SET total = excluded.total, past = excluded.past, mark = excluded.mark, idle_at = excluded.idle_at
"""
MOMENTS = """
SELECT json_group_array((
    SELECT h.at FROM hits h WHERE h.key = json_extract(j.value, '$[0]') AND h.seconds = json_extract(j.value, '$[1]')
    AND h.cum >= json_extract(j.value, '$[2]') ORDER BY h.cum LIMIT 1))
FROM json_each(:needs) j
"""
MEND = "UPDATE hits SET at = :now WHERE key = :key AND seconds = :seconds AND cum > :past AND at > :now"
WALK = """
SELECT json_group_array(json_array(key, form, seconds, total, past, idle_at)) FROM (
    SELECT * FROM windows WHERE (key, form, seconds) > (:key, :form, :seconds) ORDER BY key, form, seconds LIMIT :count)
"""
DROP_HITS = """
DELETE FROM hits WHERE (key, seconds, cum) IN (
    SELECT h.key, h.seconds, h.cum FROM json_each(:upto) j CROSS JOIN hits h
    ON h.key = json_extract(j.value, '$[0]') AND h.seconds = json_extract(j.value, '$[1]') AND h.cum <= json_extract(j.value, '$[2]')
    LIMIT :most)
"""
DROP_WINDOWS = """
DELETE FROM windows WHERE (key, form, seconds) IN (
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]') FROM json_each(:windows))
AND (form <> 'moving' OR NOT EXISTS (SELECT 1 FROM hits h WHERE h.key = windows.key AND h.seconds = windows.seconds))
"""

Row: TypeAlias = "tuple[str, Form, int, int, int, int]"
Need: TypeAlias = "tuple[str, int, int]"
"""The moment of the first hit of a moving window (key, seconds) at which its running total reached the third."""

UNUSED = Moving()
_states = msgspec.json.Decoder(list[tuple[int, int, int, int]])
_rows = msgspec.json.Decoder(list[tuple[str, Form, int, int, int, int]])
_moments = msgspec.json.Decoder(list[int])


class Book:
    """The windows that a batch touches, as they are at `now` (Unix microseconds)."""

    def __init__(self, connection: sqlite3.Connection, windows: Sequence[Window], now: int) -> None:
        self.now = now
        self._connection = connection
        self._moving: dict[Window, Moving] = {}
        self._sliding: dict[Window, Sliding] = {}
        self._fixed: dict[Window, Fixed] = {}
        self._changed: set[Window] = set()
        self._let_in: dict[Window, int] = {}
        self._load(windows)

    def moving(self, window: Window) -> Moving:
        return self._moving.get(window) or UNUSED

    def sliding(self, window: Window) -> Sliding:
        return self._sliding.get(window) or Sliding().at(self.now, window.span)

    def fixed(self, window: Window) -> Fixed:
        return self._fixed.get(window) or Fixed()

    def admits(self, demand: Demand) -> bool:
        window = demand.window
        if window.form == "moving":
            return (self._moving.get(window) or UNUSED).admits(demand.limit, demand.amount)
        return self.sliding(window).admits(demand.limit, demand.amount, self.now, window.span)

    def hit(self, demand: Demand) -> None:
        window, amount = demand.window, demand.amount
        if not amount:
            return
        self._changed.add(window)
        if window.form == "moving":
            self._moving[window] = (self._moving.get(window) or UNUSED).hit(amount, self.now)
            self._let_in[window] = self._let_in.get(window, 0) + amount
        else:
            self._sliding[window] = self.sliding(window).hit(amount)

    def usage(self, demand: Demand) -> Usage:
        window = demand.window
        state = (self._moving.get(window) or UNUSED) if window.form == "moving" else self.sliding(window)
        return state.usage(demand.limit, self.now, window.span)

    def adjust(self, window: Window, delta: int, charged_at: int) -> None:
        self._changed.add(window)
        self._sliding[window] = self.sliding(window).adjusted(delta, charged_at // window.span)

    def increment(self, window: Window, amount: int, span: int) -> int:
        self._changed.add(window)
        self._fixed[window] = self.fixed(window).hit(amount, self.now, span)
        return self._fixed[window].value

    def save(self) -> None:
        if self._let_in:
            hits = [(window.key, window.seconds, self._moving[window].total, amount) for window, amount in self._let_in.items()]
            self._connection.execute(SAVE_HITS, {"hits": _text(hits), "now": self.now})
        if self._changed:
            self._connection.execute(SAVE_WINDOWS, {"windows": _text([self._row(window) for window in self._changed])})

    def moments(self, needs: Sequence[Need]) -> Sequence[int]:
        """What was let in at `now` is found only after `save`."""
        if not needs:
            return ()
        return _moments.decode(self._connection.execute(MOMENTS, {"needs": _text(needs)}).fetchone()[0])

    def _load(self, windows: Sequence[Window]) -> None:
        found = self._connection.execute(LOAD, {"windows": _text(windows), "now": self.now}).fetchone()[0]
        for position, *state in _states.decode(found):
            window = windows[position]
            if window.form == "moving":
                self._moving[window] = self._mended(window, Moving(*state))
            elif window.form == "sliding":
                self._sliding[window] = counter = Sliding(*state).at(self.now, window.span)
                if counter.bucket < state[2]:  # the clock was stepped back
                    self._changed.add(window)
            else:
                self._fixed[window] = Fixed(state[0], state[2]).at(self.now)

    def _mended(self, window: Window, state: Moving) -> Moving:
        """After the clock was stepped back, nothing can have come in later than now: it counts for a whole window from now on."""
        if state.last_at <= self.now:
            return state
        self._changed.add(window)
        self._connection.execute(MEND, {"now": self.now, "key": window.key, "seconds": window.seconds, "past": state.expired})
        return Moving(state.total, state.expired, self.now)

    def _row(self, window: Window) -> tuple[str, Form, int, int, int, int, int]:
        if window.form == "moving":
            moving = self._moving[window]
            return (*window, moving.total, moving.expired, moving.last_at, moving.last_at + window.span)
        if window.form == "sliding":
            sliding = self._sliding[window]
            return (*window, sliding.current, sliding.previous, sliding.bucket, (sliding.bucket + 2) * window.span)
        fixed = self._fixed[window]
        return (*window, fixed.value, 0, fixed.expires_at, fixed.expires_at)


class Sweeper:
    """Removes what does not count any more, a little with every so many windows touched, in a walk over all of them."""

    START = Window("", "fixed", 0)

    def __init__(self) -> None:
        self._touched = 0
        self._place = self.START

    def sweep(self, connection: sqlite3.Connection, touched: int, now: int) -> None:
        self._touched += touched
        if self._touched < SWEEP_AFTER:
            return
        count, self._touched = 2 * self._touched, 0
        found = connection.execute(WALK, {**self._place._asdict(), "count": count}).fetchone()[0]
        rows = _rows.decode(found)
        self._place = Window(*rows[-1][:3]) if len(rows) == count else self.START
        upto = [(key, seconds, total if idle_at <= now else past) for key, form, seconds, total, past, idle_at in rows if form == "moving"]
        stale_hits = [place for place in upto if place[2]]
        if stale_hits:
            connection.execute(DROP_HITS, {"upto": _text(stale_hits), "most": SWEEP_HITS})
        idle = [(key, form, seconds) for key, form, seconds, _, _, idle_at in rows if idle_at <= now]
        if idle:
            connection.execute(DROP_WINDOWS, {"windows": _text(idle)})


def _text(rows: object) -> str:
    return msgspec.json.encode(rows).decode()
