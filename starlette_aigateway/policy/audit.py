"""What the record of an administrator's action tells of it: settings, and never what may hold a secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from .. import money
from ..types import LIMIT_NAMES, rfc3339

TOLD = LIMIT_NAMES | {
    "allowed_models", "amount_usd", "expires_at", "grace_seconds", "label", "labels", "name", "price", "scope", "tenant", "version",
}  # fmt: skip
"""Metadata, notes, and the messages and settings of prompts are the host's to know and may hold anything: they are named, not told."""


def told(details: Mapping[str, Any]) -> dict[str, Any]:
    """`details` as plain JSON; of what is not `TOLD`, the name alone, in `also`."""
    shown = {name: _plain(value) for name, value in details.items() if name in TOLD}
    also = sorted(details.keys() - TOLD)
    return {**shown, "also": also} if also else shown


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return money.text(value)
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [*value]
    return value
