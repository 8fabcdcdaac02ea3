"""How each outcome of an attempt is booked: one row for each of the table (design, section 4), on whole answers and on streams, alone and
followed by a second provider at another price, under a cap and without one."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import httpx
import pytest

from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    Chunk,
    Completion,
    CompletionRequest,
    Price,
    Principal,
    ProviderError,
    RetryPolicy,
    Timeouts,
    Usage,
    UsageRecord,
    money,
)
from starlette_aigateway.providers import OpenAIProvider
from starlette_aigateway.testing.providers import After, Die, Hang, Say, ScriptedProvider

from .kit import FaultyLedger, ask, gateway_over, held, until_booked, who_it_says

pytestmark = pytest.mark.anyio

CAPPED = Principal("capped", hard_cap_usd=100)
UNCAPPED = Principal("uncapped")
FIRST, SECOND = Price("1000", "2000"), Price("3", "5")
PRICES = {("first", "m"): FIRST, ("second", "m"): SECOND}
USED = Usage(input_tokens=10, output_tokens=5)
COST = 10 * 1_000_000 + 5 * 2_000_000
SECOND_COST = 10 * 3_000 + 5 * 5_000
OVER = Usage(input_tokens=10, output_tokens=10_000)
BOUND = 100
"""Output tokens that every call here asks for at the most."""

Booked = Literal["nothing", "the hold", "what it said", "an estimate"]


@dataclass(frozen=True)
class Row:
    """What a provider does, and how that is booked. `cost` of None follows from `booked`; `answers`: the caller has its answer."""

    does: Callable[[], object]
    outcome: str
    booked: Booked
    cost: int | None = None
    answers: bool = False


def scripted(step: Any, **settings: Any) -> Callable[[], ScriptedProvider]:
    return lambda: ScriptedProvider(step, name="first", repeat=True, **settings)


class BehindAnother(OpenAIProvider):
    """An upstream behind a gateway that answers 520 where it lost the answer."""

    ambiguous = frozenset({520})


def upstream(status: int, body: Any = None, kind: type[OpenAIProvider] = OpenAIProvider) -> Callable[[], OpenAIProvider]:
    """A provider over HTTP that answers so."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json=body if body is not None else {"error": {"message": "no"}})

    return lambda: kind(api_key="k", name="first", models=["m"], transport=over(answer))


def breaking(error: Exception) -> Callable[[], OpenAIProvider]:
    """A provider over HTTP whose connection breaks so."""

    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return lambda: OpenAIProvider(api_key="k", name="first", models=["m"], transport=over(answer))


def over(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer))


class Garbage:
    name = "first"

    async def complete(self, request: CompletionRequest) -> Any:
        return {"not": "a completion"}

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Any]:
        yield "not a chunk"


class Foreign:
    """Raises something of its own, when it is asked or after its first word."""

    name = "first"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def complete(self, request: CompletionRequest) -> Completion:
        raise self._error

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        raise self._error
        yield Chunk()


def unsent(**settings: Any) -> ProviderError:
    return ProviderError("not sent", billed="no", **settings)


REFUSED = (400, 401, 403, 404, 413, 422, 429, 500, 502, 503, 520, 529)
ROWS: dict[str, Row] = {
    "not sent, as the provider says": Row(scripted(unsent()), "released", "nothing"),
    "not sent: connection refused": Row(breaking(httpx.ConnectError("refused")), "released", "nothing"),
    "not sent: no connection in time": Row(breaking(httpx.ConnectTimeout("late")), "released", "nothing"),
    "not sent: no connection free": Row(breaking(httpx.PoolTimeout("busy")), "released", "nothing"),
    **{
        f"status {status}": Row(upstream(status), "released", "nothing")
        for status in (400, 401, 403, 404, 413, 422, 429, 500, 502, 503, 529)
    },
    **{f"status {status}": Row(upstream(status), "ambiguous", "the hold") for status in (408, 504, 524)},
    "another status that the adapter names": Row(scripted(ProviderError("mid-way", status=520)), "ambiguous", "the hold"),
    "sent, no status: the connection broke": Row(breaking(httpx.ReadError("reset")), "ambiguous", "the hold"),
    "sent, no status: silence": Row(breaking(httpx.ReadTimeout("silence")), "ambiguous", "the hold"),
    "sent, no status: it hangs": Row(scripted(Hang(), timeout=0.05), "ambiguous", "the hold"),
    "the provider does not know": Row(scripted(ProviderError("lost")), "ambiguous", "the hold"),
    "a foreign exception": Row(lambda: Foreign(KeyError("bug")), "ambiguous", "the hold"),
    "a foreign base exception": Row(lambda: Foreign(GeneratorExit()), "ambiguous", "the hold"),
    "a foreign timeout": Row(lambda: Foreign(TimeoutError()), "ambiguous", "the hold"),
    "garbage": Row(Garbage, "ambiguous", "the hold"),
    "a status of success with garbage": Row(upstream(200, {"no": "choices"}), "ambiguous", "the hold"),
    "failed, and says what it charged": Row(scripted(ProviderError("late", billed=USED)), "completed", "what it said", COST),
    "failed, and charged above the hold": Row(
        scripted(ProviderError("late", billed=OVER)), "overrun", "what it said", 10 * 1_000_000 + 10_000 * 2_000_000
    ),
    "failed, and says nonsense of its bill": Row(
        scripted(ProviderError("late", billed=Usage(input_tokens=-1, output_tokens=0))), "ambiguous", "the hold"
    ),
    "usage reported": Row(scripted(Say("hi", USED)), "completed", "what it said", COST, answers=True),
    "usage above the hold": Row(scripted(Say("hi", OVER)), "overrun", "what it said", 10 * 1_000_000 + 10_000 * 2_000_000, answers=True),
    "success without usage": Row(scripted(Say("one two", None)), "estimated", "an estimate", answers=True),
    "usage that cannot be true": Row(
        scripted(Say("one two", Usage(input_tokens=2**39, output_tokens=5))), "estimated", "an estimate", answers=True
    ),
}
STREAMED: dict[str, Row] = {
    "it broke off after content": Row(scripted(Die(after=2, text="one two three")), "ambiguous", "the hold"),
    "it broke off after content, uncharged": Row(scripted(Die(unsent(), after=2, text="one two three")), "released", "nothing"),
    "it broke off after content, and says what it charged": Row(
        scripted(Die(ProviderError("late", billed=USED), after=2, text="one two three")), "completed", "what it said", COST
    ),
    "it hangs after content": Row(scripted(Hang(after=2, text="one two three"), timeout=0.05), "ambiguous", "the hold"),
}
CASES = [
    *[
        pytest.param(row, stream, id=f"{name}, {'stream' if stream else 'complete'}")
        for name, row in ROWS.items()
        for stream in (False, True)
    ],
    *[pytest.param(row, True, id=f"{name}, stream") for name, row in STREAMED.items()],
]
FAILURES = [case for case in CASES if not case.values[0].answers and "after content" not in str(case.id)]  # type: ignore[union-attr]  # rows


async def try_call(gateway: AIGateway, who: Principal, *, stream: bool, text: str = "hello") -> bool:
    """Whether it was answered."""
    request = ask(text, max_tokens=BOUND)
    try:
        if not stream:
            await gateway.complete(who, request)
            return True
        async with gateway.stream(who, request) as answer:
            async for _ in answer:
                pass
    except AIGatewayError:
        return False
    return True


async def records_of(gateway: AIGateway, who: Principal) -> list[UsageRecord]:
    return sorted((await gateway.usage(principal=who.id)).data, key=lambda record: record.attempt)


def entries_of(ledger: FaultyLedger) -> list[tuple[str, str, int]]:
    """Hold, kind and amount, in their order."""
    with sqlite3.connect(ledger._path) as connection:
        return connection.execute("SELECT hold, kind, amount FROM entries ORDER BY seq").fetchall()


def check_row(row: Row, record: UsageRecord, hold: int) -> None:
    assert record.outcome == row.outcome
    match row.booked:
        case "nothing":
            assert record.cost == 0
        case "the hold":
            assert record.cost == hold
        case "what it said":
            assert record.cost == row.cost
        case "an estimate":
            assert COST <= record.cost <= hold


@pytest.mark.parametrize("who", [CAPPED, UNCAPPED], ids=lambda who: who.id)
@pytest.mark.parametrize(("row", "stream"), CASES)
async def test_an_outcome_is_booked_as_the_table_says_and_shows_in_usage(
    ledger: FaultyLedger, row: Row, stream: bool, who: Principal
) -> None:
    gateway = gateway_over(ledger, row.does(), prices=PRICES, resolve_principal=who_it_says)
    async with gateway:
        assert await try_call(gateway, who, stream=stream) == row.answers
        (record,) = await records_of(gateway, who)
        (first, end) = entries_of(ledger)
        assert (first[1], end[1]) == ("hold", "release" if row.outcome == "released" else "settle"), "every call holds"
        assert first[2] > 0
        check_row(row, record, first[2])
        assert (record.attempt, record.provider, record.price) == (1, "first", FIRST)
        assert await held(gateway, who) == 0
        assert await gateway.check_ledger() == []
        await check_shown(gateway, who, [record])


async def check_shown(gateway: AIGateway, who: Principal, records: Sequence[UsageRecord]) -> None:
    """`GET /usage` says the same."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test", headers={"x-user": who.id}) as client:
        shown = (await client.get("/usage")).json()
    by_attempt = sorted(shown["data"], key=lambda record: record["attempt"])
    assert [(row["outcome"], row["cost_usd"], row["attempt"], row["provider"]) for row in by_attempt] == [
        (record.outcome, money.text(record.cost_usd), record.attempt, record.provider) for record in records
    ]
    assert shown["totals"]["cost_usd"] == money.text(money.dollars(sum(record.cost for record in records)))


@pytest.mark.parametrize(("row", "stream"), FAILURES)
async def test_a_failure_before_content_is_booked_at_its_own_price_and_the_next_provider_s_answer_at_that_one_s(
    ledger: FaultyLedger, row: Row, stream: bool
) -> None:
    second = ScriptedProvider(Say("fine", USED), name="second")
    gateway = gateway_over(ledger, row.does(), second, prices=PRICES, resolve_principal=who_it_says)
    async with gateway:
        answered = await try_call(gateway, CAPPED, stream=stream)
        records = await records_of(gateway, CAPPED)
        entries = entries_of(ledger)
        check_row(row, records[0], entries[0][2])
        assert answered == bool(second.calls), "what another provider would refuse as well is not asked again"
        if answered:
            check_second(ledger, records, entries)
        assert await gateway.check_ledger() == []
        await check_shown(gateway, CAPPED, records)


def check_second(ledger: FaultyLedger, records: Sequence[UsageRecord], entries: Sequence[tuple[str, str, int]]) -> None:
    first, second = records
    assert (second.attempt, second.provider, second.price, second.outcome) == (2, "second", SECOND, "completed")
    assert second.cost == SECOND_COST
    assert first.request_id == second.request_id
    ends = "release" if first.outcome == "released" else "settle"
    assert [(hold, kind) for hold, kind, _ in entries] == [
        (first.id, "hold"), (first.id, ends), (second.id, "hold"), (second.id, "settle"),
    ]  # fmt: skip
    verbs = ["reserve", "reserve", "settle"] if ends == "release" else ["reserve", "settle", "reserve", "settle"]
    assert ledger.asked == verbs, "a hold that charged nothing is released in the transaction of the next"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retry_holds_anew_after_the_first_hold_is_given_back(ledger: FaultyLedger, stream: bool) -> None:
    provider = ScriptedProvider(unsent(status=503), Say("fine", USED), name="first")
    async with gateway_over(ledger, provider, prices=PRICES, retries=RetryPolicy(rounds=2, backoff=0.001)) as gateway:
        assert await try_call(gateway, CAPPED, stream=stream)
        records = await records_of(gateway, CAPPED)
        assert [(record.attempt, record.outcome, record.cost) for record in records] == [(1, "released", 0), (2, "completed", COST)]
        assert ledger.asked == ["reserve", "release", "reserve", "settle"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_price_that_changes_in_the_middle_of_a_call_is_not_that_call_s(ledger: FaultyLedger, stream: bool) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("fine", USED), arrived), Say("fine", USED), name="first")
    async with gateway_over(ledger, provider, prices={}) as gateway:
        await gateway.set_price("m", FIRST)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: try_call(gateway, CAPPED, stream=stream))
            await arrived.wait()
            await gateway.set_price("m", SECOND)
            go.set()
        await try_call(gateway, UNCAPPED, stream=stream, text="another")
        (before,) = await records_of(gateway, CAPPED)
        (after,) = await records_of(gateway, UNCAPPED)
        assert (before.price, before.cost) == (FIRST, COST)
        assert (after.price, after.cost) == (SECOND, SECOND_COST)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_process_that_died_is_charged_its_full_hold_and_a_late_settlement_the_difference(
    ledger: FaultyLedger, stream: bool
) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("fine", USED), arrived), name="first")
    async with gateway_over(ledger, provider, prices=PRICES, resolve_principal=who_it_says) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: try_call(gateway, CAPPED, stream=stream))
            await arrived.wait()
            full = await held(gateway, CAPPED)
            (expired,) = await ledger.expire(now=time.time() + 10_000)
            assert (expired.outcome, expired.cost) == ("expired", full)
            await check_shown(gateway, CAPPED, [expired])
            go.set()
        records = await records_of(gateway, CAPPED)
        assert sorted(record.outcome for record in records) == ["adjusted", "expired"]
        assert sum(record.cost for record in records) == COST
        assert await gateway.check_ledger() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cache_hit_costs_nothing_and_is_marked(ledger: FaultyLedger, stream: bool) -> None:
    provider = ScriptedProvider(Say("fine", USED), name="first")
    async with gateway_over(ledger, provider, prices=PRICES, resolve_principal=who_it_says) as gateway:
        for _ in range(2):
            assert await try_call(gateway, CAPPED, stream=stream)
        records = (await gateway.usage(principal=CAPPED.id)).data
        assert sorted((record.outcome, record.cost) for record in records) == [("cached", 0), ("completed", COST)]
        assert ledger.asked == ["reserve", "settle"], "a hit holds nothing"


async def test_a_joined_flight_costs_nothing_and_is_marked(ledger: FaultyLedger) -> None:
    go, arrived = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, Say("fine", USED), arrived), name="first")
    async with gateway_over(ledger, provider, prices=PRICES, resolve_principal=who_it_says) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: try_call(gateway, CAPPED, stream=False))
            await arrived.wait()
            group.start_soon(lambda: try_call(gateway, CAPPED, stream=False))
            await anyio.wait_all_tasks_blocked()
            go.set()
        records = (await gateway.usage(principal=CAPPED.id)).data
        assert sorted((record.outcome, record.cost) for record in records) == [("cached", 0), ("completed", COST)]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancellation_out_of_a_provider_is_its_own_failure(ledger: FaultyLedger, stream: bool) -> None:
    async with gateway_over(ledger, Foreign(asyncio.CancelledError()), prices=PRICES) as gateway:
        assert not await try_call(gateway, CAPPED, stream=stream)
        (record,) = await records_of(gateway, CAPPED)
        assert (record.outcome, record.cost) == ("ambiguous", entries_of(ledger)[0][2])


@pytest.mark.parametrize("drained", [True, False])
async def test_a_client_that_left_is_billed_what_was_drained_or_else_what_was_received(ledger: FaultyLedger, drained: bool) -> None:
    step = Say("one two three", USED) if drained else Hang(after=2, text="one two three")
    timeouts = Timeouts(drain=5 if drained else 0.02)
    async with gateway_over(ledger, ScriptedProvider(step, name="first"), prices=PRICES, timeouts=timeouts) as gateway:
        async with gateway.stream(CAPPED, ask(max_tokens=BOUND)) as answer:
            await anext(answer)
        await until_booked(gateway)
        (record,) = await records_of(gateway, CAPPED)
        hold = entries_of(ledger)[0][2]
        assert record.outcome == ("completed" if drained else "estimated")
        assert record.cost == COST if drained else 0 < record.cost < hold
        assert record.usage.output_tokens >= 2
