"""Blocks that are cancelled at their deadline, on asyncio by a timer, elsewhere by anyio's scopes: the same promises."""

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest
from anyio.lowlevel import checkpoint

from starlette_aigateway import deadlines
from starlette_aigateway.deadlines import Deadline, deadline

pytestmark = pytest.mark.anyio


async def in_a_task_of_its_own(work: Callable[[], Awaitable[None]]) -> None:
    """As jobs run: in a bare task on asyncio, and in a task group elsewhere."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        await work()
        return
    with anyio.fail_after(5):

        async def run() -> None:
            await work()

        await loop.create_task(run())


async def test_a_block_that_does_not_end_is_cut_off_and_the_task_goes_on() -> None:
    async def work() -> None:
        with deadline(0.01) as limit:
            await anyio.sleep_forever()
        assert limit.cancel_called
        assert limit.cancelled_caught
        await checkpoint()

    await in_a_task_of_its_own(work)


async def test_a_block_that_ends_in_time_is_left_alone() -> None:
    async def work() -> None:
        with deadline(60) as limit:
            await checkpoint()
        assert not limit.cancel_called
        assert not limit.cancelled_caught

    await in_a_task_of_its_own(work)


@pytest.mark.parametrize("seconds", [60, 0.0])
async def test_an_error_of_the_block_comes_out_as_it_is_also_after_the_deadline(seconds: float) -> None:
    async def fail() -> None:
        try:
            await anyio.sleep(0 if seconds else 60)
        finally:
            raise KeyError

    async def work() -> None:
        with pytest.raises(KeyError), deadline(seconds):
            await fail()
        await checkpoint()

    await in_a_task_of_its_own(work)


async def test_a_deadline_can_come_nearer_and_never_farther_by_within() -> None:
    async def work() -> None:
        with deadline(60) as limit:
            limit.within(0.01)
            limit.within(60)
            await anyio.sleep_forever()
        assert limit.cancelled_caught

    await in_a_task_of_its_own(work)


async def test_a_deadline_begins_anew() -> None:
    async def work() -> None:
        with deadline(0.01) as limit:
            limit.anew(60)
            await anyio.sleep(0.03)
        assert not limit.cancel_called

    await in_a_task_of_its_own(work)


async def test_a_deadline_that_was_set_before_its_block_begins_holds_in_it() -> None:
    async def work() -> None:
        limit = deadline(60)
        limit.within(0.0)
        with limit:
            await anyio.sleep_forever()
        assert limit.cancelled_caught

    await in_a_task_of_its_own(work)


async def test_an_outer_deadline_cuts_off_an_inner_block_too() -> None:
    async def work() -> None:
        with deadline(0.01) as outer:
            with deadline(60) as inner:
                await anyio.sleep_forever()
            raise AssertionError("the inner block goes on")
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    await in_a_task_of_its_own(work)


async def test_of_two_that_pass_together_the_outer_one_is_not_lost() -> None:
    async def work() -> None:
        with deadline(0.0) as outer:
            with deadline(0.0):
                await anyio.sleep_forever()
            await anyio.sleep_forever()
        assert outer.cancelled_caught

    await in_a_task_of_its_own(work)


async def pass_within(limit: Deadline) -> None:
    """Until `limit` would have cancelled a block that is not critical."""
    limit.within(0.0)
    for _ in range(5):
        await anyio.sleep(0.002)


async def test_a_critical_block_is_not_cancelled_and_what_follows_it_is() -> None:
    async def work() -> None:
        through = False
        with deadline(60, shield=True) as limit:
            with limit.critical(60) as critical:
                await pass_within(limit)
                through = True
            assert not critical.cancel_called
            await anyio.sleep_forever()
        assert through
        assert limit.cancelled_caught

    await in_a_task_of_its_own(work)


async def test_a_critical_block_in_the_cleanup_of_a_cancelled_one_runs_to_its_end() -> None:
    async def work() -> None:
        settled = False
        with deadline(0.0, shield=True) as limit:
            try:
                await anyio.sleep_forever()
            finally:
                with limit.critical(60):
                    await anyio.sleep(0.01)
                    settled = True
        assert settled
        assert limit.cancelled_caught

    await in_a_task_of_its_own(work)


async def test_a_critical_block_ends_at_its_own_bound_also_within_another() -> None:
    async def work() -> None:
        with deadline(60, shield=True) as limit, limit.critical(0.01) as outer:
            with limit.critical(0.05) as inner:
                await anyio.sleep_forever()
            assert inner.cancelled_caught, "the outer one, which passed first, does not cancel what is critical"
            await anyio.sleep_forever()
        assert outer.cancelled_caught
        assert not limit.cancel_called

    await in_a_task_of_its_own(work)


async def test_a_block_that_swallows_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "AGAIN_SECONDS", 0.01)

    async def work() -> None:
        heard = 0
        with deadline(0.0) as limit:
            while heard < 2:
                try:
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():
                    heard += 1
            await anyio.sleep_forever()
        assert limit.cancelled_caught

    await in_a_task_of_its_own(work)
    await checkpoint()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_somebody_else_cancels_is_cancelled() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        with deadline(60):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancellation_that_comes_together_with_the_deadline_is_not_swallowed() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        with deadline(60) as limit:
            limits.append(limit)
            begun.set()
            await asyncio.Event().wait()

    limits: list[Deadline] = []
    task = asyncio.create_task(work())
    await begun.wait()
    limits[0].within(0.0)
    asyncio.get_running_loop().call_later(0.0, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_is_left_of_a_block_that_ended_as_its_deadline_passed() -> None:
    async def work() -> None:
        with deadline(60) as limit:
            limit.within(0.0)
        for _ in range(5):
            await asyncio.sleep(0.001)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    await asyncio.create_task(work())


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_deadline_that_begins_anew_while_its_block_is_critical_has_not_passed() -> None:
    async def work() -> None:
        with deadline(60, shield=True) as limit:
            with limit.critical(60):
                await pass_within(limit)
                limit.anew(60)
            await anyio.sleep(0.01)
        assert not limit.cancel_called

    await in_a_task_of_its_own(work)


async def test_a_block_within_ends_at_its_own_deadline_or_with_the_one_around_it() -> None:
    async def work() -> None:
        with deadline(60, shield=True) as limit:
            with limit.inner(0.01) as own:
                await anyio.sleep_forever()
            assert own.cancelled_caught
            with limit.inner(60) as later:
                limit.within(0.01)
                await anyio.sleep_forever()
        assert limit.cancelled_caught
        assert not later.cancelled_caught

    await in_a_task_of_its_own(work)


async def test_a_block_within_whose_deadline_begins_anew_is_cut_off_at_the_new_one() -> None:
    async def work() -> None:
        with deadline(60, shield=True) as limit:
            with limit.inner(0.005) as own:
                own.anew(60)
                await anyio.sleep(0.01)
                own.anew(0.005)
                await anyio.sleep_forever()
            assert own.cancelled_caught
        assert not limit.cancel_called

    await in_a_task_of_its_own(work)


@pytest.mark.parametrize("seconds", [0.005, 60.0])
async def test_a_look_at_what_has_passed_cancels_nothing_that_has_not(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "GLANCE", 0.001)

    async def work() -> None:
        with deadline(60, shield=True) as limit:
            with limit.critical(seconds) as critical:
                await anyio.sleep(0.01)
            with limit.inner(0.01) as own:
                await anyio.sleep_forever()
            assert own.cancelled_caught
        assert critical.cancelled_caught == (seconds < 60)
        assert not limit.cancel_called

    await in_a_task_of_its_own(work)
