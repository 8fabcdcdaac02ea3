"""How an attempt is booked: the outcome table of design section 4 as pure functions. Amounts are nano-USD."""

from __future__ import annotations

from typing import Any

from msgspec.structs import astuple, replace

from ..accounts import Hold, Outcome, Settlement
from ..errors import ProviderError
from ..types import Price, Usage
from . import pricing
from .budgets import MAX_AMOUNT

MAX_TOKENS = 10**9
"""No answer has more; whoever reports more reports nonsense."""


def completed(
    hold: Hold,
    price: Price | None,
    usage: Usage,
    *,
    bounded: bool,
    reported: bool,
    model: str | None,
    latency_ms: int,
    told: Usage | None = None,
) -> Settlement:
    """An answer came. `reported` usage is booked as it is; else `usage` is the estimate, which is never below what was `told` on the way.
    `bounded`: the output was bounded by the gateway, so an amount above the hold means that the provider passed its bound."""
    if not reported:
        if bounded and told is not None and pricing.cost(told, price) > hold.amount:
            usage, reported = told, True
        else:
            usage = at_least(usage, told)
    outcome: Outcome
    if reported:
        amount = pricing.cost(usage, price)
        outcome = "overrun" if bounded and amount > hold.amount else "completed"
    else:
        amount = _estimate(usage, price)
        outcome = "estimated"
        if bounded:
            amount = min(amount, hold.amount)
    return Settlement(outcome=outcome, amount=amount, usage=usage, response_model=model, latency_ms=latency_ms)


def failed(
    hold: Hold,
    price: Price | None,
    error: ProviderError,
    *,
    received: Usage | None,
    latency_ms: int,
    has_output: bool = False,
    told: Usage | None = None,
) -> Settlement | None:
    """A provider failed. None: it charged nothing, the hold is released. `received` is what had come of a stream by then, its input
    at the bound: at least that is booked, the full hold otherwise, since nobody knows. `told` is what the stream had told of its usage."""
    if error.billed == "no":
        return None
    billed = plausible(error.billed, has_output)
    if billed is not None:
        billed = together(told, billed)
        amount = pricing.cost(billed, price)
        return Settlement(outcome="overrun" if amount > hold.amount else "completed", amount=amount, usage=billed, latency_ms=latency_ms)
    floor = 0 if received is None else _estimate(received, price)
    return Settlement(outcome="ambiguous", amount=max(hold.amount, floor), usage=received, latency_ms=latency_ms)


def abandoned(hold: Hold, price: Price | None, *, received: Usage | None, latency_ms: int) -> Settlement:
    """The client left and the answer was not read to its end. `received`: the input at its bound and the output that had come; None:
    nothing had come, and the provider may be working on all of it."""
    if received is None:
        return Settlement(outcome="ambiguous", amount=hold.amount, latency_ms=latency_ms)
    return Settlement(outcome="estimated", amount=_estimate(received, price), usage=received, latency_ms=latency_ms)


def _estimate(usage: Usage, price: Price | None) -> int:
    """Nobody knows how much of it was cached, or thought: the dearest split holds."""
    return pricing.most(usage.input_tokens, usage.output_tokens, price)


def plausible(usage: Any, has_output: bool = False) -> Usage | None:
    """The usage that a provider reported, if it can be true, whatever an adapter of the host's gave: of an answer that has output, it is
    not that there was none."""
    if not isinstance(usage, Usage):
        return None
    for tokens in astuple(usage):
        if type(tokens) is not int or not 0 <= tokens <= MAX_TOKENS:
            return None
    return None if has_output and not usage.output_tokens else usage


def together(told: Usage | None, later: Usage) -> Usage:
    """What a provider has told of an answer by two cumulative reports: of each kind the most. Only of what was read from a cache, which
    makes the bill smaller, is it what the one with more input says."""
    if told is None:
        return later
    most = Usage(**{field: max(getattr(told, field), getattr(later, field)) for field in Usage.__struct_fields__})
    read = (later if later.input_tokens >= told.input_tokens else told).cache_read_input_tokens
    return replace(most, cache_read_input_tokens=max(0, min(read, most.input_tokens - most.cache_creation_input_tokens)))


def at_least(estimated: Usage, told: Usage | None) -> Usage:
    """An estimate of input and output, nowhere below what was told on the way."""
    if told is None:
        return estimated
    cached = told.cache_read_input_tokens + max(told.cache_creation_input_tokens, told.cache_creation_1h_input_tokens)
    return Usage(
        input_tokens=max(estimated.input_tokens, told.input_tokens, cached),
        output_tokens=max(estimated.output_tokens, told.output_tokens, told.reasoning_output_tokens),
    )


def storable(settlement: Settlement) -> Settlement:
    """What is booked where a ledger refuses to store what a provider said of itself: the outcome, and the most that can be booked of the
    amount."""
    return Settlement(outcome=settlement.outcome, amount=min(settlement.amount, MAX_AMOUNT))
