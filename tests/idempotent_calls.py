"""Calls under an idempotency key, for the tests of what becomes of them."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_aigateway import (
    AIGateway,
    Answer,
    Chunk,
    CompletionRequest,
    Conflict,
    Principal,
)

from .test_pipeline import ask, capped

DAY = 86_400
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Got:
    """An answer as its reader saw it, either way."""

    def __init__(self, *, items: list[Any], facts: dict[str, Any], replayed: bool) -> None:
        self.items = items
        self.facts = facts
        self.replayed = replayed

    @property
    def text(self) -> str:
        return "".join(item.text for item in self.items)


async def call(gateway: AIGateway, request: CompletionRequest, *, stream: bool, key: str | None = "k", who: Principal | None = None) -> Got:
    who = who or capped()
    names = ("usage", "model", "finish_reason", "cost_usd", "cached", "request_id", "provider")
    if stream:
        async with gateway.stream(who, request, idempotency_key=key) as answer:
            items: list[Any] = [chunk async for chunk in answer]
        return Got(items=items, facts={name: getattr(answer, name) for name in names}, replayed=answer.replayed)
    whole: Answer = await gateway.complete(who, request, idempotency_key=key)
    text = Chunk(delta={"content": whole.message["content"]})
    facts = {name: getattr(whole, name) for name in names} | {"message": whole.message, "id": whole.id}
    return Got(items=[text], facts=facts, replayed=whole.replayed)


async def settled(gateway: AIGateway, *, stream: bool) -> Got:
    """Asks again until the call before has come to its end."""
    with anyio.fail_after(10):
        while True:
            try:
                return await call(gateway, ask(), stream=stream)
            except Conflict as conflict:
                if conflict.code != "idempotency_in_progress":
                    raise
                await anyio.sleep(0.005)


async def wait_for_replay(gateway: AIGateway, *, stream: bool) -> Got:
    got = await settled(gateway, stream=stream)
    assert got.replayed
    return got
