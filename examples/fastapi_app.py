"""FastAPI with a login of its own: one dependency guards the app's routes, and the gateway's resolver asks the same function.

    $ uvicorn --app-dir examples fastapi_app:app --port 8000

`Authorization: Bearer token-of-ana` is who is logged in. Dependencies of an app do not guard what is mounted in it, so the gateway asks
itself. Everything is kept in `AIGATEWAY_DATA_DIR` (.demo-data).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, AIGatewayMiddleware, Price, Principal
from starlette_aigateway.fastapi import Caller
from starlette_aigateway.providers import EchoProvider

USERS = {"token-of-ana": "ana", "token-of-ben": "ben"}
bearer = HTTPBearer(auto_error=False)


async def current_user(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str:
    user = None if credentials is None else USERS.get(credentials.credentials)
    if user is None:
        raise HTTPException(401, "log in first", {"www-authenticate": "Bearer"})
    return user


async def resolve_principal(connection: HTTPConnection) -> Principal:
    """What `current_user` raises keeps its status."""
    user = await current_user(await bearer(Request(connection.scope)))
    return Principal(f"user:{user}", requests_per_minute=20, daily_cap_usd="0.50")


gateway = AIGateway(
    providers=[EchoProvider()],
    data_dir=os.environ.get("AIGATEWAY_DATA_DIR", Path(__file__).resolve().parents[1] / ".demo-data"),
    prices={"echo": Price("1.00", "2.00")},
    resolve_principal=resolve_principal,
)
app = FastAPI(title="An app with a gateway")
app.add_middleware(AIGatewayMiddleware, gateway=gateway)
app.mount("/api/ai-gateway", gateway)


@app.get("/shout", dependencies=[Depends(current_user)])
async def shout(caller: Caller, text: str = "hello") -> dict[str, str]:
    """Asks a model as whoever is logged in. A full window or a cap answers by itself, with its own status."""
    answer = await caller.complete(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return {"text": str(answer.message["content"]).upper(), "cost_usd": f"{answer.cost_usd:f}"}


@app.get("/stream", dependencies=[Depends(current_user)])
async def stream(caller: Caller, text: str = "one word after the other") -> Response:
    return await caller.stream_response(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
