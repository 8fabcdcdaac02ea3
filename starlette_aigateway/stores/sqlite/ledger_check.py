"""The audit: replays every entry from the first on, and compares what comes out with what is stored."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec

from ...accounts import Finding
from ...policy.budgets import WINDOWS, Balance, Books, periods_from
from .ledger_check_records import check_records
from .ledger_schema import Limit

ENTRIES: Final = "SELECT seq, hold, kind, amount, day, scopes FROM entries ORDER BY seq"
CARRIED: Final = "SELECT value FROM meta WHERE name = 'carried'"
REPORTED_EVERY = 1000

decode_limits = msgspec.json.Decoder(list[Limit]).decode
decode_scopes = msgspec.json.Decoder(list[str]).decode

Progress = Callable[[int], None]
"""Told now and then how many entries and records were looked at so far."""


class _Held(NamedTuple):
    amount: int
    day: str
    scopes: tuple[str, ...]


def audit(connection: sqlite3.Connection, progress: Progress | None = None) -> list[Finding]:
    """Everything that contradicts an invariant, within the one snapshot that `connection` reads."""
    (carried,) = connection.execute(CARRIED).fetchone()
    replay = _Replay(carried)
    findings: list[Finding] = []
    seen = 0
    for entry in connection.execute(ENTRIES):
        findings.extend(replay.step(*entry))
        seen += 1
        if progress is not None and seen % REPORTED_EVERY == 0:
            progress(seen)
    findings.extend(_balances(connection, replay.books))
    findings.extend(_holds(connection, replay))
    findings.extend(_credits(connection, replay))
    findings.extend(check_records(connection, None if progress is None else lambda records: progress(seen + records)))
    return findings


class _Replay:
    """The books as the entries alone make them. Of the entries up to `carried` some were replaced: whether those that are left kept
    their caps was known when they were all there."""

    def __init__(self, carried: int) -> None:
        self.books = Books()
        self.open: dict[str, _Held] = {}
        self.expired: dict[str, _Held] = {}
        self.credits: dict[str, int] = {}
        self._carried = carried

    def step(self, seq: int, hold_id: str, kind: str, amount: int, day: str | None, scopes: str | None) -> Iterator[Finding]:
        match kind:
            case "hold":
                yield from self._hold(hold_id, amount, day or "", decode_limits(scopes or "[]"), seq > self._carried)
            case "adjust":
                yield from self._adjust(hold_id, amount)
            case "settle" | "release" | "expire":
                yield from self._resolve(hold_id, kind, amount)
            case "credit":
                yield from self._credit(hold_id, amount, decode_scopes(scopes or "[]"))
            case "carry":
                if hold_id:
                    self.books.balances[hold_id, day or ""] = Balance(amount)
            case _:
                yield Finding("I3", hold_id, f"an entry of the unknown kind {kind}")

    def _hold(self, hold_id: str, amount: int, day: str, limits: list[Limit], all_there: bool) -> Iterator[Finding]:
        if hold_id in self.open or hold_id in self.expired:
            yield Finding("I3", hold_id, "was granted twice")
            return
        periods = periods_from(day)
        self.open[hold_id] = held = _Held(amount, day, tuple(limit.scope for limit in limits))
        self.books.hold(held.scopes, periods, amount)
        for limit in limits:
            credit = self.books.credits.get(limit.scope, 0)
            if limit.credit != credit:
                yield Finding("I1", hold_id, f"granted in {limit.scope} with a credit of {limit.credit}, the entries give {credit}")
            for window, period, cap in zip(WINDOWS, periods, limit.caps, strict=True):
                balance = self.books.balances[limit.scope, period]
                if cap is not None and balance.spent + balance.held > cap and all_there:
                    figures = f"spent {balance.spent} and held {balance.held} pass the cap {cap}"
                    yield Finding("I1", hold_id, f"granted {amount} in {limit.scope}, {window}: {figures}")

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

    def _credit(self, credit_id: str, amount: int, scopes: list[str]) -> Iterator[Finding]:
        """A credit is given once, and ends once with the same amount."""
        given = self.credits.get(credit_id)
        if (given is None and amount <= 0) or (given is not None and given + amount != 0):
            yield Finding("I3", credit_id, f"an entry of {amount} for a credit of {given or 0}")
            return
        self.credits[credit_id] = amount if given is None else 0
        for scope in scopes:
            self.books.credits[scope] = self.books.credits.get(scope, 0) + amount


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


def _credits(connection: sqlite3.Connection, replay: _Replay) -> Iterator[Finding]:
    stored = {}
    for credit_id, amount, ended_at in connection.execute("SELECT id, amount, ended_at FROM credits"):
        stored[credit_id] = amount if ended_at is None else 0
    for credit_id in sorted(stored.keys() | replay.credits.keys()):
        found, right = stored.get(credit_id), replay.credits.get(credit_id)
        if found != right:
            yield Finding("I2", credit_id, f"a credit that counts {found or 0}, the entries give {right or 0}")
