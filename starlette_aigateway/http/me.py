"""`/me`: what a caller may use, and how much of it is left."""

from __future__ import annotations

from starlette.responses import Response

from . import shapes
from .exchange import Exchange


async def me(exchange: Exchange) -> Response:
    exchange.query()
    principal = exchange.principal
    windows = await exchange.pipeline.admission.windows(principal)
    budgets = await exchange.administration.budgets(principal)
    return exchange.answer(
        {
            "principal": principal.id,
            "tenant": principal.tenant_id,
            "key_id": principal.key_id,
            "allowed_models": principal.allowed_models,
            **shapes.limits(exchange.pipeline.admission.limits(principal)),
            "windows": [shapes.window(state) for state in windows],
            "budgets": [shapes.budget(budget) for budget in budgets],
        }
    )
