"""What a call costs, and which price holds for it. Integers of nano-USD, never a float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import InvalidArgument
from ..prices import Price, Rates
from ..types import Usage, check_id

MILLION = 10**6

PublicPriceSource: TypeAlias = Callable[[str, str], Price | None]
"""The published price of `(provider, upstream model)`, or None. Called once per call at the most: it has to remember."""

ConfiguredPrices: TypeAlias = Mapping[str, Price] | Mapping[tuple[str, str], Price] | Mapping[str | tuple[str, str], Price]
"""Prices as hosts write them: `{"gpt-4o": Price(...), ("azure", "gpt-4o"): Price(...)}`."""


def cost(usage: Usage, price: Price | None) -> int:
    """Nano-USD of what was used: `ceil(sum(tokens * nano_usd_per_million) / 10^6)` plus the price per call.

    Cached tokens are part of `input_tokens` and reasoning ones of `output_tokens` (OpenTelemetry GenAI); each kind is charged at its own
    rate, of the tier that the input tokens reach. A report that says more of a kind than of the whole is charged for all of the kind.
    None costs nothing: a model that the host did not price.
    """
    if price is None:
        return 0
    tariff = price.tariff
    read, hour, thought = usage.cache_read_input_tokens, usage.cache_creation_1h_input_tokens, usage.reasoning_output_tokens
    if not (read or hour or thought or usage.cache_creation_input_tokens):
        rates = tariff.tiers[0] if len(tariff.tiers) == 1 else tariff.at(usage.input_tokens)
        return up(usage.input_tokens * rates.input + usage.output_tokens * rates.output) + tariff.request
    minutes = max(usage.cache_creation_input_tokens - hour, 0)
    plain = max(usage.input_tokens - read - minutes - hour, 0)
    rates = tariff.tiers[0] if len(tariff.tiers) == 1 else tariff.at(read + minutes + hour + plain)
    total = (
        plain * rates.input
        + read * rates.cache_read
        + minutes * rates.cache_write
        + hour * rates.cache_write_1h
        + max(usage.output_tokens - thought, 0) * rates.output
        + thought * rates.reasoning
    )
    return up(total) + tariff.request


def most(input_tokens: int, output_tokens: int, price: Price | None) -> int:
    """The most nano-USD that a call of at most so many tokens can cost, however they are split into kinds, in whichever tier it ends up:
    shorter ones may be the dearer. None costs nothing."""
    if price is None:
        return 0
    request, tiers, _ = price.tariff
    if len(tiers) == 1:
        rates = tiers[0]
        return up(input_tokens * rates.dearest_input + output_tokens * rates.dearest_output) + request
    dearest = 0
    for longest, rates in reached(tiers, input_tokens):
        dearest = max(dearest, up(longest * rates.dearest_input + output_tokens * rates.dearest_output))
    return request + dearest


def bills_reasoning(price: Price | None) -> bool:
    """Whether the model of this price thinks: reasoning has a rate of its own."""
    return price is not None and price.tariff.reasons


def reached(tiers: Sequence[Rates], input_tokens: int) -> Iterator[tuple[int, Rates]]:
    """The tiers that a call of at most `input_tokens` can be in, each with the most input tokens that it can have there."""
    for rates in tiers:
        if input_tokens <= rates.longest:
            yield input_tokens, rates
            return
        yield int(rates.longest), rates


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
        price = stored_price(provider, upstream, model, stored)
        return price if price is not None else self.unstored(provider, upstream, model)

    def unstored(self, provider: str, upstream: str, model: str) -> Price | None:
        """The same where no price is stored. It stays as it is for as long as the gateway lives."""
        price = stored_price(provider, upstream, model, self._configured)
        return price if price is not None or self._public is None else self._public(provider, upstream)


def stored_price(provider: str, upstream: str, model: str, prices: Mapping[tuple[str | None, str], Price]) -> Price | None:
    """The price of `model` in one table, as `PriceBook.lookup` says."""
    if prices:
        for key in ((provider, upstream), (provider, model), (None, model), (None, upstream)):
            price = prices.get(key)
            if price is not None:
                return price
    return None


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
