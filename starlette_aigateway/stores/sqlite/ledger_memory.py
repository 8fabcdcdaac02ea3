"""What the writer of the ledger still knows from its batches before, so that the next one reads only what is new to it.

It is true for as long as no other connection has committed to the file, which SQLite itself says: `PRAGMA data_version`, asked inside the
transaction. Of a transaction that did not end well nothing is kept.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from math import inf
from typing import Final, TypeAlias

import msgspec

from ...accounts import ScopeClaim
from ...policy.budgets import Balance, Books, Periods
from ...types import NO_CAPS, Caps
from .ledger_schema import SEQ_STEP, HoldFacts, RunningCredit, as_json
from .ledger_terms import Terms

MOST = 20_000
"""Balances and holds that are kept from one batch to the next."""

MOST_TERMS = 1024

TAKEN_SEQS: Final = """
SELECT (SELECT max(seq) FROM usage),
    '[' || group_concat((SELECT max(seq) FROM usage WHERE seq >= value AND seq < value + 1048576)) || ']' FROM json_each(?)
"""
BalanceRow: TypeAlias = tuple[str, str, int, int, int, int]
"""Scope, period, spent, held, the number of open holds, what was told."""

CapsRow: TypeAlias = tuple[str, int | None, int | None, int | None]
decode_seqs = msgspec.json.Decoder(list[int]).decode


class RowNumbers:
    """Which rows of `usage` are taken. `_following` are the first free ones of the milliseconds that were asked for; of those that are
    later than the row `_last`, all others are free as a whole."""

    def __init__(self) -> None:
        self._last: float = inf
        self._following: dict[int, int] = {}

    def next(self, base: int) -> int:
        """Takes the first free one of the millisecond that begins at the row `base`, which was read."""
        seq = self._following.get(base, base)
        self._following[base] = seq + 1
        return seq

    def read(self, connection: sqlite3.Connection, bases: Iterable[int]) -> None:
        unknown = [base for base in bases if base <= self._last and base not in self._following]
        if not unknown:
            return
        last, taken = connection.execute(TAKEN_SEQS, (as_json(unknown),)).fetchone()
        if self._last == inf:
            self._last = -1 if last is None else last
        self._following.update((base, base) for base in unknown)
        self._following.update((seq - seq % SEQ_STEP, seq + 1) for seq in (decode_seqs(taken) if taken else ()))

    @property
    def count(self) -> int:
        return len(self._following)


class Memory:
    """`books` has balances only where they were read; `scopes` says for which periods all of a scope was: its balances, its running
    credits and, where a claim brings none, its caps. `holds` are open ones, not all. No hold that is open ends before `lease_end`. `day`
    is the latest that is stored, a guess until a scope was read."""

    def __init__(self, day: int = 0) -> None:
        self.day = day
        self.books = Books()
        self.scopes: dict[str, Periods] = {}
        self.credits: dict[str, list[RunningCredit]] = {}
        self.holds: dict[str, HoldFacts] = {}
        self.lease_end = -inf
        self.rows = RowNumbers()
        self._terms: dict[int, Terms] = {}

    def terms_of(self, claims: tuple[ScopeClaim, ...]) -> Terms:
        """Of claims whose scopes are known. The same tuple, which stands for a principal's limits, has the same terms."""
        terms = self._terms.get(id(claims))
        return terms if terms is not None and terms.claims is claims else self._new_terms(claims)

    def _new_terms(self, claims: tuple[ScopeClaim, ...]) -> Terms:
        running = [credit for claim in claims for credit in self.credits.get(claim.scope, ())]
        terms = Terms(claims, self.books, running)
        if len(self._terms) >= MOST_TERMS:
            self._terms.clear()
        self._terms[id(claims)] = terms
        return terms

    def set_caps(self, scope: str, caps: Caps) -> None:
        self.books.caps[scope] = caps
        self._terms.clear()

    def know(self, pairs: Iterable[tuple[str, str]], found: Iterable[BalanceRow]) -> None:
        """The balances of `pairs`: those `found`, and nothing in the others."""
        for pair in pairs:
            self.books.balances[pair] = Balance()
        for scope, period, *figures in found:
            self.books.balances[scope, period] = Balance(*figures)

    def know_scopes(
        self, claimed: Mapping[str, Periods], capped: Iterable[str], caps: Iterable[CapsRow], running: Iterable[RunningCredit]
    ) -> None:
        """All of the scopes that are `claimed` in these periods; of those `capped`, the stored caps."""
        self._terms.clear()
        self.books.caps.update((scope, NO_CAPS) for scope in capped)
        self.books.caps.update((scope, Caps(day, month, total)) for scope, day, month, total in caps)
        for scope in claimed:
            self.credits.setdefault(scope, [])
        for credit in running:
            self.run(credit)
        self.scopes.update(claimed)

    def run(self, credit: RunningCredit) -> None:
        self._terms.clear()
        self.credits.setdefault(credit.scope, []).append(credit)
        self.books.credits[credit.scope] = self.books.credits.get(credit.scope, 0) + credit.amount

    def end(self, credit: RunningCredit) -> None:
        running = self.credits.get(credit.scope, [])
        if credit in running:
            self._terms.clear()
            running.remove(credit)
            self.books.credits[credit.scope] -= credit.amount

    @property
    def full(self) -> bool:
        return len(self.books.balances) + len(self.holds) + self.rows.count > MOST
