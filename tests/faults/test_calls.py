"""What goes wrong in the middle of a call: a ledger that is away or never answers, a caller cancelled at any await, leases, drains."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    CacheControl,
    Chunk,
    Completion,
    CompletionRequest,
    Limits,
    NoProviderAvailable,
    PriceUnknown,
    Principal,
    ProviderError,
    RetryPolicy,
    SpendCapExceeded,
    StorageUnavailable,
    Timeouts,
    TooManyParallelRequests,
)
from starlette_aigateway.accounts import Hold, HoldRequest
from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.testing.providers import After, Die, Hang, Say, ScriptedProvider
from starlette_aigateway.types import Native
from starlette_aigateway.wires import openai_chat

from .kit import PRICES, WHO, FaultyLedger, ask, gateway_over, outcomes, read, until_booked

pytestmark = pytest.mark.anyio

# -- a ledger that is away ---------------------------------------------------------------------------------------------


async def test_a_settlement_is_retried_until_the_ledger_is_back(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, ScriptedProvider("hi")) as gateway:
        ledger.failing = {"settle": 1}
        assert (await gateway.complete(WHO, ask())).message["content"] == "hi"
        assert await outcomes(gateway) == ["completed"]
        assert ledger.asked.count("settle") == 2


async def test_a_ledger_that_cannot_hold_lets_nothing_through(ledger: FaultyLedger) -> None:
    provider = ScriptedProvider("never")
    async with gateway_over(ledger, provider) as gateway:
        ledger.failing = {"reserve": 1}
        with pytest.raises(StorageUnavailable):
            await gateway.complete(WHO, ask())
        assert provider.calls == []


async def test_a_ledger_that_never_answers_ends_the_call_at_its_limit(ledger: FaultyLedger) -> None:
    async with gateway_over(
        ledger, ScriptedProvider("never"), timeouts=Timeouts(call=0.05, drain=0.05, settle=0.05, storage=0.05)
    ) as gateway:
        ledger.hanging = {"reserve"}
        with anyio.fail_after(5), pytest.raises((StorageUnavailable, NoProviderAvailable)):
            await gateway.complete(WHO, ask())


async def test_a_hold_that_was_to_be_replaced_is_released_when_the_next_one_cannot_be_asked_for(ledger: FaultyLedger) -> None:
    first = ScriptedProvider(ProviderError("down", billed="no", status=500), name="first")
    async with gateway_over(ledger, first, ScriptedProvider("never", name="second")) as gateway:

        async def reserve(request: HoldRequest, *, now: float) -> Hold:
            if request.replaces is not None:
                raise StorageUnavailable("away")
            return await FaultyLedger.reserve(ledger, request, now=now)

        ledger.reserve = reserve  # type: ignore[method-assign]  # away for the second hold only
        with pytest.raises(StorageUnavailable):
            await gateway.complete(WHO, ask())
        assert await outcomes(gateway) == ["released"]


# -- leases ------------------------------------------------------------------------------------------------------------


class Ticking:
    """Streams words for as long as the test lets it."""

    name = "ticking"
    timeout = 30.0

    def __init__(self, words: int) -> None:
        self._words = words

    async def complete(self, request: CompletionRequest) -> Completion:
        raise AssertionError("only streamed")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        for _ in range(self._words):
            yield Chunk(delta={"content": "word "})
        yield Chunk(finish_reason="stop")


@pytest.mark.parametrize("error", [StorageUnavailable("away"), OSError("disk"), RuntimeError("bug")])
async def test_the_lease_of_a_running_stream_is_renewed_also_when_the_ledger_fails_once(
    ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("starlette_aigateway.attempt.lease", lambda *_: 0.0)
    async with gateway_over(ledger, Ticking(5)) as gateway:
        ledger.failing, ledger.error = {"renew": 1}, error
        async with gateway.stream(WHO, ask()) as stream:
            assert len([chunk async for chunk in stream if chunk.text]) == 5
        assert ledger.asked.count("renew") >= 5
        assert (await outcomes(gateway))[-1] in ("estimated", "adjusted")


async def test_a_ledger_that_hangs_does_not_hold_up_a_running_stream(ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.attempt.lease", lambda *_: 0.0)
    async with gateway_over(ledger, Ticking(3), timeouts=Timeouts(storage=0.01)) as gateway:
        ledger.hanging = {"renew"}
        with anyio.fail_after(5):
            await read(gateway, stream=True)
        assert await outcomes(gateway) == ["estimated"]


async def test_a_reader_that_is_slow_holds_the_provider_back_and_loses_nothing(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, Ticking(200)) as gateway:
        async with gateway.stream(WHO, ask()) as stream:
            await anyio.wait_all_tasks_blocked()
            words = [chunk.text async for chunk in stream if chunk.text]
        assert len(words) == 200


async def test_a_reader_that_leaves_a_full_buffer_does_not_hold_the_bill_back(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, Ticking(200)) as gateway:
        async with gateway.stream(WHO, ask()) as stream:
            await anyio.wait_all_tasks_blocked()
            assert (await anext(stream)).text == "word "
        await until_booked(gateway)
        assert await outcomes(gateway) == ["estimated"]


async def test_a_drain_ends_at_its_bound_of_bytes(ledger: FaultyLedger) -> None:
    gateway = gateway_over(ledger, Ticking(10_000), max_drain_bytes=100)
    async with gateway:
        async with gateway.stream(WHO, ask()) as stream:
            await anext(stream)
        await until_booked(gateway)
        (record,) = (await gateway.usage()).data
        assert record.outcome == "estimated"
        assert record.usage.output_tokens < 10_000 * len("word ")


async def test_a_stream_without_any_content_is_an_empty_stream_and_is_booked(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, Ticking(0)) as gateway:
        async with gateway.stream(WHO, ask()) as stream:
            assert "".join([chunk.text async for chunk in stream]) == ""
        assert await outcomes(gateway) == ["estimated"]


# -- providers that misbehave ------------------------------------------------------------------------------------------


class Odd:
    """Returns or yields whatever it is told."""

    name = "odd"

    def __init__(self, whole: Any = None, chunks: Sequence[Any] = ()) -> None:
        self._whole = whole
        self._chunks = chunks

    async def complete(self, request: CompletionRequest) -> Any:
        return self._whole

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Any]:
        for chunk in self._chunks:
            yield chunk


@pytest.mark.parametrize("nonsense", [None, "text", 7, {"message": "x"}, Completion(message=5)])  # type: ignore[arg-type]  # nonsense is meant
async def test_nonsense_from_a_provider_is_its_error_and_is_booked_in_full(ledger: FaultyLedger, nonsense: Any) -> None:
    async with gateway_over(ledger, Odd(nonsense, [nonsense])) as gateway:
        with pytest.raises(ProviderError):
            await gateway.complete(WHO, ask())
        with pytest.raises(ProviderError):
            await read(gateway, stream=True)
        assert await outcomes(gateway) == ["ambiguous", "ambiguous"]


async def test_a_stream_that_hangs_after_content_times_out_and_books_what_came_at_the_least(ledger: FaultyLedger) -> None:
    provider = ScriptedProvider(Hang(after=2, text="one two three"), timeout=0.05)
    async with gateway_over(ledger, provider) as gateway:
        with pytest.raises(ProviderError):
            await read(gateway, stream=True)
        assert await outcomes(gateway) == ["ambiguous"]


async def test_a_failure_that_charged_nothing_after_content_releases_the_hold(ledger: FaultyLedger) -> None:
    provider = ScriptedProvider(Die(ProviderError("refused late", billed="no"), after=1, text="one two"))
    async with gateway_over(ledger, provider) as gateway:
        with pytest.raises(ProviderError, match="refused late"):
            await read(gateway, stream=True)
        assert await outcomes(gateway) == ["released"]


# -- regressions --------------------------------------------------------------------------------------------------------


async def test_a_steady_stream_outlives_a_short_timeout(ledger: FaultyLedger) -> None:
    class Steady(Ticking):
        timeout = 0.4

        async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
            for _ in range(8):
                await anyio.sleep(0.1)
                yield Chunk(delta={"content": "word "})
            yield Chunk(finish_reason="stop")

    async with gateway_over(ledger, Steady(8)) as gateway:
        await read(gateway, stream=True)
        assert await outcomes(gateway) == ["estimated"]


async def test_a_reader_that_takes_nothing_is_not_blamed_on_the_provider(ledger: FaultyLedger) -> None:
    class Patient(Ticking):
        timeout = 0.05

    async with gateway_over(ledger, Patient(200), timeouts=Timeouts(call=0.3, drain=0.05)) as gateway:
        for _ in range(6):
            async with gateway.stream(WHO, ask()) as stream:
                with pytest.raises(NoProviderAvailable, match="nobody read"):
                    await stalled(stream)
        await read(gateway, stream=True)
        assert set(await outcomes(gateway)) == {"estimated"}


async def stalled(stream: Any) -> None:
    """Takes one chunk, waits until the gateway has given up, and then reads what is left."""
    await anext(stream)
    await anyio.sleep(0.5)
    async for _ in stream:
        pass


async def test_a_drain_leaves_the_event_loop_to_others(ledger: FaultyLedger) -> None:
    turns = 0
    done = anyio.Event()

    async def others() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with gateway_over(ledger, Ticking(2000), timeouts=Timeouts(drain=5)) as gateway, anyio.create_task_group() as group:
        async with gateway.stream(WHO, ask()) as stream:
            await anext(stream)
        group.start_soon(others)
        await until_booked(gateway)
        done.set()
    assert turns > 1000


@pytest.mark.parametrize("verb", ["reserve", "settle"])
async def test_a_ledger_that_hangs_is_waited_for_within_its_bound(ledger: FaultyLedger, verb: str) -> None:
    timeouts = Timeouts(call=60, drain=60, settle=0.05, storage=0.05)
    async with gateway_over(ledger, ScriptedProvider("hi"), timeouts=timeouts) as gateway:
        ledger.hanging = {verb}
        with anyio.fail_after(5):
            if verb == "reserve":
                with pytest.raises(StorageUnavailable):
                    await gateway.complete(WHO, ask())
            else:
                assert (await gateway.complete(WHO, ask())).message["content"] == "hi"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_observer_that_is_cancelled_by_itself_ends_nothing(ledger: FaultyLedger) -> None:
    told: list[object] = []

    async def odd(event: object) -> None:
        told.append(event)
        if len(told) == 1:
            raise asyncio.CancelledError

    gateway = AIGateway.in_memory(providers=[ScriptedProvider("a", "b")], prices=PRICES, ledger=ledger, observers=[odd])
    async with gateway:
        await gateway.complete(WHO, ask("1"))
        await anyio.wait_all_tasks_blocked()
        await gateway.complete(WHO, ask("2"))
        await anyio.wait_all_tasks_blocked()
    assert len(told) == 2


@pytest.mark.parametrize("error", [GeneratorExit(), asyncio.CancelledError()])
async def test_what_a_provider_raises_of_its_own_is_its_failure_and_the_next_one_answers(
    ledger: FaultyLedger, error: BaseException
) -> None:
    second = ScriptedProvider("fine", "fine", name="second")
    async with gateway_over(ledger, ScriptedProvider(Die(error), Die(error)), second) as gateway:
        assert (await gateway.complete(WHO, ask("1"))).provider == "second"
        assert await outcomes(gateway) == ["ambiguous", "completed"]


async def test_what_was_refused_or_not_billed_takes_no_tokens_from_anybody(ledger: FaultyLedger) -> None:
    free = ProviderError("down", billed="no", retryable=False, status=500)
    settings: Any = {"limits": Limits(tokens_per_minute=1000), "retries": RetryPolicy(rounds=1)}
    gateway = AIGateway.in_memory(providers=[ScriptedProvider(free, "hi")], prices=PRICES, ledger=ledger, **settings)
    async with gateway:
        poor = Principal("poor", hard_cap_usd="0.0001")
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(poor, ask(max_tokens=900))
        with pytest.raises(PriceUnknown):
            await gateway.complete(poor, CompletionRequest(model="unpriced", messages=[{"role": "user", "content": "x"}], max_tokens=900))
        with pytest.raises(ProviderError, match="down"):
            await gateway.complete(WHO, ask("1", max_tokens=900))
        await gateway.complete(WHO, ask("2", max_tokens=900))


async def test_a_cache_of_the_host_s_own_that_fails_is_a_miss(ledger: FaultyLedger) -> None:
    class Broken:
        async def get(self, key: str) -> bytes | None:
            raise OSError("disk")

        async def put(self, key: str, value: bytes, ttl: float) -> None:
            raise OSError("disk")

        async def purge(self) -> int:
            return 0

    gateway = AIGateway.in_memory(providers=[ScriptedProvider("a", "b")], prices=PRICES, ledger=ledger, responses=Broken())
    async with gateway:
        assert (await gateway.complete(WHO, ask())).message["content"] == "a"
        await read(gateway, stream=True)


async def test_an_odd_tool_delta_is_the_provider_s_error(ledger: FaultyLedger) -> None:
    odd = [Chunk(delta={"tool_calls": [{"index": 0, "id": "a"}, 5]}), Chunk(finish_reason="stop")]
    async with gateway_over(ledger, Odd(chunks=odd)) as gateway:
        with pytest.raises(ProviderError):
            await read(gateway, stream=True)


async def test_entering_a_gateway_twice_is_leaving_it_twice(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, ScriptedProvider("a", "b")) as gateway:
        async with gateway:
            await gateway.complete(WHO, ask("1"))
        await gateway.complete(WHO, ask("2"))


async def test_many_tool_deltas_are_put_together_in_one_pass() -> None:
    deltas = [Chunk(delta={"tool_calls": [{"index": 0, "function": {"arguments": "x" * 100}}]}) for _ in range(40_000)]
    with anyio.fail_after(10):
        (call,) = openai_chat.assemble(deltas).message["tool_calls"]
    assert len(call["function"]["arguments"]) == 4_000_000


async def test_a_call_that_outlives_its_lease_tells_what_it_cost_not_the_correction(ledger: FaultyLedger) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    costs: list[Decimal] = []
    async with gateway_over(ledger, ScriptedProvider(After(go, Say("hi"), arrived))) as gateway:

        async def call() -> None:
            costs.append((await gateway.complete(WHO, ask())).cost_usd)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await arrived.wait()
            assert [record.outcome for record in await ledger.expire(now=time.time() + 1000)] == ["expired"]
            go.set()
        assert costs == [Decimal("0.020")]
        assert sorted(await outcomes(gateway)) == ["adjusted", "expired"]
        assert sum(record.cost_usd for record in (await gateway.usage()).data) == Decimal("0.020")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "5"])
async def test_a_timeout_that_is_none_is_refused_before_anything_is_asked(ledger: FaultyLedger, timeout: Any) -> None:
    provider = ScriptedProvider("never")
    async with gateway_over(ledger, provider) as gateway:
        with pytest.raises(InvalidArgument) as raised:
            await gateway.complete(WHO, ask(), timeout=timeout)
        assert raised.value.param == "timeout"
        with pytest.raises(InvalidArgument):
            await gateway.acting_as(WHO).complete(model="m", messages=ask().messages, timeout=timeout)
        assert provider.calls == []


@pytest.mark.parametrize("tags", [["a"], {"a": 1}, {1: "a"}, {"a": "x" * 201}, {str(n): "" for n in range(33)}, {"a": "\ud800"}])
async def test_tags_that_cannot_be_recorded_are_refused_before_anything_is_asked(ledger: FaultyLedger, tags: Any) -> None:
    provider = ScriptedProvider("never")
    async with gateway_over(ledger, provider) as gateway:
        with pytest.raises(InvalidArgument) as raised:
            await gateway.complete(WHO, ask(), tags=tags)
        assert raised.value.param == "tags"
        assert provider.calls == []


# -- circuits ----------------------------------------------------------------------------------------------------------


async def test_a_call_that_is_refused_before_it_could_try_leaves_the_circuit_as_it_was(
    ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = [ProviderError("down", billed="no", status=500) for _ in range(5)]
    async with gateway_over(ledger, ScriptedProvider(*down, "up")) as gateway:
        for number in range(5):
            with pytest.raises(ProviderError, match="down"):
                await gateway.complete(WHO, ask(str(number)))
        monkeypatch.setattr("starlette_aigateway.attempts.monotonic", lambda: time.monotonic() + 31)
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(Principal("poor", hard_cap_usd="0.0001"), ask("5"))
        assert (await gateway.complete(WHO, ask("6"))).message["content"] == "up"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_was_charged_is_not_refused_by_the_parallel_limit_when_its_slot_is_taken_before_the_next_attempt(
    ledger: FaultyLedger, stream: bool
) -> None:
    first, second = ScriptedProvider(RuntimeError("charged, and no answer"), name="first"), ScriptedProvider("never", name="second")

    async def reserve(request: HoldRequest, *, now: float) -> Hold:
        if request.attempt == 2:
            raise TooManyParallelRequests("taken", retry_after=1.0, scope="principal", window="parallel", limit=1)
        return await FaultyLedger.reserve(ledger, request, now=now)

    ledger.reserve = reserve  # type: ignore[method-assign]  # another call comes between the two attempts
    async with gateway_over(ledger, first, second) as gateway:
        with pytest.raises(ProviderError, match="first failed"):
            await read(gateway, stream)
        assert await outcomes(gateway) == ["ambiguous"]
        assert second.calls == []


async def test_any_number_of_failing_targets_is_remembered_within_a_bound(ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.attempts.MAX_CIRCUITS", 2)
    down = ScriptedProvider(ProviderError("down", billed="no", status=500), repeat=True)
    async with gateway_over(ledger, down) as gateway:
        for number in range(5):
            with pytest.raises(ProviderError, match="down"):
                await gateway.complete(Principal("x"), CompletionRequest(model=f"m{number}", messages=[{"role": "user", "content": "x"}]))


async def test_a_whole_answer_without_usage_counts_all_of_the_provider_s_own_body(ledger: FaultyLedger) -> None:
    body = b'{"choices": [' + b" " * 500 + b"]}"
    answer = Completion(message={"role": "assistant", "content": "hi"}, native=Native("openai_chat", body))
    async with gateway_over(ledger, Odd(answer)) as gateway:
        await gateway.complete(WHO, ask(max_tokens=1000), cache=CacheControl(read=False, store=False))
        (record,) = (await gateway.usage()).data
        assert record.outcome == "estimated"
        assert record.usage.output_tokens >= 500
