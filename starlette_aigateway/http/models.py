"""`/v1/models` in OpenAI's shape. `created` is not known here and always 0; `owned_by` is the provider that is asked first."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..errors import NotFound
from .exchange import Exchange


async def list_models(exchange: Exchange) -> Response:
    models = await exchange.pipeline.admission.models(exchange.principal)
    return exchange.answer({"object": "list", "data": [_model(*item) for item in models.items()]})


async def get_model(exchange: Exchange) -> Response:
    """One of those that the list shows to this caller."""
    name = exchange.path["id"]
    provider = (await exchange.pipeline.admission.models(exchange.principal)).get(name)
    if provider is None:
        raise NotFound(f"there is no model {name!r} here, or it is not allowed", code="model_not_found", param="model")
    return exchange.answer(_model(name, provider))


def _model(name: str, provider: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": provider}
