"""What a call costs, and which price holds."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from genai_prices import data
from genai_prices.types import (
    ClauseEquals,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    StartDateConstraint,
    Tier,
    TieredPrices,
    TimeOfDateConstraint,
)
from genai_prices.types import Usage as GenaiUsage
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway import money
from starlette_aigateway.errors import ConfigurationError, InvalidArgument
from starlette_aigateway.policy.pricing import PriceBook, cost, most
from starlette_aigateway.public_prices import PublicPrices, dearest, price_field, price_tables
from starlette_aigateway.types import Price, PriceTier, Usage

from .money_strategies import prices, usages

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@given(price=prices, usage=usages())
def test_the_cost_is_exact_and_rounded_up_once(price: Price, usage: Usage) -> None:
    rates = next((tier for tier in reversed(price.tiers) if usage.input_tokens > tier.above), price)
    read, written, hour = usage.cache_read_input_tokens, usage.cache_creation_input_tokens, usage.cache_creation_1h_input_tokens
    thought = usage.reasoning_output_tokens
    dollars = (
        (usage.input_tokens - read - written) * Fraction(rates.input)
        + read * Fraction(rates.cache_read)
        + (written - hour) * Fraction(rates.cache_write)
        + hour * Fraction(rates.cache_write_1h)
        + (usage.output_tokens - thought) * Fraction(rates.output)
        + thought * Fraction(rates.reasoning)
    ) / 10**6
    assert cost(usage, price) == math.ceil(dollars * 10**9) + Fraction(price.request) * 10**9
    assert type(cost(usage, price)) is int


def test_the_cost_of_very_much_is_exact_as_well() -> None:
    """A float has no room for the last nano-dollar."""
    assert cost(Usage(input_tokens=10**7 + 1, output_tokens=0), Price("1000.000000001", 0)) == 10**13 + 10**6 + 10 + 1


def test_the_documented_example() -> None:
    assert cost(Usage(input_tokens=1_000_000, output_tokens=1_000_000), Price("0.15", "0.60")) == 750_000_000
    assert cost(Usage(input_tokens=1, output_tokens=0), Price("0.000000001", 0)) == 1


def test_more_cached_than_input_tokens_are_charged_as_cached() -> None:
    usage = Usage(input_tokens=5, output_tokens=0, cache_read_input_tokens=10)
    assert cost(usage, Price(1000, 0, cache_read=100)) == 10 * 100_000


def test_a_cached_token_is_not_charged_twice() -> None:
    usage = Usage(input_tokens=10, output_tokens=0, cache_read_input_tokens=4, cache_creation_input_tokens=6)
    assert cost(usage, Price(1000, 0, cache_read=1, cache_write=2)) == 4 * 1_000 + 6 * 2_000


def test_a_price_per_call_is_charged_without_tokens() -> None:
    assert cost(Usage(input_tokens=0, output_tokens=0), Price(0, 0, request="0.005")) == 5_000_000


def test_without_a_price_and_with_a_free_one_it_costs_nothing() -> None:
    usage = Usage(input_tokens=10**9, output_tokens=10**9)
    assert cost(usage, None) == 0
    assert cost(usage, Price.free()) == 0


LONG = Price(1, 10, cache_read="0.1", tiers=[PriceTier(1000, 2, 15), PriceTier(2000, 4, 30)])


@pytest.mark.parametrize(
    ("input_tokens", "output", "nano"),
    [
        (1000, 1, 1000 * 1000 + 10_000),
        (1001, 1, 1001 * 2000 + 15_000),
        (2000, 0, 2000 * 2000),
        (2001, 2, 2001 * 4000 + 60_000),
    ],
)
def test_a_call_is_at_the_rates_of_the_tier_that_its_input_exceeds_as_a_whole(input_tokens: int, output: int, nano: int) -> None:
    assert cost(Usage(input_tokens=input_tokens, output_tokens=output), LONG) == nano


def test_cached_tokens_count_for_the_tier() -> None:
    usage = Usage(input_tokens=1001, output_tokens=0, cache_read_input_tokens=1001)
    assert cost(usage, LONG) == 1001 * 2000
    assert cost(Usage(input_tokens=0, output_tokens=0, cache_read_input_tokens=1001), LONG) == 1001 * 2000


def test_writes_for_an_hour_and_reasoning_have_rates_of_their_own() -> None:
    price = Price(3, 15, cache_write="3.75", cache_write_1h=6, reasoning=60)
    usage = Usage(input_tokens=30, output_tokens=7, cache_creation_input_tokens=20, cache_creation_1h_input_tokens=5)
    assert cost(usage, price) == 10 * 3000 + 15 * 3750 + 5 * 6000 + 7 * 15_000
    assert cost(Usage(input_tokens=0, output_tokens=7, reasoning_output_tokens=4), price) == 3 * 15_000 + 4 * 60_000


def test_more_of_a_kind_than_of_the_whole_is_charged_in_full() -> None:
    price = Price(3, 15, cache_write=4, cache_write_1h=6, reasoning=60)
    assert cost(Usage(input_tokens=0, output_tokens=2, reasoning_output_tokens=5), price) == 5 * 60_000
    assert cost(Usage(input_tokens=9, output_tokens=0, cache_creation_input_tokens=3, cache_creation_1h_input_tokens=9), price) == 9 * 6000


@given(price=prices, usage=usages(input_tokens=400_000))
def test_nothing_of_at_most_so_many_tokens_costs_more_than_the_most(price: Price, usage: Usage) -> None:
    for input_bound in (usage.input_tokens, 400_000):
        assert cost(usage, price) <= most(input_bound, usage.output_tokens, price)


@pytest.mark.parametrize("price", [Price(4, 1, tiers=[PriceTier(1000, 1, 1)]), Price(1, 9, tiers=[PriceTier(1000, 1, 1)])])
def test_a_shorter_call_may_be_the_dearer_one(price: Price) -> None:
    worst = most(1001, 1000, price)
    assert worst > cost(Usage(input_tokens=1001, output_tokens=1000), price)
    assert worst == cost(Usage(input_tokens=1000, output_tokens=1000), price)


def test_a_tier_that_cannot_be_reached_does_not_count() -> None:
    assert most(1000, 1, LONG) == 1000 * 1000 + 10_000
    assert most(10, 1, None) == 0


def priced(number: int) -> Price:
    return Price(number, number)


KEYS: list[tuple[str | None, str]] = [("azure", "gpt-4o-2024"), ("azure", "gpt-4o"), (None, "gpt-4o"), (None, "gpt-4o-2024")]


@pytest.mark.parametrize("first", range(4))
def test_the_most_exact_price_holds(first: int) -> None:
    stored = {key: priced(number) for number, key in enumerate(KEYS)}
    kept = {key: stored[key] for key in KEYS[first:]}
    assert PriceBook().lookup("azure", "gpt-4o-2024", "gpt-4o", kept) == priced(first)
    configured: dict[str | tuple[str, str], Price] = {
        (model if provider is None else (provider, model)): price for (provider, model), price in kept.items()
    }
    assert PriceBook(configured).lookup("azure", "gpt-4o-2024", "gpt-4o", {}) == priced(first)


def test_stored_prices_go_before_configured_and_those_before_published_ones() -> None:
    book = PriceBook({("azure", "gpt-4o"): priced(2)}, public=lambda provider, upstream: priced(3))
    assert book.lookup("azure", "gpt-4o", "gpt-4o", {(None, "gpt-4o"): priced(1)}) == priced(1)
    assert book.lookup("azure", "gpt-4o", "gpt-4o", {}) == priced(2)
    assert book.lookup("azure", "gpt-5", "gpt-5", {}) == priced(3)


def test_the_price_of_another_provider_does_not_hold() -> None:
    assert PriceBook({("azure", "gpt-4o"): priced(2)}).lookup("openai", "gpt-4o", "gpt-4o", {("azure", "gpt-4o"): priced(1)}) is None


def test_a_free_price_is_a_price() -> None:
    book = PriceBook({"local": Price.free()}, public=lambda provider, upstream: priced(3))
    assert book.lookup("vllm", "local", "local", {}) == Price.free()


@pytest.mark.parametrize(
    "wrong",
    [
        [("gpt-4o", Price(1, 1))],
        {"gpt-4o": 1},
        {"gpt-4o": "0.15"},
        {"": Price(1, 1)},
        {("azure",): Price(1, 1)},
        {("azure", ""): Price(1, 1)},
        {(None, "gpt-4o"): Price(1, 1)},
        {1: Price(1, 1)},
    ],
)
def test_wrong_prices_are_refused_by_name(wrong: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PriceBook(wrong)
    assert caught.value.param == "prices"


def test_published_prices_are_found_offline() -> None:
    public = PublicPrices(clock=NOW.timestamp)
    price = public("openai", "gpt-4o-mini")
    assert price is not None
    assert 0 < price.input < price.output
    assert price.cache_read < price.input
    assert public("openai", "no-such-model-of-anyone") is None
    assert public("no-such-provider", "gpt-4o-mini") is None


def test_a_published_price_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    public = PublicPrices(clock=NOW.timestamp)
    found = public("openai", "gpt-4o-mini"), public("nobody", "nothing")

    def again(provider: str, upstream: str) -> Price | None:
        raise AssertionError("looked up again")

    monkeypatch.setattr(public, "_find", again)
    assert (public("openai", "gpt-4o-mini"), public("nobody", "nothing")) == found


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.public_prices.REMEMBERED", 2)
    public = PublicPrices(clock=NOW.timestamp)
    for name in ("gpt-4o", "a", "b", "c"):
        public("openai", name)
    assert len(public._remembered) == 2
    assert public("openai", "gpt-4o-mini") is not None


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.public_prices.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"starlette_aigateway\[prices\]"):
        PublicPrices()


def test_the_package_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from starlette_aigateway.public_prices import PublicPrices; p = PublicPrices(); "
        "assert 'genai_prices' not in sys.modules; p.load(); assert 'genai_prices.data' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def tiered(base: str, *steps: str) -> TieredPrices:
    return TieredPrices(base=Decimal(base), tiers=[Tier(start=1000 * n, price=Decimal(step)) for n, step in enumerate(steps, 1)])


def test_tiers_and_times_to_live_are_exact_and_the_dearest_modality_holds() -> None:
    table = ModelPrice(
        input_mtok=tiered("3", "6"),
        input_audio_mtok=Decimal("4"),
        output_mtok=tiered("15", "22.5", "20"),
        output_reasoning_mtok=Decimal("30"),
        cache_read_mtok=Decimal("0.3"),
        cache_write_mtok=Decimal("3.75"),
        cache_write_1h_mtok=tiered("6", "12"),
        requests_kcount=Decimal("12"),
        web_searches_kcount=Decimal("1000"),
    )
    kept: dict[str, Any] = {"cache_read": "0.3", "cache_write": "3.75", "reasoning": 30}
    assert dearest([table]) == Price(
        4,
        15,
        cache_write_1h=6,
        request="0.012",
        tiers=[PriceTier(1000, 6, "22.5", cache_write_1h=12, **kept), PriceTier(2000, 6, 20, cache_write_1h=12, **kept)],
        **kept,
    )


def test_of_several_tables_the_dearest_holds_in_each_tier_and_what_one_leaves_out_follows_its_own_input() -> None:
    day = ModelPrice(input_mtok=tiered("3", "6"), output_mtok=Decimal("15"), cache_read_mtok=Decimal("0.3"))
    night = ModelPrice(input_mtok=Decimal("4"), output_mtok=tiered("8", "16"))
    assert dearest([day, night]) == Price(4, 15, cache_read=4, tiers=[PriceTier(1000, 6, 16, cache_read=4)])


def test_where_nobody_tells_for_how_long_the_cache_was_written_the_dearer_rate_holds() -> None:
    table = ModelPrice(input_mtok=Decimal(3), output_mtok=Decimal(15), cache_write_mtok=Decimal("3.75"), cache_write_1h_mtok=Decimal(6))
    assert dearest([table], tells_lifetimes=False) == Price(3, 15, cache_write=6)
    assert dearest([table]) == Price(3, 15, cache_write="3.75", cache_write_1h=6)


def test_only_anthropic_tells_for_how_long_the_cache_was_written() -> None:
    public = PublicPrices(clock=NOW.timestamp)
    told = {"anthropic": 0, "openrouter": 0}
    for provider in data.providers:
        for info in provider.models if provider.id in told else ():
            price = public(provider.id, info.id)
            if price is not None and isinstance(info.prices, ModelPrice) and info.prices.cache_write_1h_mtok is not None:
                assert (price.cache_write < price.cache_write_1h) == (provider.id == "anthropic"), info.id
                told[provider.id] += 1
    assert all(told.values())


def plain_tables() -> Iterator[tuple[str, ModelPrice, TieredPrices]]:
    """Every published table with tiers and without modalities, of which `dearest` would take the dearest."""
    for provider in data.providers:
        for info in provider.models:
            table = info.prices
            if not isinstance(table, ModelPrice) or not isinstance(table.input_mtok, TieredPrices) or table.output_mtok is None:
                continue
            given = {name for name, value in vars(table).items() if value is not None}
            if not any(price_field(name) in ("input", "output") for name in given - {"input_mtok", "output_mtok"}):
                yield info.id, table, table.input_mtok


def test_a_published_price_costs_in_every_tier_what_the_package_itself_says() -> None:
    compared = 0
    for name, table, tiers in plain_tables():
        price, start = dearest([table]), tiers.tiers[-1].start
        assert price is not None
        for tokens in (1, start, start + 1, 3 * start):
            theirs = table.calc_price(GenaiUsage(input_tokens=tokens, output_tokens=100))["total_price"]
            assert cost(Usage(input_tokens=tokens, output_tokens=100), price) == math.ceil(theirs * 10**9), (name, tokens)
        compared += 1
    assert compared > 20


def test_a_price_finer_than_a_nano_dollar_is_rounded_up() -> None:
    assert dearest([ModelPrice(input_mtok=Decimal("0.0000000001"), output_mtok=Decimal(0))]) == Price("0.000000001", 0)


@pytest.mark.parametrize(
    "figures", [{"input_mtok": Decimal(1)}, {"output_mtok": Decimal(1)}, {}, {"input_mtok": Decimal(-1), "output_mtok": None}]
)
def test_a_model_without_both_prices_has_none(figures: dict[str, Any]) -> None:
    assert dearest([ModelPrice(**figures)]) is None


def model(*conditions: tuple[Any, int]) -> ModelInfo:
    conditional = [
        ConditionalPrice(constraint=when, prices=ModelPrice(input_mtok=Decimal(n), output_mtok=Decimal(n))) for when, n in conditions
    ]
    return ModelInfo(id="m", match=ClauseEquals("m"), prices=conditional)


def from_day(day: date) -> StartDateConstraint:
    return StartDateConstraint(start_date=day)


def test_a_price_of_the_past_is_over_and_a_coming_one_counts_already() -> None:
    info = model((None, 100), (from_day(date(2026, 1, 1)), 2), (from_day(date(2027, 1, 1)), 5))
    assert dearest(price_tables(info, NOW)) == Price(5, 5)


def test_prices_by_the_hour_all_count() -> None:
    night = TimeOfDateConstraint(start_time=time(0, tzinfo=UTC), end_time=time(6, tzinfo=UTC))
    assert dearest(price_tables(model((None, 1), (night, 4)), NOW)) == Price(4, 4)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("input_mtok", "input"),
        ("input_image_mtok", "input"),
        ("output_reasoning_mtok", "reasoning"),
        ("output_citation_mtok", "output"),
        ("cache_read_mtok", "cache_read"),
        ("cache_audio_read_mtok", "cache_read"),
        ("cache_write_5m_mtok", "cache_write"),
        ("cache_write_1h_mtok", "cache_write_1h"),
        ("requests_kcount", "request"),
        ("web_searches_kcount", None),
        ("input_text_messages_kcount", None),
        ("other_mtok", None),
    ],
)
def test_each_published_figure_has_its_field(name: str, field: str | None) -> None:
    assert price_field(name) == field


@pytest.mark.parametrize("name", ["gpt-4o-search-preview", "gpt-4o-mini-search-preview"])
def test_a_model_that_searches_by_itself_has_no_published_price_that_bounds_it(name: str) -> None:
    """Each search is charged, and none is in the price: https://platform.openai.com/docs/pricing, "Built-in tools"."""
    assert PublicPrices()("openai", name) is None
    assert PublicPrices()("openai", "gpt-4o-mini") is not None


@given(st.integers(0, 10**18))
def test_an_amount_is_told_as_the_same_text_from_nano_usd_as_from_dollars(amount: int) -> None:
    assert money.plain(amount) == money.text(money.dollars(amount))
