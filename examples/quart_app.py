"""Quart with the gateway around its ASGI app. Quart answers all errors itself; here it answers those of the gateway with their own status.

    $ hypercorn --bind 127.0.0.1:8000 examples/quart_app.py:app

The header `x-session: session-of-ana` is who is logged in. Everything is kept in `AIGATEWAY_DATA_DIR` (.demo-data). On trio, take
`QuartTrio` of Quart-Trio and `hypercorn --worker-class trio`; nothing else changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from quart import Quart, Response, request
from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, AIGatewayError, AIGatewayMiddleware, Price, Principal, render_error
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
app = Quart(__name__)
app.register_error_handler(AIGatewayError, render_error)
app.asgi_app = AIGatewayMiddleware(app.asgi_app, gateway, path="/api/ai-gateway")  # type: ignore[method-assign]  # as Quart documents it


@app.get("/shout")
async def shout() -> dict[str, str]:
    caller = await gateway.caller(request.scope)
    text = request.args.get("text", "hello")
    answer = await caller.complete(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return {"text": str(answer.message["content"]).upper(), "cost_usd": f"{answer.cost_usd:f}"}


@app.get("/stream")
async def stream() -> Response:
    caller = await gateway.caller(request.scope)
    text = request.args.get("text", "one word after the other")
    events = await caller.event_stream(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return Response(aiter(events), headers=events.headers)
