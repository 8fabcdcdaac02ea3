"""Owned work: it finishes, or is given up at its deadline, whoever leaves and however."""

import gc
import weakref

import anyio
import pytest

from starlette_aigateway.background import Background, Job
from starlette_aigateway.drains import Drains
from starlette_aigateway.errors import NoProviderAvailable, NotFound

pytestmark = pytest.mark.anyio


async def test_a_result_and_an_error_come_back_as_they_are_with_and_without_an_owner() -> None:
    background = Background(Drains(5))

    async def fine(job: Job[int]) -> int:
        return 7

    async def wrong(job: Job[int]) -> int:
        raise NotFound("gone")

    async def both() -> None:
        assert await background.run(fine) == 7
        with pytest.raises(NotFound):
            await background.run(wrong)

    assert not background.shared
    await both()
    async with background.owner():
        assert background.shared
        await both()


@pytest.mark.parametrize("owned", [True, False])
async def test_work_goes_on_when_its_caller_is_cancelled(owned: bool) -> None:
    background = Background(Drains(5))
    begun, go, ended = anyio.Event(), anyio.Event(), anyio.Event()

    async def work(job: Job[None]) -> None:
        begun.set()
        await go.wait()
        while not job.abandoned:
            await anyio.lowlevel.checkpoint()
        ended.set()

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(background.run, work)
            await begun.wait()
            group.cancel_scope.cancel()
            go.set()
        with anyio.fail_after(5):
            await ended.wait()

    if owned:
        async with background.owner():
            await scenario()
    else:
        await scenario()


@pytest.mark.parametrize("owned", [True, False])
async def test_abandoned_work_is_cancelled_at_the_end_of_its_grace_and_may_still_settle(owned: bool) -> None:
    background = Background(Drains(0))
    begun, settled = anyio.Event(), anyio.Event()

    async def work(job: Job[None]) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                settled.set()

    async def scenario() -> None:
        async with background.start(work):
            await begun.wait()
        await settled.wait()

    with anyio.fail_after(5):
        if owned:
            async with background.owner():
                await scenario()
        else:
            await scenario()


async def test_a_block_that_raises_gives_its_own_error_not_a_group() -> None:
    background = Background(Drains(0))

    async def forever(job: Job[None]) -> None:
        await anyio.sleep_forever()

    with pytest.raises(KeyError):
        async with background.start(forever):
            raise KeyError("mine")


async def test_the_owner_waits_for_abandoned_work_at_its_end() -> None:
    background = Background(Drains(5))
    begun, go = anyio.Event(), anyio.Event()
    ended = False

    async def work(job: Job[None]) -> None:
        nonlocal ended
        begun.set()
        await go.wait()
        ended = True

    async with background.owner():
        async with background.start(work):
            await begun.wait()
        assert not ended
        go.set()
    assert ended


async def test_an_owner_whose_block_raises_gives_that_error_not_a_group() -> None:
    with pytest.raises(KeyError):
        async with Background(Drains(0)).owner():
            raise KeyError("mine")


@pytest.mark.parametrize("owned", [True, False])
async def test_in_a_critical_section_abandoned_work_is_not_cancelled_and_after_it_it_is(owned: bool) -> None:
    background = Background(Drains(0))
    begun, go = anyio.Event(), anyio.Event()
    seen: list[str] = []

    async def work(job: Job[None]) -> None:
        with job.critical(5):
            begun.set()
            await go.wait()
            seen.append("through")
        try:
            await anyio.sleep_forever()
        finally:
            with job.critical(5):
                await anyio.lowlevel.checkpoint()
                seen.append("settled")

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            async with background.start(work) as job:
                await begun.wait()

                async def later() -> None:
                    while not job.abandoned:
                        await anyio.lowlevel.checkpoint()
                    go.set()

                group.start_soon(later)
            await job.finished()

    with anyio.fail_after(5):
        if owned:
            async with background.owner():
                await scenario()
        else:
            await scenario()
    assert seen == ["through", "settled"]


async def test_work_that_never_ends_is_given_up_at_its_limit() -> None:
    ended = False

    async def forever(job: Job[None]) -> None:
        nonlocal ended
        with job.critical(0.01):
            await anyio.sleep_forever()
        ended = True
        await anyio.sleep_forever()

    with anyio.fail_after(5), pytest.raises(NoProviderAvailable):
        await Background(Drains(5)).run(forever, limit=0.05)
    assert ended, "a critical section ends at its own bound"


@pytest.mark.parametrize("owned", [True, False])
async def test_who_was_told_waits_for_nothing_more_where_somebody_else_owns_the_work(owned: bool) -> None:
    background = Background(Drains(0))
    go = anyio.Event()
    seen: list[str] = []

    async def work(job: Job[str]) -> str:
        job.tell("answer")
        await go.wait()
        seen.append("abandoned" if job.abandoned else "to its end")
        return "too late to change it"

    async def scenario() -> None:
        async with background.start(work) as job:
            assert await job.result() == "answer"
            assert not job.done
            if not owned:
                go.set()
        assert job.done is not owned
        go.set()
        await job.finished()
        assert await job.result() == "answer"

    with anyio.fail_after(5):
        if owned:
            async with background.owner():
                await scenario()
        else:
            await scenario()
    assert seen == ["to its end"]


class Brought:
    """Something that a weak reference can look at."""


@pytest.mark.parametrize("owned", [True, False])
async def test_what_work_brought_is_gone_with_who_asked_for_it_and_waits_for_no_garbage_collection(owned: bool) -> None:
    background = Background(Drains(5))

    async def work(job: Job[Brought]) -> Brought:
        return Brought()

    async def scenario() -> None:
        gc.collect()
        gc.disable()
        try:
            brought = weakref.ref(await background.run(work, 60.0))
            await anyio.wait_all_tasks_blocked()
            assert brought() is None
        finally:
            gc.enable()

    if owned:
        async with background.owner():
            await scenario()
    else:
        await scenario()
