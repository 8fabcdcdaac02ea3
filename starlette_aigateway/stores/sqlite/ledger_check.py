"""The audit: replays every entry from the first on, and compares what comes out with what is stored."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from ...accounts import Finding
from ...policy.budgets import WINDOWS, Balance, Books, periods_from

ENTRIES: Final = "SELECT hold, kind, amount, day, scopes FROM entries ORDER BY seq"
UNMATCHED_RECORDS: Final = """
SELECT hold, kind, amount, usage.cost FROM entries
LEFT JOIN usage ON usage.id = CASE kind WHEN 'adjust' THEN hold || '.adjust' ELSE hold END
WHERE kind <> 'hold' AND (
  usage.id IS NULL OR usage.cost <> amount
  OR CASE kind
     WHEN 'release' THEN outcome <> 'released'
     WHEN 'expire' THEN outcome <> 'expired'
     WHEN 'adjust' THEN outcome <> 'adjusted'
     ELSE outcome IN ('released', 'expired', 'adjusted', 'cached') END)
"""
BOOKED: Final = "SELECT count(*), coalesce(sum(amount), 0) FROM entries WHERE kind <> 'hold'"
RECORDED: Final = "SELECT count(*), coalesce(sum(cost), 0) FROM usage WHERE outcome <> 'cached'"
COSTLY_HITS: Final = "SELECT id, cost FROM usage WHERE outcome = 'cached' AND cost <> 0"

decode_limits = msgspec.json.Decoder(list[tuple[str, int | None, int | None, int | None]]).decode


class _Held(NamedTuple):
    amount: int
    day: str
    scopes: tuple[str, ...]


def audit(connection: sqlite3.Connection) -> list[Finding]:
    """Everything that contradicts an invariant, within the one snapshot that `connection` reads."""
    replay = _Replay()
    findings: list[Finding] = []
    for entry in connection.execute(ENTRIES):
        findings.extend(replay.step(*entry))
    findings.extend(_balances(connection, replay.books))
    findings.extend(_holds(connection, replay))
    findings.extend(_records(connection))
    return findings


class _Replay:
    """The books as the entries alone make them."""

    def __init__(self) -> None:
        self.books = Books()
        self.open: dict[str, _Held] = {}
        self.expired: dict[str, _Held] = {}

    def step(self, hold_id: str, kind: str, amount: int, day: str | None, scopes: str | None) -> Iterator[Finding]:
        match kind:
            case "hold":
                yield from self._hold(hold_id, amount, day or "", scopes or "[]")
            case "adjust":
                yield from self._adjust(hold_id, amount)
            case "settle" | "release" | "expire":
                yield from self._resolve(hold_id, kind, amount)
            case _:
                yield Finding("I3", hold_id, f"an entry of the unknown kind {kind}")

    def _hold(self, hold_id: str, amount: int, day: str, scopes: str) -> Iterator[Finding]:
        if hold_id in self.open:
            yield Finding("I3", hold_id, "was granted twice")
            return
        limits = decode_limits(scopes)
        periods = periods_from(day)
        self.open[hold_id] = held = _Held(amount, day, tuple(scope for scope, *_ in limits))
        self.books.hold(held.scopes, periods, amount)
        for scope, *caps in limits:
            for window, period, cap in zip(WINDOWS, periods, caps, strict=True):
                balance = self.books.balances[scope, period]
                if cap is not None and balance.spent + balance.held > cap:
                    figures = f"spent {balance.spent} and held {balance.held} pass the cap {cap}"
                    yield Finding("I1", hold_id, f"granted {amount} in {scope}, {window}: {figures}")

    def _resolve(self, hold_id: str, kind: str, amount: int) -> Iterator[Finding]:
        held = self.open.pop(hold_id, None)
        if held is None:
            yield Finding("I3", hold_id, f"a {kind} of {amount}, but no hold of that id was open")
            return
        if kind == "expire":
            self.expired[hold_id] = held
        if amount != {"release": 0, "expire": held.amount}.get(kind, amount):
            yield Finding("I2", hold_id, f"a {kind} booked {amount} of a hold of {held.amount}")
        self.books.resolve(held.scopes, periods_from(held.day), held=held.amount, booked=amount)

    def _adjust(self, hold_id: str, amount: int) -> Iterator[Finding]:
        held = self.expired.pop(hold_id, None)
        if held is None:
            yield Finding("I3", hold_id, f"an adjustment of {amount}, but no hold of that id had expired")
            return
        self.books.adjust(held.scopes, periods_from(held.day), amount)


def _balances(connection: sqlite3.Connection, books: Books) -> Iterator[Finding]:
    stored = {
        (scope, period): Balance(spent, held, open_holds)
        for scope, period, spent, held, open_holds in connection.execute("SELECT scope, period, spent, held, open FROM balances")
    }
    for key in sorted(stored.keys() | books.balances.keys()):
        found, right = stored.get(key, Balance()), books.balances.get(key, Balance())
        for name in ("spent", "held"):
            if getattr(found, name) != getattr(right, name):
                subject = f"{key[0]} {key[1] or 'total'}"
                yield Finding("I2", subject, f"{name} is {getattr(found, name)}, the entries give {getattr(right, name)}")
        if not key[1] and found.open != right.open:
            yield Finding("I2", f"{key[0]} total", f"open holds are {found.open}, the entries give {right.open}")


def _holds(connection: sqlite3.Connection, replay: _Replay) -> Iterator[Finding]:
    stored: set[str] = set()
    for hold_id, expired, amount in connection.execute("SELECT id, expired, json_extract(facts, '$[12]') FROM holds"):
        stored.add(hold_id)
        right = (replay.expired if expired else replay.open).get(hold_id)
        if right is None:
            yield Finding("I3", hold_id, f"stored as {'expired' if expired else 'open'}, which the entries do not say")
        elif right.amount != amount:
            yield Finding("I2", hold_id, f"holds {amount}, the entries give {right.amount}")
    for hold_id in replay.open.keys() - stored:
        yield Finding("I3", hold_id, "open by the entries, but not stored: nothing would ever resolve it")


def _records(connection: sqlite3.Connection) -> Iterator[Finding]:
    for hold_id, kind, amount, cost in connection.execute(UNMATCHED_RECORDS):
        found = "there is no record of it" if cost is None else f"its record does not match: cost {cost}"
        yield Finding("I2", hold_id, f"a {kind} booked {amount}; {found}")
    booked, recorded = connection.execute(BOOKED).fetchone(), connection.execute(RECORDED).fetchone()
    if booked != recorded:
        yield Finding(
            "I2", "usage", f"{recorded[0]} records sum up to {recorded[1]}, {booked[0]} resolutions in the entries to {booked[1]}"
        )
    for record_id, cost in connection.execute(COSTLY_HITS):
        yield Finding("I2", record_id, f"a cached answer cost {cost}")
