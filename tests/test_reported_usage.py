"""Which of the usage that a provider reports is the bill, and what is booked where none of it is."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest

from starlette_aigateway import (
    AIGateway,
    Chunk,
    Completion,
    CompletionRequest,
    Price,
    Principal,
    ProviderError,
    RetryPolicy,
    Usage,
    UsageRecord,
)
from starlette_aigateway.policy import metering
from starlette_aigateway.streams import Meter
from starlette_aigateway.types import Message, Native, ProviderCall, RawEvents, StreamItem

pytestmark = pytest.mark.anyio

WHO = Principal("user", hard_cap_usd="1")
BOUND = 400
WORDS = 100
"""Output tokens that every stream here really has, in as many chunks."""

ROLE = Chunk(delta={"role": "assistant"})
WORD = Chunk(delta={"content": "word "})
RAW = RawEvents("openai", b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n', 1)
STOP = Chunk(finish_reason="stop")


def told(input_tokens: int, output_tokens: int, **more: int) -> Usage:
    return Usage(input_tokens=input_tokens, output_tokens=output_tokens, **more)


def reporting(chunk: Chunk, usage: Any) -> Chunk:
    return Chunk(delta=chunk.delta, finish_reason=chunk.finish_reason, usage=usage)


class Adapter:
    """Behind the adapter seam, where nothing is checked before the gateway itself."""

    name = "adapter"

    def __init__(self, items: Sequence[StreamItem] = (), completion: Completion | None = None, error: Exception | None = None) -> None:
        self.items = items
        self.whole = completion
        self.error = error

    @asynccontextmanager
    async def open(self, call: ProviderCall) -> AsyncIterator[Any]:
        yield self

    async def completion(self) -> Completion:
        if self.error is not None:
            raise self.error
        assert self.whole is not None
        return self.whole

    async def events(self) -> AsyncIterator[StreamItem]:
        for item in self.items:
            yield item
        if self.error is not None:
            raise self.error


def request() -> CompletionRequest:
    return CompletionRequest(model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=BOUND)


async def booked(provider: Adapter, *, stream: bool = True) -> UsageRecord:
    async with AIGateway.in_memory(providers=[provider], prices={"m": Price("1", "1")}, retries=RetryPolicy(rounds=1)) as gateway:
        try:
            if stream:
                async with gateway.stream(WHO, request()) as answer:
                    async for chunk in answer:
                        assert chunk.usage is None or isinstance(chunk.usage, Usage)
            else:
                await gateway.complete(WHO, request())
        except ProviderError:
            assert provider.error is not None
        assert not await gateway.check_ledger()
        assert max(budget.held for budget in await gateway.budgets(WHO)) == 0
        (record,) = (await gateway.usage()).data
        return record


@pytest.mark.parametrize(
    "end",
    [
        [],
        [reporting(STOP, told(0, 0))],
        [STOP, Chunk(usage=told(0, 0))],
        [STOP, Chunk(usage=told(10, 0))],
        [STOP, Chunk(usage=told(-1, 100))],
    ],
    ids=["nothing", "zeros with the end", "zeros after it", "no output", "nonsense"],
)
@pytest.mark.parametrize("word", [WORD, RAW], ids=["chunks", "raw events"])
@pytest.mark.parametrize("early", [0, 1, 50], ids=["at the start", "with the first word", "half-way"])
async def test_usage_that_was_told_before_the_last_output_is_not_the_bill(early: int, word: StreamItem, end: list[Chunk]) -> None:
    report: StreamItem = Chunk(usage=told(10, early))
    record = await booked(Adapter([ROLE, *[word] * early, report, *[word] * (WORDS - early), *(end or [STOP])]))
    assert record.outcome == "estimated"
    assert record.usage is not None
    assert record.usage.output_tokens >= WORDS


FULL = told(10, WORDS)


@pytest.mark.parametrize(
    "items",
    [
        [ROLE, *[WORD] * WORDS, STOP, Chunk(usage=FULL)],
        [ROLE, *[WORD] * WORDS, reporting(STOP, FULL)],
        [ROLE, *[RAW] * WORDS, STOP, Chunk(usage=FULL)],
        [reporting(ROLE, told(10, 0)), *[reporting(WORD, told(10, place + 1)) for place in range(WORDS)], STOP],
        [reporting(ROLE, told(10, 1)), *[WORD] * WORDS, reporting(STOP, told(0, WORDS))],
        [ROLE, *[WORD] * WORDS, reporting(STOP, FULL), Chunk(usage=told(0, 0))],
        [ROLE, *[WORD] * WORDS, reporting(STOP, FULL), Chunk(usage=told(-1, 0))],
    ],
    ids=["after the end", "with the end", "raw", "on every chunk", "input only at the start", "zeros at last", "nonsense at last"],
)
async def test_usage_that_covers_all_of_the_output_is_the_bill_and_nothing_after_it_lowers_it(items: list[StreamItem]) -> None:
    record = await booked(Adapter(items))
    assert (record.outcome, record.usage) == ("completed", FULL)


async def test_an_estimate_is_never_below_what_was_told_on_the_way() -> None:
    words = [WORD] * 3
    record = await booked(Adapter([reporting(ROLE, told(10, BOUND - 1)), *words, STOP]))
    assert record.outcome == "estimated"
    assert record.usage is not None
    assert record.usage.output_tokens == BOUND - 1
    over = await booked(Adapter([reporting(ROLE, told(10, 100 * BOUND)), *words, STOP]))
    assert (over.outcome, over.cost >= 100 * BOUND * 1000) == ("overrun", True)


async def test_a_failure_that_bills_less_than_the_stream_had_told_is_billed_what_was_told() -> None:
    error = ProviderError("broken", billed=told(10, 1))
    record = await booked(Adapter([ROLE, *[WORD] * WORDS, Chunk(usage=told(10, 90)), WORD], error=error))
    assert (record.outcome, record.usage) == ("completed", told(10, 90))


async def test_a_failure_after_output_that_bills_none_is_one_of_which_nothing_is_known() -> None:
    record = await booked(Adapter([ROLE, *[WORD] * WORDS], error=ProviderError("broken", billed=told(10, 0))))
    assert record.outcome == "ambiguous"


HI: Message = {"role": "assistant", "content": "hello, all of you"}


@pytest.mark.parametrize("native", [None, Native("other", b"{}")])
async def test_a_whole_answer_with_output_that_reports_none_is_estimated(native: Native | None) -> None:
    record = await booked(Adapter(completion=Completion(message=HI, usage=told(10, 0), native=native)), stream=False)
    assert record.outcome == "estimated"
    assert record.usage is not None
    assert record.usage.output_tokens > 0


async def test_an_answer_without_output_may_report_none() -> None:
    nothing = Completion(message={"role": "assistant", "content": ""}, usage=told(10, 0))
    assert (await booked(Adapter(completion=nothing), stream=False)).outcome == "completed"
    assert (await booked(Adapter([ROLE, STOP, Chunk(usage=told(10, 0))]))).outcome == "completed"


NONSENSE: list[Any] = [
    "x",
    {"input_tokens": 1, "output_tokens": 1},
    0,
    False,
    Usage(input_tokens="a", output_tokens=1),  # type: ignore[arg-type]  # what a provider without types may say
    Usage(input_tokens=None, output_tokens=None),  # type: ignore[arg-type]  # as above
    Usage(input_tokens=1.5, output_tokens=2.5),  # type: ignore[arg-type]  # as above
    Usage(input_tokens=float("nan"), output_tokens=1),  # type: ignore[arg-type]  # as above
    Usage(input_tokens=Decimal(1), output_tokens=Decimal(2)),  # type: ignore[arg-type]  # as above
    Usage(input_tokens=True, output_tokens=True),
    Usage(input_tokens=10**30, output_tokens=1),
]


@pytest.mark.parametrize("usage", NONSENSE, ids=repr)
async def test_usage_of_a_wrong_type_was_not_reported(usage: Any) -> None:
    assert metering.plausible(usage) is None
    whole = await booked(Adapter(completion=Completion(message=HI, usage=usage)), stream=False)
    with_the_end = await booked(Adapter([WORD, reporting(STOP, usage)]))
    after_another = await booked(Adapter([WORD, Chunk(usage=told(1, 1)), WORD, Chunk(usage=usage), STOP]))
    assert {whole.outcome, with_the_end.outcome, after_another.outcome} == {"estimated"}
    for stream in (False, True):
        failed = await booked(Adapter(error=ProviderError("broken", billed=usage)), stream=stream)
        assert failed.outcome == "ambiguous"


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (told(100, 5, cache_read_input_tokens=80), told(0, 0), told(100, 5, cache_read_input_tokens=80)),
        (told(100, 5, cache_read_input_tokens=80), told(100, 7), told(100, 7)),
        (told(100, 5), told(100, 7, cache_read_input_tokens=80), told(100, 7, cache_read_input_tokens=80)),
        (told(9, 5, reasoning_output_tokens=4), told(9, 5), told(9, 5, reasoning_output_tokens=4)),
        (
            told(100, 5, cache_creation_input_tokens=80),
            told(100, 5, cache_read_input_tokens=80),
            told(100, 5, cache_creation_input_tokens=80, cache_read_input_tokens=20),
        ),
    ],
)
def test_of_two_reports_each_kind_counts_at_its_most_and_what_was_cached_as_it_was_told_last(
    first: Usage, second: Usage, both: Usage
) -> None:
    assert metering.together(first, second) == both


def test_raw_events_after_the_usage_are_not_decoded() -> None:
    meter = Meter(0)
    for item in (RAW, STOP, Chunk(usage=FULL)):
        meter.see(item)
    bills = [meter.bill]
    meter.see(RawEvents("openai", b"data: not even JSON\n\n", 1))
    bills.append(meter.bill)
    assert bills == [FULL, None]
