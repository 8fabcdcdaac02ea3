"""What every `TenantStore` promises. Subclass it beside your backend, with the two fixtures, and run pytest."""

from __future__ import annotations

import anyio
import pytest

from ..errors import InvalidArgument
from ..protocols import TenantStore
from ..types import Tenant


class TenantStoreContract:
    """Fixtures of the subclass: `store`, empty, and `elsewhere`, another store over the same data as another worker has it."""

    async def test_a_tenant_comes_back_as_it_was_put(self, store: TenantStore, elsewhere: TenantStore) -> None:
        tenant = Tenant(
            "Müller & Söhne",
            requests_per_minute=1,
            tokens_per_minute=2,
            max_parallel_requests=3,
            daily_cap_usd="0.10",
            monthly_cap_usd="1",
            hard_cap_usd="12.000000001",
        )
        await store.put(tenant)
        assert await store.get(tenant.id) == tenant
        assert await elsewhere.get(tenant.id) == tenant

    async def test_an_unknown_tenant_is_none_until_another_worker_puts_it(self, store: TenantStore, elsewhere: TenantStore) -> None:
        assert await elsewhere.get("acme") is None
        await store.put(Tenant("acme"))
        assert await elsewhere.get("acme") == Tenant("acme")

    async def test_put_replaces_all_limits(self, store: TenantStore, elsewhere: TenantStore) -> None:
        await store.put(Tenant("acme", requests_per_minute=5, daily_cap_usd="1"))
        assert await elsewhere.get("acme") is not None
        await store.put(Tenant("acme", requests_per_minute=6))
        assert await elsewhere.get("acme") == Tenant("acme", requests_per_minute=6)

    async def test_update_sets_the_named_limits_and_no_other(self, store: TenantStore, elsewhere: TenantStore) -> None:
        await store.put(Tenant("acme", requests_per_minute=5, daily_cap_usd="1"))
        changed = await store.update("acme", {"requests_per_minute": None, "hard_cap_usd": "7.50"})
        assert changed == Tenant("acme", daily_cap_usd="1", hard_cap_usd="7.5")
        assert await elsewhere.get("acme") == changed

    async def test_concurrent_updates_of_different_limits_all_survive(self, store: TenantStore, elsewhere: TenantStore) -> None:
        await store.put(Tenant("acme"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.update, "acme", {"requests_per_minute": 1})
            tasks.start_soon(elsewhere.update, "acme", {"tokens_per_minute": 2})
            tasks.start_soon(store.update, "acme", {"daily_cap_usd": "3"})
            tasks.start_soon(elsewhere.update, "acme", {"hard_cap_usd": "4"})
        assert await store.get("acme") == Tenant("acme", requests_per_minute=1, tokens_per_minute=2, daily_cap_usd="3", hard_cap_usd="4")

    async def test_a_wrong_update_is_refused_and_changes_nothing(self, store: TenantStore) -> None:
        await store.put(Tenant("acme", requests_per_minute=5))
        for wrong in ({"id": "other"}, {"colour": "red"}, {"daily_cap_usd": 1.5}):
            with pytest.raises(InvalidArgument):
                await store.update("acme", {"tokens_per_minute": 1, **wrong})
        assert await store.get("acme") == Tenant("acme", requests_per_minute=5)

    async def test_updating_an_unknown_tenant_says_none_and_creates_nothing(self, store: TenantStore) -> None:
        assert await store.update("acme", {"requests_per_minute": 1}) is None
        assert await store.get("acme") is None

    async def test_tenants_are_listed_in_the_order_of_their_ids_page_by_page(self, store: TenantStore) -> None:
        for tenant_id in ("c", "a", "d", "b"):
            await store.put(Tenant(tenant_id))
        assert [tenant.id for tenant in await store.list()] == ["a", "b", "c", "d"]
        assert [tenant.id for tenant in await store.list(limit=2, after="a")] == ["b", "c"]
        assert await store.list(after="d") == []
