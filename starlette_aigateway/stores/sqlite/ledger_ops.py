"""What the writer of the ledger is asked to do: the write verbs of the `Ledger` seam as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from ...accounts import Hold, HoldRequest, Settlement, UsageRecord
from ...types import Caps


class Reserve(Struct, frozen=True):
    request: HoldRequest
    price: str | None
    now: float


class Settle(Struct, frozen=True):
    hold_id: str
    settlement: Settlement
    now: float


class Release(Struct, frozen=True):
    hold_id: str
    now: float
    latency_ms: int | None


class Renew(Struct, frozen=True):
    hold_id: str
    expires_at: float


class Record(Struct, frozen=True):
    record: UsageRecord
    price: str | None


class Expire(Struct, frozen=True):
    """Books a bounded number of holds, and says which."""

    now: float


class SetCaps(Struct, frozen=True):
    scope: str
    caps: Caps


class Ping(Struct, frozen=True):
    """Writes something of no meaning."""


Op: TypeAlias = Reserve | Settle | Release | Renew | Record | Expire | SetCaps | Ping
Result: TypeAlias = Hold | UsageRecord | Sequence[UsageRecord] | bool | None
