"""One batch of the ledger inside one transaction: load what it touches, decide each operation in Python, write the changes.

Each SQLite step gives up the interpreter lock and may wait milliseconds for it where the event loop's thread is busy. So the loads
are one statement with one row, and the writes are inserts of many rows at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from math import inf
from typing import Final

from ...accounts import Hold, HoldRequest, UsageRecord
from ...errors import AIGatewayError, RequestError, SpendCapHeld
from ...events import BudgetReached
from ...policy.budgets import Periods, day_number, grant, periods_from, periods_of
from ...types import Caps, Usage
from .ledger_credits import CreditDesk
from .ledger_inserts import CHANGE_BALANCES, INSERT_CAPS, INSERT_ENTRIES, INSERT_HOLDS, INSERT_USAGE, delete_holds
from .ledger_load import (
    LOAD,
    NEXT_LEASE_END,
    Touched,
    decode_balances,
    decode_caps,
    decode_credits,
    decode_holds,
    decode_names,
)
from .ledger_memory import Memory
from .ledger_ops import (
    AddCredit,
    EndCredit,
    Expire,
    Op,
    Outcome,
    Ping,
    Prune,
    Record,
    Release,
    Renew,
    Reserve,
    RollUp,
    SetCaps,
    Settle,
)
from .ledger_prune import prune
from .ledger_rollups import roll_up
from .ledger_schema import (
    ABSENT,
    ADJUSTED,
    NO_USAGE,
    USAGE_COLUMNS,
    HoldFacts,
    Prices,
    Row,
    as_json,
    facts_of,
    record_from,
    record_of,
    seq_base,
    usage_row,
)
from .ledger_terms import Terms
from .ledger_thresholds import Watch

KEEP_EXPIRED = 7 * 86_400.0
"""Seconds that an expired hold waits for a late settlement."""


FORGET_HOLDS: Final = "DELETE FROM holds WHERE expired = 1 AND expires_at < ?"

RECORDS: Final = f"SELECT {USAGE_COLUMNS} FROM usage WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608  # a constant


class Batch:
    """What is known of everything that the operations touch, and what they change."""

    def __init__(
        self, connection: sqlite3.Connection, ops: Sequence[Op], prices: Prices, memory: Memory, thresholds: Sequence[int] = ()
    ) -> None:
        self._connection = connection
        self._ops = ops
        self._prices = prices
        self._memory = memory
        self._books = memory.books
        self._holds = memory.holds
        self.lasting = True
        """Whether the memory is still right after this batch."""
        self._now = 0.0
        self._leases_read = False
        self._day = 0
        self._stored_day = 0
        self._periods: dict[str, Periods] = {}
        self._today: tuple[int, Periods] | None = None
        self._records: dict[str, tuple[UsageRecord, int]] = {}
        self._expired: list[UsageRecord] = []
        self._changed_holds: dict[str, HoldFacts] = {}
        self._gone_holds: list[str] = []
        self._entries: list[Row] = []
        self._new_records: list[tuple[UsageRecord, str | None, int]] = []
        self._new_caps: dict[str, Caps] = {}
        self._credits = CreditDesk(connection, memory, self._entries)
        self._watch = Watch(thresholds)
        self._forget_before: float | None = None
        self._pinged = False

    def load(self) -> None:
        """Reads all that the operations name and that is not known."""
        touched = Touched(self._ops, self._memory)
        if touched.whole:
            self._load_whole(touched)
            return
        self._stored_day = self._day = self._memory.day
        self._now = touched.now
        self._take_named(touched, *touched.look_up(self._connection))

    def _load_whole(self, touched: Touched) -> None:
        """Where the latest day that is stored is after the likely one, all was read for the wrong periods, and is read again."""
        memory, parameters = self._memory, touched.parameters()
        holds, records, stored, due, lease_end, balances, caps, running = self._connection.execute(LOAD, parameters).fetchone()
        if stored > memory.day:
            memory.day = stored
            self.load()
            return
        self._stored_day, self._day, self._now = stored, memory.day, touched.now
        memory.know(touched.pairs, decode_balances(balances))
        memory.know_scopes(touched.claimed, touched.capped, decode_caps(caps), decode_credits(running))
        self._books.next_lease_end, self._leases_read = lease_end, True
        memory.lease_end = inf if lease_end is None else lease_end
        self._take_named(touched, holds, records)
        if due:
            self._expire([facts for facts in decode_holds(due) if facts.id not in touched.resolving], touched.now)
        if due or touched.expiring:
            self._forget_before = touched.now - KEEP_EXPIRED
            self.lasting = False

    def _take_named(self, touched: Touched, holds: str | None, records: str | None) -> None:
        """Records are read only for what is done a second time, which is rare."""
        for facts in decode_holds(holds) if holds else ():
            self._holds[facts.id] = facts
        missing = [hold_id for hold_id in touched.missing if hold_id not in self._holds]
        names = (decode_names(records) if records else []) + missing + [hold_id + ADJUSTED for hold_id in missing]
        if names:
            for row in self._connection.execute(RECORDS, (as_json(names),)).fetchall():
                self._records[row[1]] = record_from(row, self._prices), row[-1]

    def decide(self, op: Op) -> Outcome | AIGatewayError:
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
                case _:
                    return self._keep_house(op)
        except AIGatewayError as refusal:
            return refusal
        return None

    def _keep_house(self, op: Op) -> Outcome:
        """What is no part of a call, and may change more than it says."""
        self.lasting = False
        match op:
            case Expire():
                expired, self._expired = self._expired, []
                return expired
            case SetCaps():
                self._memory.set_caps(op.scope, op.caps)
                self._new_caps[op.scope] = op.caps
            case AddCredit():
                return self._credits.add(op.credit)
            case EndCredit():
                return self._credits.end(op.credit_id, op.now)
            case Prune():
                return prune(self._connection, op)
            case RollUp():
                return roll_up(self._connection, op)
            case Ping():
                self._pinged = True
        return None

    def _reserve(self, op: Reserve) -> Hold:
        request = op.request
        if (known := self._holds.get(request.id)) is not None:
            return known.hold
        if (resolved := self._records.get(request.id)) is not None:
            record, amount = resolved
            return Hold(
                id=record.id,
                amount=amount,
                made_at=record.created_at,
                expires_at=request.expires_at,
                would_refuse=record.would_refuse,
            )
        if request.replaces is not None:
            self._release(request.replaces, op.now, None)
        today = day_number(op.now)
        self._day = day = today if today > self._day else self._day
        if self._today is None or self._today[0] != day:
            self._today = day, periods_of(day)
        periods = self._today[1]
        terms = self._memory.terms_of(request.scopes)
        if op.now >= terms.lapse_at:
            self._credits.lapse(request, op.now)
            terms = self._memory.terms_of(request.scopes)
        self._watch.add(terms.names, periods, terms.caps)
        amount, would_refuse = self._granted(request, terms, periods, op.now)
        made_at = op.now if day == today else day * 86_400.0
        facts = facts_of(
            request,
            op.price,
            amount=amount,
            day=periods.day,
            made_at=made_at,
            scopes=terms.names,
            caps=terms.caps,
            would_refuse=would_refuse,
        )
        self._books.hold(terms.names, periods, amount)
        self._holds[facts.id] = self._changed_holds[facts.id] = facts
        if request.expires_at < self._memory.lease_end:
            self._memory.lease_end = request.expires_at
        self._entries.append(
            (facts.id, "hold", made_at, amount, periods.day, terms.entry[request.enforce], ABSENT if op.price is None else op.price)
        )
        return facts.hold

    def _granted(self, request: HoldRequest, terms: Terms, periods: Periods, now: float) -> tuple[int, str | None]:
        """The amount; and where limits are only reported, the code of the refusal that it passed over."""
        afforded = terms.afforded(request, self._books, periods)
        if afforded is None:
            try:
                afforded = self._or_refused(request, periods, now)
            except RequestError as refusal:
                if request.enforce:
                    raise
                return request.wanted, request.would_refuse or refusal.code
        return afforded if request.enforce else request.wanted, request.would_refuse

    def _or_refused(self, request: HoldRequest, periods: Periods, now: float) -> int:
        """The leases are read only where a refusal says when one ends."""
        try:
            return grant(request, self._books, periods, now)
        except SpendCapHeld:
            if self._leases_read:
                raise
        (self._books.next_lease_end,) = self._connection.execute(NEXT_LEASE_END, (self._now,)).fetchone()
        self._leases_read = True
        return grant(request, self._books, periods, now)

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
            facts.expires_at = max(facts.expires_at, now)  # it waits for a late settlement from when it was noticed
            self._books.resolve(facts.scopes, self._periods_of(facts), held=facts.amount, booked=facts.amount)
            self._holds[facts.id] = self._changed_holds[facts.id] = facts
            self._entries.append((facts.id, "expire", now, facts.amount, ABSENT, ABSENT, ABSENT))
            self._watch_facts(facts)
            self._expired.append(self._book(facts, record_of(facts, self._prices.load(facts.price), "expired", facts.amount)))

    def _adjust(
        self, facts: HoldFacts, amount: int, now: float, usage: Usage, response_model: str | None, latency_ms: int | None
    ) -> UsageRecord:
        difference = amount - facts.amount
        self._books.adjust(facts.scopes, self._periods_of(facts), difference)
        self._forget(facts)
        self._entries.append((facts.id, "adjust", now, difference, ABSENT, ABSENT, ABSENT))
        self._watch_facts(facts)
        price = self._prices.load(facts.price)
        return self._book(
            facts, record_of(facts, price, "adjusted", difference, usage=usage, response_model=response_model, latency_ms=latency_ms)
        )

    def _resolve(self, facts: HoldFacts, kind: str, booked: int, now: float) -> None:
        self._books.resolve(facts.scopes, self._periods_of(facts), held=facts.amount, booked=booked)
        self._forget(facts)
        self._entries.append((facts.id, kind, now, booked, ABSENT, ABSENT, ABSENT))
        self._watch_facts(facts)

    def _watch_facts(self, facts: HoldFacts) -> None:
        self._watch.add(facts.scopes, self._periods_of(facts), facts.caps)

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
        self._memory.lease_end = min(self._memory.lease_end, op.expires_at)
        self._changed_holds[facts.id] = facts
        return True

    def flush(self) -> None:
        connection = self._connection
        if self._gone_holds:
            delete_holds(connection, self._gone_holds)
        if self._changed_holds:
            INSERT_HOLDS(connection, [(f.id, f.expires_at, int(f.expired), as_json(f)) for f in self._changed_holds.values()])
        INSERT_ENTRIES(connection, self._entries)
        if self._new_records:
            INSERT_USAGE(connection, self._usage_rows())
        CHANGE_BALANCES(connection, self._books.changes())
        if self._day > self._stored_day:
            connection.execute("UPDATE meta SET value = ? WHERE name = 'day'", (self._day,))
        self._memory.day = self._day
        if not self.lasting:
            self._flush_house()
        self._credits.flush()

    def _flush_house(self) -> None:
        connection = self._connection
        INSERT_CAPS(connection, [(scope, *caps) for scope, caps in self._new_caps.items()])
        if self._forget_before is not None:
            connection.execute(FORGET_HOLDS, (self._forget_before,))
        if self._pinged:
            connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'pings'")

    def reached(self) -> list[BudgetReached]:
        """The thresholds that what is spent has reached and that nobody was told before. After `flush`."""
        return self._watch.reached(self._connection, self._books)

    def _usage_rows(self) -> list[Row]:
        """New records with row numbers that none has yet: in each millisecond, the first one free."""
        numbers = self._memory.rows
        bases = [seq_base(record.created_at) for record, _, _ in self._new_records]
        numbers.read(self._connection, dict.fromkeys(bases))
        return [
            usage_row(record, numbers.next(base), price, held) for base, (record, price, held) in zip(bases, self._new_records, strict=True)
        ]
