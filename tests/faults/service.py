"""A whole gateway over a `data_dir` of files, and what its callers see of it over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, Price, Principal, Timeouts
from starlette_aigateway.testing.providers import Say, ScriptedProvider

WHO = Principal("user", hard_cap_usd="1000")
PRICES = {"m": Price("1000", "2000")}
PATIENT = Timeouts(drain=0.2, settle=0.5)
HURRIED = Timeouts(drain=0.2, settle=0.5, storage=0.5)
"""For faults that only a deadline ends."""


async def resolve_principal(connection: HTTPConnection) -> Principal:
    return WHO


class Service:
    """`call` asks over HTTP. The provider answers at once unless a test brings its own."""

    def __init__(self, gateway: AIGateway, provider: ScriptedProvider, client: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.provider = provider
        self.client = client
        self._calls = 0

    async def call(self, *, key: str | None = None) -> httpx.Response:
        """One that no cache answers and that none keeps."""
        self._calls += 1
        return await self._post(f"question {self._calls}", {"cache-control": "no-cache, no-store"}, key)

    async def cached_call(self) -> httpx.Response:
        """The same each time."""
        return await self._post("the same", {}, None)

    async def _post(self, text: str, headers: dict[str, str], key: str | None) -> httpx.Response:
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 20}
        return await self.client.post("/complete", json=body, headers=headers)

    async def ready(self) -> int:
        return (await self.client.get("/readyz")).status_code

    async def refused(self) -> bool:
        """Whether a call is refused for want of storage, and reaches no provider."""
        asked = len(self.provider.calls)
        answer = await self.call()
        return answer.status_code == 503 and answer.json()["error"]["code"] == "storage_unavailable" and len(self.provider.calls) == asked

    async def until_refused(self) -> None:
        """Calls until the storage is used up: what was allotted to a file already can still be written."""
        for _ in range(5000):
            answer = await self.call()
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "storage_unavailable"
                return
            assert answer.status_code == 200
        raise AssertionError("the storage is never full")

    async def held(self) -> int:
        return sum(budget.held for budget in await self.gateway.budgets(WHO))

    async def outcomes(self) -> Sequence[str]:
        return [record.outcome for record in (await self.gateway.usage(limit=1000)).data]

    async def until_nothing_is_held(self) -> None:
        with anyio.fail_after(20):
            while await self.held():
                await anyio.sleep(0.01)


def gateway_over(data_dir: Path, *providers: object, timeouts: Timeouts = PATIENT, **settings: Any) -> AIGateway:
    return AIGateway(
        data_dir=data_dir, providers=providers, prices=PRICES, resolve_principal=resolve_principal, timeouts=timeouts, **settings
    )


@asynccontextmanager
async def service(
    data_dir: Path, *steps: Any, lifespan: bool = True, timeouts: Timeouts = PATIENT, **settings: Any
) -> AsyncIterator[Service]:
    provider = ScriptedProvider(*steps, Say("yes"), repeat=True)
    gateway = gateway_over(data_dir, provider, timeouts=timeouts, **settings)
    async with AsyncExitStack() as stack:
        if lifespan:
            await stack.enter_async_context(gateway)
        transport = httpx.ASGITransport(gateway)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30))
        yield Service(gateway, provider, client)
