"""Whoever makes an answer is stopped when its client leaves, or takes nothing more, and by nothing else."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

import anyio
import anyio.lowlevel
import pytest
from starlette.types import Message, Receive

from starlette_aigateway.http.bodies import ClientLeft
from starlette_aigateway.http.pace import Pace
from starlette_aigateway.http.presence import A_MOMENT, StreamClient, present, while_present, while_taken

pytestmark = pytest.mark.anyio
Watched = Callable[[Receive, Callable[[], Awaitable[str]]], Awaitable[str]]


class Client:
    """What a server tells of one: nothing, until it has left."""

    def __init__(self) -> None:
        self.left = anyio.Event()
        self.asked = anyio.Event()
        self.let_go = anyio.Event()

    async def receive(self) -> Message:
        self.asked.set()
        try:
            await self.left.wait()
        finally:
            self.let_go.set()
        return {"type": "http.disconnect"}


def until(client: Client, then: Callable[[], Awaitable[str]]) -> Callable[[], Awaitable[str]]:
    async def work() -> str:
        await client.asked.wait()
        return await then()

    return work


async def forever() -> str:
    await anyio.sleep_forever()
    raise AssertionError


def patient() -> Pace:
    return Pace(60)


async def while_taken_anyhow(receive: Receive, work: Callable[[], Awaitable[str]]) -> str:
    return await while_taken(receive, lambda _: work(), patient())


@pytest.fixture(params=[while_present, while_taken_anyhow], ids=["whole", "stream"])
def watched(request: pytest.FixtureRequest) -> Watched:
    """Work while its client is there, of which the answer is whole or a stream."""
    return request.param  # type: ignore[no-any-return]


async def test_what_the_work_brings_is_given_back_and_nobody_listens_any_longer(watched: Watched) -> None:
    client = Client()

    async def answer() -> str:
        return "an answer"

    with anyio.fail_after(5):
        assert await watched(client.receive, until(client, answer)) == "an answer"
        await client.let_go.wait()


async def test_what_the_work_raises_comes_as_it_is(watched: Watched) -> None:
    client = Client()

    async def fail() -> str:
        raise ValueError("its own")

    with anyio.fail_after(5), pytest.raises(ValueError, match="its own"):
        await watched(client.receive, until(client, fail))


async def test_when_the_client_leaves_the_work_is_cancelled(watched: Watched) -> None:
    client = Client()

    async def leave() -> str:
        client.left.set()
        return await forever()

    with anyio.fail_after(5), pytest.raises(ClientLeft):
        await watched(client.receive, until(client, leave))


async def test_work_that_is_shielded_is_ended_first() -> None:
    client = Client()
    steps: list[str] = []

    async def leave() -> str:
        with anyio.CancelScope(shield=True):
            client.left.set()
            await anyio.sleep(0.01)
            steps.append("settled")
        await anyio.sleep(0)
        raise AssertionError("cancelled by then")

    with anyio.fail_after(5), pytest.raises(ClientLeft):
        await while_present(client.receive, until(client, leave))
    assert steps == ["settled"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_stream_does_once_it_is_safe_is_not_cut_off() -> None:
    client = Client()

    async def settle(ours: StreamClient) -> str:
        await client.asked.wait()
        ours.end()
        client.left.set()
        await anyio.wait_all_tasks_blocked()
        return "settled"

    with anyio.fail_after(5):
        assert await while_taken(client.receive, settle, patient()) == "settled"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_stream_ends_with_when_its_client_leaves_is_not_cut_off() -> None:
    client = Client()
    steps: list[str] = []

    async def leave(ours: StreamClient) -> str:
        await client.asked.wait()
        try:
            client.left.set()
            return await forever()
        finally:
            await anyio.wait_all_tasks_blocked()
            steps.append("settled")

    with anyio.fail_after(5), pytest.raises(ClientLeft):
        await while_taken(client.receive, leave, patient())
    assert steps == ["settled"]
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_while_its_client_leaves_is_cancelled() -> None:
    client = Client()

    async def both(ours: StreamClient) -> str:
        await client.asked.wait()
        try:
            client.left.set()
            return await forever()
        finally:
            task.cancel()

    task = asyncio.create_task(while_taken(client.receive, both, patient()))
    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await task


async def test_who_is_cancelled_from_outside_has_not_been_left(watched: Watched) -> None:
    client = Client()
    with anyio.CancelScope() as scope:

        async def cancelled() -> str:
            scope.cancel()
            return await forever()

        await watched(client.receive, until(client, cancelled))
    assert scope.cancelled_caught


async def test_a_server_that_cannot_tell_is_no_reason_to_go_on(watched: Watched) -> None:
    async def receive() -> Message:
        raise RuntimeError("no such thing here")

    with anyio.fail_after(5), pytest.raises((RuntimeError, ExceptionGroup)) as caught:
        await watched(receive, forever)
    told = caught.value
    assert "no such thing here" in str(told.exceptions[0] if isinstance(told, ExceptionGroup) else told)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nobody_listens_for_the_client_of_a_stream_that_is_over_at_once() -> None:
    client = Client()

    async def answer(ours: StreamClient) -> str:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        return "an answer"

    with anyio.fail_after(5):
        assert await while_taken(client.receive, answer, patient()) == "an answer"
        await anyio.wait_all_tasks_blocked()
    assert not client.asked.is_set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("leaves", [False, True])
async def test_whoever_asks_for_the_client_of_a_stream_hears_at_once_that_it_has_left(leaves: bool) -> None:
    """From a task of its own, as the job of a stream does."""
    client = Client()
    asked: list[asyncio.Task[bool]] = []
    if leaves:
        client.left.set()

    async def twice(ours: StreamClient) -> bool:
        assert await ours.present() is await ours.present()
        return await ours.present()

    async def ask(ours: StreamClient) -> str:
        asked.append(asyncio.create_task(twice(ours)))
        await asyncio.wait(asked)
        return "an answer"

    with anyio.fail_after(5):
        with pytest.raises(ClientLeft) if leaves else nullcontext():
            await while_taken(client.receive, ask, patient())
        assert await asked[0] is not leaves


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_whoever_asks_while_somebody_begins_to_listen_hears_what_a_server_tells_a_few_passes_later() -> None:
    asked: list[asyncio.Task[bool]] = []

    async def receive() -> Message:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        return {"type": "http.disconnect"}

    async def ask(ours: StreamClient) -> str:
        asked.append(asyncio.create_task(ours.present()))
        return await forever()

    with anyio.fail_after(5):
        with pytest.raises(ClientLeft):
            await while_taken(receive, ask, patient(), at_once=True)
        assert not await asked[0]


async def test_a_client_that_takes_nothing_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    client, pace = Client(), Pace(0.05)

    async def work() -> str:
        pace.since = time.monotonic()
        return await forever()

    with anyio.fail_after(5), pytest.raises(ClientLeft), caplog.at_level(logging.INFO, "starlette_aigateway"):
        await while_taken(client.receive, lambda _: work(), pace)
    assert "took nothing of its stream for 0.05 seconds" in caplog.text


async def test_a_client_that_takes_what_it_is_sent_may_wait_for_more_as_long_as_it_likes() -> None:
    client, pace = Client(), Pace(0.02)

    async def work() -> str:
        pace.since = time.monotonic()
        await anyio.sleep(0)
        pace.since = None
        await anyio.sleep(0.1)
        return "an answer"

    with anyio.fail_after(5):
        assert await while_taken(client.receive, lambda _: work(), pace) == "an answer"


@pytest.mark.parametrize("moments", [1.3, 5])
async def test_a_moment_for_which_the_process_did_not_run_says_nothing(moments: float) -> None:
    asked = 0

    async def receive() -> Message:
        nonlocal asked
        asked += 1
        if asked == 1:
            time.sleep(moments * A_MOMENT)  # as if others had the processor
            await anyio.sleep_forever()
        return {"type": "http.disconnect"}

    assert not await present(receive)


async def test_who_says_nothing_is_there() -> None:
    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    assert await present(receive)
