"""Litestar, with the middleware around it: its own run for each route, and see no lifespan."""

from typing import Any

from litestar import Litestar, MediaType, Request, Response, get
from litestar.types import ASGIApp

from starlette_aigateway import AIGatewayError, AIGatewayMiddleware, render_error

from .common import PREFIX, asks, make_gateway

gateway = make_gateway()


@get("/hello", media_type=MediaType.TEXT)
async def hello() -> str:
    return "hello from the host"


@get("/ask")
async def ask(request: Request[Any, Any, Any]) -> dict[str, str]:
    caller = await gateway.caller(request.scope)
    answer = await caller.complete(**asks())
    return {"answer": str(answer.message["content"]), "cost": str(answer.cost_usd)}


@get("/streamed")
async def streamed(request: Request[Any, Any, Any], token: str) -> ASGIApp:
    caller = await gateway.caller(request.scope)
    return await caller.stream_response(**asks(token))  # type: ignore[return-value]  # Litestar types ASGI by dictionaries of its own


def refused(request: Request[Any, Any, Any], error: AIGatewayError) -> Response[bytes]:
    body, status, headers = render_error(error)
    return Response(body, status_code=status, headers=headers)


app = AIGatewayMiddleware(Litestar([hello, ask, streamed], exception_handlers={AIGatewayError: refused}), gateway, path=PREFIX)
