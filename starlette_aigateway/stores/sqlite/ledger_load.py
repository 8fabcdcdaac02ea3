"""What a batch reads: everything that its operations touch, in one statement with one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from ...policy.budgets import Periods, day_number, periods_of
from .ledger_ops import AddCredit, EndCredit, Expire, Op, Ping, Prune, Record, Release, Renew, Reserve, RollUp, SetCaps, Settle
from .ledger_schema import HoldFacts, RunningCredit, as_json

DUE_IN_PASSING = 32
DUE_AT_ONCE = 1000

LOAD: Final = """
SELECT
  (SELECT value FROM meta WHERE name = 'day'),
  (SELECT '[' || group_concat(facts) || ']' FROM holds WHERE id IN (SELECT value FROM json_each(:holds))),
  (SELECT '[' || group_concat(facts) || ']'
     FROM (SELECT facts FROM holds WHERE expired = 0 AND expires_at <= :now ORDER BY expires_at LIMIT :due)),
  (SELECT min(expires_at) FROM holds WHERE expired = 0 AND expires_at > :now),
  (SELECT json_group_array(json_array(scope, period, spent, held, open, told))
     FROM json_each(:pairs) AS pair CROSS JOIN balances
     ON scope = json_extract(pair.value, '$[0]') AND period = json_extract(pair.value, '$[1]')),
  (SELECT json_group_array(json_array(scope, day, month, total)) FROM caps WHERE scope IN (SELECT value FROM json_each(:scopes))),
  (SELECT json_group_array(json_array(id, scope, amount, expires_at))
     FROM credits WHERE ended_at IS NULL AND scope IN (SELECT value FROM json_each(:claimed))),
  (SELECT json_group_array(id) FROM usage WHERE id IN (SELECT value FROM json_each(:records)))
"""
decode_holds = msgspec.json.Decoder(list[HoldFacts]).decode
decode_balances = msgspec.json.Decoder(list[tuple[str, str, int, int, int, int]]).decode
decode_caps = msgspec.json.Decoder(list[tuple[str, int | None, int | None, int | None]]).decode
decode_credits = msgspec.json.Decoder(list[RunningCredit]).decode
decode_names = msgspec.json.Decoder(list[str]).decode
decode_seqs = msgspec.json.Decoder(list[int]).decode


class Touched:
    """What a batch will read."""

    def __init__(self, ops: Sequence[Op], day: int) -> None:
        self.pairs: dict[tuple[str, str], None] = {}
        self.resolving: dict[str, None] = {}
        self.now = 0.0
        reserving: list[str] = []
        records: list[str] = []
        claimed: dict[str, None] = {}
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
                        claimed[claim.scope] = None
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
                case SetCaps() | AddCredit() | EndCredit() | Prune() | RollUp() | Ping():
                    pass
        self.parameters = {
            "holds": as_json(reserving + list(self.resolving)),
            "now": self.now,
            "due": DUE_AT_ONCE if self.expiring else DUE_IN_PASSING,
            "pairs": as_json(list(self.pairs)),
            "scopes": as_json(list(stored_caps)),
            "claimed": as_json(list(claimed)),
            "records": as_json(reserving + records),
        }
