"""What the writer of the ledger is asked to do: the write verbs of the `Ledger` seam as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from ...accounts import Credit, Hold, HoldRequest, Settlement, UsageRecord
from ...errors import AIGatewayError
from ...events import BudgetReached
from ...types import Caps


class Reserve(Struct, frozen=True, gc=False):
    request: HoldRequest
    price: str | None
    now: float


class Settle(Struct, frozen=True, gc=False):
    hold_id: str
    settlement: Settlement
    now: float


class Release(Struct, frozen=True, gc=False):
    hold_id: str
    now: float
    latency_ms: int | None


class Renew(Struct, frozen=True, gc=False):
    hold_id: str
    expires_at: float


class Record(Struct, frozen=True, gc=False):
    record: UsageRecord
    price: str | None


class Expire(Struct, frozen=True):
    """Books a bounded number of holds, and says which."""

    now: float


class SetCaps(Struct, frozen=True):
    scope: str
    caps: Caps


class AddCredit(Struct, frozen=True):
    credit: Credit


class EndCredit(Struct, frozen=True):
    credit_id: str
    now: float


class Story(Struct, frozen=True):
    """The entries of one hold that was settled for good: their row numbers, in order, and what `bookings` of them booked together."""

    seqs: tuple[int, ...]
    scopes: tuple[str, ...]
    day: str
    booked: int
    bookings: int
    last_at: float


class Prune(Struct, frozen=True):
    """Carries a bounded number of stories, out of those before `before`."""

    before: float
    stories: Sequence[Story]


class Pruned(Struct, frozen=True):
    """How many entries were replaced."""

    entries: int


class RollUp(Struct, frozen=True):
    """Rolls up records of days before `day` (days since 1970), out of a bounded number from `start` on (a row number)."""

    day: int
    start: int | None


class RolledUp(Struct, frozen=True):
    """How many records were rolled up, and where the next `RollUp` starts; None: there is nothing behind."""

    records: int
    start: int | None


class Ping(Struct, frozen=True):
    """Writes something of no meaning."""


class Told(Struct, frozen=True, gc=False):
    """The outcome of one operation, and the thresholds that its batch has reached: known to hold once the batch is committed."""

    outcome: Outcome | AIGatewayError
    reached: Sequence[BudgetReached]


Op: TypeAlias = Reserve | Settle | Release | Renew | Record | Expire | SetCaps | AddCredit | EndCredit | Prune | RollUp | Ping
Outcome: TypeAlias = Hold | UsageRecord | Sequence[UsageRecord] | Credit | Pruned | RolledUp | bool | None
Result: TypeAlias = Outcome | Told
