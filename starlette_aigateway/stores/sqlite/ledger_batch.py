"""One batch of the ledger inside one transaction: load what it touches, decide each operation in Python, write the changes.

Each SQLite step gives up the interpreter lock and may wait milliseconds for it where the event loop's thread is busy. So the loads
are one statement with one row, and the writes are inserts of many rows at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from ...accounts import Credit, Hold, HoldRequest, UsageRecord
from ...errors import AIGatewayError, InvalidArgument, RequestError
from ...events import BudgetReached
from ...policy.budgets import Balance, Books, Periods, day_number, grant, periods_from, periods_of
from ...types import NO_CAPS, Caps, Usage
from .ledger_credits import MAX_SUM, find_credit, running_credit
from .ledger_inserts import CHANGE_BALANCES, INSERT_CAPS, INSERT_CREDITS, INSERT_ENTRIES, INSERT_HOLDS, INSERT_USAGE
from .ledger_load import LOAD, Touched, decode_balances, decode_caps, decode_credits, decode_holds, decode_names, decode_seqs
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
    Result,
    RollUp,
    SetCaps,
    Settle,
    Told,
)
from .ledger_prune import prune
from .ledger_rollups import roll_up
from .ledger_schema import (
    ADJUSTED,
    NO_USAGE,
    SEQ_STEP,
    USAGE_COLUMNS,
    HoldFacts,
    Limit,
    Prices,
    Row,
    RunningCredit,
    as_json,
    facts_of,
    record_from,
    record_of,
    seq_base,
    usage_row,
)
from .ledger_thresholds import Watch

KEEP_EXPIRED = 7 * 86_400.0
"""Seconds that an expired hold waits for a late settlement."""


DELETE_HOLDS: Final = "DELETE FROM holds WHERE id IN (SELECT value FROM json_each(?))"
FORGET_HOLDS: Final = "DELETE FROM holds WHERE expired = 1 AND expires_at < ?"

END_CREDIT: Final = "UPDATE credits SET ended_at = ? WHERE id = ? AND ended_at IS NULL"
RECORDS: Final = f"SELECT {USAGE_COLUMNS} FROM usage WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608  # a constant
TAKEN_SEQS: Final = """
SELECT '[' || group_concat((SELECT max(seq) FROM usage WHERE seq >= value AND seq < value + 1048576)) || ']' FROM json_each(?)
"""


class BatchWriter:
    """Applies batches; knows nothing from one to the next but the latest day that it read, which saves a second load. `thresholds` are
    the percents of a cap that are told."""

    def __init__(self, prices: Prices, thresholds: Sequence[int] = ()) -> None:
        self._prices = prices
        self._thresholds = thresholds
        self._day = 0

    def apply(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | AIGatewayError]:
        batch = Batch(connection, ops, self._prices, self._thresholds)
        self._day = batch.load(self._day)
        outcomes = [batch.decide(op) for op in ops]
        batch.flush()
        reached = batch.reached()
        if reached:
            return [*outcomes[:-1], Told(outcomes[-1], reached)]
        return outcomes

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

    def __init__(self, connection: sqlite3.Connection, ops: Sequence[Op], prices: Prices, thresholds: Sequence[int] = ()) -> None:
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
        self._credits: dict[str, list[RunningCredit]] = {}
        self._new_credits: list[Credit] = []
        self._ended_credits: list[tuple[float, str]] = []
        self._watch = Watch(thresholds)
        self._forget_before: float | None = None
        self._pinged = False

    def load(self, likely_day: int) -> int:
        """Reads all that the operations name. Returns the latest day that is stored; where it is not the `likely_day`, the periods
        that were read for were the wrong ones, and all is read again."""
        touched = Touched(self._ops, likely_day)
        stored, holds, due, next_lease_end, balances, caps, running, records = self._connection.execute(LOAD, touched.parameters).fetchone()
        if stored > likely_day:
            return self.load(stored)
        self._day = max(likely_day, stored)
        self._stored_day = stored
        self._books.next_lease_end = next_lease_end
        for pair in touched.pairs:
            self._books.balances[pair] = Balance()
        for scope, period, *figures in decode_balances(balances):
            self._books.balances[scope, period] = Balance(*figures)
        for scope, day, month, total in decode_caps(caps):
            self._books.caps[scope] = Caps(day, month, total)
        for credit in decode_credits(running):
            self._run(credit)
        for facts in decode_holds(holds) if holds else ():
            self._holds[facts.id] = facts
        self._load_records(touched.resolving, decode_names(records))
        if due:
            self._expire([facts for facts in decode_holds(due) if facts.id not in touched.resolving], touched.now)
        if due or touched.expiring:
            self._forget_before = touched.now - KEEP_EXPIRED
        return int(stored)

    def _load_records(self, resolving: Iterable[str], known: list[str]) -> None:
        """Records are read only for what is done a second time, which is rare."""
        missing = [hold_id for hold_id in resolving if hold_id not in self._holds]
        names = known + missing + [hold_id + ADJUSTED for hold_id in missing]
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
        """What is no part of a call."""
        match op:
            case Expire():
                expired, self._expired = self._expired, []
                return expired
            case SetCaps():
                self._books.caps[op.scope] = self._new_caps[op.scope] = op.caps
            case AddCredit():
                return self._add_credit(op.credit)
            case EndCredit():
                return self._end_credit(op)
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
        self._day = day = max(self._day, today)
        if self._today is None or self._today[0] != day:
            self._today = day, periods_of(day)
        periods = self._today[1]
        self._lapse(request, op.now)
        caps = [self._books.raised_caps(claim) for claim in request.scopes]
        for claim, cap in zip(request.scopes, caps, strict=True):
            self._watch.add(claim.scope, periods, cap)
        amount, would_refuse = self._granted(request, periods, op.now)
        made_at = op.now if day == today else day * 86_400.0
        facts = facts_of(request, op.price, amount=amount, day=periods.day, made_at=made_at, caps=caps, would_refuse=would_refuse)
        self._books.hold(facts.scopes, periods, amount)
        self._holds[facts.id] = self._changed_holds[facts.id] = facts
        limits = as_json(self._limits(request, enforced=request.enforce))
        self._entries.append((facts.id, "hold", made_at, amount, periods.day, limits, op.price))
        return facts.hold

    def _granted(self, request: HoldRequest, periods: Periods, now: float) -> tuple[int, str | None]:
        """The amount; and where limits are only reported, the code of the refusal that it passed over."""
        try:
            afforded = grant(request, self._books, periods, now)
        except RequestError as refusal:
            if request.enforce:
                raise
            return request.wanted, request.would_refuse or refusal.code
        return afforded if request.enforce else request.wanted, request.would_refuse

    def _limits(self, request: HoldRequest, *, enforced: bool) -> list[Limit]:
        """Where limits are only reported, a grant was made under none, and breaks none."""
        return [
            Limit(claim.scope, *(self._books.caps_of(claim) if enforced else NO_CAPS), self._books.credits.get(claim.scope, 0))
            for claim in request.scopes
        ]

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
            self._entries.append((facts.id, "expire", now, facts.amount, None, None, None))
            self._watch_facts(facts)
            self._expired.append(self._book(facts, record_of(facts, self._prices.load(facts.price), "expired", facts.amount)))

    def _adjust(
        self, facts: HoldFacts, amount: int, now: float, usage: Usage, response_model: str | None, latency_ms: int | None
    ) -> UsageRecord:
        difference = amount - facts.amount
        self._books.adjust(facts.scopes, self._periods_of(facts), difference)
        self._forget(facts)
        self._entries.append((facts.id, "adjust", now, difference, None, None, None))
        self._watch_facts(facts)
        price = self._prices.load(facts.price)
        return self._book(
            facts, record_of(facts, price, "adjusted", difference, usage=usage, response_model=response_model, latency_ms=latency_ms)
        )

    def _resolve(self, facts: HoldFacts, kind: str, booked: int, now: float) -> None:
        self._books.resolve(facts.scopes, self._periods_of(facts), held=facts.amount, booked=booked)
        self._forget(facts)
        self._entries.append((facts.id, kind, now, booked, None, None, None))
        self._watch_facts(facts)

    def _watch_facts(self, facts: HoldFacts) -> None:
        if facts.caps is not None:
            periods = self._periods_of(facts)
            for scope, caps in zip(facts.scopes, facts.caps, strict=True):
                self._watch.add(scope, periods, caps)

    # -- credits -----------------------------------------------------------------------------------------------------------

    def _run(self, credit: RunningCredit) -> None:
        self._credits.setdefault(credit.scope, []).append(credit)
        self._books.credits[credit.scope] = self._books.credits.get(credit.scope, 0) + credit.amount

    def _lapse(self, request: HoldRequest, now: float) -> None:
        """Takes back what is over. For good: a clock that steps back finds it ended."""
        for claim in request.scopes:
            for credit in self._credits.get(claim.scope, ())[:]:
                if credit.expires_at <= now:
                    self._end(credit, now)

    def _end(self, credit: RunningCredit, now: float) -> None:
        running = self._credits.get(credit.scope, [])
        if credit in running:
            running.remove(credit)
            self._books.credits[credit.scope] -= credit.amount
        self._ended_credits.append((now, credit.id))
        self._entries.append((credit.id, "credit", now, -credit.amount, None, as_json([credit.scope]), None))

    def _add_credit(self, credit: Credit) -> Credit:
        known = find_credit(self._connection, credit.id) or next((new for new in self._new_credits if new.id == credit.id), None)
        if known is not None:
            return known
        waiting = sum(new.amount for new in self._new_credits if new.scope == credit.scope)
        if running_credit(self._connection, credit.scope, credit.created_at) + waiting + credit.amount > MAX_SUM:
            raise InvalidArgument(f"the running credits of one scope are at most {MAX_SUM} nano-USD together", param="amount")
        self._new_credits.append(credit)
        self._entries.append((credit.id, "credit", credit.created_at, credit.amount, None, as_json([credit.scope]), None))
        self._run(RunningCredit(credit.id, credit.scope, credit.amount, credit.expires_at))
        return credit

    def _end_credit(self, op: EndCredit) -> Credit | None:
        known = find_credit(self._connection, op.credit_id) or next((new for new in self._new_credits if new.id == op.credit_id), None)
        if known is None or known.ended_at is not None:
            return known
        gone = next((at for at, name in self._ended_credits if name == op.credit_id), None)
        if gone is None:
            gone = op.now
            self._end(RunningCredit(known.id, known.scope, known.amount, known.expires_at), op.now)
        return replace(known, ended_at=gone)

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
        INSERT_CREDITS(connection, [(c.id, c.scope, c.amount, c.created_at, c.expires_at, c.actor, c.note) for c in self._new_credits])
        connection.executemany(END_CREDIT, self._ended_credits)
        changes = [(*key, *balance.changes) for key, balance in self._books.balances.items()]
        CHANGE_BALANCES(connection, [change for change in changes if change[2] or change[3] or change[4]])
        INSERT_CAPS(connection, [(scope, *caps) for scope, caps in self._new_caps.items()])
        if self._day > self._stored_day:
            connection.execute("UPDATE meta SET value = ? WHERE name = 'day'", (self._day,))
        if self._forget_before is not None:
            connection.execute(FORGET_HOLDS, (self._forget_before,))
        if self._pinged:
            connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'pings'")

    def reached(self) -> list[BudgetReached]:
        """The thresholds that what is spent has reached and that nobody was told before. After `flush`."""
        return self._watch.reached(self._connection, self._books)

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
