"""Starting and stopping a gateway: once, in whichever event loop or process it is first asked for; again after it has stopped."""

import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from starlette_aigateway import (
    AIGateway,
    Chunk,
    Completion,
    CompletionRequest,
    ConfigurationError,
    Price,
    Principal,
    SpendCapExceeded,
    StorageUnavailable,
    Usage,
)
from starlette_aigateway.events import CallRecorded, CallRefused, Event

pytestmark = pytest.mark.anyio

ADA = Principal("ada")
USAGE = Usage(input_tokens=10, output_tokens=5)
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}


async def nothing() -> None:
    """What there is to do at an opening or a closing, if nothing else is said."""


class Door:
    """A provider that tells when the gateway opens and closes it, and can be told to take its time or to fail."""

    name = "door"

    def __init__(self, opening: Callable[[], Any] = nothing, closing: Callable[[], Any] = nothing) -> None:
        self.log: list[str] = []
        self._opening = opening
        self._closing = closing

    async def __aenter__(self) -> Self:
        self.log.append("open")
        await self._opening()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.log.append("close")
        await self._closing()

    async def complete(self, request: CompletionRequest) -> Completion:
        return Completion(message={"role": "assistant", "content": "hello"}, usage=USAGE)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "hello"})
        yield Chunk(finish_reason="stop", usage=USAGE)


class Heard:
    """An observer; `arrived` is set by whatever comes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.arrived = threading.Event()

    async def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.arrived.set()

    def take(self) -> list[type[Event]]:
        kinds = [type(event) for event in self.events]
        self.events.clear()
        return kinds


def gateway_of(door: Door, **settings: Any) -> AIGateway:
    return AIGateway.in_memory(providers=[door], prices={"m": Price("1000", "2000")}, **settings)


# -- starting --------------------------------------------------------------------------------------------------------------------------


async def test_two_event_loops_in_two_threads_that_ask_first_start_the_stores_once(anyio_backend: str) -> None:
    other_waits = threading.Event()

    async def slowly() -> None:
        assert await anyio.to_thread.run_sync(lambda: other_waits.wait(10))

    door = Door(opening=slowly)
    gateway = gateway_of(door)

    async def in_the_other() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.ready)
            await anyio.wait_all_tasks_blocked()
            other_waits.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.ready)
            while not door.log:
                await anyio.lowlevel.checkpoint()
            await anyio.to_thread.run_sync(lambda: anyio.run(in_the_other, backend=anyio_backend))
    assert door.log == ["open"]


async def test_first_calls_at_the_same_time_wait_for_one_start_and_all_are_answered() -> None:
    go = anyio.Event()
    door = Door(opening=go.wait)
    gateway = gateway_of(door)
    answers: list[str] = []

    async def call(number: int) -> None:
        answer = await gateway.complete(ADA, CompletionRequest(model="m", messages=[{"role": "user", "content": f"call {number}"}]))
        answers.append(str(answer.message["content"]))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(call, number)
            await anyio.wait_all_tasks_blocked()
            assert answers == []
            go.set()
    assert answers == ["hello"] * 5
    assert door.log == ["open"]


async def test_whoever_waits_for_a_start_that_is_cancelled_starts_itself() -> None:
    go = anyio.Event()
    door = Door(opening=go.wait)
    gateway = gateway_of(door)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as waiting:
            async with anyio.create_task_group() as first:
                first.start_soon(gateway.ready)
                while not door.log:
                    await anyio.lowlevel.checkpoint()
                waiting.start_soon(gateway.ready)
                await anyio.wait_all_tasks_blocked()
                first.cancel_scope.cancel()
            go.set()
    assert door.log == ["open", "open"]


async def test_whatever_a_host_s_store_raises_at_the_start_is_503_on_a_bare_mount_and_tried_again(
    caplog: pytest.LogCaptureFixture, anyio_backend: str
) -> None:
    broken = True

    async def maybe() -> None:
        if broken:
            raise RuntimeError("no route to postgres://secret@db")

    app = Starlette(routes=[Mount("/ai", gateway_of(Door(opening=maybe)))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        for path in ("/ai/complete", "/ai/v1/chat/completions"):
            refused = await client.post(path, json=HELLO, headers={"authorization": "Bearer aigw_none"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
            assert "secret" not in refused.text
        assert "no route to postgres://secret@db" in caplog.text
        broken = False
        assert (await client.post("/ai/complete", json=HELLO, headers={"authorization": "Bearer aigw_none"})).status_code == 401


async def test_what_a_start_has_opened_is_closed_when_the_rest_of_it_fails() -> None:
    async def no() -> None:
        raise ConfigurationError("not like this", param="providers")

    class Second(Door):
        name = "second"

    first, second = Door(), Second(opening=no)
    gateway = AIGateway.in_memory(providers=[first, second])
    with pytest.raises(ConfigurationError):
        async with gateway:
            raise AssertionError
    assert (first.log, second.log) == (["open", "close"], ["open"])


async def test_a_provider_that_asks_the_gateway_while_it_is_being_opened_is_told_so_and_nothing_hangs() -> None:
    async def ask() -> None:
        await gateway.create_key("too early")

    gateway = gateway_of(Door(opening=ask))
    with anyio.fail_after(10), pytest.raises(StorageUnavailable) as refused:
        await gateway.ready()
    assert "asked for it again" in str(refused.value.__cause__)


# -- stopping and starting again -------------------------------------------------------------------------------------------------------


async def test_the_last_lifespan_to_end_closes_and_the_next_one_opens_again() -> None:
    door = Door()
    gateway = gateway_of(door)
    async with gateway:
        async with gateway.lifespan(), gateway:
            pass
        assert door.log == ["open"]
        await gateway.complete(ADA, CompletionRequest(**HELLO))
    assert door.log == ["open", "close"]
    async with gateway:
        assert (await gateway.usage()).totals.calls == 1
    assert door.log == ["open", "close"] * 2


async def test_a_lifespan_that_begins_while_the_last_one_closes_finds_everything_open() -> None:
    closing, go = anyio.Event(), anyio.Event()

    async def slowly() -> None:
        closing.set()
        await go.wait()

    door = Door(closing=slowly)
    gateway = gateway_of(door)
    entered = anyio.Event()

    async def again() -> None:
        async with gateway:
            entered.set()
            assert door.log == ["open", "close", "open"]
            await gateway.complete(ADA, CompletionRequest(**HELLO))

    async def first() -> None:
        async with gateway:
            pass

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await closing.wait()
            group.start_soon(again)
            await anyio.wait_all_tasks_blocked()
            assert not entered.is_set()
            go.set()
    assert door.log == ["open", "close", "open", "close"]


async def test_a_gateway_may_be_entered_by_two_tasks_that_leave_in_any_order() -> None:
    door = Door()
    gateway = gateway_of(door)
    inside, leave = anyio.Event(), anyio.Event()

    async def longer() -> None:
        async with gateway:
            inside.set()
            await leave.wait()
            await gateway.complete(ADA, CompletionRequest(**HELLO))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            async with gateway:
                group.start_soon(longer)
                await inside.wait()
            leave.set()
    assert door.log == ["open", "close"]


# -- what observers hear ---------------------------------------------------------------------------------------------------------------


async def poor(connection: Any) -> Principal:
    return Principal("poor", hard_cap_usd="0.000001")


async def test_without_a_lifespan_observers_have_heard_of_a_call_in_process_when_it_returns() -> None:
    heard = Heard()
    gateway = gateway_of(Door(), observers=[heard])
    caller = gateway.acting_as(ADA)
    await caller.complete(**HELLO)
    assert heard.take() == [CallRecorded]
    async with caller.stream(**HELLO) as stream:
        assert [chunk.text async for chunk in stream if chunk.text] == ["hello"]
    assert heard.take() == [CallRecorded]
    await gateway.complete(ADA, CompletionRequest(**HELLO))
    assert heard.take() == [CallRecorded]
    with pytest.raises(SpendCapExceeded):
        await gateway.acting_as(await poor(None)).complete(**HELLO)
    assert heard.take() == [CallRefused]


async def test_without_a_lifespan_observers_have_heard_of_a_streamed_response_when_it_was_sent() -> None:
    heard = Heard()
    gateway = gateway_of(Door(), observers=[heard])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        response = await gateway.acting_as(ADA).stream_response(**HELLO)
        await response(scope, receive, send)
        assert heard.take() == [CallRecorded]

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        assert "event: done" in (await client.get("/")).text


async def test_a_call_in_another_event_loop_wakes_the_observers_of_a_lifespan(anyio_backend: str) -> None:
    heard = Heard()
    gateway = gateway_of(Door(), observers=[heard])

    async def call() -> None:
        await gateway.acting_as(ADA).complete(**HELLO)

    def in_the_other_loop() -> None:
        anyio.run(call, backend=anyio_backend)
        assert heard.arrived.wait(10), "nobody was told"

    with anyio.fail_after(20):
        async with gateway:
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(in_the_other_loop)
    assert heard.take() == [CallRecorded]


async def test_observers_are_told_by_a_worker_for_as_long_as_any_lifespan_lasts() -> None:
    heard = Heard()
    gateway = gateway_of(Door(), observers=[heard])
    inside, first_left, leave = anyio.Event(), anyio.Event(), anyio.Event()

    async def longer() -> None:
        async with gateway:
            inside.set()
            await first_left.wait()
            gateway._composition.observers.emit(CallRefused(request_id="req_x", principal="ada", model=None, code="x"))
            with anyio.fail_after(10):
                while not heard.arrived.is_set():
                    await anyio.lowlevel.checkpoint()
            leave.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            async with gateway:
                group.start_soon(longer)
                await inside.wait()
            first_left.set()
            await leave.wait()


async def test_an_unavailable_store_at_the_start_says_when_to_ask_again() -> None:
    async def no() -> None:
        raise OSError("nobody listens")

    with pytest.raises(StorageUnavailable) as refused:
        await gateway_of(Door(opening=no)).ready()
    assert refused.value.retry_after == 1.0
    assert isinstance(refused.value.__cause__, OSError)
