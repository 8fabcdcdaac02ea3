"""What tests of faults share: a ledger that fails on demand, and gateways over it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.types import ASGIApp

from starlette_aigateway import AIGateway, CompletionRequest, Price, Principal, RetryPolicy, StorageUnavailable, Timeouts, UsageRecord
from starlette_aigateway.accounts import Hold, HoldRequest, Settlement
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger

T = TypeVar("T")

PRICES = {"m": Price("1000", "2000")}
WHO = Principal("user", hard_cap_usd="100")
QUICK = Timeouts(drain=0.05, settle=0.3, storage=2.0)


def ask(text: str = "hello", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", messages=[{"role": "user", "content": text}], **fields)


class FaultyLedger(SQLiteLedger):
    """The real one, with verbs that fail or hang as often as a test says; those in `losing` are carried out, and fail then. `asked` are the
    verbs in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, durability="OFF")
        self.failing: dict[str, int] = {}
        self.losing: set[str] = set()
        self.hanging: set[str] = set()
        self.error: BaseException = StorageUnavailable("away")
        self.asked: list[str] = []

    async def _fault(self, verb: str) -> None:
        self.asked.append(verb)
        if verb in self.hanging:
            await anyio.sleep_forever()
        if self.failing.get(verb, 0) > 0:
            self.failing[verb] -= 1
            raise self.error

    def _given(self, verb: str, result: T) -> T:
        if verb in self.losing:
            raise self.error
        return result

    async def reserve(self, request: HoldRequest, *, now: float) -> Hold:
        await self._fault("reserve")
        return self._given("reserve", await super().reserve(request, now=now))

    async def settle(self, hold_id: str, settlement: Settlement, *, now: float) -> UsageRecord | None:
        await self._fault("settle")
        return self._given("settle", await super().settle(hold_id, settlement, now=now))

    async def release(self, hold_id: str, *, now: float, latency_ms: int | None = None) -> None:
        await self._fault("release")
        await super().release(hold_id, now=now, latency_ms=latency_ms)
        self._given("release", None)

    async def renew(self, hold_id: str, expires_at: float, *, now: float) -> bool:
        await self._fault("renew")
        return await super().renew(hold_id, expires_at, now=now)


def gateway_over(ledger: SQLiteLedger, *providers: object, timeouts: Timeouts = QUICK, **settings: Any) -> AIGateway:
    settings = {"prices": PRICES, "retries": RetryPolicy(rounds=1), **settings}
    return AIGateway.in_memory(providers=providers, ledger=ledger, timeouts=timeouts, **settings)


async def read(gateway: AIGateway, stream: bool, **options: Any) -> None:
    """One call, taken to its end."""
    if not stream:
        await gateway.complete(WHO, ask(), **options)
        return
    async with gateway.stream(WHO, ask(), **options) as answer:
        async for _ in answer:
            pass


async def outcomes(gateway: AIGateway) -> Sequence[str]:
    """In the order in which they were held."""
    return [record.outcome for record in reversed((await gateway.usage()).data)]


async def held(gateway: AIGateway, who: Principal = WHO) -> int:
    """Nano-USD."""
    return max(budget.held for budget in await gateway.budgets(who))


async def until_booked(gateway: AIGateway, count: int = 1) -> None:
    with anyio.fail_after(10):
        while len((await gateway.usage()).data) < count:
            await anyio.sleep(0.005)


class AtAwait:
    """Runs an awaitable; the n-th time that it is about to wait, `act` cancels it, or gives the error that it gets instead of waiting. What
    it would have waited for happens all the same. A deterministic walk through every await of a call."""

    def __init__(self, awaitable: Any, at: int, act: Callable[[], BaseException | None]) -> None:
        self._iterator = awaitable.__await__()
        self._at = at
        self._act = act
        self.waits = 0

    def __await__(self) -> Any:
        sent: Any = None
        error: BaseException | None = None
        while True:
            try:
                if error is not None:
                    pending, error = error, None
                    yielded = self._iterator.throw(pending)
                else:
                    yielded = self._iterator.send(sent)
            except StopIteration as stop:
                return stop.value
            self.waits += 1
            if self.waits == self._at:
                error = self._act()
            if error is None:
                try:
                    sent = yield yielded
                except BaseException as thrown:  # noqa: BLE001  # handed on into the awaitable, whatever it is
                    error, sent = thrown, None


class CancelAt(AtAwait):
    """Cancels its task, as asyncio does."""

    def __init__(self, awaitable: Any, at: int) -> None:
        super().__init__(awaitable, at, cancel_task)


def cancel_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.get_loop().call_soon(task.cancel)


class Visitor:
    """A client of the ASGI app, without a server: it leaves when `left` is set. `sent` is what it was answered; the `fails_at`-th of it
    raises `error`."""

    def __init__(self, app: ASGIApp, path: str, *, user: str = WHO.id, **fields: Any) -> None:
        self._app = app
        self.fails_at = 0
        self.error: Exception = OSError("gone")
        self.left = anyio.Event()
        self.answered = anyio.Event()
        self.sent: list[Any] = []
        self._body: bytes | None = json.dumps({"model": "m", "messages": ask().messages, **fields}).encode()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"x-user", user.encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }

    async def __call__(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if len(self.sent) == self.fails_at:
            raise self.error
        if message.get("body"):
            self.answered.set()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


async def who_it_says(connection: Any) -> Principal:
    """A login that believes everything."""
    return Principal(connection.headers["x-user"], hard_cap_usd=100)


@asynccontextmanager
async def owned_by(gateway: AIGateway, owned: bool) -> AsyncIterator[None]:
    """With a lifespan, or as on a bare mount."""
    if owned:
        async with gateway:
            yield
    else:
        await gateway.ready()
        yield
