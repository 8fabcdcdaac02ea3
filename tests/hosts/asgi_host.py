"""No framework: an ASGI function, which knows nothing but http."""

import json
from typing import Any

from starlette_aigateway import AIGatewayMiddleware

from .common import MESSAGES, PREFIX, make_gateway

gateway = make_gateway()


async def host(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    if scope["path"].endswith("/ask"):
        answer = await scope["state"]["aigateway"].complete(model="m", messages=MESSAGES, max_tokens=5)
        body = json.dumps({"answer": answer.message["content"], "cost": str(answer.cost_usd)}).encode()
    else:
        body = b"hello from the host"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


app = AIGatewayMiddleware(host, gateway, path=PREFIX)
