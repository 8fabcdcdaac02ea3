"""What a storage of sliding windows promises (`limiter.SharedWindows`, on top of a storage of `limits`).

Subclass it in your tests and give it two fixtures: `clock`, a `FakeClock`, and `storage`, an empty storage that reads its time from
that clock (for `SharedWindows` itself, the attribute `clock=` of its constructor as a rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
from limits import RateLimitItemPerMinute
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from ..limiter import SharedWindows
from ..policy.windows import Refusal, WindowClaim, WindowState
from .clock import FakeClock

MICROSECOND = 0.000001


def requests(limit: int, *, scope: str = "principal:a", amount: int = 1, seconds: int = 60) -> WindowClaim:
    return WindowClaim(scope, "requests", limit, amount, seconds)


def tokens(limit: int, amount: int, *, scope: str = "principal:a", seconds: int = 60) -> WindowClaim:
    return WindowClaim(scope, "tokens", limit, amount, seconds)


async def admitted(storage: SharedWindows, *claims: WindowClaim) -> bool:
    return not isinstance(await storage.acquire_all(claims), Refusal)


async def refused(storage: SharedWindows, *claims: WindowClaim) -> Refusal:
    outcome = await storage.acquire_all(claims)
    assert isinstance(outcome, Refusal), "this was to be refused"
    return outcome


async def remaining(storage: SharedWindows, *claims: WindowClaim) -> Sequence[int]:
    states: Sequence[WindowState] = await storage.peek(claims)
    return [state.remaining for state in states]


class WindowsContract:
    """`acquire_all`, `probe`, `peek` and `adjust`."""

    async def test_lets_in_as_many_as_the_limit_and_no_more(self, storage: SharedWindows, clock: FakeClock) -> None:
        for left in (2, 1, 0):
            states = await storage.acquire_all([requests(3)])
            assert not isinstance(states, Refusal)
            assert states[0].remaining == left
            clock.advance(1)
        assert not await admitted(storage, requests(3))

    async def test_a_slot_is_free_exactly_one_window_after_it_was_taken(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, requests(1))
        clock.advance(60 - MICROSECOND)
        assert not await admitted(storage, requests(1))
        clock.advance(MICROSECOND)
        assert await admitted(storage, requests(1))

    async def test_the_wait_of_requests_is_true_to_the_microsecond(self, storage: SharedWindows, clock: FakeClock) -> None:
        for pause in (7, 11.25, 3):
            assert await admitted(storage, requests(3))
            clock.advance(pause)
        for amount in (1, 2, 3):
            await _check_wait(storage, clock, requests(3, amount=amount))

    async def test_the_wait_of_tokens_is_true_to_the_microsecond(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, tokens(1000, 700))
        clock.advance(20)
        await _check_wait(storage, clock, tokens(1000, 301))
        await _check_wait(storage, clock, tokens(1000, 800))

    async def test_a_refusal_takes_nothing_in_any_window(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, requests(1, scope="gateway"))
        before = await remaining(storage, requests(5), tokens(100, 0), requests(1, scope="gateway"))
        for _ in range(3):
            await refused(storage, requests(5), tokens(100, 10), requests(1, scope="gateway"))
        assert await remaining(storage, requests(5), tokens(100, 0), requests(1, scope="gateway")) == before == [5, 100, 0]

    async def test_a_set_waits_for_its_slowest_window(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, requests(1, scope="tenant:t"))
        clock.advance(25)
        assert await admitted(storage, requests(1))
        refusal = await refused(storage, requests(1, scope="tenant:t"), requests(1))
        assert refusal.claim == requests(1)
        assert refusal.wait == 60
        await _check_wait(storage, clock, requests(1, scope="tenant:t"), requests(1))

    async def test_a_claim_above_its_limit_would_wait_for_ever(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert (await refused(storage, requests(2, amount=3))).wait is None
        assert (await refused(storage, tokens(10, 11))).wait is None

    async def test_a_lowered_limit_counts_what_was_used(self, storage: SharedWindows, clock: FakeClock) -> None:
        for _ in range(5):
            assert await admitted(storage, requests(5))
            clock.advance(1)
        refusal = await refused(storage, requests(2))
        assert refusal.wait == 58, "all but one have to leave"
        assert refusal.states[0].remaining == 0
        await _check_wait(storage, clock, requests(2))

    async def test_a_raised_limit_counts_what_was_used(self, storage: SharedWindows, clock: FakeClock) -> None:
        for _ in range(2):
            assert await admitted(storage, requests(2))
        assert not await admitted(storage, requests(2))
        for _ in range(3):
            assert await admitted(storage, requests(5))
        assert not await admitted(storage, requests(5))

    async def test_scopes_kinds_and_lengths_are_windows_of_their_own(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, requests(1))
        assert await admitted(storage, requests(1, scope="principal:b"))
        assert await admitted(storage, requests(1, seconds=30))
        assert await admitted(storage, tokens(1, 1))

    async def test_reset_after_is_when_the_window_is_unused_again(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert [state.reset_after for state in await storage.peek([requests(3), tokens(100, 0)])] == [0, 0]
        assert await admitted(storage, requests(3), tokens(100, 50))
        clock.advance(10)
        states = await storage.acquire_all([requests(3), tokens(100, 25)])
        assert not isinstance(states, Refusal)
        assert states[0].reset_after == 60
        clock.advance(max(state.reset_after for state in states))
        assert await remaining(storage, requests(3), tokens(100, 0)) == [3, 100]
        assert [state.reset_after for state in await storage.peek([requests(3), tokens(100, 0)])] == [0, 0]

    async def test_peeking_takes_nothing(self, storage: SharedWindows, clock: FakeClock) -> None:
        for _ in range(3):
            assert await remaining(storage, requests(1), tokens(10, 10)) == [1, 10]
        assert await admitted(storage, requests(1), tokens(10, 10))

    async def test_probing_tells_what_taking_would_meet_and_takes_nothing(self, storage: SharedWindows, clock: FakeClock) -> None:
        claims = requests(2), tokens(100, 60)
        for _ in range(3):
            states = await storage.probe(claims)
            assert not isinstance(states, Refusal)
            assert [state.remaining for state in states] == [2, 100], "as they are before it"
        assert await admitted(storage, *claims)
        clock.advance(7)
        for _ in range(3):
            told = await storage.probe(claims)
            assert isinstance(told, Refusal)
            assert told == await refused(storage, *claims)
        assert await remaining(storage, requests(2), tokens(100, 0)) == [1, 40]

    async def test_tokens_that_were_not_used_are_given_back(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, tokens(100, 90))
        await storage.adjust([(tokens(100, 90), -60)])
        assert await remaining(storage, tokens(100, 0)) == [70]

    async def test_tokens_above_the_estimate_are_charged_beyond_the_limit(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, tokens(100, 90))
        await storage.adjust([(tokens(100, 90), 60)])
        assert await remaining(storage, tokens(200, 0)) == [50]
        assert not await admitted(storage, tokens(100, 1))

    async def test_nothing_is_corrected_below_zero(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, tokens(100, 10))
        await storage.adjust([(tokens(100, 10), -50)])
        assert await remaining(storage, tokens(100, 0)) == [100]

    async def test_a_late_correction_reaches_the_bucket_that_was_charged(self, storage: SharedWindows, clock: FakeClock) -> None:
        charged_at = clock()
        assert await admitted(storage, tokens(100, 80))
        clock.advance(60)
        assert await admitted(storage, tokens(100, 10))
        await storage.adjust([(tokens(100, 80), -60)], charged_at=charged_at)
        assert await remaining(storage, tokens(100, 0)) == [70], "20 of the last minute, 10 of this one"
        clock.advance(60)
        await storage.adjust([(tokens(100, 80), -20)], charged_at=charged_at)
        assert await remaining(storage, tokens(100, 0)) == [90], "what has left the windows cannot be given back"

    async def test_a_clock_that_steps_back_neither_opens_nor_bars_a_window(self, storage: SharedWindows, clock: FakeClock) -> None:
        assert await admitted(storage, requests(1), tokens(10, 10))
        clock.advance(-100_000)
        assert not await admitted(storage, requests(1))
        assert not await admitted(storage, tokens(10, 10))
        clock.advance(60 - MICROSECOND)
        assert not await admitted(storage, requests(1))
        clock.advance(MICROSECOND)
        assert await admitted(storage, requests(1))
        clock.advance(60)
        assert await admitted(storage, tokens(10, 10))

    async def test_tasks_at_once_share_a_window_exactly(self, storage: SharedWindows, clock: FakeClock) -> None:
        let_in: list[int] = []

        async def call(number: int) -> None:
            if await admitted(storage, requests(20), tokens(10_000, 1)):
                let_in.append(number)

        async with anyio.create_task_group() as group:
            for number in range(60):
                group.start_soon(call, number)
        assert len(let_in) == 20
        assert await remaining(storage, requests(20), tokens(10_000, 0)) == [0, 9980]


class LimitsContract:
    """The verbs of `limits`, through its own strategies. `storage` also has to give its time from `clock`."""

    async def test_the_moving_window_of_limits_works_over_it(self, storage: Storage, clock: FakeClock) -> None:
        strategy, item = MovingWindowRateLimiter(storage), RateLimitItemPerMinute(2)
        assert await strategy.test(item, "a")
        assert await strategy.hit(item, "a")
        clock.advance(10)
        assert await strategy.hit(item, "a")
        assert not await strategy.test(item, "a")
        assert not await strategy.hit(item, "a")
        assert await strategy.hit(item, "b")
        assert await strategy.get_window_stats(item, "a") == (clock() + 50, 0)
        clock.advance(50)
        assert await strategy.hit(item, "a")
        await strategy.clear(item, "a")
        assert (await strategy.get_window_stats(item, "a")).remaining == 2

    async def test_the_sliding_window_counter_of_limits_works_over_it(self, storage: Storage, clock: FakeClock) -> None:
        strategy, item = SlidingWindowCounterRateLimiter(storage), RateLimitItemPerMinute(100)
        assert await strategy.hit(item, "a", cost=80)
        assert not await strategy.hit(item, "a", cost=21)
        clock.advance(75)
        assert (await strategy.get_window_stats(item, "a")).remaining == 40, "three quarters of the last minute's 80"
        assert not await strategy.test(item, "a", cost=41)
        assert await strategy.hit(item, "a", cost=40)
        await strategy.clear(item, "a")
        assert (await strategy.get_window_stats(item, "a")).remaining == 100

    async def test_the_fixed_window_of_limits_works_over_it(self, storage: Storage, clock: FakeClock) -> None:
        strategy, item = FixedWindowRateLimiter(storage), RateLimitItemPerMinute(3)
        assert await strategy.hit(item, "a", cost=3)
        assert not await strategy.hit(item, "a")
        assert (await strategy.get_window_stats(item, "a")).reset_time == clock() + 60
        clock.advance(60)
        assert await strategy.hit(item, "a")
        await strategy.clear(item, "a")
        assert await strategy.test(item, "a", cost=3)

    async def test_reset_forgets_everything(self, storage: Any, clock: FakeClock) -> None:
        await storage.incr("fixed", 60)
        await storage.acquire_entry("moving", 1, 60)
        await storage.acquire_sliding_window_entry("sliding", 1, 60)
        assert await storage.check()
        await storage.reset()
        assert await storage.get("fixed") == 0
        assert await storage.acquire_entry("moving", 1, 60)
        assert await storage.acquire_sliding_window_entry("sliding", 1, 60)


async def _check_wait(storage: SharedWindows, clock: FakeClock, *claims: WindowClaim) -> None:
    """Lets the set in, after exactly the wait that it was told."""
    wait = (await refused(storage, *claims)).wait
    assert wait is not None
    clock.advance(wait - MICROSECOND)
    assert (await refused(storage, *claims)).wait == MICROSECOND
    clock.advance(MICROSECOND)
    assert await admitted(storage, *claims)
