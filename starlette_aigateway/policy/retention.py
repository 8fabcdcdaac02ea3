"""How long the ledger keeps what nobody needs for long: each single usage record, and each step of calls that were settled."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..errors import InvalidArgument

SHORTEST = timedelta(days=1)
"""Longer than anybody asks twice for the same hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What the ledger rolls up in the background, as long as a lifespan of the gateway lasts. Budgets, and what `usage` sums up over whole
    days, stay exact for ever.

    Usage records older than `records` give way to the sums of their UTC day, for each principal, tenant, key, provider, model and outcome:
    they stay in totals and groups, and are gone from the pages of records. The entries that the audit of the ledger replays give way to
    their sums with the record that they belong to, or when they are older than `entries`, so that the audit of a long life stays short.
    None keeps everything. Each is at least a day, and `entries` not longer than `records`. Raises `InvalidArgument`.
    """

    records: timedelta | None = None
    entries: timedelta | None = None

    def __post_init__(self) -> None:
        _check_age(self.records, "records")
        _check_age(self.entries, "entries")
        if self.records is not None and self.entries is not None and self.entries > self.records:
            raise InvalidArgument("entries must not be kept longer than records: they go with them", param="entries")


def _check_age(value: Any, name: str) -> None:
    if value is None:
        return
    if not isinstance(value, timedelta):
        raise InvalidArgument(f"{name} must be a timedelta, such as timedelta(days=90), not {type(value).__name__}", param=name)
    if value < SHORTEST:
        raise InvalidArgument(f"{name} must be at least a day", param=name)
