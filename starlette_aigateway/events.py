"""What happened, for observers: read-only facts. They hold no key, no prompt and no answer."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from .accounts import UsageRecord, Window


class CallRecorded(Struct, frozen=True, kw_only=True, gc=False):
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


class CallTolerated(Struct, frozen=True, kw_only=True):
    """Limits are only reported (`enforce=False`): a call went on that would have been refused. `code` is the refusal's."""

    request_id: str
    principal: str
    model: str | None
    code: str


class BudgetReached(Struct, frozen=True, kw_only=True):
    """What a scope has spent reached `threshold` percent of its cap (running credits included) in a period; told once for each scope,
    period and threshold, over all workers. `scope` is `principal:…`, `tenant:…` or `gateway`; `cap` and `spent` are nano-USD."""

    scope: str
    window: Window
    period: str
    threshold: int
    cap: int
    spent: int


class AdminActed(Struct, frozen=True, kw_only=True):
    """An admin route changed something: `action` is `key.create`, `tenant.update`, …; `subject` the id."""

    actor: str
    action: str
    subject: str


Event: TypeAlias = CallRecorded | CallRefused | CallTolerated | AttemptFailed | BudgetReached | AdminActed
