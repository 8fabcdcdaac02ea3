"""The ledger's tables, and what a row of them is in Python.

- `balances`: what is spent and held, by scope and period (`2026-01-31`, `2026-01`, empty for the lifetime); `open` counts the open
  holds of a scope, in its lifetime row; `told` is the highest threshold in percent that was told.
- `holds`: the open ones, and for a week the expired ones, which a late settlement may still adjust. `facts` is a `HoldFacts` in JSON.
- `entries`: append-only, in the order of the decisions; what `check` replays. A `hold` entry carries its price, its day and, for each
  scope, the `Limit` that it was decided under. Those of settled holds are at last replaced by `carry` entries (`ledger_prune.py`).
- `usage`: one record for each attempt. The row number is the time in milliseconds and 20 bits that tell equal times apart, so that
  each index on a filter is also in the order of time, and none on the time itself is needed.
- `rollups`: what records were rolled up to (`ledger_rollups.py`): how many they were and their sums, for each UTC day and combination of
  what reports tell apart. The row number is the day and 32 bits that tell the rows of a day apart, as in `usage`.
- `credits`: temporary top-ups, for good; `ended_at` is set when one no longer counts. Each is an entry of its amount when it is given,
  and one of the negative amount when it ends.
- `caps`: those of tenants and of the gateway. `meta`: `day` is the latest UTC day that a hold was asked for in, granted or not,
  in days since 1970; of the entries up to the row number `carried` not all are there any more; `carrying` is 1 while some are
  deleted, and carries added to; records of the days before the day `rolled_up` may be rollups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from ...accounts import Hold, HoldRequest, Outcome, UsageRecord
from ...money import text
from ...policy.budgets import raised
from ...prices import RATES, Price, PriceTier
from ...types import Caps, Usage

SCHEMA: Final = (
    """
CREATE TABLE balances (
    scope TEXT NOT NULL, period TEXT NOT NULL,
    spent INTEGER NOT NULL, held INTEGER NOT NULL, open INTEGER NOT NULL,
    PRIMARY KEY (scope, period)
) WITHOUT ROWID;
CREATE TABLE holds (
    id TEXT NOT NULL PRIMARY KEY, expires_at REAL NOT NULL, expired INTEGER NOT NULL, facts TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX leases ON holds (expires_at) WHERE expired = 0;
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, hold TEXT NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL, amount INTEGER NOT NULL,
    day TEXT, scopes TEXT
);
CREATE TABLE usage (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, request_id TEXT NOT NULL, attempt INTEGER NOT NULL, created_at REAL NOT NULL,
    principal TEXT NOT NULL, tenant TEXT, key_id TEXT, provider TEXT NOT NULL, model TEXT NOT NULL, response_model TEXT,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cache_read_input_tokens INTEGER NOT NULL,
    cache_creation_input_tokens INTEGER NOT NULL, reasoning_output_tokens INTEGER NOT NULL,
    cost INTEGER NOT NULL, price TEXT, outcome TEXT NOT NULL, latency_ms INTEGER, prompt TEXT, tags TEXT, held INTEGER NOT NULL
);
CREATE INDEX usage_principal ON usage (principal);
CREATE INDEX usage_tenant ON usage (tenant) WHERE tenant IS NOT NULL;
CREATE INDEX usage_key ON usage (key_id) WHERE key_id IS NOT NULL;
CREATE INDEX usage_model ON usage (model);
CREATE TABLE caps (scope TEXT NOT NULL PRIMARY KEY, day INTEGER, month INTEGER, total INTEGER) WITHOUT ROWID;
CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('day', 0), ('pings', 0);
""",
    """
ALTER TABLE entries ADD COLUMN price TEXT;
ALTER TABLE balances ADD COLUMN told INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage ADD COLUMN cache_creation_1h_input_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage ADD COLUMN would_refuse TEXT;
CREATE TABLE credits (
    id TEXT NOT NULL PRIMARY KEY, scope TEXT NOT NULL, amount INTEGER NOT NULL, created_at REAL NOT NULL, expires_at REAL NOT NULL,
    ended_at REAL, actor TEXT NOT NULL, note TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX carries ON entries (hold, day) WHERE kind = 'carry';
CREATE INDEX credits_of_a_scope ON credits (scope);
CREATE INDEX credits_running ON credits (scope) WHERE ended_at IS NULL;
INSERT INTO meta VALUES ('carried', 0), ('carrying', 0);
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
BEGIN SELECT raise(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_are_only_carried BEFORE DELETE ON entries WHEN (SELECT value FROM meta WHERE name = 'carrying') = 0
BEGIN SELECT raise(ABORT, 'entries are append-only'); END;
""",
    """
CREATE TABLE rollups (
    seq INTEGER PRIMARY KEY, principal TEXT NOT NULL, tenant TEXT, key_id TEXT, provider TEXT NOT NULL, model TEXT NOT NULL,
    outcome TEXT NOT NULL, records INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cache_read_input_tokens INTEGER NOT NULL,
    cache_creation_input_tokens INTEGER NOT NULL, cache_creation_1h_input_tokens INTEGER NOT NULL,
    reasoning_output_tokens INTEGER NOT NULL, cost INTEGER NOT NULL
);
CREATE INDEX rollups_principal ON rollups (principal);
CREATE INDEX rollups_tenant ON rollups (tenant) WHERE tenant IS NOT NULL;
CREATE INDEX rollups_key ON rollups (key_id) WHERE key_id IS NOT NULL;
CREATE INDEX rollups_model ON rollups (model);
CREATE INDEX expired_holds ON holds (expires_at) WHERE expired = 1;
INSERT INTO meta VALUES ('rolled_up', 0);
DROP TRIGGER entries_never_change;
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
WHEN OLD.kind <> 'carry' OR NEW.kind <> 'carry' OR (SELECT value FROM meta WHERE name = 'carrying') = 0
BEGIN SELECT raise(ABORT, 'entries are append-only'); END;
""",
)

SUMMED: Final = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation_1h_input_tokens",
    "reasoning_output_tokens", "cost",
)  # fmt: skip
"""What a rollup sums up; also what no report shows yet, since it cannot be had later."""

ROLLED_UP: Final = "rolled_up"

LAST_ENTRY: Final = "SELECT coalesce(max(seq), 0) FROM entries"
"""It never falls: pruning leaves the last entry of all."""

SEQ_BITS = 20
SEQ_STEP = 1 << SEQ_BITS
DAY_STEP = 1 << 32
ADJUSTED = ".adjust"
"""What the id of an `adjusted` record has after the hold's."""


class HoldFacts(Struct, array_like=True, gc=False):
    """All that is known of a hold that is not resolved. `made_at` is never before the ledger's latest day. `caps` are those of each of
    the `scopes` as they were then, credits included; None where there were none."""

    id: str
    request_id: str
    attempt: int
    scopes: tuple[str, ...]
    principal: str
    tenant: str | None
    key_id: str | None
    provider: str
    model: str
    price: str | None
    prompt: str | None
    tags: dict[str, str] | None
    amount: int
    day: str
    made_at: float
    expires_at: float
    expired: bool = False
    caps: tuple[Caps, ...] | None = None
    would_refuse: str | None = None

    @property
    def hold(self) -> Hold:
        return Hold(id=self.id, amount=self.amount, made_at=self.made_at, expires_at=self.expires_at, would_refuse=self.would_refuse)


class Limit(Struct, array_like=True, gc=False):
    """What one scope was held under: its caps in nano-USD, and what running credits added to each. Without caps, nothing was enforced."""

    scope: str
    day: int | None
    month: int | None
    total: int | None
    credit: int = 0

    @property
    def caps(self) -> Caps:
        return raised(Caps(self.day, self.month, self.total), self.credit)


class RunningCredit(Struct, array_like=True, gc=False):
    id: str
    scope: str
    amount: int
    expires_at: float


NO_USAGE = Usage(input_tokens=0, output_tokens=0)


def seq_base(created_at: float) -> int:
    """The first row number of the millisecond that `created_at` (Unix seconds) lies in."""
    return int(created_at * 1000) << SEQ_BITS


def day_base(day: int) -> int:
    """The first row number of a rollup of `day`, in days since 1970."""
    return day * DAY_STEP


class Prices:
    """Price snapshots as compact JSON and back. A gateway has few prices: both ways are remembered, up to a bound."""

    BOUND = 1024

    def __init__(self) -> None:
        self._texts: dict[Price, str] = {}
        self._prices: dict[str, Price] = {}

    def dump(self, price: Price | None) -> str | None:
        if price is None:
            return None
        known = self._texts.get(price)
        if known is None:
            known = msgspec.json.encode(_snapshot(price)).decode()
            if len(self._texts) >= self.BOUND:
                self._texts.clear()
            self._texts[price] = known
        return known

    def load(self, stored: str | None) -> Price | None:
        if stored is None:
            return None
        known = self._prices.get(stored)
        if known is None:
            known = _price(msgspec.json.decode(stored, type=list[str | list[str | int]]))
            if len(self._prices) >= self.BOUND:
                self._prices.clear()
            self._prices[stored] = known
        return known


FIRST_RATES = ("input", "output", "cache_read", "cache_write")
LATER_RATES = ("cache_write_1h", "reasoning")


def _snapshot(price: Price) -> list[Any]:
    """The first rates and the fee per call; then, only where they say something of their own, the later rates and the tiers, each a list
    of its `above` and its rates. The first five are what the ledger's first releases wrote."""
    amounts: list[Any] = [text(getattr(price, name)) for name in (*FIRST_RATES, "request")]
    if price.tiers or price.cache_write_1h != price.cache_write or price.reasoning != price.output:
        amounts += [text(getattr(price, name)) for name in LATER_RATES]
        amounts += [[tier.above, *(text(getattr(tier, name)) for name in RATES)] for tier in price.tiers]
    return amounts


def _price(snapshot: Sequence[Any]) -> Price:
    *first, request = snapshot[:5]
    rates = dict(zip(FIRST_RATES + LATER_RATES, (*first, *snapshot[5:7]), strict=False))
    tiers = [PriceTier(above, **dict(zip(RATES, amounts, strict=True))) for above, *amounts in snapshot[7:]]
    return Price(**rates, request=request, tiers=tiers)


def facts_of(
    request: HoldRequest,
    price: str | None,
    *,
    amount: int,
    day: str,
    made_at: float,
    scopes: tuple[str, ...],
    caps: tuple[Caps, ...] | None,
    would_refuse: str | None,
) -> HoldFacts:
    return HoldFacts(
        request.id,
        request.request_id,
        request.attempt,
        scopes,
        request.principal,
        request.tenant,
        request.key_id,
        request.provider,
        request.model,
        price,
        request.prompt,
        dict(request.tags) or None,
        amount,
        day,
        made_at,
        request.expires_at,
        False,
        caps,
        would_refuse,
    )


def record_of(
    facts: HoldFacts,
    price: Price | None,
    outcome: Outcome,
    cost: int,
    *,
    usage: Usage = NO_USAGE,
    response_model: str | None = None,
    latency_ms: int | None = None,
) -> UsageRecord:
    """What a resolved hold leaves in the books."""
    return UsageRecord(
        facts.id + ADJUSTED if outcome == "adjusted" else facts.id,
        facts.request_id,
        facts.attempt,
        facts.made_at,
        facts.principal,
        facts.tenant,
        facts.key_id,
        facts.provider,
        model=facts.model,
        response_model=response_model,
        usage=usage,
        cost=cost,
        price=price,
        outcome=outcome,
        latency_ms=latency_ms,
        prompt=facts.prompt,
        tags=facts.tags or {},
        would_refuse=facts.would_refuse,
    )


USAGE_COLUMNS = (
    "seq, id, request_id, attempt, created_at, principal, tenant, key_id, provider, model, response_model, input_tokens, output_tokens,"
    " cache_read_input_tokens, cache_creation_input_tokens, reasoning_output_tokens, cost, price, outcome, latency_ms, prompt, tags,"
    " cache_creation_1h_input_tokens, would_refuse, held"
)
USAGE_WIDTH = USAGE_COLUMNS.count(",") + 1
USAGE_TEXTS = [USAGE_COLUMNS.split(", ").index(name) for name in ("tenant", "key_id", "price", "prompt", "tags", "would_refuse")]
ABSENT: Final = 0
"""NULL, where a text is written: no text is equal to a number."""

_encode = msgspec.json.Encoder().encode

Row = Sequence[Any]  # what sqlite3 binds and returns: int, float, str, None


def as_json(value: object) -> str:
    return _encode(value).decode()


def usage_row(record: UsageRecord, seq: int, price: str | None, held: int) -> Row:
    usage = record.usage
    return (
        seq,
        record.id,
        record.request_id,
        record.attempt,
        record.created_at,
        record.principal,
        ABSENT if record.tenant is None else record.tenant,
        ABSENT if record.key_id is None else record.key_id,
        record.provider,
        record.model,
        record.response_model,
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_input_tokens,
        usage.cache_creation_input_tokens,
        usage.reasoning_output_tokens,
        record.cost,
        ABSENT if price is None else price,
        record.outcome,
        record.latency_ms,
        ABSENT if record.prompt is None else record.prompt,
        as_json(record.tags) if record.tags else ABSENT,
        usage.cache_creation_1h_input_tokens,
        ABSENT if record.would_refuse is None else record.would_refuse,
        held,
    )


def record_from(row: Row, prices: Prices) -> UsageRecord:
    """A row of `USAGE_COLUMNS` as the record that it was."""
    return UsageRecord(
        id=row[1],
        request_id=row[2],
        attempt=row[3],
        created_at=row[4],
        principal=row[5],
        tenant=row[6],
        key_id=row[7],
        provider=row[8],
        model=row[9],
        response_model=row[10],
        usage=Usage(
            input_tokens=row[11],
            output_tokens=row[12],
            cache_read_input_tokens=row[13],
            cache_creation_input_tokens=row[14],
            cache_creation_1h_input_tokens=row[22],
            reasoning_output_tokens=row[15],
        ),
        cost=row[16],
        price=prices.load(row[17]),
        outcome=row[18],
        latency_ms=row[19],
        prompt=row[20],
        tags={} if row[21] is None else msgspec.json.decode(row[21], type=dict[str, str]),
        would_refuse=row[23],
    )
