"""What a batch reads: everything that its operations touch and that is not known yet, in one statement with one row."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ...policy.budgets import Periods, day_number, periods_of
from .ledger_memory import BalanceRow, CapsRow, Memory
from .ledger_ops import AddCredit, EndCredit, Expire, Op, Ping, Prune, Record, Release, Renew, Reserve, RollUp, SetCaps, Settle
from .ledger_schema import HoldFacts, RunningCredit, as_json

DUE_IN_PASSING = 32
DUE_AT_ONCE = 1000

LOAD: Final = """
SELECT
  (SELECT '[' || group_concat(facts) || ']' FROM holds WHERE id IN (SELECT value FROM json_each(:holds))),
  (SELECT json_group_array(id) FROM usage WHERE id IN (SELECT value FROM json_each(:records))),
  (SELECT value FROM meta WHERE name = 'day'),
  (SELECT '[' || group_concat(facts) || ']'
     FROM (SELECT facts FROM holds WHERE expired = 0 AND expires_at <= :now ORDER BY expires_at LIMIT :due)),
  (SELECT min(expires_at) FROM holds WHERE expired = 0 AND expires_at > :now),
  (SELECT json_group_array(json_array(scope, period, spent, held, open, told))
     FROM json_each(:pairs) AS pair CROSS JOIN balances
     ON scope = json_extract(pair.value, '$[0]') AND period = json_extract(pair.value, '$[1]')),
  (SELECT json_group_array(json_array(scope, day, month, total)) FROM caps WHERE scope IN (SELECT value FROM json_each(:capped))),
  (SELECT json_group_array(json_array(id, scope, amount, expires_at))
     FROM credits WHERE ended_at IS NULL AND scope IN (SELECT value FROM json_each(:claimed)))
"""
LOOK_UP: Final = """
SELECT (SELECT '[' || group_concat(facts) || ']' FROM holds WHERE id IN (SELECT value FROM json_each(:holds))),
  (SELECT json_group_array(id) FROM usage WHERE id IN (SELECT value FROM json_each(:records)))
"""
LOOK_UP_ONE: Final = "SELECT (SELECT '[' || facts || ']' FROM holds WHERE id = ?1), (SELECT json_array(id) FROM usage WHERE id = ?1)"
NEXT_LEASE_END: Final = "SELECT min(expires_at) FROM holds WHERE expired = 0 AND expires_at > ?"

decode_holds = msgspec.json.Decoder(list[HoldFacts]).decode
decode_balances = msgspec.json.Decoder(list[BalanceRow]).decode
decode_caps = msgspec.json.Decoder(list[CapsRow]).decode
decode_credits = msgspec.json.Decoder(list[RunningCredit]).decode
decode_names = msgspec.json.Decoder(list[str]).decode


class Touched:
    """What a batch touches and its `memory` does not know: `holds` and `records` by their ids, `missing` being those to be resolved;
    `pairs` of scope and period, and of the scopes those whose credits (`claimed`) and stored caps (`capped`) are unknown."""

    def __init__(self, ops: Sequence[Op], memory: Memory) -> None:
        self._memory = memory
        self.now = 0.0
        self.expiring = False
        self.resolving: dict[str, None] = {}
        self.pairs: dict[tuple[str, str], None] = {}
        self.claimed: dict[str, Periods] = {}
        self.capped: dict[str, None] = {}
        self.reserving: list[str] = []
        self.records: list[str] = []
        day, periods = memory.day, None
        for op in ops:
            match op:
                case Reserve():
                    self._now(op.now)
                    if periods is None or day_number(op.now) > day:
                        day = max(day, day_number(op.now))
                        periods = periods_of(day)
                    self._reserve(op, periods)
                case Settle() | Release() | Renew():
                    self.resolving[op.hold_id] = None
                case Record():
                    self.records.append(op.record.id)
                case Expire():
                    self._now(op.now)
                    self.expiring = True
                case SetCaps() | AddCredit() | EndCredit() | Prune() | RollUp() | Ping():
                    pass
        self.missing = [hold_id for hold_id in self.resolving if hold_id not in memory.holds]
        self.holds = self.reserving + self.missing

    def _now(self, now: float) -> None:
        if now > self.now:
            self.now = now

    def _reserve(self, op: Reserve, periods: Periods) -> None:
        request, memory = op.request, self._memory
        self.reserving.append(request.id)
        self.records.append(request.id)
        if request.replaces is not None:
            self.resolving[request.replaces] = None
        for claim in request.scopes:
            scope = claim.scope
            if claim.caps is None and scope not in memory.books.caps:
                self.capped[scope] = None
            if memory.scopes.get(scope) != periods:
                self.claimed[scope] = periods
                for period in periods:
                    if (scope, period) not in memory.books.balances:
                        self.pairs[scope, period] = None

    @property
    def whole(self) -> bool:
        """Whether there is more to read than what has an id."""
        return bool(self.claimed or self.capped or self.expiring) or (bool(self.reserving) and self.now >= self._memory.lease_end)

    @property
    def due(self) -> int:
        """How many holds may expire in this batch."""
        return DUE_AT_ONCE if self.expiring else DUE_IN_PASSING

    def parameters(self) -> dict[str, Any]:
        """Those of `LOAD`."""
        return {
            "holds": as_json(self.holds),
            "records": as_json(self.records),
            "now": self.now,
            "due": self.due,
            "pairs": as_json(list(self.pairs)),
            "capped": as_json(list(self.capped)),
            "claimed": as_json([scope for scope in self.claimed if scope not in self._memory.credits]),
        }

    def look_up(self, connection: sqlite3.Connection) -> tuple[str | None, str | None]:
        """What has an id: holds and the names of records, in JSON."""
        if not self.holds and not self.records:
            return None, None
        if len(self.holds) <= 1 and self.holds == self.records:
            found = connection.execute(LOOK_UP_ONE, self.holds)
        else:
            found = connection.execute(LOOK_UP, {"holds": as_json(self.holds), "records": as_json(self.records)})
        row: tuple[str | None, str | None] = found.fetchone()
        return row
