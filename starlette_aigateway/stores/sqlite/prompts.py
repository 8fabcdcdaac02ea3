"""Versions and labels of prompts in `config.db`."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from ...accounts import StoredPrompt
from ...policy import prompts
from ...types import rfc3339
from .config import ConfigDatabase, Remembered, decode, encode

SHARED = ""

COLUMNS = "prompts.tenant, prompts.name, prompts.version, messages, settings, text, created_at"

LABELS = (
    "(SELECT json_group_array(label) FROM"
    " (SELECT label FROM labels WHERE labels.tenant = prompts.tenant AND labels.name = prompts.name"
    " AND labels.version = prompts.version ORDER BY label))"
)

VISIBLE = f"""
SELECT {COLUMNS}, {LABELS}
FROM (
    SELECT max(tenant) AS tenant, name FROM prompts WHERE tenant IN ('', :tenant) AND name > :after GROUP BY name ORDER BY name LIMIT :limit
) AS seen
JOIN prompts ON prompts.tenant = seen.tenant AND prompts.name = seen.name
    AND prompts.version = (SELECT max(version) FROM prompts AS all_versions
                           WHERE all_versions.tenant = seen.tenant AND all_versions.name = seen.name)
ORDER BY prompts.name
"""  # noqa: S608  # constants
"""A tenant's own prompt hides a shared one of the same name: no id sorts before the empty one."""

Reference: TypeAlias = tuple[str, str, int | None, str | None]

MAX_REMEMBERED = 512
"""Prompts are up to 256 KiB each."""


class SQLitePromptStore:
    """The `PromptStore` protocol. A `get` of what has not changed is answered from memory."""

    def __init__(self, database: ConfigDatabase) -> None:
        self._database = database
        self._remembered: Remembered[Reference, StoredPrompt] = Remembered(database, MAX_REMEMBERED)

    async def add(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        settings: Mapping[str, Any],
        tenant: str | None,
        labels: Sequence[str],
        text: bool,
        created_at: datetime,
    ) -> StoredPrompt:
        owner = tenant or SHARED
        encoded = (encode(messages), encode(settings), text, rfc3339(created_at))

        def insert(connection: sqlite3.Connection) -> StoredPrompt:
            version = (_highest(connection, owner, name) or 0) + 1
            cells = (owner, name, version, *encoded)
            connection.execute(
                "INSERT INTO prompts (tenant, name, version, messages, settings, text, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)", cells
            )
            for label in prompts.labels_of_new_version(labels, version):
                _point(connection, owner, name, label, version)
            return _select(connection, owner, name, version)

        return await self._database.write(insert)

    async def get(
        self, name: str, *, version: int | None = None, label: str | None = None, tenant: str | None = None
    ) -> StoredPrompt | None:
        reference = (tenant or SHARED, name, version, label if version is None else None)
        entries = self._remembered.entries()
        prompt = entries.get(reference)
        if prompt is None:
            prompt = self._database.read(lambda connection: _resolve(connection, reference))
            if prompt is not None:  # names that do not exist are the callers' to choose, and never remembered
                self._remembered.put(entries, reference, prompt)
        return prompt

    async def list(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[StoredPrompt]:
        values = {"tenant": tenant or SHARED, "after": after or "", "limit": limit}
        return [_prompt(row) for row in self._database.read(lambda connection: connection.execute(VISIBLE, values).fetchall())]

    async def versions(self, name: str, *, tenant: str | None = None) -> Sequence[StoredPrompt]:
        def select(connection: sqlite3.Connection) -> Sequence[tuple[Any, ...]]:
            return connection.execute(
                f"SELECT {COLUMNS}, {LABELS} FROM prompts WHERE tenant = ? AND name = ? ORDER BY version DESC",  # noqa: S608  # constants
                (_owner(connection, tenant or SHARED, name), name),
            ).fetchall()

        return [_prompt(row) for row in self._database.read(select)]

    async def move_label(self, name: str, label: str, version: int, *, tenant: str | None = None) -> StoredPrompt | None:
        prompts.check_label(label)

        def move(connection: sqlite3.Connection) -> StoredPrompt | None:
            owner = _owner(connection, tenant or SHARED, name)
            if not _exists(connection, owner, name, version):
                return None
            _point(connection, owner, name, label, version)
            return _select(connection, owner, name, version)

        return await self._database.write(move)


def _owner(connection: sqlite3.Connection, tenant: str, name: str) -> str:
    """Whose prompt of that name `tenant` sees."""
    return SHARED if tenant == SHARED or _highest(connection, tenant, name) is None else tenant


def _highest(connection: sqlite3.Connection, owner: str, name: str) -> int | None:
    version: int | None = connection.execute("SELECT max(version) FROM prompts WHERE tenant = ? AND name = ?", (owner, name)).fetchone()[0]
    return version


def _labelled(connection: sqlite3.Connection, owner: str, name: str, label: str) -> int | None:
    row = connection.execute("SELECT version FROM labels WHERE tenant = ? AND name = ? AND label = ?", (owner, name, label)).fetchone()
    return None if row is None else int(row[0])


def _resolve(connection: sqlite3.Connection, reference: Reference) -> StoredPrompt | None:
    tenant, name, version, label = reference
    owner = _owner(connection, tenant, name)
    if version is None:
        if label == prompts.LATEST:
            version = _highest(connection, owner, name)
        else:
            version = _labelled(connection, owner, name, label or prompts.PRODUCTION)
    if version is None or not _exists(connection, owner, name, version):
        return None
    return _select(connection, owner, name, version)


def _exists(connection: sqlite3.Connection, owner: str, name: str, version: int) -> bool:
    key = (owner, name, version)
    return connection.execute("SELECT 1 FROM prompts WHERE tenant = ? AND name = ? AND version = ?", key).fetchone() is not None


def _select(connection: sqlite3.Connection, owner: str, name: str, version: int) -> StoredPrompt:
    row = connection.execute(
        f"SELECT {COLUMNS}, {LABELS} FROM prompts WHERE tenant = ? AND name = ? AND version = ?",  # noqa: S608  # constants
        (owner, name, version),
    ).fetchone()
    return _prompt(row)


def _point(connection: sqlite3.Connection, owner: str, name: str, label: str, version: int) -> None:
    connection.execute(
        "INSERT INTO labels (tenant, name, label, version) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (tenant, name, label) DO UPDATE SET version = excluded.version",
        (owner, name, label, version),
    )


def _prompt(row: tuple[Any, ...]) -> StoredPrompt:
    tenant, name, version, messages, settings, text, created_at, labels = row
    return StoredPrompt(
        name=name,
        version=version,
        messages=tuple(decode(messages)),
        settings=decode(settings),
        labels=tuple(decode(labels)),
        tenant=tenant or None,
        created_at=datetime.fromisoformat(created_at),
        text=bool(text),
    )
