"""Prices in `config.db`."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from types import MappingProxyType

from ...prices import Price, price_from, price_texts
from .config import ConfigDatabase, Remembered, decode, encode

PriceTable = Mapping[tuple[str | None, str], Price]
ANY_PROVIDER = ""


class SQLitePriceStore:
    """The `PriceStore` protocol. `all` gives the same mapping for as long as nothing has changed."""

    def __init__(self, database: ConfigDatabase) -> None:
        self._database = database
        self._remembered: Remembered[None, PriceTable] = Remembered(database)

    async def put(self, provider: str | None, model: str, price: Price | None) -> None:
        cells = (provider or ANY_PROVIDER, model)

        def change(connection: sqlite3.Connection) -> None:
            if price is None:
                connection.execute("DELETE FROM prices WHERE provider = ? AND model = ?", cells)
            else:
                connection.execute(
                    "INSERT INTO prices (provider, model, price) VALUES (?, ?, ?)"
                    " ON CONFLICT (provider, model) DO UPDATE SET price = excluded.price",
                    (*cells, _encode(price)),
                )

        await self._database.write(change)

    async def all(self) -> PriceTable:
        return self._remembered.get(None, self._read)

    def _read(self) -> PriceTable:
        return self._database.read(_select)


def _select(connection: sqlite3.Connection) -> PriceTable:
    rows = connection.execute("SELECT provider, model, price FROM prices").fetchall()
    return MappingProxyType({(provider or None, model): _decode(price) for provider, model, price in rows})


def _encode(price: Price) -> str:
    """As the first releases wrote it, unless a later component says something of its own."""
    texts = price_texts(price)
    if not price.tiers:
        del texts["tiers"]
    if price.cache_write_1h == price.cache_write:
        del texts["cache_write_1h"]
    if price.reasoning == price.output:
        del texts["reasoning"]
    return encode(texts)


def _decode(text: str) -> Price:
    return price_from(decode(text))
