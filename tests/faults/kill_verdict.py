"""What is left of a kill loop: the provider's own bill against our books, and every cap against what was spent."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path

from starlette_aigateway import UsageRecord
from starlette_aigateway.accounts import UsageQuery, principal_scope
from starlette_aigateway.policy.budgets import WINDOWS
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.types import Caps

from .kill_load import Seen

KNOWN = ("completed", "overrun", "adjusted")
"""Outcomes of calls whose usage the provider told."""


@dataclass(frozen=True)
class Verdict:
    """Money in US dollars. A call is one attempt at one provider. What has to be nought is `wrong`.

    `over_charged`: by outcome, what was booked above the bill. As shares of the bill, `by_kills` is that of holds whose process died,
    `by_silence` that of calls whose provider told no usage, so that the full hold or an estimate was booked.
    """

    kills: int
    seconds: int
    asked: int
    statuses: dict[str, int]
    connections_lost: int
    streams_left: int
    billed_calls: int
    booked_calls: int
    outcomes: dict[str, int]
    caps: int
    caps_reached: int
    billed_usd: str
    booked_usd: str
    exact_calls: int
    over_charged: dict[str, str]
    over_charged_by_kills: float
    over_charged_by_silence: float
    known_and_booked_otherwise: int
    over_cap: int
    lost: int
    lost_usd: str
    let_through: int
    answers_booked_otherwise: int
    still_held: int
    findings: list[str]

    @property
    def wrong(self) -> list[str]:
        noughts = {
            "scopes over their cap": self.over_cap,
            "billed calls that are not booked in full": self.lost,
            "refused requests that a provider was asked for": self.let_through,
            "answers whose cost is not the one that was told": self.answers_booked_otherwise,
            "calls of a known usage that are booked otherwise": self.known_and_booked_otherwise,
            "scopes with money held for ever": self.still_held,
            "findings of the audit": len(self.findings),
        }
        return [f"{count} {what}" for what, count in noughts.items() if count]

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"wrong": self.wrong})


def billed(path: Path) -> tuple[dict[tuple[str, str], int], Counter[str]]:
    """The provider's bill, nano-USD: by `(request, provider)`, and by principal."""
    calls: dict[tuple[str, str], int] = defaultdict(int)
    principals: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        calls[entry["request"], entry["provider"]] += entry["nano_usd"]
        principals[entry["principal"]] += entry["nano_usd"]
    return calls, principals


async def records_of(ledger: SQLiteLedger) -> list[UsageRecord]:
    records: list[UsageRecord] = []
    cursor: str | None = None
    while True:
        page = await ledger.usage(UsageQuery(limit=1000, cursor=cursor))
        records.extend(page.data)
        cursor = page.next_cursor
        if cursor is None:
            return records


async def over_caps(ledger: SQLiteLedger, caps: Mapping[str, Caps], principals: Counter[str], now: float) -> tuple[int, int, int]:
    """How many scopes are over a cap, by our books or by the provider's; how many have less left than a twentieth; in how many money is
    still held."""
    over, reached, held = 0, 0, 0
    for budget in await ledger.budgets(caps, now=now):
        if budget.cap is not None:
            _, _, name = budget.scope.partition(":")
            theirs = principals[name] if principal_scope(name) == budget.scope else 0
            over += max(budget.spent, theirs) > budget.cap
            reached += budget.spent >= budget.cap * 19 // 20
        held += budget.window == WINDOWS[-1] and budget.held != 0
    return over, reached, held


def wrong_answers(records: Sequence[UsageRecord], seen: Seen) -> int:
    """Whole answers that said another cost than what their last attempt is booked with."""
    last: dict[str, UsageRecord] = {}
    for record in records:
        if record.outcome not in ("released", "adjusted") and record.attempt >= getattr(last.get(record.request_id), "attempt", 0):
            last[record.request_id] = record
    return sum(request not in last or last[request].cost != cost for request, cost in seen.answers.items())


async def verdict(
    path: Path, bill: Path, seen: Seen, caps: Mapping[str, Caps], *, kills: int, seconds: float, now: float, findings: Sequence[str]
) -> Verdict:
    """Of the ledger at `path`, in which every lease has ended."""
    calls, principals = billed(bill)
    async with SQLiteLedger(path) as ledger:
        records = await records_of(ledger)
        over, reached, held = await over_caps(ledger, caps, principals, now)
    booked: dict[tuple[str, str], int] = defaultdict(int)
    how: dict[tuple[str, str], str] = {}
    for record in sorted(records, key=lambda record: record.outcome == "adjusted"):
        if record.outcome not in ("cached", "released"):
            booked[record.request_id, record.provider] += record.cost
            how[record.request_id, record.provider] = record.outcome
    missing = {call: amount - booked.get(call, -1) for call, amount in calls.items() if booked.get(call, -1) < amount}
    surplus = {call: amount - calls.get(call, 0) for call, amount in booked.items() if amount > calls.get(call, 0)}
    above: Counter[str] = Counter()
    for call, amount in surplus.items():
        above[how[call]] += amount
    total = sum(calls.values())
    return Verdict(
        kills=kills,
        seconds=round(seconds),
        asked=sum(seen.statuses.values()) + seen.lost + seen.left,
        statuses=dict(sorted(seen.statuses.items())),
        connections_lost=seen.lost,
        streams_left=seen.left,
        billed_calls=len(calls),
        booked_calls=len(booked),
        outcomes=dict(sorted(Counter(record.outcome for record in records).items())),
        caps=sum(cap is not None for each in caps.values() for cap in each),
        caps_reached=reached,
        billed_usd=usd(total),
        booked_usd=usd(sum(booked.values())),
        exact_calls=sum(booked.get(call) == amount for call, amount in calls.items()),
        over_charged={outcome: usd(amount) for outcome, amount in sorted(above.items())},
        over_charged_by_kills=share(above["expired"], total),
        over_charged_by_silence=share(above["ambiguous"] + above["estimated"], total),
        known_and_booked_otherwise=sum(how[call] in KNOWN and amount != calls.get(call) for call, amount in booked.items()),
        over_cap=over,
        lost=len(missing),
        lost_usd=usd(sum(missing.values())),
        let_through=len(seen.refused & {request for request, _ in calls}),
        answers_booked_otherwise=wrong_answers(records, seen),
        still_held=held,
        findings=list(findings),
    )


def share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def usd(nano: int) -> str:
    return f"{Decimal(nano).scaleb(-9):.2f}"
