"""What every `AuditStore` promises. Subclass it beside your backend, with the two fixtures, and run pytest."""

from __future__ import annotations

from typing import Any

from ..accounts import AdminAction, AuditQuery
from ..protocols import AuditStore


def action(number: int, **fields: Any) -> AdminAction:
    given = {"actor": "ada", "action": "key.update", "subject": "key_1", "tenant": None, "details": {}, **fields}
    return AdminAction(id=f"act_{number:03d}", created_at=float(number), **given)


class AuditStoreContract:
    """Fixtures of the subclass: `store`, empty, and `elsewhere`, another store over the same data as another worker has it."""

    async def test_there_are_no_actions_at_first(self, store: AuditStore) -> None:
        assert list(await store.list(AuditQuery())) == []

    async def test_actions_come_back_as_they_were_newest_first_in_every_worker(self, store: AuditStore, elsewhere: AuditStore) -> None:
        details = {"monthly_cap_usd": "50", "allowed_models": ["a", "b"], "expires_at": None, "price": {"input": "1"}}
        written = [action(1), action(2, tenant="acme", details=details), action(3, actor="ünïcode", subject="gpt/4o")]
        for one in written:
            await store.add(one)
        assert list(await elsewhere.list(AuditQuery())) == written[::-1]

    async def test_an_action_is_written_once_and_never_changed(self, store: AuditStore, elsewhere: AuditStore) -> None:
        await store.add(action(1))
        await elsewhere.add(action(1))
        await elsewhere.add(action(1, actor="somebody-else"))
        assert list(await store.list(AuditQuery())) == [action(1)]

    async def test_filters_are_exact_and_combined_and_the_range_is_half_open(self, store: AuditStore) -> None:
        for number in range(12):
            await store.add(
                action(
                    number,
                    actor=("ada", "bob")[number % 2],
                    action=("key.update", "key.revoke", "price.set")[number % 3],
                    subject=f"key_{number % 4}",
                    tenant=(None, "acme")[number // 6],
                )
            )

        async def found(**filters: Any) -> list[int]:
            return [int(one.created_at) for one in await store.list(AuditQuery(**filters))]

        assert await found(actor="bob") == [11, 9, 7, 5, 3, 1]
        assert await found(action="price.set") == [11, 8, 5, 2]
        assert await found(subject="key_3") == [11, 7, 3]
        assert await found(tenant="acme") == [11, 10, 9, 8, 7, 6]
        assert await found(tenant="acm") == []
        assert await found(since=3.0, until=6.0) == [5, 4, 3]
        assert await found(actor="bob", action="price.set", tenant="acme") == [11]

    async def test_pages_follow_one_another_by_the_id_of_the_last(self, store: AuditStore) -> None:
        for number in range(5):
            await store.add(action(number))
        first = await store.list(AuditQuery(limit=2))
        second = await store.list(AuditQuery(limit=2, before=first[-1].id))
        third = await store.list(AuditQuery(limit=2, before=second[-1].id))
        assert [one.id for page in (first, second, third) for one in page] == [f"act_{number:03d}" for number in (4, 3, 2, 1, 0)]
