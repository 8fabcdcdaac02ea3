"""What every `PriceStore` promises. Subclass it beside your backend, with the two fixtures, and run pytest."""

from __future__ import annotations

from ..prices import Price, PriceTier
from ..protocols import PriceStore

CHEAP = Price("0.15", "0.60")
FULL = Price("3", "15.000000001", cache_read="0.30", cache_write="3.75", request="0.01")
LONG = Price(
    "1.25",
    "10",
    cache_write_1h="2.5",
    reasoning="3.5",
    tiers=[PriceTier(128_000, 2, 12), PriceTier(200_000, "2.5", "15", cache_read="0.625")],
)


class PriceStoreContract:
    """Fixtures of the subclass: `store`, empty, and `elsewhere`, another store over the same data as another worker has it."""

    async def test_there_are_no_prices_at_first(self, store: PriceStore) -> None:
        assert dict(await store.all()) == {}

    async def test_prices_come_back_exact_by_provider_and_model(self, store: PriceStore, elsewhere: PriceStore) -> None:
        await store.put(None, "gpt-4o-mini", CHEAP)
        await store.put("azure", "gpt-4o-mini", FULL)
        await store.put("azure", "free", Price.free())
        await store.put("google", "long", LONG)
        expected = {
            (None, "gpt-4o-mini"): CHEAP,
            ("azure", "gpt-4o-mini"): FULL,
            ("azure", "free"): Price.free(),
            ("google", "long"): LONG,
        }
        assert dict(await store.all()) == expected
        assert dict(await elsewhere.all()) == expected

    async def test_a_changed_price_is_true_everywhere_from_the_next_call_on(self, store: PriceStore, elsewhere: PriceStore) -> None:
        await store.put(None, "m", CHEAP)
        assert (await elsewhere.all())[None, "m"] == CHEAP
        await store.put(None, "m", FULL)
        assert (await elsewhere.all())[None, "m"] == FULL

    async def test_a_price_of_none_removes_it_and_only_it(self, store: PriceStore, elsewhere: PriceStore) -> None:
        await store.put(None, "m", CHEAP)
        await store.put("azure", "m", CHEAP)
        assert len(await elsewhere.all()) == 2
        await store.put(None, "m", None)
        await store.put(None, "never-there", None)
        assert dict(await elsewhere.all()) == {("azure", "m"): CHEAP}

    async def test_a_mapping_that_was_given_out_does_not_change(self, store: PriceStore) -> None:
        await store.put(None, "m", CHEAP)
        before = await store.all()
        await store.put(None, "m", FULL)
        assert before[None, "m"] == CHEAP
