"""The buffer between the job that reads a provider and the task that writes to the client."""

import anyio
import pytest

from starlette_aigateway.channel import Channel

pytestmark = pytest.mark.anyio


async def test_items_come_in_order_and_then_nothing() -> None:
    channel: Channel[int] = Channel(3)
    for number in range(3):
        channel.put(number)
    channel.close()
    assert await channel.take() == [0, 1, 2]
    assert await channel.take() == []


async def test_a_reader_that_waits_is_woken_by_an_item_and_by_the_end() -> None:
    channel: Channel[int] = Channel(3)
    got: list[list[int]] = []

    async def read() -> None:
        while items := await channel.take():
            got.append(items)
        got.append([])

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            channel.put(1)
            await anyio.wait_all_tasks_blocked()
            channel.close()
    assert got == [[1], []]


@pytest.mark.parametrize("how", ["take", "leave"])
async def test_a_writer_waits_for_room_until_something_is_taken_or_nobody_takes_any_more(how: str) -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    assert channel.full
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.room)
            await anyio.wait_all_tasks_blocked()
            if how == "take":
                await channel.take()
            else:
                channel.leave()


async def test_what_comes_after_the_reader_left_is_forgotten() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    channel.leave()
    channel.put(2)
    assert not channel.full
    await channel.room()
