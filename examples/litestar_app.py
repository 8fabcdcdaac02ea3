"""Litestar with the gateway around it. Litestar answers all errors itself; here it answers those of the gateway with their own status.

    $ granian --interface asgi --port 8000 examples/litestar_app.py:app

The header `x-session: session-of-ana` is who is logged in. Everything is kept in `AIGATEWAY_DATA_DIR` (.demo-data).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, Response, get
from litestar.types import ASGIApp
from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, AIGatewayError, AIGatewayMiddleware, Message, Price, Principal, render_error
from starlette_aigateway.providers import EchoProvider

SESSIONS = {"session-of-ana": "ana", "session-of-ben": "ben"}


async def resolve_principal(connection: HTTPConnection) -> Principal | None:
    user = SESSIONS.get(connection.headers.get("x-session", ""))
    return None if user is None else Principal(f"user:{user}", requests_per_minute=20, daily_cap_usd="0.50")


gateway = AIGateway(
    providers=[EchoProvider()],
    data_dir=os.environ.get("AIGATEWAY_DATA_DIR", Path(__file__).resolve().parents[1] / ".demo-data"),
    prices={"echo": Price("1.00", "2.00")},
    resolve_principal=resolve_principal,
)


@get("/shout")
async def shout(request: Request[Any, Any, Any], text: str = "hello") -> dict[str, str]:
    caller = await gateway.caller(request.scope)
    answer = await caller.complete(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return {"text": str(answer.message["content"]).upper(), "cost_usd": f"{answer.cost_usd:f}"}


@get("/stream")
async def stream(request: Request[Any, Any, Any], text: str = "one word after the other") -> ASGIApp:
    caller = await gateway.caller(request.scope)
    messages: list[Message] = [{"role": "user", "content": text}]
    return await caller.stream_response(model="echo", messages=messages)  # type: ignore[return-value]  # Litestar has types of its own for ASGI


def refused(request: Request[Any, Any, Any], error: AIGatewayError) -> Response[bytes]:
    body, status, headers = render_error(error)
    return Response(body, status_code=status, headers=headers)


app = AIGatewayMiddleware(Litestar([shout, stream], exception_handlers={AIGatewayError: refused}), gateway, path="/api/ai-gateway")
