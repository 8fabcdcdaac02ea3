"""Waiting for so long and no longer: the same promises on asyncio, where the limit begins with the first wait, and on trio."""

import asyncio
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from starlette_aigateway import patience
from starlette_aigateway.patience import within

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
HOUR = 3600


async def value(waits: int) -> str:
    for _ in range(waits):
        await checkpoint()
    return "brought"


async def failing(waits: int, error: Exception) -> str:
    await value(waits)
    raise error


@pytest.mark.parametrize("waits", [0, 1, 3])
async def test_what_the_work_brings_comes_out(waits: int) -> None:
    assert await within(HOUR, value(waits)) == "brought"


@pytest.mark.parametrize("waits", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyError("a"), TimeoutError("its own")], ids=repr)
async def test_what_the_work_raises_comes_out(waits: int, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        await within(HOUR, failing(waits, error))
    assert caught.value is error


@on_asyncio
async def test_work_that_never_waits_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(patience, "deadline")
    assert await within(HOUR, value(0)) == "brought"


async def test_work_that_takes_longer_is_cancelled_and_the_task_goes_on() -> None:
    heard = False

    async def work() -> str:
        nonlocal heard
        await checkpoint()
        try:
            await anyio.sleep_forever()
        finally:
            heard = True
        return "brought"

    assert await within(0.01, work()) is None
    assert heard
    await checkpoint()
    with anyio.move_on_after(HOUR) as scope:
        await checkpoint()
    assert not scope.cancel_called


async def test_work_that_is_cut_off_may_wait_while_it_cleans_up() -> None:
    cleaned: list[str] = []

    async def work() -> str:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                cleaned.append(await value(3))
        return "brought"

    assert await within(0.01, work()) is None
    assert cleaned == ["brought"]


async def test_a_scope_that_the_work_entered_before_its_first_wait_is_left_in_order() -> None:
    async def work() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            await checkpoint()
            group.cancel_scope.cancel()
        return "brought"

    with anyio.CancelScope() as outer:
        assert await within(HOUR, work()) == "brought"
        await checkpoint()
        outer.cancel()
        await checkpoint()
    assert outer.cancelled_caught


async def test_the_limit_reaches_through_scopes_of_the_work() -> None:
    async def work() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            with anyio.CancelScope():
                await anyio.sleep_forever()
        return "brought"

    assert await within(0.01, work()) is None
    await checkpoint()


async def test_a_scope_around_cancels_the_work_and_not_the_limit() -> None:
    reached = False
    with anyio.CancelScope() as scope:

        async def work() -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await within(HOUR, work())
        reached = True
    assert scope.cancelled_caught
    assert not reached


@on_asyncio
@pytest.mark.parametrize("seconds", [HOUR, 0.0], ids=["alone", "as the time is over"])
async def test_a_task_that_somebody_cancels_is_cancelled(seconds: float) -> None:
    waiting = asyncio.Event()

    async def work() -> None:
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(within(seconds, work()))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@on_asyncio
async def test_work_whose_task_is_dropped_is_closed() -> None:
    closed: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closed.append("closed")

    dropped: Any = within(HOUR, work())
    dropped.send(None)
    dropped.close()
    assert closed == ["closed"]
