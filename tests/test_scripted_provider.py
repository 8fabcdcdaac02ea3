"""The provider that does what a test tells it: pauses on a clock that the test moves, gates, deaths, missing usage."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from starlette_aigateway import AIGateway, CompletionRequest, Price, Principal, ProviderError, RetryPolicy
from starlette_aigateway.testing import After, Die, FakeClock, Hang, Say, ScriptedProvider

pytestmark = pytest.mark.anyio

ASK = CompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])


async def collected(provider: ScriptedProvider, into: list[str]) -> None:
    async for chunk in provider.stream(ASK):
        into += [chunk.text] if chunk.text else []


async def test_a_stream_pauses_before_each_word_until_the_clock_has_moved() -> None:
    clock, words = FakeClock(), list[str]()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(collected, ScriptedProvider(Say("one two", pause=2), clock=clock), words)
            for expected in ([], ["one "]):
                await anyio.wait_all_tasks_blocked()
                await clock.slept_on()
                clock.advance(1.5)
                await anyio.wait_all_tasks_blocked()
                assert words == expected
                clock.advance(0.5)
    assert words == ["one ", "two"]


@pytest.mark.parametrize("step", [Say("late", pause=3), Die(pause=3)])
async def test_a_whole_answer_and_a_failure_take_their_time(step: Any) -> None:
    clock, ended = FakeClock(), list[str]()

    async def call() -> None:
        try:
            ended.append(str((await ScriptedProvider(step, clock=clock).complete(ASK)).message["content"]))
        except ProviderError as error:
            ended.append(error.message)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await clock.slept_on()
            assert ended == []
            clock.advance(3)
    assert ended in (["late"], ["the stream was cut short"])


async def test_a_clock_moved_in_another_thread_wakes_who_sleeps_on_it() -> None:
    clock = FakeClock()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(clock.sleep, 5)
            await clock.slept_on()
            await anyio.to_thread.run_sync(clock.advance, 5)


async def test_nobody_sleeps_for_no_time_and_a_sleep_that_is_cancelled_is_forgotten() -> None:
    clock = FakeClock()
    await clock.sleep(0)
    with anyio.move_on_after(0) as scope:
        await clock.sleep(1)
    assert scope.cancelled_caught
    with anyio.move_on_after(0) as scope:
        await clock.slept_on()
    assert scope.cancelled_caught, "nobody sleeps any more"


async def test_a_stream_waits_in_its_middle_for_the_test() -> None:
    go, words = anyio.Event(), list[str]()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(collected, ScriptedProvider(Say("one two three", until=go, after=2)), words)
            await anyio.wait_all_tasks_blocked()
            assert words == ["one ", "two "]
            go.set()
    assert words == ["one ", "two ", "three"]


async def test_each_kind_of_trouble_ends_as_it_is_meant_to() -> None:
    arrived, go = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(
        Say("no usage", usage=None),
        Die(after=1, text="one two"),
        After(go, "after", arrived),
        Hang(after=1, text="one two"),
        ProviderError("refused", billed="no"),
    )
    gateway = AIGateway.in_memory(providers=[provider], prices={"m": Price("1000", "2000")}, retries=RetryPolicy(rounds=1))
    caller = gateway.acting_as(Principal("p"))
    asked: dict[str, Any] = {"model": "m", "messages": ASK.messages, "max_tokens": 50}
    with anyio.fail_after(20):
        async with gateway:
            await caller.complete(**asked)
            async with caller.stream(**asked, seed=1) as stream:
                assert (await anext(stream)).text == "one "
                with pytest.raises(ProviderError, match="cut short"):
                    await anext(stream)
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: caller.complete(**asked, seed=2))
                await arrived.wait()
                go.set()
            with pytest.raises(ProviderError):
                await caller.complete(**asked, seed=3, timeout=0.2)
            with pytest.raises(ProviderError, match="refused"):
                await caller.complete(**asked, seed=4)
            outcomes = [record.outcome for record in (await gateway.usage()).data]
    assert outcomes == ["released", "ambiguous", "completed", "ambiguous", "estimated"]
    assert len(provider.calls) == 5
