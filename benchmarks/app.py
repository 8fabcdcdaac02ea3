"""What is measured: a Starlette app with the gateway mounted at /ai, in front of a server that plays OpenAI's API on port 9001.

Everything is on: a stored key with windows of requests and of tokens and with caps of every kind, a durable ledger on disk in a new
directory, the cache. The limits are too large to refuse anything, and are counted all the same.

With `LEDGER=none` nothing is held or booked, so that the cost of the ledger itself can be told. With `DATA_DIR=<a directory>` that one is
used and left there: by several workers, or filled before (`benchmarks/scale.py`). `RETENTION_DAYS=30` rolls up what is older.

After the start the garbage collector is told to look at less and less often, as `docs/performance.md` tells hosts; not with
`GC=default`.
`TRANSPORT` is `aiohttp` or `httptools`; without it, the gateway chooses.

    $ WORK=<a directory> uvicorn --app-dir benchmarks app:app --port 9201 --loop uvloop --http httptools --no-access-log

`python benchmarks/app.py` prints the key that the app opens to; it is made once, below `$WORK`, and belongs to nothing but these runs.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import ample_key
from no_ledger import NoLedger
from starlette.applications import Starlette
from starlette.routing import Mount

from starlette_aigateway import AIGateway, Conflict, Price, Retention
from starlette_aigateway.policy.keys import mint
from starlette_aigateway.protocols import Transport
from starlette_aigateway.providers import OpenAIProvider

WORK = Path(os.environ["WORK"])
SEED_FILE = WORK / "aigateway.seed"
SEED_BYTES = 32
UPSTREAM = os.environ.get("UPSTREAM", "http://127.0.0.1:9001/v1")


def seed() -> bytes:
    """The random bytes that the key is made of, so that the load generator knows the key before the app has made it."""
    if not SEED_FILE.exists():
        SEED_FILE.touch(mode=0o600)
        SEED_FILE.write_bytes(os.urandom(SEED_BYTES))
    return SEED_FILE.read_bytes()


def random(length: int) -> bytes:
    return seed() if length == SEED_BYTES else os.urandom(length)


def transport() -> Transport | None:
    """Imported when it is used: what is not would count as memory of the gateway."""
    match os.environ.get("TRANSPORT"):
        case "aiohttp":
            from starlette_aigateway.providers.transport_aiohttp import AiohttpTransport

            return AiohttpTransport()
        case "httptools":
            from starlette_aigateway.providers.transport_httptools import HttptoolsTransport

            return HttptoolsTransport()
        case _:
            return None


def build() -> Starlette:
    given, days = os.environ.get("DATA_DIR"), os.environ.get("RETENTION_DAYS")
    data_dir = Path(given or tempfile.mkdtemp(prefix="aigateway-", dir=WORK))
    gateway = AIGateway(
        providers=[OpenAIProvider(api_key="upstream", base_url=UPSTREAM, transport=transport())],
        data_dir=data_dir,
        prices={"gpt-4o-mini": Price("0.15", "0.60", cache_read="0.075")},
        ledger=None if os.environ.get("LEDGER") != "none" else NoLedger(),
        random=random,
        retention=None if days is None else Retention(records=timedelta(days=float(days))),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            async with gateway.lifespan():
                with suppress(Conflict):  # another worker has made it, or an earlier run
                    await ample_key.make(gateway, "bench")
                if os.environ.get("GC") != "default":
                    gc.collect()
                    gc.freeze()
                    gc.set_threshold(10_000, 20, 50)
                yield
        finally:
            if given is None:
                shutil.rmtree(data_dir, ignore_errors=True)

    return Starlette(routes=[Mount("/ai", app=gateway)], lifespan=lifespan)


if __name__ == "__main__":
    print(mint(random))
else:
    app = build()
