"""What administrators did, in `config.db`. The table itself refuses to change or to forget."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from ...accounts import AdminAction, AuditQuery
from .config import ConfigDatabase, decode, encode

COLUMNS = "id, created_at, actor, action, subject, tenant, details"
FILTERS = (
    ("actor", "actor = ?"),
    ("action", "action = ?"),
    ("subject", "subject = ?"),
    ("tenant", "tenant = ?"),
    ("since", "created_at >= ?"),
    ("until", "created_at < ?"),
    ("before", "id < ?"),
)


class SQLiteAuditStore:
    """The `AuditStore` protocol."""

    def __init__(self, database: ConfigDatabase) -> None:
        self._database = database

    async def add(self, action: AdminAction) -> None:
        cells = (action.id, action.created_at, action.actor, action.action, action.subject, action.tenant, encode(action.details))

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"INSERT INTO admin_actions ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",  # noqa: S608  # a constant
                cells,
            )

        await self._database.write(insert)

    async def list(self, query: AuditQuery) -> Sequence[AdminAction]:
        asked = [(condition, value) for name, condition in FILTERS if (value := getattr(query, name)) is not None]
        where = " AND ".join(condition for condition, _ in asked) or "1"
        rows = self._database.read(
            lambda connection: connection.execute(
                f"SELECT {COLUMNS} FROM admin_actions WHERE {where} ORDER BY id DESC LIMIT ?",  # noqa: S608  # made of constants
                (*(value for _, value in asked), query.limit),
            ).fetchall()
        )
        return [_action(row) for row in rows]


def _action(row: tuple[Any, ...]) -> AdminAction:
    action_id, created_at, actor, action, subject, tenant, details = row
    return AdminAction(
        id=action_id, created_at=created_at, actor=actor, action=action, subject=subject, tenant=tenant, details=decode(details)
    )
