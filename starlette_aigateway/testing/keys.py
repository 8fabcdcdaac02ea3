"""What every `KeyStore` promises. Subclass it beside your backend, with the two fixtures, and run pytest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import anyio
import pytest

from ..errors import Conflict, InvalidArgument
from ..protocols import KeyStore
from ..types import Key, limit_fields

NOW = 1_800_000_000.0
CREATED = datetime(2026, 1, 31, 12, 30, 15, 250_000, tzinfo=UTC)


def key(key_id: str = "key_1", **fields: Any) -> Key:
    return Key(**{"id": key_id, "name": "mobile-app", "hint": "wxyz", "created_at": CREATED, **fields})


def digest_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


class KeyStoreContract:
    """Fixtures of the subclass: `store`, empty, and `elsewhere`, another store over the same data as another worker has it (the same
    object, where a backend has no workers). Mark the module with `pytest.mark.anyio`."""

    async def test_a_key_is_found_by_its_digest_with_every_field_as_it_was_added(self, store: KeyStore, elsewhere: KeyStore) -> None:
        added = key(
            tenant="acme",
            allowed_models=["gpt-4o-mini", "claude-sonnet"],
            requests_per_minute=60,
            tokens_per_minute=100_000,
            max_parallel_requests=3,
            daily_cap_usd="0.000000001",
            monthly_cap_usd=Decimal("50.00"),
            hard_cap_usd=1000,
            expires_at=datetime(2030, 1, 1, tzinfo=UTC),
            revoked_at=datetime(2029, 1, 1, tzinfo=UTC),
            metadata={"owner": "ana", "nested": {"list": [1, 2.5, None, True, "ü"]}},
        )
        await store.add(added, digest_of(1))
        for reader in (store, elsewhere):
            assert await reader.find(digest_of(1), now=NOW) == added
            assert await reader.get("key_1") == added

    async def test_no_limits_stay_no_limits(self, store: KeyStore) -> None:
        await store.add(key(allowed_models=[]), digest_of(1))
        found = await store.find(digest_of(1), now=NOW)
        assert found is not None
        assert set(limit_fields(found).values()) == {None}
        assert (found.tenant, found.allowed_models, found.expires_at, found.revoked_at) == (None, (), None, None)

    async def test_an_unknown_digest_or_id_is_none_until_it_is_added(self, store: KeyStore, elsewhere: KeyStore) -> None:
        for reader in (store, elsewhere):
            assert await reader.find(digest_of(1), now=NOW) is None
            assert await reader.get("key_1") is None
        await store.add(key(), digest_of(1))
        for reader in (store, elsewhere):
            assert await reader.find(digest_of(1), now=NOW) is not None

    async def test_an_id_or_a_digest_that_exists_is_a_conflict_and_changes_nothing(self, store: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        with pytest.raises(Conflict):
            await store.add(key(name="other"), digest_of(2))
        with pytest.raises(Conflict):
            await store.add(key("key_2"), digest_of(1))
        assert await store.find(digest_of(1), now=NOW) == key()
        assert await store.find(digest_of(2), now=NOW) is None
        assert await store.get("key_2") is None

    async def test_a_digest_that_was_rotated_away_is_a_conflict_too(self, store: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        await store.rotate("key_1", digest_of(2), "abcd", previous_until=NOW)
        with pytest.raises(Conflict):
            await store.add(key("key_2"), digest_of(1))

    async def test_a_change_is_true_everywhere_from_the_next_find_on(self, store: KeyStore, elsewhere: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        for moment in range(3):
            assert await elsewhere.find(digest_of(1), now=NOW) is not None
            revoked_at = datetime(2026, 2, 1 + moment, tzinfo=UTC)
            changed = await store.update("key_1", {"revoked_at": revoked_at})
            assert changed == key(revoked_at=revoked_at)
            assert await elsewhere.find(digest_of(1), now=NOW) == changed
            assert await store.find(digest_of(1), now=NOW) == changed

    async def test_an_update_sets_the_named_fields_and_no_other(self, store: KeyStore) -> None:
        added = key(tenant="acme", requests_per_minute=60, daily_cap_usd="1.5", metadata={"a": 1})
        await store.add(added, digest_of(1))
        assert await store.update("key_1", {"requests_per_minute": None, "name": "renamed"}) == key(
            name="renamed", tenant="acme", daily_cap_usd="1.5", metadata={"a": 1}
        )

    async def test_concurrent_updates_of_different_fields_all_survive(self, store: KeyStore, elsewhere: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        changes: Sequence[dict[str, Any]] = (
            {"requests_per_minute": 10},
            {"tokens_per_minute": 20},
            {"max_parallel_requests": 30},
            {"daily_cap_usd": "1"},
            {"monthly_cap_usd": "2"},
            {"hard_cap_usd": "3"},
            {"metadata": {"a": 1}},
            {"name": "renamed"},
        )
        async with anyio.create_task_group() as tasks:
            for number, change in enumerate(changes):
                tasks.start_soon((store, elsewhere)[number % 2].update, "key_1", change)
        merged: dict[str, Any] = {name: value for change in changes for name, value in change.items()}
        assert await store.find(digest_of(1), now=NOW) == key(**merged)

    async def test_an_update_with_a_wrong_field_or_value_is_refused_and_changes_nothing(self, store: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        for wrong in ({"id": "key_9"}, {"colour": "red"}, {"name": None}, {"daily_cap_usd": 1.5}, {"expires_at": "soon"}):
            with pytest.raises(InvalidArgument):
                await store.update("key_1", {"requests_per_minute": 5, **wrong})
        assert await store.find(digest_of(1), now=NOW) == key()

    async def test_updating_or_rotating_an_unknown_key_says_none(self, store: KeyStore) -> None:
        assert await store.update("key_9", {"name": "x"}) is None
        assert await store.rotate("key_9", digest_of(2), "abcd", previous_until=NOW) is None
        assert await store.find(digest_of(2), now=NOW) is None

    async def test_a_rotated_key_opens_with_the_new_digest_and_with_the_old_one_until_its_grace_ends(
        self, store: KeyStore, elsewhere: KeyStore
    ) -> None:
        await store.add(key(tenant="acme"), digest_of(1))
        assert await elsewhere.find(digest_of(1), now=NOW) is not None
        rotated = await store.rotate("key_1", digest_of(2), "abcd", previous_until=NOW + 60)
        assert rotated == key(tenant="acme", hint="abcd")
        for reader in (store, elsewhere):
            assert await reader.find(digest_of(2), now=NOW + 1e6) == rotated
            assert await reader.find(digest_of(1), now=NOW + 59.9) == rotated
            assert await reader.find(digest_of(1), now=NOW + 60) is None
            assert await reader.find(digest_of(1), now=NOW + 59.9) == rotated

    async def test_a_second_rotation_shuts_the_oldest_digest_at_once(self, store: KeyStore, elsewhere: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        await store.rotate("key_1", digest_of(2), "abcd", previous_until=NOW + 60)
        assert await elsewhere.find(digest_of(1), now=NOW) is not None
        await store.rotate("key_1", digest_of(3), "efgh", previous_until=NOW + 60)
        found = [await elsewhere.find(digest_of(number), now=NOW) is not None for number in (1, 2, 3)]
        assert found == [False, True, True]

    async def test_a_rotation_to_a_digest_that_exists_is_a_conflict_and_changes_nothing(self, store: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        await store.add(key("key_2"), digest_of(2))
        await store.rotate("key_2", digest_of(3), "abcd", previous_until=NOW + 60)
        for taken in (1, 2, 3):
            with pytest.raises(Conflict):
                await store.rotate("key_1", digest_of(taken), "zzzz", previous_until=NOW)
        assert await store.find(digest_of(1), now=NOW) == key()

    async def test_a_revocation_holds_for_the_previous_digest_too(self, store: KeyStore) -> None:
        await store.add(key(), digest_of(1))
        await store.rotate("key_1", digest_of(2), "abcd", previous_until=NOW + 60)
        await store.update("key_1", {"revoked_at": CREATED})
        for number in (1, 2):
            found = await store.find(digest_of(number), now=NOW)
            assert found is not None
            assert found.revoked_at == CREATED

    async def test_keys_are_listed_in_the_order_of_their_ids_page_by_page(self, store: KeyStore) -> None:
        for number in (3, 1, 5, 2, 4):
            await store.add(key(f"key_{number}", tenant="acme" if number % 2 else None), digest_of(number))
        assert [each.id for each in await store.list()] == ["key_1", "key_2", "key_3", "key_4", "key_5"]
        assert [each.id for each in await store.list(limit=2, after="key_2")] == ["key_3", "key_4"]
        assert [each.id for each in await store.list(after="key_5")] == []
        assert [each.id for each in await store.list(tenant="acme", limit=2)] == ["key_1", "key_3"]
        assert [each.id for each in await store.list(tenant="acme", after="key_3")] == ["key_5"]
        assert await store.list(tenant="nobody") == []
