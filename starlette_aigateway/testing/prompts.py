"""What every `PromptStore` promises. Subclass it beside your backend, with the two fixtures, and run pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from ..accounts import StoredPrompt
from ..errors import InvalidRequest
from ..protocols import PromptStore

CREATED = datetime(2026, 1, 31, 12, 30, 15, 250_000, tzinfo=UTC)


async def add(
    store: PromptStore,
    name: str = "greeting",
    content: str = "Hello {{ name }}",
    *,
    tenant: str | None = None,
    labels: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> StoredPrompt:
    messages = [{"role": "system", "content": content}]
    return await store.add(name, messages, settings=settings or {}, tenant=tenant, labels=labels, text=False, created_at=CREATED)


def version_of(prompt: StoredPrompt | None) -> int | None:
    return None if prompt is None else prompt.version


class PromptStoreContract:
    """Fixtures of the subclass: `store`, empty, and `elsewhere`, another store over the same data as another worker has it."""

    async def test_a_prompt_comes_back_as_it_was_added(self, store: PromptStore, elsewhere: PromptStore) -> None:
        messages = (
            {"role": "system", "content": "Be brief, {{ name }}."},
            {"role": "user", "content": [{"type": "text", "text": "ü {{ question }}"}]},
        )
        settings = {"model": "gpt-4o-mini", "temperature": 0.5, "stop": ["a", "b"]}
        added = await store.add("faq", messages, settings=settings, tenant="acme", labels=["beta"], text=False, created_at=CREATED)
        assert added == StoredPrompt(
            name="faq",
            version=1,
            messages=messages,
            settings=settings,
            labels=("beta", "production"),
            tenant="acme",
            created_at=CREATED,
            text=False,
        )
        assert await store.get("faq", tenant="acme") == added
        assert await elsewhere.get("faq", tenant="acme") == added

    async def test_versions_count_from_one_and_production_stays_with_the_first(self, store: PromptStore) -> None:
        first, second = await add(store, content="one"), await add(store, content="two")
        assert (first.version, first.labels, second.version, second.labels) == (1, ("production",), 2, ())
        assert version_of(await store.get("greeting")) == 1
        assert version_of(await store.get("greeting", label="latest")) == 2
        assert version_of(await store.get("greeting", version=2)) == 2
        assert [prompt.version for prompt in await store.versions("greeting")] == [2, 1]

    async def test_a_version_outranks_a_label(self, store: PromptStore) -> None:
        await add(store)
        await add(store)
        assert version_of(await store.get("greeting", version=2, label="production")) == 2
        assert version_of(await store.get("greeting", version=1, label="latest")) == 1

    async def test_concurrent_additions_get_different_versions(self, store: PromptStore, elsewhere: PromptStore) -> None:
        versions: list[int] = []

        async def add_one(number: int) -> None:
            added = await add((store, elsewhere)[number % 2], content=str(number))
            versions.append(added.version)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(add_one, number)
        assert sorted(versions) == list(range(1, 11))
        assert len({prompt.messages[0]["content"] for prompt in await store.versions("greeting")}) == 10

    async def test_labels_of_an_addition_move_to_it(self, store: PromptStore) -> None:
        await add(store, labels=["beta"])
        await add(store, labels=["beta", "production"])
        assert [prompt.labels for prompt in await store.versions("greeting")] == [("beta", "production"), ()]

    async def test_a_moved_label_is_true_everywhere_from_the_next_call_on_also_back(
        self, store: PromptStore, elsewhere: PromptStore
    ) -> None:
        await add(store)
        await add(store)
        for version in (2, 1, 2):
            moved = await store.move_label("greeting", "production", version)
            assert version_of(moved) == version
            assert moved is not None
            assert moved.labels == ("production",)
            assert version_of(await elsewhere.get("greeting")) == version

    async def test_a_new_version_is_the_latest_everywhere(self, store: PromptStore, elsewhere: PromptStore) -> None:
        for version in (1, 2, 3):
            await add(store)
            assert version_of(await elsewhere.get("greeting", label="latest")) == version

    async def test_what_does_not_exist_is_none(self, store: PromptStore) -> None:
        assert await store.get("greeting") is None
        assert await store.get("greeting", label="latest") is None
        assert await store.versions("greeting") == []
        await add(store)
        assert await store.get("greeting", version=2) is None
        assert await store.get("greeting", version=0) is None
        assert await store.get("greeting", label="beta") is None
        assert await store.move_label("greeting", "beta", 2) is None
        assert await store.move_label("unknown", "beta", 1) is None
        assert await store.get("greeting", label="beta") is None

    async def test_latest_and_malformed_labels_cannot_be_moved(self, store: PromptStore) -> None:
        await add(store)
        for label in ("latest", "Beta", "", "-x", "a" * 65, "a b"):
            with pytest.raises(InvalidRequest):
                await store.move_label("greeting", label, 1)
            with pytest.raises(InvalidRequest):
                await add(store, labels=[label])
        assert len(await store.versions("greeting")) == 1

    async def test_a_tenants_prompt_does_not_exist_for_others(self, store: PromptStore) -> None:
        await add(store, "secret", tenant="acme")
        for other in (None, "rival"):
            assert await store.get("secret", tenant=other) is None
            assert await store.get("secret", version=1, tenant=other) is None
            assert await store.versions("secret", tenant=other) == []
            assert await store.list(tenant=other) == []
            assert await store.move_label("secret", "beta", 1, tenant=other) is None
        assert version_of(await store.get("secret", tenant="acme")) == 1

    async def test_a_tenants_own_prompt_hides_the_shared_one_of_its_name(self, store: PromptStore) -> None:
        await add(store, content="shared one")
        await add(store, content="shared two")
        shared = await store.get("greeting", tenant="acme")
        assert shared is not None
        assert shared.tenant is None
        own = await add(store, content="own", tenant="acme")
        assert own.version == 1
        assert await store.get("greeting", tenant="acme") == own
        assert await store.get("greeting", version=2, tenant="acme") is None
        assert [prompt.tenant for prompt in await store.versions("greeting", tenant="acme")] == ["acme"]
        assert version_of(await store.get("greeting", label="latest", tenant="rival")) == 2

    async def test_the_list_has_the_highest_version_of_each_visible_prompt_in_the_order_of_names(self, store: PromptStore) -> None:
        await add(store, "b", content="shared")
        await add(store, "a")
        await add(store, "a")
        await add(store, "c", tenant="acme")
        await add(store, "b", content="own", tenant="acme")
        await add(store, "d", tenant="rival")
        listed = [(prompt.name, prompt.version, prompt.tenant) for prompt in await store.list(tenant="acme")]
        assert listed == [("a", 2, None), ("b", 1, "acme"), ("c", 1, "acme")]
        assert [prompt.name for prompt in await store.list(tenant="acme", limit=1, after="a")] == ["b"]
        assert [prompt.name for prompt in await store.list()] == ["a", "b"]
        assert await store.list(after="b") == []
