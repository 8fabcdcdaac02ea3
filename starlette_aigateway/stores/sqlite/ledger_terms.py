"""What is the same for all holds with the same claims, worked out once: most calls are of few principals."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from ...accounts import HoldRequest, ScopeClaim
from ...policy.budgets import Balance, Books, Periods
from ...types import NO_CAPS, Caps
from .ledger_schema import Limit, RunningCredit, as_json


class Terms:
    """Of `claims`, as long as no cap and no credit of their scopes changes. `names` are the scopes; `caps` those that hold now, running
    credits included, None where there are none; `entry` is what an entry of a hold says of them, where limits are enforced and where they
    are only reported. `lapse_at` is when the first of the credits is over (Unix seconds)."""

    __slots__ = ("_capped", "_has_caps", "_parallel", "_periods", "caps", "claims", "entry", "lapse_at", "names")

    def __init__(self, claims: tuple[ScopeClaim, ...], books: Books, running: Sequence[RunningCredit]) -> None:
        self.claims = claims
        self.names = tuple([claim.scope for claim in claims])
        caps = tuple([books.raised_caps(claim) for claim in claims])
        self.caps: tuple[Caps, ...] | None = None if all(cap is NO_CAPS for cap in caps) else caps
        self._has_caps = any(cap != NO_CAPS for cap in caps)
        raised = [books.credits.get(name, 0) for name in self.names]
        stored = [books.caps_of(claim) for claim in claims]
        self.entry = {
            True: as_json([Limit(name, *cap, credit) for name, cap, credit in zip(self.names, stored, raised, strict=True)]),
            False: as_json([Limit(name, *NO_CAPS, credit) for name, credit in zip(self.names, raised, strict=True)]),
        }
        self.lapse_at = min((credit.expires_at for credit in running), default=inf)
        self._periods: Periods | None = None
        self._capped: list[tuple[int, Balance]] = []
        self._parallel: list[tuple[int, Balance]] = []

    def afforded(self, request: HoldRequest, books: Books, periods: Periods) -> int | None:
        """What `budgets.grant` gives `request`; None where it refuses, and says why."""
        if self._periods != periods:
            self._read(books, periods)
        amount, admission = request.wanted, request.admission
        if self._has_caps and not request.bounded:
            return None
        for cap, balance in self._capped:
            room = cap - balance.spent - balance.held
            if admission > room:
                return None
            if room < amount:
                amount = room
        for most, balance in self._parallel:
            if balance.open >= most:
                return None
        return amount

    def _read(self, books: Books, periods: Periods) -> None:
        self._periods = periods
        self._capped = [
            (cap, books.known(name, period))
            for name, caps in zip(self.names, self.caps or (), strict=False)
            for period, cap in zip(periods, caps, strict=True)
            if cap is not None
        ]
        self._parallel = [(claim.max_parallel, books.known(claim.scope, "")) for claim in self.claims if claim.max_parallel is not None]
