"""The outcome table of design section 4, row by row, as the pure functions that decide it."""

import pytest

from starlette_aigateway import Price, ProviderError, Usage
from starlette_aigateway.accounts import Hold
from starlette_aigateway.policy import metering

PRICE = Price("1000", "2000")
HOLD = Hold(id="use_1", amount=50_000_000, made_at=0.0, expires_at=60.0)
USAGE = Usage(input_tokens=10, output_tokens=5)
COST = 20_000_000
HUGE = Usage(input_tokens=10, output_tokens=500)


@pytest.mark.parametrize(
    ("usage", "bounded", "reported", "outcome", "amount"),
    [
        (USAGE, True, True, "completed", COST),
        (HUGE, True, True, "overrun", 1_010_000_000),
        (HUGE, False, True, "completed", 1_010_000_000),
        (USAGE, True, False, "estimated", COST),
        (HUGE, True, False, "estimated", HOLD.amount),
        (HUGE, False, False, "estimated", 1_010_000_000),
    ],
)
def test_an_answer_that_came(usage: Usage, bounded: bool, reported: bool, outcome: str, amount: int) -> None:
    settlement = metering.completed(HOLD, PRICE, usage, bounded=bounded, reported=reported, model="m", latency_ms=7)
    assert (settlement.outcome, settlement.amount, settlement.usage, settlement.latency_ms) == (outcome, amount, usage, 7)


def test_an_unpriced_answer_costs_nothing() -> None:
    assert metering.completed(HOLD, None, USAGE, bounded=False, reported=True, model=None, latency_ms=0).amount == 0


def test_a_failure_that_charged_nothing_is_a_release() -> None:
    assert metering.failed(HOLD, PRICE, ProviderError("x", billed="no"), received=HUGE, latency_ms=0) is None


@pytest.mark.parametrize(("billed", "outcome", "amount"), [(USAGE, "completed", COST), (HUGE, "overrun", 1_010_000_000)])
def test_a_failure_that_says_what_it_billed(billed: Usage, outcome: str, amount: int) -> None:
    settlement = metering.failed(HOLD, PRICE, ProviderError("x", billed=billed), received=None, latency_ms=0)
    assert settlement is not None
    assert (settlement.outcome, settlement.amount) == (outcome, amount)


@pytest.mark.parametrize(("received", "amount"), [(None, HOLD.amount), (USAGE, HOLD.amount), (HUGE, 1_010_000_000)])
def test_a_failure_of_which_nothing_is_known_is_the_full_hold_and_never_less_than_what_came(received: Usage | None, amount: int) -> None:
    settlement = metering.failed(HOLD, PRICE, ProviderError("x"), received=received, latency_ms=0)
    assert settlement is not None
    assert (settlement.outcome, settlement.amount) == ("ambiguous", amount)


def test_a_client_that_left_pays_for_what_came_and_for_all_where_nothing_did() -> None:
    left = metering.abandoned(HOLD, PRICE, received=USAGE, latency_ms=0)
    assert (left.outcome, left.amount) == ("estimated", COST)
    early = metering.abandoned(HOLD, PRICE, received=None, latency_ms=0)
    assert (early.outcome, early.amount) == ("ambiguous", HOLD.amount)


def test_what_nobody_told_is_estimated_at_the_dearest_rates() -> None:
    """It may have been written to a cache, or thought: an estimate is never below what the provider bills."""
    price = Price("1000", "2000", cache_write="3000", reasoning="4000")
    amount = 10 * 3_000_000 + 5 * 4_000_000
    left = metering.abandoned(HOLD, price, received=USAGE, latency_ms=0)
    silent = metering.completed(HOLD, price, USAGE, bounded=False, reported=False, model=None, latency_ms=0)
    failed = metering.failed(HOLD, price, ProviderError("x"), received=USAGE, latency_ms=0)
    assert failed is not None
    assert left.amount == silent.amount == failed.amount == amount


@pytest.mark.parametrize(
    "usage",
    [
        None,
        Usage(input_tokens=-1, output_tokens=5),
        Usage(input_tokens=1, output_tokens=-5),
        Usage(input_tokens=1, output_tokens=10**12),
        Usage(input_tokens=1, output_tokens=5, cache_read_input_tokens=-1),
        Usage(input_tokens=1, output_tokens=5, cache_creation_1h_input_tokens=-1),
        Usage(input_tokens=1, output_tokens=5, reasoning_output_tokens=10**12),
    ],
)
def test_a_usage_that_cannot_be_true_was_not_reported(usage: Usage | None) -> None:
    assert metering.plausible(usage) is None
    assert metering.plausible(USAGE) == USAGE
    failed = metering.failed(HOLD, PRICE, ProviderError("x", billed=usage or "unknown"), received=None, latency_ms=0)
    assert failed is not None
    assert (failed.outcome, failed.amount, failed.usage) == ("ambiguous", HOLD.amount, None)
