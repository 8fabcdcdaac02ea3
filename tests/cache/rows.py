"""The rows of the file of the response cache, as somebody who can write to it sees them."""

from __future__ import annotations

import sqlite3
from math import inf
from pathlib import Path
from typing import Any

from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.cache_disk import restored, stored
from starlette_aigateway.cache_sieve import Sieve
from starlette_aigateway.testing.cache import key
from starlette_aigateway.testing.clock import FakeClock


def rows(directory: Path) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(directory / "cache.db")
    try:
        found = connection.execute("SELECT key, raw, mode, filename, value FROM Cache ORDER BY rowid").fetchall()
        return [(restored(name), *others) for name, *others in found]
    finally:
        connection.close()


def plant(directory: Path, name: str, *, mode: int, value: object = None, filename: str | None = None, raw: int = 1) -> None:
    connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
    try:
        connection.execute("DELETE FROM Cache WHERE key = ?", (stored(key(name)),))
        connection.execute(
            "INSERT INTO Cache (key, raw, store_time, expire_time, access_time, mode, filename, value) VALUES (?, ?, 0, NULL, 0, ?, ?, ?)",
            (stored(key(name)), raw, mode, filename, value),
        )
    finally:
        connection.close()
    sieve = Sieve(directory / "sieve")
    sieve.refresh()
    sieve.mark([key(name)], inf)


async def fresh(directory: Path, clock: FakeClock) -> DiskResponseCache:
    """A cache whose files exist and whose memory is empty."""
    made = DiskResponseCache(directory, memory_entries=0, clock=clock)
    await made.flush()
    return made
