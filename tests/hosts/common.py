"""The gateway of every host of the matrix: who is let in, what a call costs, and a provider that waits for its test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, Chunk, Completion, CompletionRequest, Price, Principal, Timeouts, Usage
from starlette_aigateway.events import CallRecorded, Event

from .switchboard import dial, say

USAGE = Usage(input_tokens=10, output_tokens=5)
COST = "0.02"
"""US dollars of a call with this usage, at the price below."""

DRAIN_SECONDS = 2.0
PREFIX = "/api/ai-gateway"


def asks(token: str = "hello") -> dict[str, Any]:
    """What routes of the hosts ask the model for."""
    return {"model": "m", "messages": [{"role": "user", "content": token}], "max_tokens": 5}


class Guided:
    """Tells when the gateway starts and stops. A stream goes on after its first piece when its test says so; the last message of a
    request is its token."""

    name = "guided"
    models = ("m",)

    async def __aenter__(self) -> Self:
        await say(kind="started")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await say(kind="stopped")

    async def complete(self, request: CompletionRequest) -> Completion:
        return Completion(message={"role": "assistant", "content": f"answer to {token_of(request)}"}, finish_reason="stop", usage=USAGE)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        token = token_of(request)
        async with await dial() as line:
            await line.send(b'{"kind": "begun", "token": "%s"}\n' % token.encode())
            yield Chunk(delta={"content": "first "})
            await line.receive()
            yield Chunk(delta={"content": "last"})
            yield Chunk(finish_reason="stop", usage=USAGE)


def token_of(request: CompletionRequest) -> str:
    return str(request.messages[-1]["content"])


async def report(event: Event) -> None:
    if isinstance(event, CallRecorded):
        record = event.record
        facts = {"request_id": record.request_id, "principal": record.principal, "outcome": record.outcome}
        await say(kind="record", cost=str(record.cost_usd), **facts)


async def by_header(connection: HTTPConnection) -> Principal | None:
    """The login of hosts that have no other: `x-user`."""
    user = connection.headers.get("x-user")
    return principal_of(user) if user else None


def principal_of(user: str) -> Principal:
    return Principal(user, hard_cap_usd="0.0001" if user == "poor" else "100")


def make_gateway(resolve_principal: Callable[[HTTPConnection], Awaitable[Principal | None]] = by_header) -> AIGateway:
    return AIGateway.in_memory(
        providers=[Guided()],
        prices={"m": Price("1000", "2000")},
        resolve_principal=resolve_principal,
        observers=[report],
        timeouts=Timeouts(drain=DRAIN_SECONDS),
    )
