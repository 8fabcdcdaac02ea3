"""No framework at all: an ASGI function, and the gateway around it. The caller is in the scope's state.

    $ uvicorn --app-dir examples asgi_app:app --port 8000

The header `x-session: session-of-ana` is who is logged in. Everything is kept in `AIGATEWAY_DATA_DIR` (.demo-data).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from starlette_aigateway import AIGateway, AIGatewayMiddleware, Price, Principal
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


async def host(scope: Scope, receive: Receive, send: Send) -> None:
    """Knows nothing but http; the lifespan is the gateway's affair. What the gateway refuses is answered outside of here."""
    assert scope["type"] == "http"
    caller = scope["state"]["aigateway"]
    if scope["path"] == "/stream":
        response = await caller.stream_response(model="echo", messages=[{"role": "user", "content": "one word after the other"}])
        await response(scope, receive, send)
        return
    answer = await caller.complete(model="echo", messages=[{"role": "user", "content": "hello"}], max_tokens=100)
    body = json.dumps({"text": answer.message["content"].upper(), "cost_usd": f"{answer.cost_usd:f}"}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


app = AIGatewayMiddleware(host, gateway, path="/api/ai-gateway")
