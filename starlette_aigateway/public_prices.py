"""Published prices, offline, from the optional package `genai-prices`: for models that the host did not price itself."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, InvalidArgument
from .prices import FOLLOWS, Price, PriceTier
from .protocols import Clock

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

EXTRA = "prices"
REMEMBERED = 4096
ANTHROPIC = "anthropic"
"""Whose API tells for how long the cache was written; the Chat Completions API does not."""

SEARCHES = re.compile(r"search|sonar")
"""Models that search the web at each call, as their names say (`gpt-4o-search-preview`, `sonar-pro`, `o3-deep-research`). What they charge
for it is a fee for each search, which published prices leave out unless they have one for the request."""

NANO = Decimal("1e-9")


class PublicPrices:
    """`PublicPrices()(provider, upstream)` is the published price of a provider's model, or None where none is known.

    Rates of long contexts, of cache writes for an hour and of reasoning are exact. Published prices also differ by modality and by time of
    day: of those the dearest is taken, so that a cap holds whatever the call turns out to be. A host that wants to be exact gives its own
    price. Prices of tiers of service (`service_tier`, batches) and of server-side tools are left out:
    what makes use of them is unbounded in cost, and models that do so by themselves have no price here without a fee for it. A model
    without a price for output (embeddings, legacy ones) has no price here.

    Every answer is remembered, also a None. The data costs about 0.3 s to load: at the first call, or before it with `load()` in a
    thread. Raises `ConfigurationError` if the package is not installed.
    """

    def __init__(self, *, clock: Clock = time.time) -> None:
        if find_spec("genai_prices") is None:
            raise ConfigurationError(
                f"published prices need the package genai-prices: pip install 'starlette_aigateway[{EXTRA}]'", param="prices"
            )
        self._clock = clock
        self._lock = Lock()
        self._providers: list[Provider] | None = None
        self._remembered: dict[tuple[str, str], Price | None] = {}

    def __call__(self, provider: str, upstream: str) -> Price | None:
        key = (provider, upstream)
        if key in self._remembered:
            return self._remembered[key]
        price = self._find(provider, upstream)
        if len(self._remembered) < REMEMBERED:  # callers may ask for any name: full is full, the known ones stay
            self._remembered[key] = price
        return price

    def load(self) -> None:
        """Loads the data, once. Blocks for about 0.3 s."""
        self._data()

    def _data(self) -> list[Provider]:
        with self._lock:
            if self._providers is None:
                from genai_prices.data import providers  # an optional package of 1.6 MB: not before it is needed

                self._providers = providers
            return self._providers

    def _find(self, provider: str, upstream: str) -> Price | None:
        providers = self._data()
        from genai_prices.data_snapshot import find_provider_by_id  # as above; its snapshot keeps every name asked for, without a bound

        vendor = find_provider_by_id(providers, provider)
        model = None if vendor is None else vendor.find_model(upstream, all_providers=providers)
        if vendor is None or model is None:
            return None
        price = dearest(price_tables(model, datetime.fromtimestamp(self._clock(), UTC)), tells_lifetimes=vendor.id == ANTHROPIC)
        return None if price is not None and not price.request and SEARCHES.search(upstream) else price


def price_tables(model: ModelInfo, now: datetime) -> Iterator[ModelPrice]:
    """The price tables that hold at `now` or may hold later, by the hour of the day or from a coming date on."""
    from genai_prices.types import ModelPrice, StartDateConstraint  # an optional package

    if isinstance(model.prices, ModelPrice):
        yield model.prices
        return
    for conditional in reversed(model.prices):  # the last one whose condition is met holds
        yield conditional.prices
        constraint = conditional.constraint
        if constraint is None or (isinstance(constraint, StartDateConstraint) and constraint.active(now)):
            return


def dearest(tables: Iterable[ModelPrice], *, tells_lifetimes: bool = True) -> Price | None:
    """One `Price` that is at least every one of `tables` and each of their modalities, tier by tier. None without an input or an output
    price. Where a provider does not tell cache writes for an hour from shorter ones, all of them are at the dearer of the two rates."""
    known = list(tables)
    starts = sorted({start for table in known for start in _starts(table)})
    base = _highest(known, 0, tells_lifetimes)
    if not {"input", "output"} <= base.keys():
        return None
    try:
        tiers: list[PriceTier] = []
        for start in starts:
            rates = _highest(known, start, tells_lifetimes)
            rates.pop("request", None)
            tiers.append(PriceTier(start, **rates))
        return Price(**base, tiers=tiers)
    except InvalidArgument:  # a figure that is no price of ours, such as a negative one
        return None


def _starts(table: ModelPrice) -> Iterator[int]:
    for name, value in vars(table).items():
        if price_field(name) is not None and value is not None and not isinstance(value, Decimal):
            yield from (tier.start for tier in value.tiers)


def _highest(tables: Iterable[ModelPrice], start: int, tells_lifetimes: bool) -> dict[str, Any]:
    """The highest rate of each field for calls with more than `start` input tokens. What a table leaves out follows there as in `Price`, so
    that what another says of it does not hide what this one charges."""
    highest: dict[str, Decimal] = {}
    for table in tables:
        own: dict[str, Decimal] = {}
        for name, value in vars(table).items():
            field = price_field(name)
            if field is not None and value is not None:
                own[field] = max(own.get(field, Decimal(0)), _amount(value, start) / (1000 if field == "request" else 1))
        for field, leader in FOLLOWS.items():
            if leader in own:
                own.setdefault(field, own[leader])
        if not tells_lifetimes and "cache_write" in own:
            own["cache_write"] = max(own["cache_write"], own["cache_write_1h"])
        for field, amount in own.items():
            highest[field] = max(highest.get(field, amount), amount)
    return {field: amount.quantize(NANO, ROUND_CEILING) for field, amount in highest.items()}


def _amount(value: Decimal | TieredPrices, start: int) -> Decimal:
    if isinstance(value, Decimal):
        return value
    return next((tier.price for tier in reversed(value.tiers) if tier.start <= start), value.base)


def price_field(name: str) -> str | None:
    """Which field of `Price` a published price belongs to: `input_audio_mtok` to `input`, `cache_write_5m_mtok` to `cache_write`; None
    for what is charged by anything but a token or a call."""
    if name == "requests_kcount":
        return "request"
    if not name.endswith("_mtok"):
        return None
    if name in ("output_reasoning_mtok", "cache_write_1h_mtok"):
        return name.removeprefix("output_").removesuffix("_mtok")
    kind = name.removesuffix("_mtok").split("_")
    if kind[0] == "cache":
        return "cache_write" if "write" in kind else "cache_read" if "read" in kind else None
    return kind[0] if kind[0] in ("input", "output") else None
