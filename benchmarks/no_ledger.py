"""The `Ledger` seam without a ledger: grants everything and keeps nothing, to measure what the real one costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from starlette_aigateway import UsageRecord
from starlette_aigateway.accounts import Budget, Credit, Finding, Hold, HoldRequest, Settlement, UsageQuery, UsageReport, UsageTotals
from starlette_aigateway.events import BudgetReached
from starlette_aigateway.types import Caps, Usage


class NoLedger:
    def __init__(self) -> None:
        self._open: dict[str, tuple[HoldRequest, float]] = {}

    async def reserve(self, request: HoldRequest, *, now: float) -> Hold:
        self._open[request.id] = request, now
        return Hold(id=request.id, amount=request.wanted, made_at=now, expires_at=request.expires_at)

    async def probe(self, request: HoldRequest, *, now: float) -> Hold:
        return Hold(id=request.id, amount=request.wanted, made_at=now, expires_at=request.expires_at)

    async def settle(self, hold_id: str, settlement: Settlement, *, now: float) -> UsageRecord | None:
        request, made_at = self._open.pop(hold_id)
        return UsageRecord(
            id=hold_id,
            request_id=request.request_id,
            attempt=request.attempt,
            created_at=made_at,
            principal=request.principal,
            tenant=request.tenant,
            key_id=request.key_id,
            provider=request.provider,
            model=request.model,
            response_model=settlement.response_model,
            usage=settlement.usage or Usage(input_tokens=0, output_tokens=0),
            cost=settlement.amount,
            price=request.price,
            outcome=settlement.outcome,
            latency_ms=settlement.latency_ms,
        )

    async def release(self, hold_id: str, *, now: float, latency_ms: int | None = None) -> None:
        del self._open[hold_id]

    async def renew(self, hold_id: str, expires_at: float, *, now: float) -> bool:
        return True

    async def record(self, record: UsageRecord) -> None: ...

    async def expire(self, *, now: float) -> Sequence[UsageRecord]:
        return ()

    async def set_caps(self, scope: str, caps: Caps) -> None: ...

    async def add_credit(self, credit: Credit) -> Credit:
        return credit

    async def end_credit(self, credit_id: str, *, now: float) -> Credit | None:
        return None

    async def credit(self, credit_id: str) -> Credit | None:
        return None

    async def credits(self, scope: str | None = None, *, limit: int = 100, before: str | None = None) -> Sequence[Credit]:
        return ()

    def listen(self, tell: Callable[[BudgetReached], None]) -> None: ...

    async def prune(self, before: float) -> int:
        return 0

    async def roll_up(self, before: float) -> int:
        return 0

    async def budgets(self, scopes: Mapping[str, Caps | None], *, now: float) -> Sequence[Budget]:
        return ()

    async def usage(self, query: UsageQuery) -> UsageReport:
        return UsageReport(totals=UsageTotals(), groups=(), data=(), next_cursor=None)

    async def check(self) -> Sequence[Finding]:
        return ()

    async def ping(self) -> None: ...
