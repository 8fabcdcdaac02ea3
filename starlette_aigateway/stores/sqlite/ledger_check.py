"""The audit: replays every entry from the first on, and compares what comes out with what is stored."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from ...accounts import GATEWAY_SCOPE, Finding, principal_scope, tenant_scope
from ...policy.budgets import WINDOWS, Balance, Books, periods_from
from .ledger_check_meta import check_append_only, read_carried
from .ledger_check_records import FOREIGN, check_records
from .ledger_check_rollups import check_rollups
from .ledger_schema import Limit

ENTRIES: Final = """
SELECT entries.seq, hold, kind, amount, day, scopes, entries.price, usage.price, principal, tenant
FROM entries LEFT JOIN usage ON kind = 'hold' AND usage.id = hold ORDER BY entries.seq
"""
HOLDS: Final = "SELECT id, expired, CASE WHEN json_valid(facts) THEN json_extract(facts, '$[12]') END FROM holds"
REPORTED_EVERY = 1000
ANY_PRINCIPAL, ANY_TENANT = principal_scope(""), tenant_scope("")

decode_limits = msgspec.json.Decoder(list[Limit]).decode
decode_scopes = msgspec.json.Decoder(list[str]).decode

Progress = Callable[[int], None]
"""Told now and then how many entries and records were looked at so far."""


class _Entry(Struct, array_like=True):
    """A row of `entries`; that of a hold with what its usage record says, once there is one."""

    seq: int
    hold: str
    kind: str
    amount: int
    day: str | None
    scopes: str | None
    price: str | None
    recorded_price: str | None
    principal: str | None
    tenant: str | None


class _Held(NamedTuple):
    amount: int
    day: str
    scopes: tuple[str, ...]


class _Credit(NamedTuple):
    """`amount` is what counts: nothing once it has ended."""

    amount: int
    scopes: list[str]


def audit(connection: sqlite3.Connection, progress: Progress | None = None) -> list[Finding]:
    """Everything that contradicts an invariant, within the one snapshot that `connection` reads."""
    findings = list(check_append_only(connection))
    replay = _Replay(read_carried(connection))
    seen = 0
    for row in connection.execute(ENTRIES):
        try:
            findings.extend(replay.step(msgspec.convert(row, _Entry)))
        except msgspec.MsgspecError as error:
            replay.pass_over(row[0])
            findings.append(Finding("I2", str(row[1]), f"entry {row[0]} {FOREIGN}: {error}"))
        seen += 1
        if progress is not None and seen % REPORTED_EVERY == 0:
            progress(seen)
    findings.extend(_balances(connection, replay.books))
    findings.extend(_holds(connection, replay))
    findings.extend(_credits(connection, replay))
    findings.extend(check_rollups(connection))
    findings.extend(check_records(connection, None if progress is None else lambda records: progress(seen + records)))
    return findings


class _Replay:
    """The books as the entries alone make them. Of the entries up to `carried` some were replaced: whether those that are left kept
    their caps was known when they were all there."""

    def __init__(self, carried: int) -> None:
        self.books = Books()
        self.open: dict[str, _Held] = {}
        self.expired: dict[str, _Held] = {}
        self.credits: dict[str, _Credit] = {}
        self._carried = carried
        self._last = carried

    def step(self, entry: _Entry) -> Iterator[Finding]:
        """Raises `MsgspecError` for scopes that are none, before it has booked anything."""
        hold_id, kind, amount = entry.hold, entry.kind, entry.amount
        if entry.seq == self._last + 1 and kind != "carry":
            self._last = entry.seq
        else:
            yield from self._place(entry)
        match kind:
            case "hold":
                limits = decode_limits(entry.scopes or "[]")
                scopes = tuple([limit.scope for limit in limits])
                yield from self._hold(entry, limits, scopes)
                if entry.principal is not None:
                    yield from _recorded(entry, entry.principal, scopes)
            case "adjust":
                yield from self._adjust(hold_id, amount)
            case "settle" | "release" | "expire":
                yield from self._resolve(hold_id, kind, amount)
            case "credit":
                yield from self._credit(hold_id, amount, decode_scopes(entry.scopes or "[]"))
            case "carry":
                if hold_id:
                    self.books.balances[hold_id, entry.day or ""] = Balance(amount)
            case _:
                yield Finding("I3", hold_id, f"an entry of the unknown kind {kind}")

    def pass_over(self, seq: int) -> None:
        """There is a row of that number, whatever it says."""
        self._last = max(self._last, seq)

    def _place(self, entry: _Entry) -> Iterator[Finding]:
        """Row numbers are given one after the other, also after a rollback; pruning takes none above `carried`, and not the last."""
        if (entry.kind == "carry") != (entry.seq < 0):
            yield Finding("I4", entry.hold, f"entry {entry.seq} is a {entry.kind}; carries alone have row numbers below zero")
        if entry.seq > self._carried:
            if entry.seq != self._last + 1:
                yield Finding("I4", "entries", f"those from {self._last + 1} to {entry.seq - 1} are gone")
            self._last = entry.seq

    def _hold(self, entry: _Entry, limits: list[Limit], scopes: tuple[str, ...]) -> Iterator[Finding]:
        hold_id, amount, day = entry.hold, entry.amount, entry.day or ""
        if hold_id in self.open or hold_id in self.expired:
            yield Finding("I3", hold_id, "was granted twice")
            return
        periods = periods_from(day)
        self.open[hold_id] = held = _Held(amount, day, scopes)
        self.books.hold(held.scopes, periods, amount)
        for limit in limits:
            credit = self.books.credits.get(limit.scope, 0)
            if limit.credit != credit:
                yield Finding("I1", hold_id, f"granted in {limit.scope} with a credit of {limit.credit}, the entries give {credit}")
            for window, period, cap in zip(WINDOWS, periods, limit.caps, strict=True):
                balance = self.books.balances[limit.scope, period]
                if cap is not None and balance.spent + balance.held > cap and entry.seq > self._carried:
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
        """A credit is given once, and ends once with the same amount in the same scope."""
        given = self.credits.get(credit_id)
        if (given is None and amount <= 0) or (given is not None and given.amount + amount != 0):
            yield Finding("I3", credit_id, f"an entry of {amount} for a credit of {given.amount if given else 0}")
            return
        if given is not None and given.scopes != scopes:
            yield Finding("I3", credit_id, f"given to {', '.join(given.scopes)}, ended for {', '.join(scopes)}")
        self.credits[credit_id] = _Credit(amount if given is None else 0, scopes)
        for scope in scopes:
            self.books.credits[scope] = self.books.credits.get(scope, 0) + amount


def _recorded(entry: _Entry, principal: str, scopes: tuple[str, ...]) -> Iterator[Finding]:
    """Whether the record of a hold names its price and who it was held for. Who uses a ledger without a gateway may hold for other
    scopes than those of principals and tenants; and a tenant's scope may be held in for no tenant."""
    if entry.price is not None and entry.price != entry.recorded_price:
        yield Finding("I2", entry.hold, f"held at the price {entry.price}, settled at {entry.recorded_price}")
    if (payer := principal_scope(principal)) not in scopes and _are_told(scopes, ANY_PRINCIPAL):
        yield Finding("I2", entry.hold, f"recorded for {payer}, held for {', '.join(scopes)}")
    if entry.tenant is not None and (payer := tenant_scope(entry.tenant)) not in scopes and _are_told(scopes, ANY_TENANT):
        yield Finding("I2", entry.hold, f"recorded for {payer}, held for {', '.join(scopes)}")


def _are_told(scopes: tuple[str, ...], kind: str) -> bool:
    """Whether those of this kind are all among them."""
    return any(scope.startswith(kind) or scope == GATEWAY_SCOPE for scope in scopes)


def _balances(connection: sqlite3.Connection, books: Books) -> Iterator[Finding]:
    stored = {
        (scope, period): Balance(spent, held, open_holds)
        for scope, period, spent, held, open_holds in connection.execute("SELECT scope, period, spent, held, open FROM balances")
    }
    for key in sorted(stored.keys() | books.balances.keys(), key=str):
        found, right = stored.get(key, Balance()), books.balances.get(key, Balance())
        for name in ("spent", "held"):
            if getattr(found, name) != getattr(right, name):
                subject = f"{key[0]} {key[1] or 'total'}"
                yield Finding("I2", subject, f"{name} is {getattr(found, name)}, the entries give {getattr(right, name)}")
        if not key[1] and found.open != right.open:
            yield Finding("I2", f"{key[0]} total", f"open holds are {found.open}, the entries give {right.open}")


def _holds(connection: sqlite3.Connection, replay: _Replay) -> Iterator[Finding]:
    stored: set[str] = set()
    for hold_id, expired, amount in connection.execute(HOLDS):
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
    for credit_id, scope, amount, ended_at in connection.execute("SELECT id, scope, amount, ended_at FROM credits"):
        stored[credit_id] = _Credit(amount if ended_at is None else 0, [scope])
    nothing = _Credit(0, [])
    for credit_id in sorted(stored.keys() | replay.credits.keys(), key=str):
        found, right = stored.get(credit_id, nothing), replay.credits.get(credit_id, nothing)
        if found != right:
            given = f"{right.amount} for {', '.join(right.scopes)}" if right.scopes else "none"
            scope = "".join(map(str, found.scopes)) or "nobody"
            yield Finding("I2", str(credit_id), f"a credit that counts {found.amount} for {scope}, the entries give {given}")
