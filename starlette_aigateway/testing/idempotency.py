"""What every `IdempotencyStore` promises. Subclass it beside your backend, with the two fixtures, and run pytest."""

from __future__ import annotations

import anyio

from ..protocols import Claim, IdempotencyStore

NOW = 1_800_000_000.0
LEASE = NOW + 60
DAY = NOW + 86_400

CLAIMED = Claim("claimed")
RUNNING = Claim("running")
OTHER_REQUEST = Claim("other_request")


async def claim(store: IdempotencyStore, holder: str, key: str = "k", *, body: str = "body", now: float = NOW, lease: float = 60) -> Claim:
    return await store.claim(key, body, holder=holder, until=now + lease, now=now)


class IdempotencyContract:
    """Fixtures of the subclass: `store`, empty, and `elsewhere`, another store over the same data as another worker has it (the same
    object, where a backend has no workers). Mark the module with `pytest.mark.anyio`."""

    async def test_a_key_that_is_free_is_claimed_and_then_running_everywhere(
        self, store: IdempotencyStore, elsewhere: IdempotencyStore
    ) -> None:
        assert await claim(store, "a") == CLAIMED
        for other in (store, elsewhere):
            assert await claim(other, "b") == RUNNING

    async def test_keys_do_not_meet(self, store: IdempotencyStore) -> None:
        assert await claim(store, "a", "one") == CLAIMED
        assert await claim(store, "b", "two") == CLAIMED

    async def test_another_request_under_the_key_is_told_so_while_it_runs_and_after(
        self, store: IdempotencyStore, elsewhere: IdempotencyStore
    ) -> None:
        await claim(store, "a")
        assert await claim(elsewhere, "b", body="other") == OTHER_REQUEST
        await store.keep("k", b"answer", holder="a", until=DAY)
        assert await claim(elsewhere, "b", body="other") == OTHER_REQUEST

    async def test_a_kept_outcome_is_given_back_byte_by_byte_until_its_time_is_over(
        self, store: IdempotencyStore, elsewhere: IdempotencyStore
    ) -> None:
        outcome = bytes(range(256)) * 5000
        await claim(store, "a")
        assert await store.keep("k", outcome, holder="a", until=DAY)
        for reader in (store, elsewhere):
            assert await claim(reader, "b", now=DAY - 0.001) == Claim("kept", outcome)
        assert await claim(elsewhere, "b", now=DAY) == CLAIMED

    async def test_an_empty_outcome_is_an_outcome(self, store: IdempotencyStore) -> None:
        await claim(store, "a")
        assert await store.keep("k", b"", holder="a", until=DAY)
        assert await claim(store, "b") == Claim("kept", b"")

    async def test_an_outcome_is_kept_once_however_often_it_is_said(self, store: IdempotencyStore) -> None:
        await claim(store, "a")
        assert await store.keep("k", b"answer", holder="a", until=DAY)
        assert await store.keep("k", b"answer", holder="a", until=DAY)
        assert await claim(store, "b") == Claim("kept", b"answer")

    async def test_a_released_key_is_free_also_for_another_request(self, store: IdempotencyStore, elsewhere: IdempotencyStore) -> None:
        await claim(store, "a")
        await store.release("k", holder="a")
        assert await claim(elsewhere, "b", body="other") == CLAIMED

    async def test_a_release_does_not_take_a_kept_outcome_away(self, store: IdempotencyStore) -> None:
        await claim(store, "a")
        await store.keep("k", b"answer", holder="a", until=DAY)
        await store.release("k", holder="a")
        assert await claim(store, "b") == Claim("kept", b"answer")

    async def test_a_claim_whose_lease_is_over_is_free_also_for_another_request(
        self, store: IdempotencyStore, elsewhere: IdempotencyStore
    ) -> None:
        await claim(store, "a")
        assert await claim(elsewhere, "b", now=LEASE - 0.001) == RUNNING
        assert await claim(elsewhere, "b", body="other", now=LEASE) == CLAIMED

    async def test_a_renewed_claim_lasts_longer(self, store: IdempotencyStore, elsewhere: IdempotencyStore) -> None:
        await claim(store, "a")
        assert await store.renew("k", holder="a", until=LEASE + 60)
        assert await claim(elsewhere, "b", now=LEASE + 59) == RUNNING
        assert await claim(elsewhere, "b", now=LEASE + 60) == CLAIMED

    async def test_a_holder_that_was_slow_may_still_keep_its_outcome_as_long_as_nobody_took_the_key(
        self, store: IdempotencyStore, elsewhere: IdempotencyStore
    ) -> None:
        await claim(store, "a")
        await claim(elsewhere, "c", "another key", now=LEASE + 3600)
        assert await store.renew("k", holder="a", until=LEASE + 3660)
        assert await store.keep("k", b"answer", holder="a", until=LEASE + DAY)
        assert await claim(elsewhere, "b", now=LEASE + 3600) == Claim("kept", b"answer")

    async def test_a_holder_that_lost_its_claim_can_neither_renew_nor_keep_nor_release(
        self, store: IdempotencyStore, elsewhere: IdempotencyStore
    ) -> None:
        await claim(store, "a")
        assert await claim(elsewhere, "b", now=LEASE) == CLAIMED
        assert not await store.renew("k", holder="a", until=DAY)
        assert not await store.keep("k", b"of a", holder="a", until=DAY)
        await store.release("k", holder="a")
        assert await claim(store, "c", now=LEASE) == RUNNING
        assert await elsewhere.keep("k", b"of b", holder="b", until=DAY)
        assert not await store.keep("k", b"of a", holder="a", until=DAY)
        assert await claim(store, "c", now=LEASE) == Claim("kept", b"of b")

    async def test_verbs_for_a_key_that_nobody_claimed_change_nothing(self, store: IdempotencyStore) -> None:
        assert not await store.renew("k", holder="a", until=DAY)
        assert not await store.keep("k", b"answer", holder="a", until=DAY)
        await store.release("k", holder="a")
        assert await claim(store, "b") == CLAIMED

    async def test_of_many_concurrent_claims_exactly_one_is_granted(self, store: IdempotencyStore, elsewhere: IdempotencyStore) -> None:
        claims: list[Claim] = []

        async def contend(number: int) -> None:
            claims.append(await claim((store, elsewhere)[number % 2], f"holder {number}"))

        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(contend, number)
        assert sorted(each.state for each in claims) == ["claimed"] + ["running"] * 39
