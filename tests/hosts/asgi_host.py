"""No framework: an ASGI function, which knows nothing but http."""

from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse

from starlette_aigateway import AIGatewayMiddleware

from .common import PREFIX, asks, make_gateway

gateway = make_gateway()


async def host(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    caller = scope["state"]["aigateway"]
    if scope["path"].endswith("/streamed"):
        token = scope["query_string"].decode().partition("token=")[2]
        response = await caller.stream_response(**asks(token))
    elif scope["path"].endswith("/ask"):
        answer = await caller.complete(**asks())
        response = JSONResponse({"answer": answer.message["content"], "cost": str(answer.cost_usd)})
    else:
        response = PlainTextResponse("hello from the host")
    await response(scope, receive, send)


app = AIGatewayMiddleware(host, gateway, path=PREFIX)
