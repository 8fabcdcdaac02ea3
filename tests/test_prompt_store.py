from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.prompts import SQLitePromptStore
from starlette_aigateway.testing.prompts import PromptStoreContract, add

pytestmark = pytest.mark.anyio


class TestSQLitePromptStore(PromptStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SQLitePromptStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLitePromptStore(database)
        database.close()

    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[SQLitePromptStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLitePromptStore(database)
        database.close()

    async def test_a_reference_that_no_row_can_have_is_refused_as_such(self, store: SQLitePromptStore) -> None:
        with pytest.raises(InvalidArgument):
            await store.get("greeting", version=2**63)
        with pytest.raises(InvalidArgument):
            await store.get("\ud800")

    async def test_callers_cannot_fill_the_memory_with_references(self, store: SQLitePromptStore) -> None:
        await add(store, "greeting")
        for number in range(5):
            assert await store.get(f"unknown{number}") is None
            assert await store.get("greeting", label=f"unknown{number}") is None
            assert await store.get("greeting", version=1, label=f"unknown{number}") is not None
        assert len(store._remembered.entries()) == 1
