"""`enforce=False`: calls go on, everything is booked, and what would have been refused says so."""

from collections.abc import Sequence
from typing import Any

import pytest

from starlette_aigateway import AIGateway, CompletionRequest, Limits, Price, Principal, SpendCapExceeded, Tenant, Timeouts
from starlette_aigateway.events import CallRefused, CallTolerated, Event
from starlette_aigateway.testing import Hang, ScriptedProvider

pytestmark = pytest.mark.anyio

PRICES = {"m": Price("1000", "2000")}


def ask(text: str = "hello", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", messages=[{"role": "user", "content": text}], **fields)


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def __call__(self, event: Event) -> None:
        self.events.append(event)

    def tolerated(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, CallTolerated)]


@pytest.fixture
def heard() -> Heard:
    return Heard()


def reporting(heard: Heard, **settings: Any) -> AIGateway:
    provider = ScriptedProvider("hi", repeat=True)
    return AIGateway.in_memory(**{"providers": [provider], "prices": PRICES, "observers": [heard], "enforce": False, **settings})


async def marks(gateway: AIGateway) -> Sequence[str | None]:
    return [record.would_refuse for record in reversed((await gateway.usage()).data)]


async def complete_or_stream(gateway: AIGateway, who: Principal, stream: bool, request: CompletionRequest) -> None:
    if not stream:
        await gateway.complete(who, request)
        return
    async with gateway.stream(who, request) as answer:
        async for _ in answer:
            pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("limits", "fields", "code"),
    [
        ({"hard_cap_usd": "0.000001"}, {}, "spend_cap_exceeded"),
        ({"tenant": Tenant("t", daily_cap_usd="0.000001")}, {}, "spend_cap_exceeded"),
        ({"hard_cap_usd": "100"}, {"params": {"web_search_options": {}}}, "cost_unbounded"),
        ({"tokens_per_minute": 1}, {}, "request_too_large_for_limit"),
    ],
)
async def test_a_call_that_would_be_refused_goes_on_and_is_marked(
    heard: Heard, stream: bool, limits: dict[str, Any], fields: dict[str, Any], code: str
) -> None:
    async with reporting(heard) as gateway:
        who = Principal("alice", **limits)
        quote = await gateway.quote(who, ask(**fields))
        assert quote.would_refuse is not None
        assert quote.would_refuse.code == code
        await complete_or_stream(gateway, who, stream, ask(**fields))
        (record,) = (await gateway.usage()).data
        assert (record.would_refuse, record.outcome) == (code, "completed")
        assert record.cost > 0
        assert await gateway.check_ledger() == []
    assert heard.tolerated() == [code]
    assert not [event for event in heard.events if isinstance(event, CallRefused)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_window_is_only_reported_and_its_tokens_stay_right(heard: Heard, stream: bool) -> None:
    who = Principal("alice", requests_per_minute=1, tokens_per_minute=1_000)
    async with reporting(heard) as gateway:
        for number in range(3):
            await complete_or_stream(gateway, who, stream, ask(str(number)))
        assert await marks(gateway) == [None, "rate_limit_exceeded", "rate_limit_exceeded"]
        states = {state.claim.kind: state.remaining for state in await gateway._composition.pipeline.admission.windows(who)}
        assert states == {"requests": 0, "tokens": 1_000 - 15}, "a call that was only tolerated took nothing, and gives nothing back"


async def test_a_cached_answer_is_marked_as_well(heard: Heard) -> None:
    who = Principal("alice", requests_per_minute=1)
    async with reporting(heard) as gateway:
        await gateway.complete(who, ask())
        assert (await gateway.complete(who, ask())).cached
        assert await marks(gateway) == [None, "rate_limit_exceeded"]


async def test_a_model_without_a_price_is_let_through_and_marked(heard: Heard) -> None:
    async with reporting(heard, prices={}) as gateway:
        await gateway.complete(Principal("alice", hard_cap_usd="1"), ask())
        assert await marks(gateway) == ["price_unknown"]


async def test_nothing_is_said_of_a_call_that_fits_and_its_bound_is_left_alone(heard: Heard) -> None:
    provider = ScriptedProvider("hi")
    async with reporting(heard, providers=[provider], limits=Limits(hard_cap_usd="5")) as gateway:
        await gateway.complete(Principal("alice"), ask())
        assert await marks(gateway) == [None]
    assert provider.calls[0].max_tokens is None
    assert heard.tolerated() == []


async def test_the_parallel_limit_is_only_reported(heard: Heard) -> None:
    who = Principal("alice", max_parallel_requests=1)
    provider = ScriptedProvider(Hang(after=1, text="one two"), "hi")
    gateway = reporting(heard, providers=[provider], timeouts=Timeouts(drain=0.05))
    async with gateway, gateway.stream(who, ask("first")) as first:
        await anext(first)
        await gateway.complete(who, ask("second"))
    assert heard.tolerated() == ["too_many_parallel_requests"]


async def test_login_and_allowed_models_are_enforced_all_the_same(heard: Heard) -> None:
    async with reporting(heard) as gateway:
        with pytest.raises(Exception, match="not allowed"):
            await gateway.complete(Principal("alice", allowed_models=["other"]), ask())


async def test_the_same_call_is_refused_where_limits_are_enforced(heard: Heard) -> None:
    async with reporting(heard, enforce=True) as gateway:
        with pytest.raises(SpendCapExceeded):
            await gateway.complete(Principal("alice", hard_cap_usd="0.000001"), ask())
        assert (await gateway.usage()).data == []
