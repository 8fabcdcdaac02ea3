"""An ordinary Starlette app with pages of its own, and the gateway below /api/ai-gateway. `scripts/demo` serves it.

    $ uvicorn --app-dir examples starlette_app:app --port 8000

Environment: `OPENAI_API_KEY` and `ANTHROPIC_API_KEY` add these providers to the echo that answers without any account;
`AIGATEWAY_ADMIN_TOKEN` opens the admin routes to whoever sends it; `AIGATEWAY_DATA_DIR` is where everything is kept (.demo-data).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from starlette_aigateway import Admin, AIGateway, AIGatewayMiddleware, Completion, CompletionRequest, Price, Principal, ProviderError
from starlette_aigateway.providers import EchoProvider

CHECKOUT = Path(__file__).resolve().parents[1]
MOUNT = "/api/ai-gateway"

SESSIONS = {"session-of-ana": "ana", "session-of-ben": "ben"}


async def resolve_principal(connection: HTTPConnection) -> Principal | None:
    """Turns a login of the host into somebody who is metered. Here a session is a header and a dictionary; a real app asks whatever
    it has: `connection.session`, `connection.user`, a verified JSON Web Token. None: nobody is logged in, and the gateway answers 401."""
    user = SESSIONS.get(connection.headers.get("x-session", ""))
    return None if user is None else Principal(f"user:{user}", requests_per_minute=20, daily_cap_usd="0.50")


async def authorize_admin(connection: HTTPConnection) -> Admin | bool:
    """Who may use the admin routes: whoever sends the token of the environment. Without one, nobody."""
    token = os.environ.get("AIGATEWAY_ADMIN_TOKEN", "")
    given = connection.headers.get("authorization", "").removeprefix("Bearer ")
    return Admin("demo") if token and secrets.compare_digest(given.encode(), token.encode()) else False


class BrokenProvider:
    """Serves one model and fails each time, for certain without having charged anything: the next provider answers."""

    name = "broken"
    models = ("echo-with-fallback",)

    async def complete(self, request: CompletionRequest) -> Completion:
        raise ProviderError("the broken provider is broken", billed="no", status=503)


def providers() -> list[object]:
    """In the order in which they are tried."""
    found: list[object] = [BrokenProvider(), EchoProvider(models=["echo", "echo-with-fallback"], latency=0.03)]
    if openai_key := os.environ.get("OPENAI_API_KEY"):
        from starlette_aigateway.providers import OpenAIProvider

        found.append(OpenAIProvider(api_key=openai_key))
    if anthropic_key := os.environ.get("ANTHROPIC_API_KEY"):
        from starlette_aigateway.providers import AnthropicProvider

        found.append(AnthropicProvider(api_key=anthropic_key))
    return found


gateway = AIGateway(
    providers=providers(),
    data_dir=os.environ.get("AIGATEWAY_DATA_DIR", CHECKOUT / ".demo-data"),
    prices={"echo": Price("1.00", "2.00"), "echo-with-fallback": Price("1.00", "2.00")},
    public_prices=True,
    resolve_principal=resolve_principal,
    authorize_admin=authorize_admin,
)

PAGE = """<!doctype html>
<title>An app with a gateway</title>
<h1>An ordinary app</h1>
<p>This page is the app's own. So is <a href="/shout?text=hello">/shout</a>, which asks a model through the gateway, in process,
for whoever is logged in: send the header <code>x-session: session-of-ana</code>.</p>
<p>The gateway is mounted below <code>/api/ai-gateway</code>.</p>
"""


async def home(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def shout(request: Request) -> Response:
    """A page of the host that uses a model. Nobody logged in, a full window, a cap: the middleware answers with the right status."""
    text = request.query_params.get("text", "hello")
    answer = await request.state.aigateway.complete(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return PlainTextResponse(f"{answer.message['content'].upper()}!\n(${answer.cost_usd:f}, cached: {answer.cached})\n")


app = Starlette(
    routes=[Route("/", home), Route("/shout", shout), Mount(MOUNT, app=gateway)],
    middleware=[Middleware(AIGatewayMiddleware, gateway=gateway)],
)
