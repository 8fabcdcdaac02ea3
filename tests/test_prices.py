"""What a price is: its components, what follows from what, and the tiers of long contexts."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given

from starlette_aigateway import Price, PriceTier
from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.prices import MAX_TIERS, price_from, price_texts
from starlette_aigateway.stores.sqlite.ledger_schema import Prices

from .money_strategies import prices


def test_what_is_not_given_follows_what_it_is_a_kind_of() -> None:
    price = Price("3", "15", cache_write="3.75", tiers=[PriceTier(200_000, "6", "22.5")])
    assert (price.cache_read, price.cache_write, price.cache_write_1h) == (Decimal(3), Decimal("3.75"), Decimal("3.75"))
    assert (price.reasoning, price.request) == (Decimal(15), Decimal(0))
    (tier,) = price.tiers
    assert {tier.cache_read, tier.cache_write, tier.cache_write_1h} == {Decimal(6)}
    assert tier.reasoning == Decimal("22.5")
    assert Price(1, 2).cache_write_1h == 1


@pytest.mark.parametrize("name", ["input", "output", "cache_read", "cache_write", "cache_write_1h", "reasoning"])
@pytest.mark.parametrize("wrong", [0.1, -1, "NaN", "1e-10", True, [], "many"])
def test_a_wrong_amount_is_refused_by_the_name_of_its_component(name: str, wrong: Any) -> None:
    amounts: dict[str, Any] = {"input": 1, "output": 2, name: wrong}
    for make in (lambda: Price(**amounts), lambda: PriceTier(1, **amounts)):
        with pytest.raises(InvalidArgument) as caught:
            make()
        assert caught.value.param == name
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["input", "output"])
def test_the_two_rates_that_follow_nothing_must_be_given(name: str) -> None:
    amounts: dict[str, Any] = {"input": 1, "output": 2, name: None}
    with pytest.raises(InvalidArgument) as caught:
        Price(**amounts)
    assert caught.value.param == name


@pytest.mark.parametrize("above", [0, -1, 1.5, "200000", True, None, 10**12])
def test_a_tier_begins_above_a_positive_number_of_tokens(above: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PriceTier(above, 1, 2)
    assert caught.value.param == "above"


@pytest.mark.parametrize(
    "tiers",
    [
        None,
        5,
        "tiers",
        [{"above": 1}],
        {PriceTier(1, 1, 1): 1},
        [PriceTier(2, 1, 1), PriceTier(1, 1, 1)],
        [PriceTier(1, 1, 1), PriceTier(1, 2, 2)],
        [PriceTier(number, 1, 1) for number in range(1, MAX_TIERS + 2)],
    ],
)
def test_tiers_that_do_not_ascend_are_refused(tiers: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Price(1, 2, tiers=tiers)
    assert caught.value.param == "tiers"


def test_prices_are_values() -> None:
    one, same = (Price(1, 2, reasoning=3, tiers=[PriceTier(10, 1, 2)]) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Price(1, 2, reasoning=3)
    with pytest.raises(AttributeError):
        one.input = Decimal(0)  # type: ignore[misc]  # it is frozen


@given(price=prices)
def test_a_price_comes_back_from_json_and_from_a_snapshot_as_it_was(price: Price) -> None:
    assert price_from(msgspec.json.decode(msgspec.json.encode(price_texts(price)))) == price
    stored = Prices().dump(price)
    assert Prices().load(stored) == price


def test_a_price_without_later_components_is_stored_as_ever() -> None:
    price = Price("3", "15", cache_read="0.3", cache_write="3.75", request="0.01")
    assert Prices().dump(price) == '["3","15","0.3","3.75","0.01"]'
    assert Prices().load('["3","15","0.3","3.75","0.01"]') == price
