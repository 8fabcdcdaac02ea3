"""What the apps of Quart and of Quart-Trio have in common."""

import quart
from quart import Quart, Response

from starlette_aigateway import AIGatewayError, AIGatewayMiddleware, render_error

from .common import PREFIX, asks, make_gateway

gateway = make_gateway()


def furnish(app: Quart) -> None:
    app.register_error_handler(AIGatewayError, render_error)
    app.add_url_rule("/hello", "hello", hello)
    app.add_url_rule("/ask", "ask", ask)
    app.add_url_rule("/streamed", "streamed", streamed)
    app.asgi_app = AIGatewayMiddleware(app.asgi_app, gateway=gateway, path=PREFIX)  # type: ignore[method-assign]  # as its documentation says


async def hello() -> str:
    return "hello from the host"


async def ask() -> dict[str, str]:
    caller = await gateway.caller(quart.request.scope)
    answer = await caller.complete(**asks())
    return {"answer": str(answer.message["content"]), "cost": str(answer.cost_usd)}


async def streamed() -> Response:
    caller = await gateway.caller(quart.request.scope)
    events = await caller.event_stream(**asks(quart.request.args["token"]))
    return Response(aiter(events), headers=events.headers)
