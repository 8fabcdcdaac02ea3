from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
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

    async def test_a_price_of_an_earlier_release_is_read_and_written_as_ever(self, store: SQLitePriceStore, tmp_path: Path) -> None:
        price = Price(3, 15, cache_read="0.3", request="0.01")
        await store.put(None, "m", price)
        with closing(sqlite3.connect(tmp_path / "config.db")) as connection:
            (written,) = connection.execute("SELECT price FROM prices").fetchone()
        assert msgspec.json.decode(written) == {"input": "3", "output": "15", "cache_read": "0.3", "cache_write": "3", "request": "0.01"}
        assert (await store.all())[None, "m"] == price
