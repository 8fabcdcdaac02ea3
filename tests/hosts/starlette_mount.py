"""Starlette with the gateway mounted and nothing else: it starts at its first request and has no lifespan."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from starlette_aigateway import AIGatewayError, render_error

from .common import PREFIX, asks, make_gateway

gateway = make_gateway()


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello from the host")


async def ask(request: Request) -> Response:
    caller = await gateway.caller(request)
    answer = await caller.complete(**asks())
    return JSONResponse({"answer": answer.message["content"], "cost": str(answer.cost_usd)})


async def streamed(request: Request) -> Response:
    caller = await gateway.caller(request)
    return await caller.stream_response(**asks(request.query_params["token"]))


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AIGatewayError)
    return Response(*render_error(error))


app = Starlette(
    routes=[Route("/hello", hello), Route("/ask", ask), Route("/streamed", streamed), Mount(PREFIX, gateway)],
    exception_handlers={AIGatewayError: refused},
)
