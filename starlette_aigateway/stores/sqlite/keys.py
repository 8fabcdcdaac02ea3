"""Stored keys in `config.db`. Only digests are stored; no statement here ever sees a raw key."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from ...errors import Conflict
from ...policy import keys
from ...types import Key, rfc3339
from .config import ConfigDatabase, Remembered, decode, encode
from .tenants import decode_limits, encode_limits

COLUMNS = "id, name, hint, tenant, allowed_models, limits, metadata, created_at, expires_at, revoked_at"


class Found(NamedTuple):
    """`until` is when a digest that was rotated away stops to open; None for the current one."""

    key: Key
    until: float | None


class SQLiteKeyStore:
    """The `KeyStore` protocol. `find` of a key that has not changed is answered from memory; a digest that is not known is looked up
    each time, so that guesses cannot push out what is."""

    def __init__(self, database: ConfigDatabase) -> None:
        self._database = database
        self._remembered: Remembered[bytes, Found] = Remembered(database)

    async def add(self, key: Key, digest: bytes) -> None:
        cells = (digest, *_cells(key))

        def insert(connection: sqlite3.Connection) -> None:
            _refuse_known(connection, digest)
            try:
                connection.execute(
                    f"INSERT INTO keys (digest, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # a constant
                    cells,
                )
            except sqlite3.IntegrityError:
                raise Conflict(f"the key {key.id!r} exists already", param="id") from None

        await self._database.write(insert)

    async def find(self, digest: bytes, *, now: float) -> Key | None:
        entries = self._remembered.entries()
        found = entries.get(digest)
        if found is None:
            found = self._database.read(lambda connection: _find(connection, digest))
            if found is None:
                return None
            self._remembered.put(entries, digest, found)
        return found.key if found.until is None or now < found.until else None

    def recall(self, digest: bytes, *, now: float) -> Key | None:
        found = self._remembered.entries().get(digest)
        return found.key if found is not None and (found.until is None or now < found.until) else None

    async def get(self, key_id: str) -> Key | None:
        return self._database.read(lambda connection: select_key(connection, key_id))

    async def update(self, key_id: str, changes: Mapping[str, Any]) -> Key | None:
        def change(connection: sqlite3.Connection) -> Key | None:
            key = select_key(connection, key_id)
            return None if key is None else _update(connection, keys.revised(key, changes))

        return await self._database.write(change)

    async def rotate(self, key_id: str, digest: bytes, hint: str, *, previous_until: float) -> Key | None:
        def change(connection: sqlite3.Connection) -> Key | None:
            key = select_key(connection, key_id)
            if key is None:
                return None
            _refuse_known(connection, digest)
            connection.execute(
                "UPDATE keys SET previous_digest = digest, previous_until = ?, digest = ? WHERE id = ?", (previous_until, digest, key_id)
            )
            return _update(connection, keys.with_hint(key, hint))

        return await self._database.write(change)

    async def list(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[Key]:
        conditions, values = "id > ?", [after or ""]
        if tenant is not None:
            conditions, values = f"tenant = ? AND {conditions}", [tenant, *values]
        rows = self._database.read(
            lambda connection: connection.execute(
                f"SELECT {COLUMNS} FROM keys WHERE {conditions} ORDER BY id LIMIT ?",  # noqa: S608  # both are constants
                (*values, limit),
            ).fetchall()
        )
        return [_key(row) for row in rows]


def _refuse_known(connection: sqlite3.Connection, digest: bytes) -> None:
    if connection.execute("SELECT 1 FROM keys WHERE digest = ?1 OR previous_digest = ?1", (digest,)).fetchone():
        raise Conflict("this key exists already")


def _find(connection: sqlite3.Connection, digest: bytes) -> Found | None:
    row = connection.execute(
        f"SELECT {COLUMNS}, iif(digest = ?1, NULL, previous_until) FROM keys"  # noqa: S608  # a constant
        " WHERE digest = ?1 OR previous_digest = ?1",
        (digest,),
    ).fetchone()
    return None if row is None else Found(_key(row[:-1]), row[-1])


def select_key(connection: sqlite3.Connection, key_id: str) -> Key | None:
    row = connection.execute(f"SELECT {COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()  # noqa: S608  # a constant
    return None if row is None else _key(row)


def _update(connection: sqlite3.Connection, key: Key) -> Key:
    connection.execute(
        f"UPDATE keys SET ({COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE id = ?",  # noqa: S608  # a constant
        (*_cells(key), key.id),
    )
    return key


def _cells(key: Key) -> tuple[Any, ...]:
    """In the order of `COLUMNS`."""
    return (
        key.id,
        key.name,
        key.hint,
        key.tenant,
        None if key.allowed_models is None else encode(key.allowed_models),
        encode_limits(key),
        encode(key.metadata),
        rfc3339(key.created_at),
        rfc3339(key.expires_at),
        rfc3339(key.revoked_at),
    )


def _key(row: tuple[Any, ...]) -> Key:
    key_id, name, hint, tenant, allowed_models, limits, metadata, created_at, expires_at, revoked_at = row
    return Key(
        id=key_id,
        name=name,
        hint=hint,
        tenant=tenant,
        allowed_models=None if allowed_models is None else decode(allowed_models),
        metadata=decode(metadata),
        created_at=datetime.fromisoformat(created_at),
        expires_at=None if expires_at is None else datetime.fromisoformat(expires_at),
        revoked_at=None if revoked_at is None else datetime.fromisoformat(revoked_at),
        **decode_limits(limits),
    )
