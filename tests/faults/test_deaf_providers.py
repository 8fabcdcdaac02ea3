"""Providers of the host's own that swallow their cancellation: they keep neither a caller nor a shutdown, and are billed when they end."""

import logging
from collections.abc import AsyncIterator

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    Chunk,
    Completion,
    CompletionRequest,
    NoProviderAvailable,
    Price,
    Principal,
    ProviderTimeout,
    RetryPolicy,
    Timeouts,
    Usage,
)
from starlette_aigateway.background import Background, Job
from starlette_aigateway.drains import Drains

from .kit import ask, held, until_booked

pytestmark = pytest.mark.anyio

WHO = Principal("user", hard_cap_usd="100")
USAGE = Usage(input_tokens=10, output_tokens=5)
IMPATIENT = Timeouts(read=0.05, call=0.1, drain=0.05, settle=0.2, storage=0.2)


class Ear:
    """Hears no cancellation until it `may_end`."""

    def __init__(self) -> None:
        self.asked, self.may_end, self.ended = anyio.Event(), anyio.Event(), anyio.Event()

    async def shut(self) -> None:
        self.asked.set()
        while not self.may_end.is_set():
            try:
                await self.may_end.wait()
            except anyio.get_cancelled_exc_class():
                continue
        self.ended.set()


class Deaf:
    name = "deaf"

    def __init__(self) -> None:
        self.ear = Ear()

    async def complete(self, request: CompletionRequest) -> Completion:
        await self.ear.shut()
        return Completion(message={"role": "assistant", "content": "at last"}, usage=USAGE)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "first"})
        await self.ear.shut()
        yield Chunk(finish_reason="stop", usage=USAGE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.background.GIVE_UP_SECONDS", 0.1, raising=False)


def gateway_of(deaf: Deaf) -> AIGateway:
    prices = {"m": Price("1000", "2000")}
    return AIGateway.in_memory(providers=[deaf], prices=prices, timeouts=IMPATIENT, retries=RetryPolicy(rounds=1))


async def call(gateway: AIGateway, *, stream: bool) -> None:
    if not stream:
        await gateway.complete(WHO, ask())
        return
    async with gateway.stream(WHO, ask()) as answer:
        async for chunk in answer:
            assert chunk.delta["content"] == "first"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_is_told_at_the_limit_of_its_call_and_what_the_provider_did_is_booked_when_it_ends(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    deaf = Deaf()
    async with gateway_of(deaf) as gateway:
        try:
            with anyio.fail_after(5), pytest.raises(ProviderTimeout):
                await call(gateway, stream=stream)
            assert not deaf.ear.ended.is_set()
            assert "the provider deaf does not end" in caplog.text
            assert await held(gateway, WHO) > 0
        finally:
            deaf.ear.may_end.set()
        await until_booked(gateway)
        (record,) = (await gateway.usage()).data
        assert record.usage is not None
        assert record.outcome in {"completed", "estimated", "ambiguous"}
        assert record.cost > 0
        assert await held(gateway, WHO) == 0
        assert await gateway.check_ledger() == []


async def test_a_call_that_was_given_up_is_shared_with_no_later_one() -> None:
    deaf = Deaf()
    async with gateway_of(deaf) as gateway:
        try:
            with anyio.fail_after(5), pytest.raises(ProviderTimeout):
                await gateway.complete(WHO, ask())
            with anyio.fail_after(5), pytest.raises(ProviderTimeout) as caught:
                await gateway.complete(WHO, ask())
        finally:
            deaf.ear.may_end.set()
        await until_booked(gateway, 2)
        assert caught.value.billed == "unknown", "it had a call of its own"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("owned", [True, False])
async def test_a_caller_that_leaves_is_kept_by_no_provider(owned: bool) -> None:
    deaf = Deaf()
    gateway = gateway_of(deaf)
    try:
        if owned:
            async with gateway:
                await _left(gateway, deaf)
        else:
            await _left(gateway, deaf)
    finally:
        deaf.ear.may_end.set()
    await deaf.ear.ended.wait()


async def _left(gateway: AIGateway, deaf: Deaf) -> None:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.complete, WHO, ask())
            await deaf.ear.asked.wait()
            group.cancel_scope.cancel()
    assert not deaf.ear.ended.is_set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # a task group of trio's waits for its tasks, whatever they do
@pytest.mark.parametrize("stream", [False, True])
async def test_a_shutdown_ends_and_tells_the_caller_and_says_who_did_not_end(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    deaf = Deaf()
    told: list[Exception] = []

    async def caller(gateway: AIGateway) -> None:
        try:
            await call(gateway, stream=stream)
        except ProviderTimeout as error:
            told.append(error)

    gateway = gateway_of(deaf)
    try:
        async with anyio.create_task_group() as group:
            with anyio.fail_after(5):
                async with gateway:
                    group.start_soon(caller, gateway)
                    await deaf.ear.asked.wait()
        assert len(told) == 1
        assert not deaf.ear.ended.is_set()
    finally:
        deaf.ear.may_end.set()
    await deaf.ear.ended.wait()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert said[:1] == ["the provider deaf does not end when it is cancelled; it is waited for no longer"]


@pytest.mark.parametrize("asks", [None, "deaf"])
async def test_work_that_is_given_up_begins_nothing_new_and_its_end_is_noted(asks: str | None) -> None:
    ear = Ear()
    background = Background(Drains(0), patience=0)
    seen: list[Job[None]] = []

    async def work(job: Job[None]) -> None:
        job.asks = asks
        seen.append(job)
        await ear.shut()

    async with background.owner():
        try:
            with anyio.fail_after(5), pytest.raises(NoProviderAvailable if asks is None else ProviderTimeout):
                await background.run(work, limit=0.05)
        finally:
            ear.may_end.set()
        await ear.ended.wait()
    assert seen[0].abandoned
