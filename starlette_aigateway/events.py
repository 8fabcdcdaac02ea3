"""What happened, for observers: read-only facts. They hold no key, no prompt and no answer."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from .accounts import UsageRecord


class CallRecorded(Struct, frozen=True, kw_only=True):
    """An attempt was booked; the record is in the ledger."""

    record: UsageRecord


class CallRefused(Struct, frozen=True, kw_only=True):
    """A call was refused before any provider was asked. `code` is the error's."""

    request_id: str
    principal: str | None
    model: str | None
    code: str


class AttemptFailed(Struct, frozen=True, kw_only=True):
    """A provider failed an attempt; the call may go on at another target."""

    request_id: str
    attempt: int
    provider: str
    model: str
    code: str
    status: int | None


class AdminActed(Struct, frozen=True, kw_only=True):
    """An admin route changed something: `action` is `key.create`, `tenant.update`, …; `subject` the id."""

    actor: str
    action: str
    subject: str


Event: TypeAlias = CallRecorded | CallRefused | AttemptFailed | AdminActed
