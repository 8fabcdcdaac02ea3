"""Caps that a call does not know when it begins: set meanwhile, or by a worker with other settings."""

from collections.abc import AsyncIterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    Completion,
    CompletionRequest,
    CostUnbounded,
    Limits,
    Price,
    PriceUnknown,
    Principal,
    ProviderError,
    SpendCapExceeded,
    StorageUnavailable,
    Tenant,
    Usage,
)
from starlette_aigateway.types import Caps

pytestmark = pytest.mark.anyio

CAP = Decimal("0.01")
PRICES = {"m": Price("1", "1")}
WHO = Principal("u", tenant="t")


class Talker:
    """Does what it is told; without a bound, it talks. Before the first answer it fails once, and `meanwhile` happens."""

    name = "talker"

    def __init__(self, meanwhile: Any = None) -> None:
        self.bounds: list[int | None] = []
        self._meanwhile = meanwhile

    async def complete(self, request: CompletionRequest) -> Completion:
        self.bounds.append(request.max_tokens)
        if self._meanwhile is not None and len(self.bounds) == 1:
            await self._meanwhile()
            raise ProviderError("busy", billed="no", status=503)
        said = Usage(input_tokens=10, output_tokens=request.max_tokens or 60_000)
        return Completion(message={"role": "assistant", "content": "x"}, usage=said)


def ask(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}], **fields)


async def spent(of: AIGateway, **whose: Any) -> Decimal:
    return next(budget.spent_usd for budget in await of.budgets(**whose) if budget.window == "total")


async def test_a_gateway_s_cap_that_this_worker_does_not_know_bounds_its_calls(tmp_path: Path) -> None:
    provider = Talker()
    old = AIGateway(data_dir=tmp_path, providers=[provider], prices=PRICES)
    async with old, AIGateway(data_dir=tmp_path, limits=Limits(hard_cap_usd=CAP)):
        await old.complete(Principal("u"), ask())
        assert provider.bounds[0] is not None
        (record,) = (await old.usage()).data
        assert record.outcome == "completed"
        assert record.cost_usd <= CAP
        with pytest.raises(SpendCapExceeded):
            await old.complete(Principal("u"), ask(max_tokens=8_000))
        assert await spent(old, gateway=True) <= CAP
        assert await old.check_ledger() == []


@pytest.mark.parametrize(
    ("prices", "fields", "refusal"),
    [({}, {}, PriceUnknown), (PRICES, {"params": {"web_search_options": {}}}, CostUnbounded)],
)
async def test_what_has_no_bound_is_refused_under_a_cap_that_this_worker_does_not_know(
    tmp_path: Path, prices: Any, fields: dict[str, Any], refusal: type[Exception]
) -> None:
    provider = Talker()
    async with AIGateway(data_dir=tmp_path, providers=[provider], prices=prices) as old:
        async with AIGateway(data_dir=tmp_path, limits=Limits(hard_cap_usd=CAP)):
            with pytest.raises(refusal):
                await old.complete(Principal("u"), ask(**fields))
        assert provider.bounds == []
        assert (await old.usage()).data == []


async def test_a_cap_that_is_set_between_two_attempts_bounds_the_second(tmp_path: Path) -> None:
    async def cap_everything() -> None:
        async with AIGateway(data_dir=tmp_path, limits=Limits(hard_cap_usd=CAP)):
            pass

    provider = Talker(cap_everything)
    async with AIGateway(data_dir=tmp_path, providers=[provider], prices=PRICES) as gateway:
        await gateway.complete(Principal("u"), ask())
        assert provider.bounds[0] is None
        assert provider.bounds[1] is not None
        assert await spent(gateway, gateway=True) <= CAP
        assert await gateway.check_ledger() == []


@pytest.fixture
async def gateway() -> AsyncIterator[AIGateway]:
    async with AIGateway.in_memory(providers=[Talker()], prices=PRICES) as gateway:
        yield gateway


async def test_the_cap_that_a_tenant_shows_is_the_one_that_holds_whichever_change_came_last(gateway: AIGateway) -> None:
    await gateway.save_tenant(Tenant("t"))
    for number in range(20):
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.save_tenant, Tenant("t", monthly_cap_usd="0.01"))
            group.start_soon(partial(gateway.update_tenant, "t", monthly_cap_usd=100 + number))
        shown = (await gateway.get_tenant("t")).monthly_cap_usd
        month = next(budget for budget in await gateway.budgets(tenant="t") if budget.window == "month")
        assert month.cap_usd == shown


async def test_a_tenant_s_cap_holds_though_the_ledger_could_not_be_told_of_it(gateway: AIGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    await gateway.save_tenant(Tenant("t"))
    ledger = gateway._composition.stores.ledger

    async def away(scope: str, caps: Caps) -> None:
        raise StorageUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "set_caps", away)
        with pytest.raises(StorageUnavailable):
            await gateway.update_tenant("t", monthly_cap_usd="0.000001")
    assert (await gateway.get_tenant("t")).monthly_cap_usd == Decimal("0.000001")
    with pytest.raises(SpendCapExceeded):
        await gateway.complete(WHO, ask())
    assert await spent(gateway, tenant="t") == 0
