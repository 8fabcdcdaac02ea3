"""A caller that leaves before its answer is whole: the rest is read within bounds, or the upstream is closed at once; never a refund."""

import gc
from collections.abc import AsyncIterator
from typing import Any, Literal

import anyio
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from starlette_aigateway import (
    AIGateway,
    Chunk,
    Completion,
    CompletionRequest,
    ConfigurationError,
    ProviderError,
    RetryPolicy,
    Timeouts,
    Usage,
    UsageRecord,
)
from starlette_aigateway.providers import OpenAIProvider

from ..mute_server import mute_server
from .kit import PRICES, WHO, FaultyLedger, Visitor, ask, gateway_over, held, outcomes, owned_by, read, until_booked, who_it_says

pytestmark = pytest.mark.anyio

USAGE = Usage(input_tokens=10, output_tokens=5)
EXACT = 10 * 1_000_000 + 5 * 2_000_000
PATIENT = Timeouts(drain=5, settle=5, storage=5)
Mode = Literal["drain", "cancel"]


class Slow:
    """Says `first ` of a stream at once, unless `mute`, and the rest when `go` is set; a whole answer then too. `arrived` counts calls."""

    name = "slow"

    def __init__(self, error: ProviderError | None = None, *, mute: bool = False) -> None:
        self.arrived = anyio.Event()
        self.go = anyio.Event()
        self.closed = anyio.Event()
        self.calls = 0
        self._error = error
        self._mute = mute

    async def complete(self, request: CompletionRequest) -> Completion:
        await self._wait()
        return Completion(message={"role": "assistant", "content": "hi"}, usage=USAGE, finish_reason="stop")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        try:
            if not self._mute:
                yield Chunk(delta={"content": "first "})
            await self._wait()
        except GeneratorExit:
            self.closed.set()
            raise
        yield Chunk(delta={"content": "last"}, finish_reason="stop")
        yield Chunk(usage=USAGE)

    async def _wait(self) -> None:
        self.calls += 1
        self.arrived.set()
        try:
            await self.go.wait()
        except BaseException:
            self.closed.set()
            raise
        if self._error is not None:
            raise self._error


def gateway_for(ledger: FaultyLedger, *providers: object, **settings: Any) -> AIGateway:
    settings = {"timeouts": PATIENT, "resolve_principal": who_it_says, **settings}
    return gateway_over(ledger, *providers, **settings)


async def only_record(gateway: AIGateway) -> UsageRecord:
    await until_booked(gateway)
    (record,) = (await gateway.usage()).data
    assert await held(gateway) == 0
    assert await gateway.check_ledger() == []
    return record


# -- at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("path", ["/complete", "/v1/chat/completions"])
async def test_a_stream_that_is_left_is_closed_at_once_and_what_came_is_booked_as_an_estimate(
    ledger: FaultyLedger, path: str, owned: bool
) -> None:
    slow = Slow()
    gateway = gateway_for(ledger, slow, on_disconnect="cancel")
    visitor = Visitor(gateway, path, stream=True, max_tokens=1000)
    async with owned_by(gateway, owned), anyio.create_task_group() as group:
        group.start_soon(visitor)
        with anyio.fail_after(5):
            await visitor.answered.wait()
            visitor.left.set()
            await slow.closed.wait()
        record = await only_record(gateway)
    assert record.outcome == "estimated"
    assert 0 < record.usage.output_tokens < 1000
    assert record.usage.input_tokens > USAGE.input_tokens, "the bound of the input, since nobody told what it was"


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_left_before_anything_came_is_closed_at_once_and_its_full_hold_is_booked(
    ledger: FaultyLedger, stream: bool, owned: bool
) -> None:
    slow = Slow(mute=True)
    gateway = gateway_for(ledger, slow, on_disconnect="cancel")
    visitor = Visitor(gateway, "/complete", stream=stream, max_tokens=1000)
    async with owned_by(gateway, owned), anyio.create_task_group() as group:
        group.start_soon(visitor)
        with anyio.fail_after(5):
            await slow.arrived.wait()
            full = await held(gateway)
            visitor.left.set()
            await slow.closed.wait()
        record = await only_record(gateway)
    assert (record.outcome, record.cost) == ("ambiguous", full)
    assert [message.get("status") for message in visitor.sent] == [499, None], "an answer to nobody, which middleware waits for"


UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed .*:ResourceWarning")
"""httpx2, which serves trio, leaves the socket of a handshake that is cancelled to the garbage collector."""


@UNCLOSED
@pytest.mark.parametrize(("stream", "mode"), [(False, "cancel"), (True, "cancel"), (True, "drain")])
async def test_a_call_that_is_left_while_its_provider_is_connected_to_costs_nothing(ledger: FaultyLedger, mode: Mode, stream: bool) -> None:
    async with mute_server() as server, OpenAIProvider("key", f"{server.url}/v1", name="mute") as mute:
        gateway = gateway_for(ledger, mute, on_disconnect=mode, timeouts=Timeouts(drain=0.05, settle=5, storage=5))
        visitor = Visitor(gateway, "/complete", stream=stream, max_tokens=1000)
        async with owned_by(gateway, True), anyio.create_task_group() as group:
            group.start_soon(visitor)
            with anyio.fail_after(5):
                await server.reached.wait()
                assert await held(gateway) > 0
                visitor.left.set()
                while await held(gateway):
                    await anyio.sleep(0.001)
            record = await only_record(gateway)
    gc.collect()
    assert (record.outcome, record.cost) == ("released", 0)


@UNCLOSED
async def test_a_call_whose_time_is_over_while_its_provider_is_connected_to_costs_nothing(ledger: FaultyLedger) -> None:
    async with mute_server() as server, OpenAIProvider("key", f"{server.url}/v1", name="mute") as mute:
        mute.timeout = 0.05
        async with gateway_for(ledger, mute, retries=RetryPolicy(rounds=1)) as gateway:
            with pytest.raises(ProviderError), anyio.fail_after(5):
                await gateway.complete(WHO, ask())
            record = await only_record(gateway)
    gc.collect()
    assert (record.outcome, record.cost) == ("released", 0)


@pytest.mark.parametrize(("stream", "mode"), [(False, "cancel"), (True, "cancel"), (True, "drain")])
async def test_middleware_that_waits_for_an_answer_is_not_surprised_by_a_client_that_left(
    ledger: FaultyLedger, stream: bool, mode: Literal["drain", "cancel"]
) -> None:
    async def passing(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    slow = Slow(mute=True)
    gateway = gateway_for(ledger, slow, on_disconnect=mode, timeouts=Timeouts(drain=0.05, settle=0.3, storage=2.0))
    visitor = Visitor(BaseHTTPMiddleware(gateway, dispatch=passing), "/complete", stream=stream, max_tokens=1000)
    async with owned_by(gateway, True), anyio.create_task_group() as group:
        group.start_soon(visitor)
        with anyio.fail_after(5):
            await slow.arrived.wait()
            visitor.left.set()
            await slow.closed.wait()


class Ended:
    """Says how much it took, and then does not close the stream. Where it says that before the end of the answer, there may be more."""

    name = "ended"

    def __init__(self, *, early: bool = False) -> None:
        self.arrived = anyio.Event()
        self._early = early

    async def complete(self, request: CompletionRequest) -> Completion:
        raise AssertionError("only streamed")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "all of it"})
        if self._early:
            yield Chunk(usage=USAGE)
            yield Chunk(finish_reason="stop")
        else:
            yield Chunk(finish_reason="stop")
            yield Chunk(usage=USAGE)
        self.arrived.set()
        await anyio.sleep_forever()


@pytest.mark.parametrize(("early", "outcome"), [(False, "completed"), (True, "estimated")])
async def test_a_stream_that_is_left_after_its_whole_bill_has_come_is_booked_by_it(ledger: FaultyLedger, early: bool, outcome: str) -> None:
    ended = Ended(early=early)
    async with gateway_for(ledger, ended, on_disconnect="cancel") as gateway:
        async with gateway.stream(WHO, ask()) as stream:
            await anext(stream)
            await ended.arrived.wait()
        record = await only_record(gateway)
        assert record.outcome == outcome
        assert (record.cost == EXACT) == (not early)


async def test_a_stream_that_breaks_after_its_whole_bill_has_come_is_booked_by_it(ledger: FaultyLedger) -> None:
    async with gateway_for(ledger, Ended(), timeouts=Timeouts(read=0.1)) as gateway:
        with pytest.raises(ProviderError):
            await read(gateway, stream=True)
        record = await only_record(gateway)
        assert (record.outcome, record.cost) == ("completed", EXACT)


async def test_in_process_a_cancelled_call_is_closed_at_once_as_well(ledger: FaultyLedger) -> None:
    slow = Slow()
    async with gateway_for(ledger, slow, on_disconnect="cancel") as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway.complete, WHO, ask())
            with anyio.fail_after(5):
                await slow.arrived.wait()
                group.cancel_scope.cancel()
        assert (await only_record(gateway)).outcome == "ambiguous"


async def test_who_stays_gets_its_answer(ledger: FaultyLedger) -> None:
    slow = Slow()
    slow.go.set()
    async with gateway_for(ledger, slow, on_disconnect="cancel") as gateway:
        for stream in (False, True):
            visitor = Visitor(gateway, "/complete", stream=stream)
            await visitor()
            assert visitor.status == 200
        assert await outcomes(gateway) == ["completed", "cached"]


async def test_an_answer_that_others_wait_for_goes_on_though_the_one_who_asked_first_leaves(ledger: FaultyLedger) -> None:
    slow = Slow()
    async with gateway_for(ledger, slow, on_disconnect="cancel") as gateway:
        answers = []

        async def call() -> None:
            answers.append(await gateway.complete(WHO, ask()))

        async with anyio.create_task_group() as group:
            first = anyio.CancelScope()

            async def lead() -> None:
                with first:
                    await call()

            group.start_soon(lead)
            await slow.arrived.wait()
            group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            first.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not slow.closed.is_set()
            slow.go.set()
        assert (slow.calls, [answer.cached for answer in answers]) == (1, [True])
        assert sorted(await outcomes(gateway)) == ["cached", "completed"]


# -- drained -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize(("stream", "mute"), [(False, False), (True, False), (True, True)])
async def test_what_is_left_is_read_on_and_billed_exactly(ledger: FaultyLedger, stream: bool, mute: bool, owned: bool) -> None:
    slow = Slow(mute=mute)
    gateway = gateway_for(ledger, slow)
    visitor = Visitor(gateway, "/complete", stream=stream, max_tokens=1000)
    async with owned_by(gateway, owned), anyio.create_task_group() as group:
        group.start_soon(visitor)
        with anyio.fail_after(5):
            await slow.arrived.wait()
            visitor.left.set()
            await anyio.wait_all_tasks_blocked()
            slow.go.set()
        record = await only_record(gateway)
    assert not slow.closed.is_set()
    assert (record.outcome, record.cost, record.usage) == ("completed", EXACT, USAGE)


@pytest.mark.parametrize("mode", ["drain", "cancel"])
@pytest.mark.parametrize("billed", ["no", "unknown"])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_second_provider_is_asked_for_somebody_who_has_left(
    ledger: FaultyLedger, stream: bool, billed: Literal["no", "unknown"], mode: Mode
) -> None:
    slow, second = Slow(ProviderError("down", billed=billed, status=500), mute=True), Slow()
    second.name = "second"
    async with gateway_for(ledger, slow, second, on_disconnect=mode) as gateway, anyio.create_task_group() as group:
        visitor = Visitor(gateway, "/complete", stream=stream)
        group.start_soon(visitor)
        with anyio.fail_after(5):
            await slow.arrived.wait()
            visitor.left.set()
            await anyio.wait_all_tasks_blocked()
            slow.go.set()
        record = await only_record(gateway)
        assert record.outcome == ("released" if billed == "no" and mode == "drain" else "ambiguous")
        assert second.calls == 0


async def test_a_drain_too_many_gives_way_and_those_that_run_go_on(ledger: FaultyLedger) -> None:
    first, second = Slow(), Slow()
    first.name, second.name = "first", "second"
    prices = {("first", "a"): PRICES["m"], ("second", "b"): PRICES["m"]}
    first.models, second.models = ("a",), ("b",)  # type: ignore[attr-defined]  # as a provider may have them
    async with gateway_for(ledger, first, second, max_drains=1, prices=prices) as gateway:
        for model in ("a", "b"):
            request = CompletionRequest(model=model, messages=ask().messages)
            async with gateway.stream(WHO, request) as stream:
                assert (await anext(stream)).text == "first "
        with anyio.fail_after(5):
            await second.closed.wait()
        await until_booked(gateway)
        assert not first.closed.is_set()
        first.go.set()
        await until_booked(gateway, 2)
        booked = {record.provider: record.outcome for record in (await gateway.usage()).data}
        assert booked == {"first": "completed", "second": "estimated"}


async def test_a_drain_that_ended_makes_room_for_the_next(ledger: FaultyLedger) -> None:
    async with gateway_for(ledger, slow := Slow(), max_drains=1) as gateway:
        for number in range(1, 4):
            async with gateway.stream(WHO, ask(str(number))) as stream:
                await anext(stream)
            slow.go.set()
            await until_booked(gateway, number)
        assert await outcomes(gateway) == ["completed"] * 3


async def test_a_drain_ends_after_its_seconds(ledger: FaultyLedger) -> None:
    slow = Slow()
    async with gateway_for(ledger, slow, timeouts=Timeouts(drain=0.05)) as gateway:
        async with gateway.stream(WHO, ask()) as stream:
            await anext(stream)
        with anyio.fail_after(5):
            await slow.closed.wait()
        assert (await only_record(gateway)).outcome == "estimated"


async def test_a_shutdown_waits_for_drains_and_settles_the_estimate_at_its_deadline(ledger: FaultyLedger) -> None:
    patient, hasty = Slow(), Slow()
    for slow, seconds in ((patient, 60.0), (hasty, 0.05)):
        async with anyio.create_task_group() as group:
            gateway = gateway_for(ledger, slow, timeouts=Timeouts(drain=seconds))
            async with gateway:
                async with gateway.stream(WHO, ask()) as stream:
                    await anext(stream)
                if slow is patient:

                    async def later() -> None:
                        await anyio.wait_all_tasks_blocked()
                        patient.go.set()

                    group.start_soon(later)
        assert await held(gateway) == 0
    assert await outcomes(gateway) == ["completed", "estimated"]


@pytest.mark.parametrize(
    "settings",
    [{"on_disconnect": "refund"}, {"on_disconnect": None}, {"max_drains": 0}, {"max_drains": 1.5}, {"max_drain_bytes": -1}],
)
async def test_a_setting_that_means_nothing_is_refused_by_its_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        AIGateway.in_memory(**settings)
    assert refused.value.param in settings
