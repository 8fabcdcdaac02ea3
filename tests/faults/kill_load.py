"""The load of the kill loop: callers of several tenants over HTTP, each tenant and key under a cap that they soon reach."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp
import anyio

from starlette_aigateway import AIGateway, Tenant
from starlette_aigateway.accounts import principal_scope, tenant_scope
from starlette_aigateway.types import Caps, LimitFields

from .kill_worker import MODEL, MOUNT

LOST = (aiohttp.ClientError, ConnectionError, TimeoutError)
"""What a caller sees of a server that is killed."""

REFUSALS = ("spend_cap_exceeded", "spend_cap_held", "too_many_parallel_requests")
"""Codes of requests that no provider may have been asked for. `storage_unavailable` may come after a first attempt."""

PATIENCE = 1000
"""Refusals after which a household is replaced by a new one; a final one counts for a hundred."""

PAUSE = 0.02
"""Seconds that a refused caller waits."""


@dataclass
class Household:
    """A tenant with two keys, and how often they were refused."""

    tenant: str
    keys: list[tuple[str, str]]
    refusals: int = 0


@dataclass
class Seen:
    """What the callers saw: how many of each status, and under which request ids. `answers`: nano-USD that a whole answer said it cost."""

    statuses: Counter[str] = field(default_factory=Counter)
    refused: set[str] = field(default_factory=set)
    answers: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    left: int = 0


class Load:
    """`clients` callers at once. Scopes and their caps are remembered in `caps`, for the verdict."""

    def __init__(self, admin: AIGateway, urls: list[str], seed: int) -> None:
        self.seen = Seen()
        self.caps: dict[str, Caps] = {}
        self.gateway_is_full = anyio.Event()
        self._admin = admin
        self._urls = urls
        self._random = random.Random(seed)
        self._households: list[Household] = []
        self._founded = 0
        self._founding = anyio.Lock()
        self._calls = 0

    async def found(self, count: int) -> None:
        """The first households."""
        self._households = [await self._new_household() for _ in range(count)]

    async def call_until(self, over: Callable[[], bool]) -> None:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            while not over():
                await self._call(session)

    async def _call(self, session: aiohttp.ClientSession) -> None:
        place = self._random.randrange(len(self._households))
        household = self._households[place]
        key_id, raw = self._random.choice(household.keys)
        self._calls += 1
        number = self._calls if self._random.random() > 0.05 else max(1, self._calls - 20)  # one in twenty was asked before
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{key_id} {number} " + "x" * self._random.randrange(80)}],
        }
        if self._random.random() < 0.5:
            body["max_tokens"] = self._random.randint(1, 40)
        path = self._random.choice(("/complete", "/v1/chat/completions"))
        stream = self._random.random() < 0.5
        url = self._random.choice(self._urls) + MOUNT + path
        try:
            async with session.post(url, json=body | {"stream": stream}, headers={"authorization": f"Bearer {raw}"}) as answer:
                await self._read(answer, household, stream)
        except LOST:
            self.seen.lost += 1
            await anyio.sleep(PAUSE)
        if household.refusals >= PATIENCE:
            await self._move_on(place, household)

    async def _read(self, answer: aiohttp.ClientResponse, household: Household, stream: bool) -> None:
        request_id = answer.headers["request-id"]
        if answer.status == 200 and stream and self._random.random() < 0.2:
            await answer.content.readany()
            self.seen.left += 1
            answer.close()
            return
        text = await answer.text()
        if answer.status == 200:
            self.seen.statuses["200"] += 1
            if not stream:
                self.seen.answers[request_id] = int(Decimal(answer.headers["x-aigateway-cost-usd"]) * 10**9)
            return
        code = str((await answer.json())["error"]["code"])
        self.seen.statuses[f"{answer.status} {code}"] += 1
        if code not in REFUSALS:
            return
        self.seen.refused.add(request_id)
        if "of this gateway" in text:
            self.gateway_is_full.set()
        else:
            household.refusals += 100 if code == "spend_cap_exceeded" else 1
        await anyio.sleep(PAUSE)

    async def _move_on(self, place: int, household: Household) -> None:
        async with self._founding:
            if self._households[place] is household:
                self._households[place] = await self._new_household()

    async def _new_household(self) -> Household:
        """Caps of some tens to hundreds of calls; for every other tenant the sum of what its keys may spend is above its own."""
        self._founded += 1
        tenant = Tenant(f"t{self._founded}", daily_cap_usd=f"{self._random.randint(4, 30)}")
        await self._admin.save_tenant(tenant)
        self.caps[tenant_scope(tenant.id)] = tenant.caps
        keys: list[tuple[str, str]] = []
        for window in self._random.sample(range(3), 2):
            limits: LimitFields = {"max_parallel_requests": None if keys else 8, **one_cap(window, self._random.randint(2, 20))}
            raw, key = await self._admin.create_key(f"k{self._founded}", tenant=tenant.id, **limits)
            self.caps[principal_scope(key.id)] = key.caps
            keys.append((key.id, raw))
        return Household(tenant.id, keys)


def one_cap(window: int, usd: int) -> LimitFields:
    caps: tuple[LimitFields, ...] = ({"daily_cap_usd": Decimal(usd)}, {"monthly_cap_usd": Decimal(usd)}, {"hard_cap_usd": Decimal(usd)})
    return caps[window]
