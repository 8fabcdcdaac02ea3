"""The key that is measured with."""

from __future__ import annotations

from starlette_aigateway.administration import Administration

PLENTY = 10**9


async def make(administration: Administration, name: str) -> str:
    """A raw key with limits of every kind, which refuse nothing and are counted all the same."""
    raw_key, _ = await administration.create_key(
        name,
        requests_per_minute=PLENTY,
        tokens_per_minute=PLENTY,
        max_parallel_requests=PLENTY,
        daily_cap_usd=PLENTY,
        monthly_cap_usd=PLENTY,
        hard_cap_usd=PLENTY,
    )
    return raw_key
