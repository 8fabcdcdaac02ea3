from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.stores.sqlite.tenants import SQLiteTenantStore
from starlette_aigateway.testing.tenants import TenantStoreContract

pytestmark = pytest.mark.anyio


class TestSQLiteTenantStore(TenantStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SQLiteTenantStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLiteTenantStore(database)
        database.close()

    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[SQLiteTenantStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLiteTenantStore(database)
        database.close()
