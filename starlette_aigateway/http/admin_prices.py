"""`/prices`: the stored prices, which go before those in the host's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.responses import Response

from ..errors import InvalidArgument, InvalidRequest
from ..prices import FOLLOWS, RATES, Price, PriceTier
from ..types import check_id
from . import pages, realm, shapes
from .bodies import known_fields
from .exchange import Exchange

T = TypeVar("T")


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
    await exchange.administration.set_price(model, price, provider=provider, actor=exchange.administrator.actor)
    exchange.acted("price.set", model if provider is None else f"{provider}/{model}")
    return exchange.answer(_shown(provider, model, price))


def _shown(provider: str | None, model: str, price: Price | None) -> dict[str, Any]:
    return {"provider": provider, "model": model, "price": shapes.price(price)}


def _price(given: Any) -> Price | None:
    if given is None:
        return None
    fields = _rates(given, "price", ("request", "tiers"))
    tiers = fields.pop("tiers", [])
    if not isinstance(tiers, list):
        raise InvalidRequest("price.tiers must be a list of objects, or null", param="price.tiers")
    made = [_tier(tier, f"price.tiers[{index}]") for index, tier in enumerate(tiers)]
    return _made(Price, {**fields, "tiers": made}, "price")


def _tier(given: Any, where: str) -> PriceTier:
    fields = _rates(given, where, ("above",))
    if "above" not in fields:
        raise InvalidRequest(f"{where}.above is required: the input tokens that such a call exceeds", param=f"{where}.above")
    return _made(PriceTier, fields, where)


def _rates(given: Any, where: str, others: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a price or of a tier; null is as good as left out where a rate may follow another."""
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be an object{' or null' if where == 'price' else ''}", param=where)
    known_fields(given, (*RATES, *others), f"{where}.")
    for name in RATES:
        if name not in FOLLOWS and name not in given:
            raise InvalidRequest(f"{where}.{name} is required: US dollars per million tokens", param=f"{where}.{name}")
    return {name: value for name, value in given.items() if value is not None or name in ("input", "output", "above")}


def _made(kind: Callable[..., T], fields: dict[str, Any], where: str) -> T:
    try:
        return kind(**fields)
    except InvalidArgument as error:
        raise InvalidRequest(f"{where}.{error.message}", param=f"{where}.{error.param}") from None
