"""How an attempt is booked: the outcome table of design section 4 as pure functions. Amounts are nano-USD."""

from __future__ import annotations

from msgspec.structs import astuple

from ..accounts import Hold, Outcome, Settlement
from ..errors import ProviderError
from ..types import Price, Usage
from . import pricing
from .budgets import MAX_AMOUNT

MAX_TOKENS = 10**9
"""No answer has more; whoever reports more reports nonsense."""


def completed(
    hold: Hold, price: Price | None, usage: Usage, *, bounded: bool, reported: bool, model: str | None, latency_ms: int
) -> Settlement:
    """An answer came. `reported` usage is booked as it is; else `usage` is the estimate. `bounded`: the output was bounded by the
    gateway, so an amount above the hold means that the provider passed its bound."""
    if not reported:
        amount = _estimate(usage, price)
        return Settlement(
            outcome="estimated",
            amount=min(amount, hold.amount) if bounded else amount,
            usage=usage,
            response_model=model,
            latency_ms=latency_ms,
        )
    amount = pricing.cost(usage, price)
    outcome: Outcome = "overrun" if bounded and amount > hold.amount else "completed"
    return Settlement(outcome=outcome, amount=amount, usage=usage, response_model=model, latency_ms=latency_ms)


def failed(hold: Hold, price: Price | None, error: ProviderError, *, received: Usage | None, latency_ms: int) -> Settlement | None:
    """A provider failed. None: it charged nothing, the hold is released. `received` is what had come of a stream by then, its input
    at the bound: at least that is booked, the full hold otherwise, since nobody knows."""
    if error.billed == "no":
        return None
    billed = plausible(error.billed) if isinstance(error.billed, Usage) else None
    if billed is not None:
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


def plausible(usage: Usage | None) -> Usage | None:
    """The usage that a provider reported, if it can be true."""
    if usage is None or not all(0 <= tokens <= MAX_TOKENS for tokens in astuple(usage)):
        return None
    return usage


def storable(settlement: Settlement) -> Settlement:
    """What is booked where a ledger refuses to store what a provider said of itself: the outcome, and the most that can be booked of the
    amount."""
    return Settlement(outcome=settlement.outcome, amount=min(settlement.amount, MAX_AMOUNT))
