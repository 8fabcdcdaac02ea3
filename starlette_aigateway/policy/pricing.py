"""What a call costs, and which price holds for it. Integers of nano-USD, never a float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from ..errors import InvalidArgument
from ..money import nano
from ..types import Price, Usage, check_id

MILLION = 10**6

PublicPriceSource: TypeAlias = Callable[[str, str], Price | None]
"""The published price of `(provider, upstream model)`, or None. Called once per call at the most: it has to remember."""

ConfiguredPrices: TypeAlias = Mapping[str, Price] | Mapping[tuple[str, str], Price] | Mapping[str | tuple[str, str], Price]
"""Prices as hosts write them: `{"gpt-4o": Price(...), ("azure", "gpt-4o"): Price(...)}`."""


class Rates(NamedTuple):
    """A `Price` in nano-USD per million tokens; `request` in nano-USD per call."""

    input: int
    output: int
    cache_read: int
    cache_write: int
    request: int

    @property
    def dearest_input(self) -> int:
        """What an input token costs at the most, whichever way the provider's own cache goes."""
        return max(self.input, self.cache_read, self.cache_write)


@lru_cache(maxsize=1024)
def rates(price: Price) -> Rates:
    return Rates(nano(price.input), nano(price.output), nano(price.cache_read), nano(price.cache_write), nano(price.request))


def cost(usage: Usage, price: Price | None) -> int:
    """Nano-USD of what was used: `ceil(sum(tokens * nano_usd_per_million) / 10^6)` plus the price per call.

    Cached tokens are part of `input_tokens` (OpenTelemetry GenAI) and are charged at their own rates. A provider that reports more
    cached than input tokens is charged for all of them. None costs nothing: a model that the host did not price.
    """
    if price is None:
        return 0
    rate = rates(price)
    read, created = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    plain = usage.input_tokens - read - created
    total = read * rate.cache_read + created * rate.cache_write + usage.output_tokens * rate.output
    if plain > 0:
        total += plain * rate.input
    return up(total) + rate.request


def up(millionths: int) -> int:
    """`millionths / 10^6`, rounded up."""
    return -(-millionths // MILLION)


class PriceBook:
    """Which price holds for a target: stored ones before configured ones before published ones.

    `configured` is the host's `prices=`; `public` looks a published price up (see `public_prices.PublicPrices`). Raises
    `InvalidArgument`, naming `prices`.
    """

    def __init__(self, configured: ConfiguredPrices | None = None, public: PublicPriceSource | None = None) -> None:
        self._configured = configured_prices({} if configured is None else configured)
        self._public = public

    @property
    def configured(self) -> Mapping[tuple[str | None, str], Price]:
        """The host's own prices by `(provider or None, model)`."""
        return self._configured

    def lookup(self, provider: str, upstream: str, model: str, stored: Mapping[tuple[str | None, str], Price]) -> Price | None:
        """The price of `model`, which `provider` knows as `upstream`. In the stored and then in the configured prices:
        `(provider, upstream)`, `(provider, model)`, `model`, `upstream`; at last the published price of `(provider, upstream)`.
        None: nobody priced it."""
        for prices in (stored, self._configured):
            if not prices:
                continue
            for key in ((provider, upstream), (provider, model), (None, model), (None, upstream)):
                price = prices.get(key)
                if price is not None:
                    return price
        return None if self._public is None else self._public(provider, upstream)


def configured_prices(prices: Any) -> dict[tuple[str | None, str], Price]:
    """The host's `prices=` by `(provider or None, model)`. Raises `InvalidArgument`."""
    if not isinstance(prices, Mapping):
        raise InvalidArgument("prices must be a mapping such as {'gpt-4o-mini': Price(...)}", param="prices")
    checked: dict[tuple[str | None, str], Price] = {}
    for key, price in prices.items():
        if not isinstance(price, Price):
            raise InvalidArgument(f"prices[{key!r}] must be a Price, not {type(price).__name__}", param="prices")
        checked[_price_key(key)] = price
    return checked


def _price_key(key: Any) -> tuple[str | None, str]:
    if isinstance(key, str):
        return None, check_id(key, "prices")
    if isinstance(key, tuple) and len(key) == 2:
        return check_id(key[0], "prices"), check_id(key[1], "prices")
    raise InvalidArgument(f"prices has the key {key!r}; a key is a model, or a pair (provider, model)", param="prices")
