from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.prices import SQLitePriceStore
from starlette_aigateway.testing.prices import PriceStoreContract
from starlette_aigateway.types import Price

pytestmark = pytest.mark.anyio


class TestSQLitePriceStore(PriceStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SQLitePriceStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLitePriceStore(database)
        database.close()

    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[SQLitePriceStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLitePriceStore(database)
        database.close()

    async def test_the_mapping_is_the_same_object_while_nothing_has_changed(self, store: SQLitePriceStore) -> None:
        await store.put(None, "m", Price.free())
        first = await store.all()
        assert await store.all() is first
        await store.put(None, "m", Price(1, 2))
        assert await store.all() is not first
