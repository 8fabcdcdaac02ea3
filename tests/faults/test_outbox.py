"""What a call cost is never dropped while the process lives: a ledger that is away is told later, by whoever comes, also at the end."""

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import AIGateway, Completion, Principal, ProviderError, StorageUnavailable, Timeouts, Usage
from starlette_aigateway.accounts import UsageRecord
from starlette_aigateway.events import CallRecorded, Event
from starlette_aigateway.testing.providers import ScriptedProvider

from . import kit
from .kit import WHO, FaultyLedger, ask, held, outcomes

DOWN = ProviderError("down", billed="no", status=500)


class Told:
    """An observer; `records` are what it heard of."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.heard = anyio.Event()

    async def __call__(self, event: Event) -> None:
        if isinstance(event, CallRecorded):
            self.records.append(event.record)
            self.heard.set()


SHORT = Timeouts(drain=0.05, settle=0.02, storage=0.05)


def gateway_over(ledger: FaultyLedger, *providers: object, **settings: Any) -> AIGateway:
    return kit.gateway_over(ledger, *providers, **{"timeouts": SHORT, **settings})


def waiting(gateway: AIGateway) -> int:
    return gateway._composition.outbox.waiting


async def until_delivered(gateway: AIGateway) -> None:
    with anyio.fail_after(10):
        while waiting(gateway):
            await anyio.sleep(0.005)


@pytest.mark.anyio
@pytest.mark.parametrize("error", [StorageUnavailable("away"), OSError("disk"), RuntimeError("bug")])
async def test_an_answer_whose_settlement_cannot_be_written_is_given_and_its_settlement_is_written_later(
    ledger: FaultyLedger, error: Exception
) -> None:
    told = Told()
    async with gateway_over(ledger, ScriptedProvider("hi"), observers=[told]) as gateway:
        ledger.failing, ledger.error = {"settle": 1000}, error
        answer = await gateway.complete(WHO, ask())
        assert answer.message["content"] == "hi"
        assert answer.cost_usd > 0
        assert (waiting(gateway), await held(gateway) > 0) == (1, True)
        ledger.failing = {}
        await until_delivered(gateway)
        assert await outcomes(gateway) == ["completed"]
        assert await held(gateway) == 0
        with anyio.fail_after(5):
            await told.heard.wait()
        assert [record.cost_usd for record in told.records] == [answer.cost_usd]
        assert await gateway.check_ledger() == []


@pytest.mark.anyio
async def test_a_release_that_cannot_be_written_is_written_later(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, ScriptedProvider(DOWN)) as gateway:
        ledger.failing = {"release": 1000}
        with pytest.raises(ProviderError, match="down"):
            await gateway.complete(WHO, ask())
        assert await outcomes(gateway) == []
        ledger.failing = {}
        await until_delivered(gateway)
        assert await outcomes(gateway) == ["released"]


@pytest.mark.anyio
async def test_a_settlement_that_comes_after_its_lease_is_booked_as_the_difference(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, ScriptedProvider("hi")) as gateway:
        ledger.failing = {"settle": 1000}
        answer = await gateway.complete(WHO, ask())
        assert [record.outcome for record in await ledger.expire(now=time.time() + 1000)] == ["expired"]
        ledger.failing = {}
        await until_delivered(gateway)
        assert sorted(await outcomes(gateway)) == ["adjusted", "expired"]
        assert sum(record.cost_usd for record in (await gateway.usage()).data) == answer.cost_usd
        assert await gateway.check_ledger() == []


@pytest.mark.anyio
async def test_a_settlement_that_was_written_though_it_failed_is_not_booked_twice(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, ScriptedProvider("hi")) as gateway:
        ledger.losing = {"settle"}
        answer = await gateway.complete(WHO, ask())
        assert waiting(gateway) == 1
        ledger.losing = set()
        await until_delivered(gateway)
        assert [record.cost_usd for record in (await gateway.usage()).data] == [answer.cost_usd]
        assert await gateway.check_ledger() == []


@pytest.mark.anyio
async def test_on_a_bare_mount_later_calls_write_it_in_passing(ledger: FaultyLedger) -> None:
    gateway = gateway_over(ledger, ScriptedProvider("one", "two", "three"))
    ledger.failing = {"settle": 1000}
    await gateway.complete(WHO, ask("1"))
    assert waiting(gateway) == 1
    ledger.failing = {}
    await gateway.complete(WHO, ask("2"))
    assert waiting(gateway) == 0
    assert await outcomes(gateway) == ["completed", "completed"]


@pytest.mark.anyio
async def test_on_a_bare_mount_a_ledger_that_stays_away_is_not_asked_by_every_call(ledger: FaultyLedger) -> None:
    gateway = gateway_over(ledger, ScriptedProvider("hi", repeat=True))
    ledger.failing = {"settle": 100_000}
    gateway._composition.outbox._pause = 1000.0
    for number in range(5):
        await gateway.complete(WHO, ask(str(number)))
    asked = ledger.asked.count("settle")
    gateway._composition.outbox.put("use_other", None)
    await gateway.complete(WHO, ask("last"))
    assert "release" not in ledger.asked
    assert ledger.asked.count("settle") == asked + 1
    ledger.failing = {}


@pytest.mark.anyio
async def test_at_the_end_of_a_lifespan_it_is_tried_once_more(ledger: FaultyLedger) -> None:
    gateway = gateway_over(ledger, ScriptedProvider("hi"))
    async with gateway:
        ledger.failing = {"settle": 1000}
        gateway._composition.outbox._pause = 1000.0
        await gateway.complete(WHO, ask())
        ledger.failing = {}
    async with gateway:
        assert await outcomes(gateway) == ["completed"]


@pytest.mark.anyio
async def test_what_a_process_must_end_without_is_told_to_its_log_by_id_and_amount_alone(
    ledger: FaultyLedger, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = gateway_over(ledger, ScriptedProvider("a secret"))
    with caplog.at_level(logging.ERROR, "starlette_aigateway"):
        async with gateway:
            ledger.failing = {"settle": 1000}
            answer = await gateway.complete(WHO, ask())
    ledger.failing = {}
    async with gateway:
        await until_delivered(gateway)
        (record,) = (await gateway.usage()).data
        assert record.outcome == "completed"
    told = [entry.getMessage() for entry in caplog.records]
    assert f"hold {record.id} could not be settled: {int(answer.cost_usd * 10**9)} nano-USD" in told
    assert "secret" not in caplog.text


BARE = """
import asyncio, logging, sys
from pathlib import Path
from starlette_aigateway.testing.providers import ScriptedProvider
from tests.faults.kit import FaultyLedger, gateway_over, read

async def main() -> None:
    ledger = FaultyLedger(Path(sys.argv[1]) / "ledger.db")
    ledger.failing = {"settle": 1000}
    await read(gateway_over(ledger, ScriptedProvider("hi")), stream=False)

logging.basicConfig(level=logging.ERROR)
asyncio.run(main())
"""


def test_a_process_with_a_bare_mount_tells_its_log_when_it_ends(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True, timeout=60, check=True)
    assert "could not be settled: 20000000 nano-USD" in ended.stderr


@pytest.mark.anyio
async def test_a_forked_child_leaves_what_waits_to_its_parent_and_does_its_own(ledger: FaultyLedger) -> None:
    async with gateway_over(ledger, ScriptedProvider("one", "two")) as gateway:
        ledger.failing = {"settle": 1000}
        await gateway.complete(WHO, ask("1"))
        ledger.failing = {}
        gateway._composition.outbox._forget_parent()  # as a child finds it
        gateway._composition.outbox.put("use_child", None)
        assert waiting(gateway) == 1
        await gateway.complete(WHO, ask("2"))
        assert "use_child" not in gateway._composition.outbox._waiting, "no worker of the parent's is waited for"


@pytest.mark.anyio
async def test_where_too_much_waits_no_new_hold_is_granted_until_the_ledger_took_it(
    ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starlette_aigateway.outbox.MAX_WAITING", 3)
    provider = ScriptedProvider("hi", repeat=True)
    async with gateway_over(ledger, provider) as gateway:
        ledger.failing = {"settle": 100_000}
        for number in range(3):
            await gateway.complete(WHO, ask(str(number)))
        with pytest.raises(StorageUnavailable) as refused:
            await gateway.complete(WHO, ask("refused"))
        assert refused.value.retry_after is not None
        with pytest.raises(StorageUnavailable):
            await gateway.check_ready()
        assert len(provider.calls) == 3
        ledger.failing = {}
        await until_delivered(gateway)
        await gateway.complete(WHO, ask("again"))
        assert await outcomes(gateway) == ["completed"] * 4


@pytest.mark.anyio
async def test_many_that_wait_are_told_at_one_go(ledger: FaultyLedger) -> None:
    provider = ScriptedProvider("hi", repeat=True)
    async with gateway_over(ledger, provider, timeouts=Timeouts(settle=0.02)) as gateway:
        ledger.failing = {"settle": 100_000}
        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(gateway.complete, Principal("uncapped"), ask(str(number)))
        assert waiting(gateway) == 200
        ledger.failing = {}
        await gateway._composition.outbox.deliver()
        assert waiting(gateway) == 0


# -- holds of which nobody learned -------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("error", [StorageUnavailable("away"), OSError("disk"), RuntimeError("bug")])
async def test_a_hold_whose_grant_was_lost_on_the_way_is_given_back(ledger: FaultyLedger, error: Exception) -> None:
    async with gateway_over(ledger, ScriptedProvider()) as gateway:
        ledger.losing, ledger.error = {"reserve"}, error
        with pytest.raises(StorageUnavailable):
            await gateway.complete(WHO, ask())
        await until_delivered(gateway)
        assert await outcomes(gateway) == ["released"]
        assert await held(gateway) == 0


@pytest.mark.anyio
async def test_a_hold_that_is_granted_after_the_wait_for_it_is_over_is_given_back(ledger: FaultyLedger) -> None:
    late = anyio.Event()
    reserve = ledger.reserve
    async with gateway_over(ledger, ScriptedProvider()) as gateway, anyio.create_task_group() as group:

        async def grant_late(request: object, *, now: float) -> None:
            async def grant() -> None:
                await reserve(request, now=now)  # type: ignore[arg-type]  # as it came
                late.set()

            group.start_soon(grant)
            await anyio.sleep_forever()

        ledger.reserve = grant_late  # type: ignore[method-assign,assignment]  # for this call
        with pytest.raises(StorageUnavailable):
            await gateway.complete(WHO, ask())
        await late.wait()
        await until_delivered(gateway)
        assert await outcomes(gateway) == ["released"]


@pytest.mark.anyio
async def test_what_a_ledger_refuses_to_store_of_a_provider_s_words_does_not_leave_the_hold_open(ledger: FaultyLedger) -> None:
    class Odd:
        name = "odd"

        async def complete(self, request: object) -> Completion:
            message = {"role": "assistant", "content": "hi"}
            return Completion(message=message, usage=Usage(input_tokens=10, output_tokens=5), model="\ud800")  # type: ignore[arg-type]

    async with gateway_over(ledger, Odd()) as gateway:
        answer = await gateway.complete(WHO, ask())
        (record,) = (await gateway.usage()).data
        assert (record.outcome, record.cost_usd, record.response_model) == ("completed", answer.cost_usd, None)
        assert await held(gateway) == 0
