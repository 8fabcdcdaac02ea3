"""The JSON shapes of the native routes (design, section 7). Money goes out as a decimal string, times as RFC 3339 in UTC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import money
from ..accounts import AdminAction, Budget, Credit, StoredPrompt, UsageRecord, UsageReport, UsageTotals
from ..errors import AIGatewayError
from ..policy.prompts import variables
from ..prices import Price, price_texts
from ..quotes import Quote, QuotedTarget
from ..streams import AnswerStream
from ..types import (
    CAP_NAMES,
    COUNT_NAMES,
    Answer,
    Completion,
    Key,
    Limits,
    Tenant,
    Usage,
    WindowState,
    rfc3339,
    utc,
)
from .errors import status_of

TOKEN_FIELDS = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation_1h_input_tokens",
    "reasoning_output_tokens",
)  # fmt: skip


def usage(value: Usage | None) -> dict[str, int] | None:
    return None if value is None else tokens(value)


def tokens(value: Usage) -> dict[str, int]:
    """In the order of `TOKEN_FIELDS`."""
    return {
        "input_tokens": value.input_tokens,
        "output_tokens": value.output_tokens,
        "cache_read_input_tokens": value.cache_read_input_tokens,
        "cache_creation_input_tokens": value.cache_creation_input_tokens,
        "cache_creation_1h_input_tokens": value.cache_creation_1h_input_tokens,
        "reasoning_output_tokens": value.reasoning_output_tokens,
    }


def answer(value: Answer, model: str) -> dict[str, Any]:
    return {
        "id": value.request_id,
        "model": value.model or model,
        "provider": value.provider,
        "message": value.message,
        "finish_reason": value.finish_reason,
        "usage": usage(value.usage),
        "cost_usd": money.text(value.cost_usd),
        "cached": value.cached,
    }


def stream_end(stream: AnswerStream, completion: Completion, model: str) -> dict[str, Any]:
    return {
        "id": stream.request_id,
        "model": stream.model or model,
        "provider": stream.provider,
        "message": completion.message,
        "finish_reason": stream.finish_reason,
        "usage": usage(stream.usage),
        "cost_usd": money.text(stream.cost_usd),
        "cached": stream.cached,
    }


def limits(value: Limits) -> dict[str, Any]:
    """The six limits; null is no limit."""
    counts = {name: getattr(value, name) for name in COUNT_NAMES}
    return counts | {name: money.text(getattr(value, name)) for name in CAP_NAMES}


def budget(value: Budget) -> dict[str, Any]:
    return {
        "scope": value.scope.partition(":")[0],
        "window": value.window,
        "period": value.period,
        "cap_usd": money.text(value.cap_usd),
        "credit_usd": money.text(value.credit_usd),
        "spent_usd": money.text(value.spent_usd),
        "held_usd": money.text(value.held_usd),
        "remaining_usd": money.text(value.remaining_usd),
    }


def window(state: WindowState) -> dict[str, Any]:
    claim = state.claim
    return {
        "scope": claim.scope_kind,
        "window": claim.kind,
        "limit": claim.limit,
        "seconds": claim.seconds,
        "remaining": state.remaining,
        "reset_after_seconds": state.reset_after,
    }


def quote(value: Quote) -> dict[str, Any]:
    refusal = value.would_refuse
    return {
        "model": value.model,
        "prompt": value.prompt,
        "cached": value.cached,
        "required_usd": money.text(value.required_usd),
        "worst_case_usd": money.text(value.worst_case_usd),
        "bounded": value.bounded,
        "targets": [quoted_target(target) for target in value.targets],
        "windows": [window(state) for state in value.windows],
        "budgets": [budget(one) for one in value.budgets],
        "would_refuse": None if refusal is None else would_refuse(refusal),
    }


def quoted_target(value: QuotedTarget) -> dict[str, Any]:
    return {
        "provider": value.provider,
        "model": value.model,
        "price": price(value.price),
        "input_tokens": value.input_tokens,
        "max_tokens": value.max_tokens,
        "imposed": value.imposed,
        "minimum_usd": money.text(value.minimum_usd),
        "worst_case_usd": money.text(value.worst_case_usd),
        "bounded": value.bounded,
    }


def would_refuse(error: AIGatewayError) -> dict[str, Any]:
    """The status and the error of the answer that the call would get, and its `retry-after` in seconds."""
    status, kind = status_of(error)
    facts = error.details or {}
    return {
        "status": status,
        "type": kind,
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "scope": facts.get("scope"),
        "window": facts.get("window"),
        "retry_after_seconds": error.retry_after,
        "details": error.details,
    }


def key(value: Key, budgets: Sequence[Budget]) -> dict[str, Any]:
    return {
        "id": value.id,
        "name": value.name,
        "hint": value.hint,
        "tenant": value.tenant,
        "allowed_models": value.allowed_models,
        **limits(value),
        "expires_at": rfc3339(value.expires_at),
        "revoked_at": rfc3339(value.revoked_at),
        "created_at": rfc3339(value.created_at),
        "metadata": value.metadata,
        "budgets": [budget(one) for one in budgets],
    }


def tenant(value: Tenant, budgets: Sequence[Budget]) -> dict[str, Any]:
    return {"id": value.id, **limits(value), "budgets": [budget(one) for one in budgets]}


def price(value: Price | None) -> dict[str, Any] | None:
    return None if value is None else price_texts(value)


def prompt_summary(value: StoredPrompt) -> dict[str, Any]:
    """The highest version, without its messages."""
    return {
        "name": value.name,
        "version": value.version,
        "labels": value.labels,
        "tenant": value.tenant,
        "created_at": rfc3339(value.created_at),
    }


def prompt(value: StoredPrompt) -> dict[str, Any]:
    return {**prompt_summary(value), "messages": value.messages, "settings": value.settings, "variables": sorted(variables(value))}


def credit(value: Credit) -> dict[str, Any]:
    kind, _, name = value.scope.partition(":")
    return {
        "id": value.id,
        "scope": kind,
        "principal": name if kind == "principal" else None,
        "tenant": name if kind == "tenant" else None,
        "amount_usd": money.text(value.amount_usd),
        "created_at": rfc3339(utc(value.created_at)),
        "expires_at": rfc3339(utc(value.expires_at)),
        "ended_at": None if value.ended_at is None else rfc3339(utc(value.ended_at)),
        "actor": value.actor,
        "note": value.note,
    }


def admin_action(value: AdminAction) -> dict[str, Any]:
    return {
        "id": value.id,
        "created_at": rfc3339(utc(value.created_at)),
        "actor": value.actor,
        "action": value.action,
        "subject": value.subject,
        "tenant": value.tenant,
        "details": value.details,
    }


TOTALS_FIELDS = ("calls", "cached_calls", "input_tokens", "output_tokens", "cost_usd")


def totals(value: UsageTotals) -> dict[str, Any]:
    """In the order of `TOTALS_FIELDS`."""
    return {
        "calls": value.calls,
        "cached_calls": value.cached_calls,
        "input_tokens": value.input_tokens,
        "output_tokens": value.output_tokens,
        "cost_usd": money.text(value.cost_usd),
    }


RECORD_FIELDS = (
    "id", "request_id", "attempt", "created_at", "principal", "tenant", "key_id", "provider", "model", "response_model", *TOKEN_FIELDS,
    "cost_usd", "price", "outcome", "cached", "latency_ms", "prompt", "tags", "would_refuse",
)  # fmt: skip


def record(value: UsageRecord) -> dict[str, Any]:
    """In the order of `RECORD_FIELDS`."""
    return {
        "id": value.id,
        "request_id": value.request_id,
        "attempt": value.attempt,
        "created_at": rfc3339(utc(value.created_at)),
        "principal": value.principal,
        "tenant": value.tenant,
        "key_id": value.key_id,
        "provider": value.provider,
        "model": value.model,
        "response_model": value.response_model,
        **tokens(value.usage),
        "cost_usd": money.text(value.cost_usd),
        "price": price(value.price),
        "outcome": value.outcome,
        "cached": value.cached,
        "latency_ms": value.latency_ms,
        "prompt": value.prompt,
        "tags": value.tags,
        "would_refuse": value.would_refuse,
    }


def usage_report(value: UsageReport) -> dict[str, Any]:
    return {
        "totals": totals(value.totals),
        "groups": [{"by": group.by, **totals(group.totals)} for group in value.groups],
        "data": [record(one) for one in value.data],
        "has_more": value.has_more,
        "next_cursor": value.next_cursor,
        "rolled_up_before": None if value.rolled_up_before is None else rfc3339(utc(value.rolled_up_before)),
    }
