"""Starlette with the middleware, which starts and stops the gateway and puts the caller into the state; and a mount."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from starlette_aigateway import AIGatewayMiddleware

from .common import PREFIX, asks, make_gateway

gateway = make_gateway()


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello from the host")


async def ask(request: Request) -> Response:
    answer = await request.state.aigateway.complete(**asks())
    return JSONResponse({"answer": answer.message["content"], "cost": str(answer.cost_usd)})


async def streamed(request: Request) -> Response:
    response: Response = await request.state.aigateway.stream_response(**asks(request.query_params["token"]))
    return response


app = Starlette(
    routes=[Route("/hello", hello), Route("/ask", ask), Route("/streamed", streamed), Mount(PREFIX, gateway)],
    middleware=[Middleware(AIGatewayMiddleware, gateway=gateway)],
)
