"""FastAPI with a login of its own, a dependency, which the resolver of the gateway asks too."""

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, Response
from starlette.requests import HTTPConnection

from starlette_aigateway import AIGatewayMiddleware, Principal
from starlette_aigateway.fastapi import Caller

from .common import PREFIX, asks, make_gateway, principal_of


async def current_user(connection: HTTPConnection) -> str:
    user = connection.headers.get("x-user")
    if not user:
        raise HTTPException(401, "log in first")
    return user


async def resolve_principal(connection: HTTPConnection) -> Principal:
    return principal_of(await current_user(connection))


gateway = make_gateway(resolve_principal)
app = FastAPI()
app.add_middleware(AIGatewayMiddleware, gateway=gateway)
app.mount(PREFIX, gateway)


@app.get("/hello", response_class=PlainTextResponse)
async def hello() -> str:
    return "hello from the host"


@app.get("/ask")
async def ask(caller: Caller, user: Annotated[str, Depends(current_user)]) -> dict[str, str]:
    answer = await caller.complete(**asks())
    return {"answer": str(answer.message["content"]), "cost": str(answer.cost_usd)}


@app.get("/streamed")
async def streamed(caller: Caller, token: str) -> Response:
    return await caller.stream_response(**asks(token))
