"""A call and a stream, cut off at every await in turn: the caller cancelled, the call's own work cancelled, an error out of each await.

After each, nothing is held, every provider call that was made has its record, and what was booked is at least what the provider billed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, NoReturn, TypeAlias

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    Chunk,
    Completion,
    CompletionRequest,
    Conflict,
    Principal,
    ProviderError,
    RetryPolicy,
    StorageUnavailable,
    Timeouts,
    Usage,
)
from starlette_aigateway.attempts import Attempts
from starlette_aigateway.background import Job, Work
from starlette_aigateway.calls import Call
from starlette_aigateway.drains import OnDisconnect
from starlette_aigateway.types import ProviderCall

from .kit import AtAwait, FaultyLedger, Visitor, cancel_task, gateway_over, owned_by, who_it_says

pytestmark = [pytest.mark.anyio, pytest.mark.untraced]

Script: TypeAlias = Literal["retry", "fallback", "fallback after a bill", "answer", "given up while it connects"]
Act: TypeAlias = Callable[[], BaseException | None]
WORDS = ("one ", "two ", "three")
USAGE = Usage(input_tokens=10, output_tokens=len(WORDS))
TIMEOUTS = Timeouts(drain=5, settle=1, storage=10)


class Billing:
    """Fails the first call of each text, with `error`, and answers the others. `calls` counts by text, and `bill` is what it charges, in
    nano-USD: the input when it is asked, the output with every word that it gives."""

    def __init__(self, name: str, error: ProviderError | None = None) -> None:
        self.name = name
        self.bill: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._error = error

    async def complete(self, request: CompletionRequest) -> Completion:
        text = self._asked(request)
        self.bill[text] += len(WORDS) * 2_000_000
        await anyio.lowlevel.checkpoint()
        return Completion(message={"role": "assistant", "content": "".join(WORDS)}, usage=USAGE, finish_reason="stop")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        text = self._asked(request)
        for word in WORDS:
            await anyio.lowlevel.checkpoint()
            self.bill[text] += 2_000_000
            yield Chunk(delta={"content": word})
        yield Chunk(finish_reason="stop")
        yield Chunk(usage=USAGE)

    def _asked(self, request: CompletionRequest) -> str:
        text = str(request.messages[0]["content"])
        self.calls[text] += 1
        if self._error is not None and self.calls[text] == 1:
            if self._error.billed != "no":
                self.bill[text] += USAGE.input_tokens * 1_000_000
            raise self._error
        self.bill[text] += USAGE.input_tokens * 1_000_000
        return text


class Connecting:
    """Has no connection yet when the job that waits for one comes to its deadline."""

    name = "first"
    job: Job[Any]

    def __init__(self) -> None:
        self.bill: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def open(self, call: ProviderCall) -> Connection:
        return Connection(self.job)


class Connection:
    unsent = True

    def __init__(self, job: Job[Any]) -> None:
        self._job = job

    async def __aenter__(self) -> NoReturn:
        self._job._deadline.within(0)
        await anyio.sleep_forever()
        raise AssertionError("nobody gave it up")

    async def __aexit__(self, *exception: object) -> None: ...


def providers_for(script: Script) -> Sequence[Billing | Connecting]:
    down = ProviderError("down", billed="no", status=500)
    match script:
        case "answer":
            return [Billing("first")]
        case "given up while it connects":
            return [Connecting()]
        case "retry":
            return [Billing("first", down)]
        case "fallback":
            return [Billing("first", down), Billing("second")]
        case "fallback after a bill":
            return [Billing("first", ProviderError("lost")), Billing("second")]


class Walk:
    """One gateway, and a call of a principal of its own for each step."""

    def __init__(self, gateway: AIGateway, providers: Sequence[Billing | Connecting], *, stream: bool, key: bool, http: bool) -> None:
        self.gateway = gateway
        self.providers = providers
        self._stream = stream
        self._key = key
        self._http = http
        self._at = 0

    def next(self) -> int:
        self._at += 1
        assert self._at < 500, "the walk does not end"
        return self._at

    def go_to(self, step: int) -> None:
        assert step < 500, "the walk does not end"
        self._at = step

    @property
    def who(self) -> Principal:
        return Principal(f"user{self._at}", hard_cap_usd="100")

    @property
    def text(self) -> str:
        return f"step {self._at}"

    @property
    def request(self) -> CompletionRequest:
        return CompletionRequest(model="m", messages=[{"role": "user", "content": self.text}])

    def begun(self, job: Job[Any]) -> None:
        for provider in self.providers:
            if isinstance(provider, Connecting):
                provider.job = job

    async def call(self) -> None:
        request = self.request
        if self._http:
            await Visitor(self.gateway, "/complete", user=self.who.id, stream=self._stream, messages=request.messages)()
            return
        key = f"key{self._at}" if self._key else None
        if not self._stream:
            await self.gateway.complete(self.who, request, idempotency_key=key)
            return
        async with self.gateway.stream(self.who, request, idempotency_key=key) as answer:
            async for _ in answer:
                pass

    async def check(self) -> None:
        """What must hold after whatever happened."""
        await quiet(self.gateway)
        where = f"cut off at await {self._at}"
        records = (await self.gateway.usage(principal=self.who.id)).data
        calls = sum(provider.calls[self.text] for provider in self.providers)
        unmade = len(records) - calls
        released = [record for record in records if record.outcome == "released"]
        assert max(budget.held for budget in await self.gateway.budgets(self.who)) == 0, where
        assert 0 <= unmade <= len(released), f"{calls} calls and {[record.outcome for record in records]}, {where}"
        assert sum(record.cost for record in records) >= sum(provider.bill[self.text] for provider in self.providers), where
        assert await self.gateway.check_ledger() == [], where
        if self._key:
            await self._ask_again(where)

    async def _ask_again(self, where: str) -> None:
        """The idempotency key is not left behind by a call that is over, and what was billed under it is not billed again."""
        vars(self.gateway._composition.background).pop("job", None)
        billed = [provider.bill[self.text] for provider in self.providers]
        refused: Conflict | None = None
        try:
            await self.call()
        except Conflict as error:
            refused = error
        except AIGatewayError:  # the failure that was kept
            pass
        assert refused is None or refused.code != "idempotency_in_progress", where
        if any(billed):
            assert billed == [provider.bill[self.text] for provider in self.providers], where


async def quiet(gateway: AIGateway) -> None:
    """Every job has ended, and the ledger has taken what was left for later."""
    with anyio.fail_after(10), suppress(asyncio.CancelledError):
        background = gateway._composition.background
        for job in [job for owner in background._owners for job in owner.jobs]:
            await job.finished()
        if background._tasks:
            await asyncio.wait(background._tasks)
    with anyio.fail_after(10):
        while gateway._composition.outbox.waiting:
            await gateway._composition.outbox.deliver()


@asynccontextmanager
async def walking(
    ledger: FaultyLedger,
    script: Script,
    *,
    stream: bool,
    owned: bool,
    key: bool = False,
    http: bool = False,
    on_disconnect: OnDisconnect = "drain",
) -> AsyncIterator[Walk]:
    providers = providers_for(script)
    retries = RetryPolicy(rounds=2, backoff=0.001)
    gateway = gateway_over(
        ledger, *providers, timeouts=TIMEOUTS, retries=retries, resolve_principal=who_it_says, on_disconnect=on_disconnect
    )
    async with owned_by(gateway, owned):
        yield Walk(gateway, providers, stream=stream, key=key, http=http)


def cut_work(
    gateway: AIGateway, at: int, act: Callable[[Job[Any]], BaseException | None], begun: Callable[[Job[Any]], object]
) -> list[AtAwait]:
    """From now on the work of each job of the gateway is cut off at await `at`."""
    cuts: list[AtAwait] = []
    job = type(gateway._composition.background).job

    def starting(work: Work[Any], limit: float) -> Job[Any]:
        def cut(job: Job[Any]) -> Awaitable[Any]:
            begun(job)
            cuts.append(AtAwait(work(job), at, lambda: act(job)))
            return cuts[-1]

        async def walked(job: Job[Any]) -> Any:
            return await cut(job)

        return job(gateway._composition.background, walked, limit)

    gateway._composition.background.job = starting  # type: ignore[method-assign]  # for the step that follows
    return cuts


every_way = [
    pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"]),
    pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"]),
    pytest.mark.parametrize("key", [False, True], ids=["", "key"]),
    pytest.mark.parametrize("script", ["retry", "fallback", "fallback after a bill"]),
]


def in_every_way(test: Any) -> Any:
    for mark in every_way:
        test = mark(test)
    return test


@in_every_way
@pytest.mark.parametrize("mode", ["drain", "cancel"])
async def test_a_caller_cancelled_at_any_await(
    ledger: FaultyLedger, stream: bool, owned: bool, key: bool, script: Script, mode: OnDisconnect
) -> None:
    async with walking(ledger, script, stream=stream, owned=owned, key=key, on_disconnect=mode) as walk:
        survived = False
        while not survived:
            at = walk.next()
            with anyio.CancelScope() as scope:
                cut = AtAwait(walk.call(), at, scope.cancel)
                await in_coroutine(cut)
                survived = cut.waits < at
            await walk.check()
        assert walk.next() > 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@in_every_way
async def test_a_caller_whose_task_is_cancelled_at_any_await_while_the_gateway_stops(
    ledger: FaultyLedger, stream: bool, owned: bool, key: bool, script: Script
) -> None:
    survived = False
    at = 0
    while not survived:
        async with walking(ledger, script, stream=stream, owned=owned, key=key) as walk:
            walk.go_to(at := at + 1)
            cut = AtAwait(walk.call(), at, cancel_task)
            with suppress(asyncio.CancelledError):
                await asyncio.ensure_future(in_coroutine(cut))
                survived = cut.waits < at
        async with walk.gateway:
            await walk.check()
    assert at > 1


async def in_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


@in_every_way
async def test_a_call_whose_own_work_is_cancelled_at_any_await(
    ledger: FaultyLedger, stream: bool, owned: bool, key: bool, script: Script
) -> None:
    def at_its_deadline(job: Job[Any]) -> None:
        job._deadline.within(0)

    await walk_through_work(ledger, script, at_its_deadline, stream=stream, owned=owned, key=key)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@in_every_way
async def test_a_call_whose_own_task_is_cancelled_at_any_await(
    ledger: FaultyLedger, stream: bool, owned: bool, key: bool, script: Script
) -> None:
    """As a loop does that is being closed: without regard for shields."""
    await walk_through_work(ledger, script, lambda job: cancel_task(), stream=stream, owned=owned, key=key)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), StorageUnavailable("away"), OSError("disk")], ids=lambda error: type(error).__name__
)
@in_every_way
async def test_an_error_out_of_any_await_of_a_call(
    ledger: FaultyLedger, error: Exception, stream: bool, owned: bool, key: bool, script: Script
) -> None:
    await walk_through_work(ledger, script, lambda job: error, stream=stream, owned=owned, key=key)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"])
@pytest.mark.parametrize("act", [lambda job: cancel_task(), lambda job: StorageUnavailable("away")], ids=["cancelled", "error"])
async def test_a_call_that_is_given_up_while_it_connects_costs_nothing_whichever_await_of_its_end_is_cut_off(
    ledger: FaultyLedger, act: Callable[[Job[Any]], BaseException | None], stream: bool, owned: bool
) -> None:
    await walk_through_work(ledger, "given up while it connects", act, stream=stream, owned=owned)
    assert "release" in ledger.asked
    assert "settle" not in ledger.asked


class Asked:
    """How often it was asked whether the client is still there, and how often that was cut off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = self.cut_off = 0
        present = Attempts._caller_left

        async def counted(attempts: Attempts, call: Call, job: Job[Any]) -> bool:
            self.times += 1
            try:
                return await present(attempts, call, job)
            except BaseException:
                self.cut_off += 1
                raise

        monkeypatch.setattr(Attempts, "_caller_left", counted)


@pytest.mark.parametrize("script", ["retry", "fallback"])
@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
async def test_a_call_cut_off_at_its_deadline_while_it_is_asked_whether_the_client_is_there(
    ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch, stream: bool, script: Script, anyio_backend: str
) -> None:
    asked = Asked(monkeypatch)
    await walk_through_work(ledger, script, lambda job: job._deadline.within(0), stream=stream, owned=True, http=True)
    told_without_a_wait = stream and anyio_backend == "trio"  # there, the work of a client that leaves is cancelled
    assert told_without_a_wait or asked.cut_off > 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("script", ["retry", "fallback"])
@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
async def test_an_error_while_it_is_asked_whether_the_client_is_there(
    ledger: FaultyLedger, monkeypatch: pytest.MonkeyPatch, stream: bool, script: Script
) -> None:
    asked = Asked(monkeypatch)
    await walk_through_work(ledger, script, lambda job: RuntimeError("bug"), stream=stream, owned=True, http=True)
    assert asked.cut_off > 1


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"])
@pytest.mark.parametrize("mode", ["drain", "cancel"])
async def test_a_reader_cancelled_at_any_chunk(ledger: FaultyLedger, owned: bool, mode: OnDisconnect) -> None:
    async with walking(ledger, "fallback", stream=True, owned=owned, key=False, on_disconnect=mode) as walk:
        read = 0
        while read < len(WORDS) + 2:
            at = walk.next()
            read = 0
            with anyio.CancelScope() as scope:
                async with walk.gateway.stream(walk.who, walk.request) as answer:
                    async for _ in answer:
                        read += 1
                        if read == at:
                            scope.cancel()
            await walk.check()


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"])
@pytest.mark.parametrize("mode", ["drain", "cancel"])
@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("a server's bug")], ids=["gone", "bug"])
async def test_a_client_to_whom_any_send_fails(ledger: FaultyLedger, owned: bool, mode: OnDisconnect, error: Exception) -> None:
    async with walking(ledger, "fallback", stream=True, owned=owned, key=False, on_disconnect=mode) as walk:
        sent = 0
        while sent < len(WORDS) + 2:
            at = walk.next()
            visitor = Visitor(walk.gateway, "/complete", user=walk.who.id, stream=True, messages=walk.request.messages)
            visitor.fails_at, visitor.error = at, error
            with suppress(RuntimeError):
                await visitor()
            sent = len(visitor.sent)
            await walk.check()


async def walk_through_work(
    ledger: FaultyLedger,
    script: Script,
    act: Callable[[Job[Any]], BaseException | None],
    *,
    stream: bool,
    owned: bool,
    key: bool = False,
    http: bool = False,
) -> None:
    async with walking(ledger, script, stream=stream, owned=owned, key=key, http=http) as walk:
        survived = False
        while not survived:
            at = walk.next()
            cuts = cut_work(walk.gateway, at, act, walk.begun)
            with suppress(Exception):
                await walk.call()
            assert cuts, "no job was started"
            survived = all(cut.waits < at for cut in cuts)
            await walk.check()
        assert walk.next() > 4
