"""Fills a directory as years of use would leave it, so that a full gateway can be measured against an empty one.

    python benchmarks/scale.py --keys 100000 --records 2000000 --cache 50000 DIR
    DATA_DIR=DIR WORK=... uvicorn --app-dir benchmarks app:app ...

Keys are made by a gateway, with what its audit trail says of them; answers are put into the cache by its store; calls are carried out by
the writer of the ledger itself, in the order of time up to now, without a sync. A tenth of the keys
makes two thirds of the calls. Of the calls 8 % are
hits, 4 % are given back, and one in 2,000 is never settled.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import anyio

from starlette_aigateway import AIGateway, Key, Tenant, Usage, UsageRecord
from starlette_aigateway.accounts import GATEWAY_SCOPE, HoldRequest, ScopeClaim, Settlement, principal_scope, tenant_scope
from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.policy.caching import CachedAnswer, CachedCompletion, encode
from starlette_aigateway.policy.keys import mint_id
from starlette_aigateway.policy.pricing import cost
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.stores.sqlite.connection import connect
from starlette_aigateway.stores.sqlite.ledger_ops import Op, Record, Release, Reserve, Settle
from starlette_aigateway.stores.sqlite.ledger_schema import SCHEMA, Prices
from starlette_aigateway.stores.sqlite.ledger_writer import BatchWriter
from starlette_aigateway.types import Caps, Price

DAY = 86_400.0
BATCH = 128
BATCHES_A_COMMIT = 800
TENANTS = 500
LEASE = 150.0
SECONDS_A_CALL = 1.2
MONTH = 30 * DAY
CAPS = Caps(10**12, 10**13, 10**14)
PRICES = {
    ("openai", "gpt-4o-mini"): Price("0.15", "0.60", cache_read="0.075"),
    ("openai", "gpt-4o"): Price("2.50", "10", cache_read="1.25"),
    ("anthropic", "claude-sonnet-4"): Price("3", "15", cache_read="0.3", cache_write="3.75"),
}
ANSWER = "An answer of some two thousand characters, as most are. " * 36


class Payer(NamedTuple):
    key_id: str
    tenant: str | None
    scopes: tuple[ScopeClaim, ...]


async def make_keys(directory: Path, count: int) -> list[Key]:
    keys: list[Key] = []
    limit = anyio.CapacityLimiter(256)

    async def make(number: int) -> None:
        async with limit:
            tenant = f"tenant-{number % TENANTS}" if number % 4 else None
            _, key = await gateway.create_key(
                f"service {number}", tenant=tenant, requests_per_minute=600, tokens_per_minute=10**6, monthly_cap_usd=10_000
            )
            keys.append(key)

    async with AIGateway(providers=[EchoProvider()], data_dir=directory) as gateway:
        for number in range(TENANTS):
            await gateway.save_tenant(Tenant(f"tenant-{number}", monthly_cap_usd=10**6))
        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(make, number)
        await gateway.check_ready()
    return keys


def payer(key: Key) -> Payer:
    scopes = [ScopeClaim(principal_scope(key.id), CAPS, 1000)]
    if key.tenant is not None:
        scopes.append(ScopeClaim(tenant_scope(key.tenant), CAPS))
    return Payer(key.id, key.tenant, (*scopes, ScopeClaim(GATEWAY_SCOPE)))


class Calls:
    """Makes up calls; `dice` decides who makes them, and how they end."""

    def __init__(self, payers: Sequence[Payer], seed: int) -> None:
        self._payers = payers
        self._dice = random.Random(seed)
        self._prices = Prices()
        self._models = list(PRICES.items())

    def ops(self, now: float) -> tuple[Op, Op | None]:
        """What one call asks of the ledger at first, and when it ends."""
        dice = self._dice
        who = self._payers[int(len(self._payers) * dice.random() ** 6)]
        (provider, model), price = self._models[min(int(dice.expovariate(1.2)), 2)]
        use_id, request_id = (mint_id(prefix, now, dice.randbytes) for prefix in ("use_", "req_"))
        stored, fate = self._prices.dump(price), dice.random()
        used = Usage(input_tokens=dice.randrange(20, 3000), output_tokens=dice.randrange(5, 800))
        if fate < 0.08:
            record = UsageRecord(
                id=use_id, request_id=request_id, attempt=1, created_at=now, principal=who.key_id, tenant=who.tenant, key_id=who.key_id,
                provider=provider, model=model, response_model=model, usage=used, cost=0, price=price, outcome="cached", latency_ms=1,
            )  # fmt: skip
            return Record(record, stored), None
        request = HoldRequest(
            id=use_id, request_id=request_id, attempt=1, scopes=who.scopes, principal=who.key_id, tenant=who.tenant, key_id=who.key_id,
            provider=provider, model=model, price=price, minimum=0, wanted=40_000_000, admission=0, expires_at=now + LEASE,
        )  # fmt: skip
        if fate < 0.12:
            return Reserve(request, stored, now), Release(use_id, now + SECONDS_A_CALL, 300)
        settlement = Settlement(
            outcome="completed", amount=cost(used, price), usage=used, response_model=model, latency_ms=dice.randrange(200, 4000)
        )
        return Reserve(request, stored, now), None if fate > 0.9995 else Settle(use_id, settlement, now + SECONDS_A_CALL)


def batches(calls: Calls, count: int, begin: float, end: float) -> Iterator[list[Op]]:
    """Each batch ends what the one before began."""
    ending: list[Op] = []
    for first in range(0, count, BATCH):
        started = [calls.ops(begin + (end - begin) * number / count) for number in range(first, min(first + BATCH, count))]
        yield [*ending, *(op for op, _ in started)]
        ending = [op for _, op in started if op is not None]
    yield ending


def fill_ledger(directory: Path, keys: Sequence[Key], count: int, days: float) -> None:
    connection = connect(directory / "ledger.db", durability="OFF", schema=SCHEMA)
    for pragma in ("cache_size=-1000000", "wal_autocheckpoint=100000"):
        connection.execute(f"PRAGMA {pragma}")
    writer = BatchWriter(Prices())
    now = time.time()
    connection.execute("BEGIN IMMEDIATE")
    for number, batch in enumerate(batches(Calls([payer(key) for key in keys], 1), count, now - days * DAY, now - 2 * SECONDS_A_CALL), 1):
        for outcome in writer.apply(connection, batch):
            if isinstance(outcome, Exception):
                raise outcome
        if number % BATCHES_A_COMMIT == 0:
            connection.execute("COMMIT")
            print(f"  {number * BATCH} of {count} calls", flush=True)
            connection.execute("BEGIN IMMEDIATE")
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def fill_cache(directory: Path, count: int) -> None:
    cache = DiskResponseCache(directory / "cache")
    message = {"role": "assistant", "content": ANSWER}
    for number in range(count):
        content = CachedCompletion(
            message=message,
            finish_reason="stop",
            usage=Usage(input_tokens=20, output_tokens=400),
            model="gpt-4o-mini",
            id=f"chatcmpl-{number}",
        )
        value = encode(CachedAnswer(stored_at=time.time(), provider="openai", model="gpt-4o-mini", content=content))
        assert value is not None
        await cache.put(hashlib.sha256(str(number).encode()).hexdigest(), value, MONTH)
        if number % 1000 == 999:
            await cache.flush()
    await cache.flush()
    await anyio.to_thread.run_sync(cache.close)


def sizes(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return "\n".join(f"{path.stat().st_size / 2**20:10.1f} MiB  {path.relative_to(directory)}" for path in files)


def counted(directory: Path) -> str:
    connection = sqlite3.connect(f"file:{directory / 'ledger.db'}?mode=ro", uri=True)
    tables = ("entries", "usage", "balances", "holds", "rollups")
    rows = [f"{connection.execute(f'SELECT count(*) FROM {table}').fetchone()[0]} {table}" for table in tables]
    connection.close()
    return ", ".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--cache", type=int, default=50_000)
    parser.add_argument("--days", type=float, default=180, help="how long ago the first call was made")
    options = parser.parse_args()
    if options.directory.exists() and os.listdir(options.directory):  # noqa: PTH208
        parser.error(f"{options.directory} is not empty")
    begun = time.monotonic()
    keys = anyio.run(make_keys, options.directory, options.keys)
    print(f"{len(keys)} keys after {time.monotonic() - begun:.0f} s", flush=True)
    fill_ledger(options.directory, keys, options.records, options.days)
    print(f"{counted(options.directory)} after {time.monotonic() - begun:.0f} s", flush=True)
    anyio.run(fill_cache, options.directory, options.cache)
    print(f"{options.cache} answers after {time.monotonic() - begun:.0f} s")
    print(sizes(options.directory))


if __name__ == "__main__":
    main()
