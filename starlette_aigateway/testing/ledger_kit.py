"""What tests of ledgers are written with: requests, settlements and records with something in every field, and questions to the books."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio

from ..accounts import (
    Budget,
    HoldRequest,
    ScopeClaim,
    Settlement,
    UsageQuery,
    UsageRecord,
    Window,
    principal_scope,
    tenant_scope,
)
from ..errors import AIGatewayError
from ..protocols import Ledger
from ..types import NO_CAPS, Caps, Price, Usage

T = TypeVar("T")
NOON = 1_774_958_400.0
"""2026-03-31 12:00:00 UTC, twelve hours before the end of a day and of a month."""
DAY = 86_400.0
LEASE = 60.0
PRICE = Price("0.0001", "0.0002")
"""Low, so that the small amounts of these tests pay for the tokens that they report."""
USED = Usage(input_tokens=10, output_tokens=5)
ALICE = principal_scope("alice")
ACME = tenant_scope("acme")


def hold_request(
    name: str,
    amount: int = 100,
    *,
    now: float = NOON,
    caps: Caps | None = NO_CAPS,
    max_parallel: int | None = None,
    scopes: Sequence[ScopeClaim] | None = None,
    **fields: Any,
) -> HoldRequest:
    """A request of `alice` for exactly `amount` nano-USD; `fields` override."""
    values: dict[str, Any] = {
        "id": f"use_{name}",
        "request_id": f"req_{name}",
        "attempt": 1,
        "scopes": tuple(scopes) if scopes is not None else (ScopeClaim(ALICE, caps, max_parallel),),
        "principal": "alice",
        "tenant": None,
        "key_id": None,
        "provider": "openai",
        "model": "gpt-4o-mini",
        "price": PRICE,
        "minimum": amount,
        "wanted": amount,
        "admission": amount,
        "expires_at": now + LEASE,
    }
    return HoldRequest(**{**values, **fields})


def completed(amount: int, **fields: Any) -> Settlement:
    """An answer at `amount` nano-USD; the tokens that it reports come to 2 at `PRICE`, and to nothing below that."""
    return Settlement(**{"outcome": "completed", "amount": amount, "usage": USED if amount >= 2 else None, **fields})


def cached_record(name: str, **fields: Any) -> UsageRecord:
    values: dict[str, Any] = {
        "id": f"use_{name}",
        "request_id": f"req_{name}",
        "attempt": 1,
        "created_at": NOON,
        "principal": "alice",
        "tenant": None,
        "key_id": None,
        "provider": "openai",
        "model": "gpt-4o-mini",
        "response_model": None,
        "usage": Usage(input_tokens=10, output_tokens=5),
        "cost": 0,
        "price": PRICE,
        "outcome": "cached",
        "latency_ms": 1,
    }
    return UsageRecord(**{**values, **fields})


async def refused(call: Awaitable[object]) -> AIGatewayError:
    """The domain error that `call` raises."""
    try:
        await call
    except AIGatewayError as error:
        return error
    raise AssertionError("nothing was refused")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> tuple[list[T], list[AIGatewayError]]:
    """All `calls` at the same time: what was granted, and what was refused."""
    granted: list[T] = []
    errors: list[AIGatewayError] = []

    async def one(call: Callable[[], Awaitable[T]]) -> None:
        try:
            granted.append(await call())
        except AIGatewayError as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(one, call)
    return granted, errors


async def budget(ledger: Ledger, window: Window = "total", *, scope: str = ALICE, caps: Caps | None = NO_CAPS, now: float = NOON) -> Budget:
    budgets = await ledger.budgets({scope: caps}, now=now)
    return next(one for one in budgets if one.window == window)


async def money(ledger: Ledger, window: Window = "total", *, scope: str = ALICE, now: float = NOON) -> tuple[int, int]:
    """What is spent and held."""
    one = await budget(ledger, window, scope=scope, now=now)
    return one.spent, one.held


async def records(ledger: Ledger, **query: Any) -> Sequence[UsageRecord]:
    return (await ledger.usage(UsageQuery(**query))).data


async def assert_clean(ledger: Ledger) -> None:
    assert await ledger.check() == []
