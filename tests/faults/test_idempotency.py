"""Calls under an idempotency key whose caller leaves, and whose store fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_aigateway import (
    AIGateway,
    CachePolicy,
    CompletionRequest,
    Conflict,
    ProviderError,
    StorageUnavailable,
    Timeouts,
)
from starlette_aigateway.protocols import Claim
from starlette_aigateway.stores.sqlite.idempotency import SQLiteIdempotencyStore
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.providers import After, Hang, Say, ScriptedProvider

from ..idempotent_calls import both_ways, call, settled, wait_for_replay
from ..test_pipeline import PRICE, USUAL_COST, ZERO, ask, capped, gateway_with, records, spent_and_held
from .kit import CancelAt, FaultyLedger

pytestmark = pytest.mark.anyio

# -- callers that leave ------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_caller_that_is_cancelled_finds_its_answer_when_it_asks_again(stream: bool, lifespan: bool) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("hi"), arrived))
    async with gateway_with(provider, lifespan=lifespan) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=stream))
            await arrived.wait()
            group.cancel_scope.cancel()
            go.set()
        got = await wait_for_replay(gateway, stream=stream)
        assert got.text == "hi"
        assert len(provider.calls) == len(await records(gateway)) == 1


async def test_a_stream_that_is_left_early_is_read_on_and_given_again_whole() -> None:
    provider = ScriptedProvider(Say("one two three"))
    async with gateway_with(provider) as gateway:
        async with gateway.stream(capped(), ask(), idempotency_key="k") as answer:
            await anext(answer)
        got = await wait_for_replay(gateway, stream=True)
        assert (got.text, got.facts["cost_usd"]) == ("one two three", USUAL_COST)
        assert len(provider.calls) == 1


@both_ways
async def test_a_call_that_is_given_up_after_its_caller_left_was_billed_and_stays_so(store: FaultyStore, stream: bool) -> None:
    arrived = anyio.Event()
    provider = ScriptedProvider(Hang(arrived))
    store.failing = {"keep": 1}
    async with gateway_with(provider, timeouts=Timeouts(drain=0.02), idempotency=store) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=stream))
            await arrived.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(10):
            while not await records(gateway):
                await anyio.sleep(0.005)
        with pytest.raises(Conflict) as raised:
            await settled(gateway, stream=stream)
        assert raised.value.code == "idempotency_answer_not_kept"
        assert len(provider.calls) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("owned", [True, False])
async def test_a_reader_cancelled_at_any_await_and_calling_again_is_billed_once(tmp_path: Path, owned: bool) -> None:
    at = 0
    survived = False
    while not survived:
        at += 1
        assert at < 300, "the walk does not end"
        provider = ScriptedProvider(Say("one two three"))
        gateway = AIGateway(data_dir=tmp_path / str(at), providers=[provider], prices={"m": PRICE})
        lifespan = gateway.lifespan() if owned else None
        if lifespan is not None:
            await lifespan.__aenter__()
        else:
            await gateway.ready()
        walk = CancelAt(call(gateway, ask(), stream=True), at)

        async def walker(walk: CancelAt = walk) -> None:
            await walk

        try:
            await asyncio.ensure_future(walker())
            survived = walk.waits < at
        except asyncio.CancelledError:
            pass
        if lifespan is not None:
            await lifespan.__aexit__(None, None, None)
        async with gateway:
            got = await call(gateway, ask(), stream=True)
            assert got.text == "one two three", f"cancelled at await {at}"
            assert len(provider.calls) == 1
            assert [record.cost_usd for record in await records(gateway) if record.cost] == [USUAL_COST]
            assert [budget.held for budget in await gateway.budgets(capped())] == [0, 0, 0]
            assert await gateway.check_ledger() == []
    assert at > 3


# -- a store that fails ------------------------------------------------------------------------------------------------


class FaultyStore(SQLiteIdempotencyStore):
    """The real one, with verbs that fail or hang as often as a test says."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.failing: dict[str, int] = {}
        self.hanging: set[str] = set()
        self.asked: list[str] = []
        self.renewed = anyio.Event()
        self.at: Callable[[str], None] = lambda verb: None

    async def _fault(self, verb: str) -> None:
        self.asked.append(verb)
        self.at(verb)
        await anyio.lowlevel.checkpoint()  # as a store over a network, whose verb is lost when it is cancelled
        if verb in self.hanging:
            await anyio.sleep_forever()
        if self.failing.get(verb, 0) > 0:
            self.failing[verb] -= 1
            raise StorageUnavailable("away")

    async def claim(self, key: str, fingerprint: str, *, holder: str, until: float, now: float) -> Claim:
        await self._fault("claim")
        return await super().claim(key, fingerprint, holder=holder, until=until, now=now)

    async def renew(self, key: str, *, holder: str, until: float) -> bool:
        await self._fault("renew")
        renewed = await super().renew(key, holder=holder, until=until)
        self.renewed.set()
        return renewed

    async def keep(self, key: str, outcome: bytes, *, holder: str, until: float) -> bool:
        await self._fault("keep")
        return await super().keep(key, outcome, holder=holder, until=until)

    async def release(self, key: str, *, holder: str) -> None:
        await self._fault("release")
        await super().release(key, holder=holder)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FaultyStore]:
    async with FaultyStore(tmp_path / "answers.db") as store:
        yield store


@both_ways
async def test_a_store_that_is_away_or_never_answers_lets_nothing_through(store: FaultyStore, stream: bool) -> None:
    provider = ScriptedProvider("hi")
    async with gateway_with(provider, idempotency=store, timeouts=Timeouts(storage=0.02)) as gateway:
        store.failing = {"claim": 1}
        with pytest.raises(StorageUnavailable):
            await call(gateway, ask(), stream=stream)
        store.hanging = {"claim"}
        with anyio.fail_after(10), pytest.raises(StorageUnavailable) as raised:
            await call(gateway, ask(), stream=stream)
        assert raised.value.code == "storage_unavailable"
        store.hanging = set()
        assert provider.calls == []
        assert await records(gateway) == []


async def test_a_file_that_is_damaged_lets_nothing_through_and_calls_without_a_key_go_on(tmp_path: Path) -> None:
    (tmp_path / "answers.db").write_bytes(b"this is no database" * 100)
    provider = ScriptedProvider("hi")
    async with AIGateway(data_dir=tmp_path, providers=[provider], prices={"m": PRICE}) as gateway:
        with pytest.raises(StorageUnavailable):
            await call(gateway, ask(), stream=False)
        assert provider.calls == []
        assert (await call(gateway, ask(), stream=False, key=None)).text == "hi"


@both_ways
@pytest.mark.parametrize("verb", ["keep", "release"])
async def test_a_claim_is_concluded_once_the_store_is_back(store: FaultyStore, stream: bool, verb: str) -> None:
    provider = ScriptedProvider(*([ProviderError("down", billed="no", status=500)] if verb == "release" else []), "hi")
    async with gateway_with(provider, idempotency=store) as gateway:
        store.failing = {verb: 1}
        if verb == "release":
            with pytest.raises(ProviderError):
                await call(gateway, ask(), stream=stream)
        assert (await call(gateway, ask(), stream=stream)).text == "hi"
        assert (await call(gateway, ask(), stream=stream)).replayed
        assert store.asked.count(verb) == 2


@both_ways
@pytest.mark.parametrize("fault", ["failing", "hanging"])
async def test_an_answer_that_cannot_be_kept_is_given_all_the_same(store: FaultyStore, stream: bool, fault: str) -> None:
    async with gateway_with(ScriptedProvider("hi"), idempotency=store, timeouts=Timeouts(settle=0.05)) as gateway:
        setattr(store, fault, {"keep": 10**6})
        assert (await call(gateway, ask(), stream=stream)).text == "hi"
        with pytest.raises(Conflict):
            await call(gateway, ask(), stream=stream)


async def test_the_claim_of_a_running_call_is_renewed_also_when_the_store_is_away_once(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starlette_aigateway.idempotency.LEASE", 0.03)
    clock = FakeClock()
    provider = ScriptedProvider(After(store.renewed, Say("hi")))
    async with gateway_with(provider, idempotency=store, clock=clock) as gateway:
        store.failing = {"renew": 1}
        with anyio.fail_after(10):
            assert (await call(gateway, ask(), stream=False)).text == "hi"
        assert store.asked.count("renew") >= 2


async def test_a_call_that_outlives_its_lease_does_not_overwrite_the_outcome_of_the_one_that_took_over(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("slow"), arrived), Say("quick"))
    async with gateway_with(provider, idempotency=store, clock=clock, cache=CachePolicy(enabled=False)) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(gateway, ask(), stream=False))
            await arrived.wait()
            clock.advance(61)
            assert (await call(gateway, ask(), stream=False)).text == "quick"
            go.set()
        assert (await call(gateway, ask(), stream=False)).text == "quick"
    assert "another one has it now" in caplog.text


class WatchedLedger(FaultyLedger):
    """Tells a test of each verb that it is asked for."""

    at: Callable[[str], None] = staticmethod(lambda verb: None)

    async def _fault(self, verb: str) -> None:
        self.at(verb)


class Watched(ScriptedProvider):
    at: Callable[[str], None] = staticmethod(lambda verb: None)

    async def _next(self, request: CompletionRequest) -> Any:
        self.at("provider")
        return await super()._next(request)


@both_ways
@pytest.mark.parametrize("lifespan", [True, False])
@pytest.mark.parametrize("moment", ["claim", "reserve", "provider", "settle", "keep"])
async def test_a_caller_cancelled_at_any_step_and_calling_again_is_billed_once(
    tmp_path: Path, store: FaultyStore, moment: str, stream: bool, lifespan: bool
) -> None:
    provider = Watched("hi")
    async with (
        WatchedLedger(tmp_path / "ledger.db") as ledger,
        gateway_with(provider, idempotency=store, ledger=ledger, lifespan=lifespan) as gateway,
    ):
        seen: list[str] = []
        async with anyio.create_task_group() as group:

            def leave(verb: str) -> None:
                seen.append(verb)
                if verb == moment:
                    group.cancel_scope.cancel()

            store.at = ledger.at = provider.at = leave
            group.start_soon(lambda: call(gateway, ask(), stream=stream))
        assert moment in seen
        with anyio.fail_after(10):
            while "keep" not in store.asked and "release" not in store.asked:
                await anyio.sleep(0.005)
        got = await settled(gateway, stream=stream)
        assert (got.text, len(provider.calls)) == ("hi", 1)
        assert await spent_and_held(gateway, capped()) == (USUAL_COST, ZERO)
