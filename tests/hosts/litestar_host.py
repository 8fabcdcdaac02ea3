"""Litestar, with the middleware around it: its own run for each route, and see no lifespan."""

from typing import Any

from litestar import Litestar, MediaType, Request, Response, get

from starlette_aigateway import AIGatewayError, AIGatewayMiddleware, render_error

from .common import MESSAGES, PREFIX, make_gateway

gateway = make_gateway()


@get("/hello", media_type=MediaType.TEXT)
async def hello() -> str:
    return "hello from the host"


@get("/ask")
async def ask(request: Request[Any, Any, Any]) -> dict[str, str]:
    caller = await gateway.caller(request.scope)
    answer = await caller.complete(model="m", messages=MESSAGES, max_tokens=5)
    return {"answer": str(answer.message["content"]), "cost": str(answer.cost_usd)}


def refused(request: Request[Any, Any, Any], error: AIGatewayError) -> Response[bytes]:
    body, status, headers = render_error(error)
    return Response(body, status_code=status, headers=headers)


app = AIGatewayMiddleware(Litestar([hello, ask], exception_handlers={AIGatewayError: refused}), gateway, path=PREFIX)
