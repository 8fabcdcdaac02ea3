"""What a model costs: rates by kind of token, a fee per call, and other rates for long contexts.

The kinds are those that vendors bill apart (https://platform.claude.com/docs/en/about-claude/pricing,
https://platform.openai.com/docs/pricing, https://ai.google.dev/gemini-api/docs/pricing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple

from . import money
from .errors import InvalidArgument
from .money import Money

MAX_TIERS = 16
MAX_ABOVE = 10**9

RATES = ("input", "output", "cache_read", "cache_write", "cache_write_1h", "reasoning")
"""The kinds of tokens that have a rate, in US dollars per million."""

FOLLOWS: Mapping[str, str] = MappingProxyType(
    {"cache_read": "input", "cache_write": "input", "cache_write_1h": "cache_write", "reasoning": "output"}
)
"""Whose rate a kind has that is not given one."""


class Rates(NamedTuple):
    """Nano-USD per million tokens, for calls of at most `longest` input tokens."""

    longest: float
    input: int
    output: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    reasoning: int
    dearest_input: int
    dearest_output: int


class Tariff(NamedTuple):
    """A `Price` as whole numbers: nano-USD per call, and the rates of its tiers from the shortest calls to the longest. `reasons`:
    reasoning has a rate of its own."""

    request: int
    tiers: tuple[Rates, ...]
    reasons: bool

    def at(self, input_tokens: int) -> Rates:
        """The rates of a call with `input_tokens`."""
        return next(rates for rates in self.tiers if input_tokens <= rates.longest)


@dataclass(frozen=True, slots=True, init=False)
class PriceTier:
    """The rates of calls with more than `above` input tokens, cached ones included: US dollars per million tokens, for the whole call.

    So long contexts are charged: once the input of a call passes 200,000 tokens, all of it and all of the answer are at the other rates
    (Gemini: https://ai.google.dev/gemini-api/docs/pricing; Claude Sonnet 4.5 with a context of a million tokens:
    https://platform.claude.com/docs/en/about-claude/pricing, "Long context pricing"). What is not given follows as in `Price`. Raises
    `InvalidArgument`.
    """

    above: int
    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write: Decimal
    cache_write_1h: Decimal
    reasoning: Decimal

    def __init__(
        self,
        above: int,
        input: Money,  # noqa: A002  # the vendors' word
        output: Money,
        *,
        cache_read: Money | None = None,
        cache_write: Money | None = None,
        cache_write_1h: Money | None = None,
        reasoning: Money | None = None,
    ) -> None:
        if isinstance(above, bool) or not isinstance(above, int) or not 1 <= above <= MAX_ABOVE:
            raise InvalidArgument(f"above must be a number of input tokens between 1 and {MAX_ABOVE}", param="above")
        object.__setattr__(self, "above", above)
        _set_rates(self, (input, output, cache_read, cache_write, cache_write_1h, reasoning))


@dataclass(frozen=True, slots=True, init=False)
class Price:
    """US dollars per million tokens; `request` is US dollars per call.

    - `cache_read`, `cache_write`: input tokens that the provider read from, or wrote to, its own prompt cache; as `input` where not
      given. `cache_write_1h`: those written for an hour instead of five minutes, where the provider tells them apart, as Anthropic's API
      does; as `cache_write` where not given.
    - `reasoning`: output tokens that the model thinks with; as `output` where not given.
    - `tiers`: the rates of longer contexts, ascending. A call is at the rates of the last tier whose `above` its input tokens exceed.

    Raises `InvalidArgument`, naming the argument, for a float, a negative or an absurd amount, and for tiers that do not ascend.
    """

    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write: Decimal
    cache_write_1h: Decimal
    reasoning: Decimal
    request: Decimal
    tiers: tuple[PriceTier, ...]
    tariff: Tariff = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        input: Money,  # noqa: A002  # the vendors' word
        output: Money,
        *,
        cache_read: Money | None = None,
        cache_write: Money | None = None,
        cache_write_1h: Money | None = None,
        reasoning: Money | None = None,
        request: Money = 0,
        tiers: Sequence[PriceTier] = (),
    ) -> None:
        _set_rates(self, (input, output, cache_read, cache_write, cache_write_1h, reasoning))
        object.__setattr__(self, "request", money.usd(request, "request"))
        object.__setattr__(self, "tiers", _ascending(tiers))
        object.__setattr__(self, "tariff", _tariff(self))

    @classmethod
    def free(cls) -> Price:
        """A model that costs nothing, said on purpose: a missing price is an error for principals under a cap."""
        return cls(0, 0)


def _set_rates(owner: Price | PriceTier, given: Sequence[Money | None]) -> None:
    """`given` in the order of `RATES`."""
    for name, amount in zip(RATES, given, strict=True):
        follows = amount is None and name in FOLLOWS
        rate = getattr(owner, FOLLOWS[name]) if follows else money.usd(amount, name)  # type: ignore[arg-type]  # refuses None by name
        object.__setattr__(owner, name, rate)


def _tariff(price: Price) -> Tariff:
    owners: tuple[Price | PriceTier, ...] = (price, *price.tiers)
    ends = (*(tier.above for tier in price.tiers), inf)
    tiers = tuple(_rates(owner, longest) for owner, longest in zip(owners, ends, strict=True))
    return Tariff(money.nano(price.request), tiers, any(rates.reasoning != rates.output for rates in tiers))


def _rates(owner: Price | PriceTier, longest: float) -> Rates:
    input_, output, read, write, write_1h, reasoning = (money.nano(getattr(owner, name)) for name in RATES)
    return Rates(longest, input_, output, read, write, write_1h, reasoning, max(input_, read, write, write_1h), max(output, reasoning))


def _ascending(tiers: Any) -> tuple[PriceTier, ...]:
    if not isinstance(tiers, list | tuple) or not all(isinstance(tier, PriceTier) for tier in tiers):
        raise InvalidArgument("tiers must be a list of PriceTier", param="tiers")
    if len(tiers) > MAX_TIERS:
        raise InvalidArgument(f"tiers must be at most {MAX_TIERS}", param="tiers")
    if any(lower.above >= higher.above for lower, higher in pairwise(tiers)):
        raise InvalidArgument("tiers must ascend, each above a higher number of input tokens than the one before", param="tiers")
    return tuple(tiers)


def price_texts(price: Price) -> dict[str, Any]:
    """`price` for JSON, every amount a decimal string: its rates, `request` and `tiers`."""
    tiers = [{"above": tier.above, **_rate_texts(tier)} for tier in price.tiers]
    return {**_rate_texts(price), "request": money.text(price.request), "tiers": tiers}


def price_from(texts: Mapping[str, Any]) -> Price:
    """The price of `price_texts`; what is left out follows. Raises `InvalidArgument`."""
    return Price(**{**texts, "tiers": [PriceTier(**tier) for tier in texts.get("tiers", ())]})


def _rate_texts(owner: Price | PriceTier) -> dict[str, Any]:
    return {name: money.text(getattr(owner, name)) for name in RATES}
