"""One batch of the ledger inside one transaction: load what it touches, decide each operation in Python, write the changes.

Each SQLite step gives up the interpreter lock and may wait milliseconds for it where the event loop's thread is busy. So the loads
are one statement with one row, and the writes are inserts of many rows at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

import msgspec

from ...accounts import Hold, UsageRecord
from ...errors import AIGatewayError
from ...policy.budgets import Balance, Books, Periods, day_number, grant, periods_from, periods_of
from ...types import Caps, Usage
from .ledger_ops import Expire, Op, Ping, Record, Release, Renew, Reserve, Result, SetCaps, Settle
from .ledger_schema import (
    ADJUSTED,
    NO_USAGE,
    SEQ_STEP,
    USAGE_COLUMNS,
    USAGE_WIDTH,
    HoldFacts,
    Prices,
    Row,
    facts_of,
    record_from,
    record_of,
    seq_base,
    usage_row,
)

DUE_IN_PASSING = 32
DUE_AT_ONCE = 1000
KEEP_EXPIRED = 7 * 86_400.0
"""Seconds that an expired hold waits for a late settlement."""


class Insert:
    """An insert of any number of rows in few statements, whose texts are few as well, so that SQLite keeps them prepared."""

    SIZES = (64, 16, 4, 1)

    def __init__(self, head: str, width: int, tail: str = "") -> None:
        row = f"({','.join('?' * width)})"
        self._texts = {size: f"{head} VALUES {','.join([row] * size)} {tail}" for size in self.SIZES}

    def __call__(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        start = 0
        for size, sql in self._texts.items():
            while len(rows) - start >= size:
                connection.execute(sql, list(chain.from_iterable(rows[start : start + size])))
                start += size


INSERT_HOLDS: Final = Insert("INSERT OR REPLACE INTO holds (id, expires_at, expired, facts)", 4)
INSERT_ENTRIES: Final = Insert("INSERT INTO entries (hold, kind, at, amount, day, scopes)", 6)
INSERT_USAGE: Final = Insert(f"INSERT INTO usage ({USAGE_COLUMNS})", USAGE_WIDTH)
INSERT_CAPS: Final = Insert("INSERT OR REPLACE INTO caps (scope, day, month, total)", 4)
CHANGE_BALANCES: Final = Insert(
    "INSERT INTO balances (scope, period, spent, held, open)",
    5,
    "ON CONFLICT (scope, period) DO UPDATE SET spent = spent + excluded.spent, held = held + excluded.held, open = open + excluded.open",
)
DELETE_HOLDS: Final = "DELETE FROM holds WHERE id IN (SELECT value FROM json_each(?))"
PRUNE_HOLDS: Final = "DELETE FROM holds WHERE expired = 1 AND expires_at < ?"

LOAD: Final = """
SELECT
  (SELECT value FROM meta WHERE name = 'day'),
  (SELECT '[' || group_concat(facts) || ']' FROM holds WHERE id IN (SELECT value FROM json_each(:holds))),
  (SELECT '[' || group_concat(facts) || ']'
     FROM (SELECT facts FROM holds WHERE expired = 0 AND expires_at <= :now ORDER BY expires_at LIMIT :due)),
  (SELECT min(expires_at) FROM holds WHERE expired = 0 AND expires_at > :now),
  (SELECT json_group_array(json_array(scope, period, spent, held, open))
     FROM json_each(:pairs) AS pair CROSS JOIN balances
     ON scope = json_extract(pair.value, '$[0]') AND period = json_extract(pair.value, '$[1]')),
  (SELECT json_group_array(json_array(scope, day, month, total)) FROM caps WHERE scope IN (SELECT value FROM json_each(:scopes))),
  (SELECT json_group_array(id) FROM usage WHERE id IN (SELECT value FROM json_each(:records)))
"""
RECORDS: Final = f"SELECT {USAGE_COLUMNS} FROM usage WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608  # a constant
TAKEN_SEQS: Final = """
SELECT '[' || group_concat((SELECT max(seq) FROM usage WHERE seq >= value AND seq < value + 1048576)) || ']' FROM json_each(?)
"""

decode_holds = msgspec.json.Decoder(list[HoldFacts]).decode
decode_balances = msgspec.json.Decoder(list[tuple[str, str, int, int, int]]).decode
decode_caps = msgspec.json.Decoder(list[tuple[str, int | None, int | None, int | None]]).decode
decode_names = msgspec.json.Decoder(list[str]).decode
decode_seqs = msgspec.json.Decoder(list[int]).decode
encode = msgspec.json.Encoder().encode


def as_json(value: object) -> str:
    return encode(value).decode()


class BatchWriter:
    """Applies batches; knows nothing from one to the next but the latest day that it read, which saves a second load."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._day = 0

    def apply(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | AIGatewayError]:
        batch = Batch(connection, ops, self._prices)
        self._day = batch.load(self._day)
        results = [batch.decide(op) for op in ops]
        batch.flush()
        return results

    def probe(self, connection: sqlite3.Connection, op: Reserve) -> Hold:
        """What `op` would be granted in a batch of its own; nothing is written. For any thread."""
        batch = Batch(connection, [op], self._prices)
        batch.load(0)
        outcome = batch.decide(op)
        if isinstance(outcome, AIGatewayError):
            raise outcome
        assert isinstance(outcome, Hold)
        return outcome


class Batch:
    """What is known of everything that the operations touch, and what they change."""

    def __init__(self, connection: sqlite3.Connection, ops: Sequence[Op], prices: Prices) -> None:
        self._connection = connection
        self._ops = ops
        self._prices = prices
        self._books = Books()
        self._day = 0
        self._stored_day = 0
        self._periods: dict[str, Periods] = {}
        self._today: tuple[int, Periods] | None = None
        self._holds: dict[str, HoldFacts] = {}
        self._records: dict[str, tuple[UsageRecord, int]] = {}
        self._expired: list[UsageRecord] = []
        self._changed_holds: dict[str, HoldFacts] = {}
        self._gone_holds: list[str] = []
        self._entries: list[Row] = []
        self._new_records: list[tuple[UsageRecord, str | None, int]] = []
        self._new_caps: dict[str, Caps] = {}
        self._prune_before: float | None = None
        self._pinged = False

    def load(self, likely_day: int) -> int:
        """Reads all that the operations name. Returns the latest day that is stored; where it is not the `likely_day`, the periods
        that were read for were the wrong ones, and all is read again."""
        touched = _Touched(self._ops, likely_day)
        stored, holds, due, next_lease_end, balances, caps, records = self._connection.execute(LOAD, touched.parameters).fetchone()
        if stored > likely_day:
            return self.load(stored)
        self._day = max(likely_day, stored)
        self._stored_day = stored
        self._books.next_lease_end = next_lease_end
        for pair in touched.pairs:
            self._books.balances[pair] = Balance()
        for scope, period, spent, held, open_holds in decode_balances(balances):
            self._books.balances[scope, period] = Balance(spent, held, open_holds)
        for scope, day, month, total in decode_caps(caps):
            self._books.caps[scope] = Caps(day, month, total)
        for facts in decode_holds(holds) if holds else ():
            self._holds[facts.id] = facts
        self._load_records(touched.resolving, decode_names(records))
        if due:
            self._expire([facts for facts in decode_holds(due) if facts.id not in touched.resolving], touched.now)
        if due or touched.expiring:
            self._prune_before = touched.now - KEEP_EXPIRED
        return int(stored)

    def _load_records(self, resolving: Iterable[str], known: list[str]) -> None:
        """Records are read only for what is done a second time, which is rare."""
        missing = [hold_id for hold_id in resolving if hold_id not in self._holds]
        names = known + missing + [hold_id + ADJUSTED for hold_id in missing]
        if names:
            for row in self._connection.execute(RECORDS, (as_json(names),)).fetchall():
                self._records[row[1]] = record_from(row, self._prices), row[-1]

    def decide(self, op: Op) -> Result | AIGatewayError:
        try:
            match op:
                case Reserve():
                    return self._reserve(op)
                case Settle():
                    return self._settle(op)
                case Release():
                    self._release(op.hold_id, op.now, op.latency_ms)
                case Record():
                    self._record(op)
                case Renew():
                    return self._renew(op)
                case Expire():
                    expired, self._expired = self._expired, []
                    return expired
                case SetCaps():
                    self._books.caps[op.scope] = self._new_caps[op.scope] = op.caps
                case Ping():
                    self._pinged = True
        except AIGatewayError as refusal:
            return refusal
        return None

    def _reserve(self, op: Reserve) -> Hold:
        request = op.request
        if (known := self._holds.get(request.id)) is not None:
            return known.hold
        if (resolved := self._records.get(request.id)) is not None:
            record, amount = resolved
            return Hold(id=record.id, amount=amount, made_at=record.created_at, expires_at=request.expires_at)
        if request.replaces is not None:
            self._release(request.replaces, op.now, None)
        today = day_number(op.now)
        self._day = day = max(self._day, today)
        if self._today is None or self._today[0] != day:
            self._today = day, periods_of(day)
        periods = self._today[1]
        amount = grant(request, self._books, periods, op.now)
        made_at = op.now if day == today else day * 86_400.0
        facts = facts_of(request, op.price, amount=amount, day=periods.day, made_at=made_at)
        self._books.hold(facts.scopes, periods, amount)
        self._holds[facts.id] = self._changed_holds[facts.id] = facts
        limits = [(claim.scope, *self._books.caps_of(claim)) for claim in request.scopes]
        self._entries.append((facts.id, "hold", made_at, amount, periods.day, as_json(limits)))
        return facts.hold

    def _settle(self, op: Settle) -> UsageRecord | None:
        facts = self._holds.get(op.hold_id)
        if facts is None:
            resolved = self._records.get(op.hold_id + ADJUSTED) or self._records.get(op.hold_id)
            return None if resolved is None else resolved[0]
        end = op.settlement
        usage = end.usage or NO_USAGE
        if facts.expired:
            return self._adjust(facts, end.amount, op.now, usage, end.response_model, end.latency_ms)
        self._resolve(facts, "settle", end.amount, op.now)
        return self._book(
            facts,
            record_of(
                facts,
                self._prices.load(facts.price),
                end.outcome,
                end.amount,
                usage=usage,
                response_model=end.response_model,
                latency_ms=end.latency_ms,
            ),
        )

    def _release(self, hold_id: str, now: float, latency_ms: int | None) -> None:
        facts = self._holds.get(hold_id)
        if facts is None:
            return
        if facts.expired:
            self._adjust(facts, 0, now, NO_USAGE, None, latency_ms)
            return
        self._resolve(facts, "release", 0, now)
        self._book(facts, record_of(facts, self._prices.load(facts.price), "released", 0, latency_ms=latency_ms))

    def _expire(self, due: Sequence[HoldFacts], now: float) -> None:
        for facts in due:
            facts.expired = True
            self._books.resolve(facts.scopes, self._periods_of(facts), held=facts.amount, booked=facts.amount)
            self._holds[facts.id] = self._changed_holds[facts.id] = facts
            self._entries.append((facts.id, "expire", now, facts.amount, None, None))
            self._expired.append(self._book(facts, record_of(facts, self._prices.load(facts.price), "expired", facts.amount)))

    def _adjust(
        self, facts: HoldFacts, amount: int, now: float, usage: Usage, response_model: str | None, latency_ms: int | None
    ) -> UsageRecord:
        difference = amount - facts.amount
        self._books.adjust(facts.scopes, self._periods_of(facts), difference)
        self._forget(facts)
        self._entries.append((facts.id, "adjust", now, difference, None, None))
        price = self._prices.load(facts.price)
        return self._book(
            facts, record_of(facts, price, "adjusted", difference, usage=usage, response_model=response_model, latency_ms=latency_ms)
        )

    def _resolve(self, facts: HoldFacts, kind: str, booked: int, now: float) -> None:
        self._books.resolve(facts.scopes, self._periods_of(facts), held=facts.amount, booked=booked)
        self._forget(facts)
        self._entries.append((facts.id, kind, now, booked, None, None))

    def _periods_of(self, facts: HoldFacts) -> Periods:
        periods = self._periods.get(facts.day)
        if periods is None:
            periods = self._periods[facts.day] = periods_from(facts.day)
        return periods

    def _forget(self, facts: HoldFacts) -> None:
        del self._holds[facts.id]
        self._changed_holds.pop(facts.id, None)
        self._gone_holds.append(facts.id)

    def _book(self, facts: HoldFacts, record: UsageRecord) -> UsageRecord:
        self._records[record.id] = record, facts.amount
        self._new_records.append((record, facts.price, facts.amount))
        return record

    def _record(self, op: Record) -> None:
        if op.record.id not in self._records:
            self._records[op.record.id] = op.record, 0
            self._new_records.append((op.record, op.price, 0))

    def _renew(self, op: Renew) -> bool:
        facts = self._holds.get(op.hold_id)
        if facts is None or facts.expired:
            return False
        facts.expires_at = op.expires_at
        self._changed_holds[facts.id] = facts
        return True

    def flush(self) -> None:
        connection = self._connection
        if self._gone_holds:
            connection.execute(DELETE_HOLDS, (as_json(self._gone_holds),))
        INSERT_HOLDS(connection, [(f.id, f.expires_at, f.expired, as_json(f)) for f in self._changed_holds.values()])
        INSERT_ENTRIES(connection, self._entries)
        if self._new_records:
            INSERT_USAGE(connection, self._usage_rows())
        changes = [(*key, *balance.changes) for key, balance in self._books.balances.items()]
        CHANGE_BALANCES(connection, [change for change in changes if change[2] or change[3] or change[4]])
        INSERT_CAPS(connection, [(scope, *caps) for scope, caps in self._new_caps.items()])
        if self._day > self._stored_day:
            connection.execute("UPDATE meta SET value = ? WHERE name = 'day'", (self._day,))
        if self._prune_before is not None:
            connection.execute(PRUNE_HOLDS, (self._prune_before,))
        if self._pinged:
            connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'pings'")

    def _usage_rows(self) -> list[Row]:
        """New records with row numbers that none has yet: in each millisecond, the first one free."""
        bases = {seq_base(record.created_at) for record, _, _ in self._new_records}
        (taken,) = self._connection.execute(TAKEN_SEQS, (as_json(list(bases)),)).fetchone()
        following = {base: base for base in bases}
        for seq in decode_seqs(taken) if taken else ():
            following[seq - seq % SEQ_STEP] = seq + 1
        rows = []
        for record, price, held in self._new_records:
            base = seq_base(record.created_at)
            rows.append(usage_row(record, following[base], price, held))
            following[base] += 1
        return rows


class _Touched:
    """What a batch will read."""

    def __init__(self, ops: Sequence[Op], day: int) -> None:
        self.pairs: dict[tuple[str, str], None] = {}
        self.resolving: dict[str, None] = {}
        self.now = 0.0
        reserving: list[str] = []
        records: list[str] = []
        stored_caps: dict[str, None] = {}
        self.expiring = False
        periods: Periods | None = None
        for op in ops:
            match op:
                case Reserve():
                    request = op.request
                    reserving.append(request.id)
                    if request.replaces is not None:
                        self.resolving[request.replaces] = None
                    self.now = max(self.now, op.now)
                    if day_number(op.now) > day or periods is None:
                        day = max(day, day_number(op.now))
                        periods = periods_of(day)
                    for claim in request.scopes:
                        for period in periods:
                            self.pairs[claim.scope, period] = None
                        if claim.caps is None:
                            stored_caps[claim.scope] = None
                case Settle() | Release() | Renew():
                    self.resolving[op.hold_id] = None
                case Record():
                    records.append(op.record.id)
                case Expire():
                    self.now = max(self.now, op.now)
                    self.expiring = True
                case SetCaps() | Ping():
                    pass
        self.parameters = {
            "holds": as_json(reserving + list(self.resolving)),
            "now": self.now,
            "due": DUE_AT_ONCE if self.expiring else DUE_IN_PASSING,
            "pairs": as_json(list(self.pairs)),
            "scopes": as_json(list(stored_caps)),
            "records": as_json(reserving + records),
        }
