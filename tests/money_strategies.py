"""Prices, and usages of every split, for the tests by properties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from starlette_aigateway import Price, PriceTier, Usage

MAX_TOKENS = 2**31

amounts = st.decimals(min_value=0, max_value=1000, places=9, allow_nan=False, allow_infinity=False)
counts = st.integers(min_value=0, max_value=300_000)
choices = st.none() | st.integers(min_value=1, max_value=8)
_given: dict[str, Any] = {name: st.none() | amounts for name in ("cache_read", "cache_write", "cache_write_1h", "reasoning")}


@st.composite
def tiers(draw: st.DrawFn) -> Sequence[PriceTier]:
    """Up to three, dearer or cheaper than each other."""
    above = sorted(draw(st.sets(st.integers(min_value=1, max_value=300_000), max_size=3)))
    return [draw(st.builds(PriceTier, st.just(start), amounts, amounts, **_given)) for start in above]


prices = st.builds(Price, amounts, amounts, **_given, request=amounts, tiers=tiers())


@st.composite
def usages(draw: st.DrawFn, *, input_tokens: int = MAX_TOKENS, output_tokens: int = MAX_TOKENS) -> Usage:
    """A report of at most so many tokens, split into kinds in any way."""
    total, output = draw(st.integers(0, input_tokens)), draw(st.integers(0, output_tokens))
    read = draw(st.integers(0, total))
    written = draw(st.integers(0, total - read))
    return Usage(
        input_tokens=total,
        output_tokens=output,
        cache_read_input_tokens=read,
        cache_creation_input_tokens=written,
        cache_creation_1h_input_tokens=draw(st.integers(0, written)),
        reasoning_output_tokens=draw(st.integers(0, output)),
    )
