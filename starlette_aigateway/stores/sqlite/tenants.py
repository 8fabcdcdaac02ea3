"""Tenants and their limits in `config.db`."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from ... import money
from ...policy import keys
from ...types import CAP_NAMES, COUNT_NAMES, LimitFields, Limits, Tenant
from .config import ConfigDatabase, Remembered, decode, encode


class SQLiteTenantStore:
    """The `TenantStore` protocol. A `get` of what has not changed, also that there is no such tenant, is answered from memory."""

    def __init__(self, database: ConfigDatabase) -> None:
        self._database = database
        self._remembered: Remembered[str, Tenant | None] = Remembered(database)

    async def get(self, tenant_id: str) -> Tenant | None:
        return self._remembered.get(tenant_id, lambda: self._database.read(lambda connection: _select(connection, tenant_id)))

    async def put(self, tenant: Tenant) -> None:
        await self._database.write(lambda connection: _upsert(connection, tenant))

    async def update(self, tenant_id: str, changes: Mapping[str, Any]) -> Tenant | None:
        def change(connection: sqlite3.Connection) -> Tenant | None:
            tenant = _select(connection, tenant_id)
            return None if tenant is None else _upsert(connection, keys.revised_tenant(tenant, changes))

        return await self._database.write(change)

    async def list(self, *, limit: int = 100, after: str | None = None) -> Sequence[Tenant]:
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT id, limits FROM tenants WHERE id > ? ORDER BY id LIMIT ?", (after or "", limit)
            ).fetchall()
        )
        return [_tenant(row) for row in rows]


def _select(connection: sqlite3.Connection, tenant_id: str) -> Tenant | None:
    row = connection.execute("SELECT id, limits FROM tenants WHERE id = ?", (tenant_id,)).fetchone()
    return None if row is None else _tenant(row)


def _upsert(connection: sqlite3.Connection, tenant: Tenant) -> Tenant:
    connection.execute(
        "INSERT INTO tenants (id, limits) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET limits = excluded.limits",
        (tenant.id, encode_limits(tenant)),
    )
    return tenant


def _tenant(row: tuple[str, str]) -> Tenant:
    return Tenant(row[0], **decode_limits(row[1]))


def encode_limits(limits: Limits) -> str:
    """Only what is limited, amounts as decimal strings: `{"requests_per_minute":60,"daily_cap_usd":"2.5"}`."""
    given: dict[str, Any] = {name: getattr(limits, name) for name in COUNT_NAMES}
    given |= {name: money.text(getattr(limits, name)) for name in CAP_NAMES}
    return encode({name: value for name, value in given.items() if value is not None})


def decode_limits(text: str) -> LimitFields:
    fields: LimitFields = decode(text)
    return fields
