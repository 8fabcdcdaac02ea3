"""`/prices`: the stored prices, which go before those in the host's code."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..errors import InvalidArgument, InvalidRequest
from ..types import Price, check_id
from . import pages, realm, shapes
from .bodies import known_fields
from .exchange import Exchange

AMOUNTS = ("input", "output", "cache_read", "cache_write", "request")


async def list_prices(exchange: Exchange) -> Response:
    exchange.query()
    realm.whole_gateway(exchange.administrator)
    prices = await exchange.administration.list_prices()
    ordered = sorted(prices.items(), key=lambda item: (item[0][1], item[0][0] or ""))
    return exchange.answer(pages.list_of([_shown(provider, model, price) for (provider, model), price in ordered], None))


async def put_price(exchange: Exchange) -> Response:
    """Sets one price, for every provider or for one; a price of null removes it."""
    realm.whole_gateway(exchange.administrator)
    body = await exchange.json()
    known_fields(body, ("model", "provider", "price"))
    model, provider = check_id(body.get("model"), "model"), body.get("provider")
    if provider is not None:
        check_id(provider, "provider")
    if "price" not in body:
        raise InvalidRequest("price is required: an object with input and output, or null to remove the price", param="price")
    price = _price(body["price"])
    await exchange.administration.set_price(model, price, provider=provider)
    exchange.acted("price.set", model if provider is None else f"{provider}/{model}")
    return exchange.answer(_shown(provider, model, price))


def _shown(provider: str | None, model: str, price: Price | None) -> dict[str, Any]:
    return {"provider": provider, "model": model, "price": shapes.price(price)}


def _price(given: Any) -> Price | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InvalidRequest("price must be an object or null", param="price")
    known_fields(given, AMOUNTS, "price.")
    for name in ("input", "output"):
        if name not in given:
            raise InvalidRequest(f"price.{name} is required: US dollars per million tokens", param=f"price.{name}")
    try:
        return Price(**{name: value for name, value in given.items() if value is not None or name in ("input", "output")})
    except InvalidArgument as error:
        raise InvalidRequest(f"price.{error.message}", param=f"price.{error.param}") from None
