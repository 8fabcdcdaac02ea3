"""`/healthz`: this process answers. `/readyz`: a call could be metered now."""

from __future__ import annotations

from starlette.responses import Response

from .exchange import Exchange


async def alive(exchange: Exchange) -> Response:
    return exchange.answer({"status": "ok"})


async def ready(exchange: Exchange) -> Response:
    await exchange.check()
    return exchange.answer({"status": "ready"})
