"""`override`: a gateway that is a module global, as a host's tests want it. Other parts inside, its own again after."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from starlette_aigateway import (
    Admin,
    AIGateway,
    AIGatewayMiddleware,
    AuthenticationError,
    ConfigurationError,
    Price,
    Principal,
    SpendCapExceeded,
)
from starlette_aigateway.errors import InvalidArgument
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.testing import ASGIClient, FakeClock, Say, ScriptedProvider, override
from starlette_aigateway.types import Message

pytestmark = pytest.mark.anyio

HELLO: list[Message] = [{"role": "user", "content": "hello"}]
ADA = Principal("ada", hard_cap_usd="10")


class Expensive:
    """The host's own provider, which no test may ask."""

    name = "expensive"

    async def complete(self, request: Any) -> Any:
        raise AssertionError("a test has asked the host's own provider")


async def nobody(connection: Any) -> Principal | None:
    return None


@pytest.fixture
def gateway(tmp_path: Path) -> AIGateway:
    """As a module of the host has it."""
    return AIGateway(providers=[Expensive()], data_dir=tmp_path / "real", prices={"m": Price("1000", "2000")}, resolve_principal=nobody)


async def ask(request: Request) -> Response:
    answer = await request.state.aigateway.complete(model="m", messages=HELLO)
    return JSONResponse(answer.message["content"])


def app_of(gateway: AIGateway) -> Any:
    return AIGatewayMiddleware(Starlette(routes=[Route("/ask", ask), Mount("/ai", gateway)]), gateway)


async def test_providers_stores_and_login_are_others_and_what_happens_is_recorded(gateway: AIGateway, tmp_path: Path) -> None:
    with override(gateway, providers=[ScriptedProvider("first", "second")], principal=ADA) as recorded:
        async with ASGIClient(app_of(gateway)) as client:
            assert (await client.get("/ask")).json() == "first"
            assert (await client.post("/ai/complete", json={"model": "m", "messages": HELLO, "seed": 1})).status == 200
    assert [(call.provider, call.request.model, call.stream) for call in recorded.calls] == [("scripted", "m", False)] * 2
    assert recorded.calls[1].request.params == {"seed": 1}
    assert [record.principal for record in recorded.records] == ["ada", "ada"]
    assert recorded.cost_usd == Decimal("0.040")
    assert recorded.refusals == []
    assert not (tmp_path / "real").exists(), "the host's own directory was not touched"


async def test_everything_is_the_host_s_own_again_also_after_an_exception(gateway: AIGateway) -> None:
    def refused() -> None:
        with override(gateway, principal=ADA):
            raise ValueError("a test failed")

    caller = gateway.acting_as(ADA)
    with pytest.raises(ValueError, match="a test failed"):
        refused()
    assert repr(gateway) == "AIGateway(name='default', providers=['expensive'])"
    async with gateway, ASGIClient(app_of(gateway)) as client:
        assert (await client.get("/ask")).status == 401
        assert await gateway.list_keys() == []
        assert (await caller.budgets())[0].spent_usd == 0


async def test_a_caller_that_was_made_before_is_overridden_too(gateway: AIGateway) -> None:
    nightly = gateway.acting_as(Principal("nightly"))
    async with override(gateway, providers=[ScriptedProvider("scripted")]) as recorded:
        assert (await nightly.complete(model="m", messages=HELLO)).message["content"] == "scripted"
    assert [record.principal for record in recorded.records] == ["nightly"]


async def test_without_providers_every_model_is_echoed(gateway: AIGateway) -> None:
    async with override(gateway) as recorded:
        answer = await gateway.acting_as(Principal("free")).complete(model="whatever", messages=HELLO)
    assert (answer.message["content"], answer.provider) == ("hello", "echo")
    assert len(recorded.calls) == 1


async def test_refusals_and_cached_answers_are_recorded(gateway: AIGateway) -> None:
    async with override(gateway, providers=[ScriptedProvider("once")]) as recorded:
        caller = gateway.acting_as(ADA)
        for _ in range(2):
            await caller.complete(model="m", messages=HELLO)
        with pytest.raises(SpendCapExceeded):
            await gateway.acting_as(Principal("poor", hard_cap_usd="0.000001")).complete(model="m", messages=[*HELLO, *HELLO])
    assert len(recorded.calls) == 1
    assert [record.outcome for record in recorded.records] == ["completed", "cached"]
    assert [(refusal.principal, refusal.code) for refusal in recorded.refusals] == [("poor", "spend_cap_exceeded")]


async def test_a_stream_that_was_left_can_be_waited_for(gateway: AIGateway) -> None:
    go = anyio.Event()

    class Gated(EchoProvider):
        async def stream(self, request: Any) -> Any:
            async for chunk in super().stream(request):
                yield chunk
                await go.wait()

    body = {"model": "m", "messages": HELLO, "stream": True, "max_tokens": 50}
    with override(gateway, providers=[Gated()], principal=ADA) as recorded:
        async with ASGIClient(app_of(gateway)) as client:
            async with client.stream("POST", "/ai/complete", json=body) as answer:
                await anext(answer.events())
            assert recorded.records == []
            go.set()
            with anyio.fail_after(20):
                (record,) = await recorded.booked(1)
    assert record.outcome == "completed"


async def test_a_gateway_that_runs_already_is_overridden_for_what_comes_and_not_for_what_runs(gateway: AIGateway) -> None:
    class Slow:
        name = "slow"

        def __init__(self) -> None:
            self.arrived, self.go = anyio.Event(), anyio.Event()

        async def complete(self, request: Any) -> Any:
            self.arrived.set()
            await self.go.wait()
            return await EchoProvider().complete(request)

    slow = Slow()
    answers: list[str] = []
    own = AIGateway.in_memory(providers=[slow], resolve_principal=nobody)

    async def running() -> None:
        answers.append(str((await own.acting_as(Principal("old")).complete(model="m", messages=HELLO)).message["content"]))

    async with ASGIClient(app_of(own)) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(running)
            await slow.arrived.wait()
            async with override(own, providers=[ScriptedProvider("other")], principal=Principal("new")) as recorded:
                assert (await client.get("/ask")).json() == "other"
                slow.go.set()
        assert answers == ["hello"]
        assert [record.principal for record in recorded.records] == ["new"]
        assert [record.principal for record in (await own.usage()).data] == ["old"]
        assert (await client.get("/ask")).status == 401


async def test_overrides_may_be_nested_and_the_inner_one_begins_from_the_outer_one(gateway: AIGateway) -> None:
    async def content(model: str) -> Any:
        return (await gateway.acting_as(ADA).complete(model=model, messages=HELLO)).message["content"]

    outer, inner = ScriptedProvider("outer", repeat=True), ScriptedProvider("inner", repeat=True)
    async with override(gateway, providers=[outer], prices={"n": Price("1", "1")}) as seen_outside:
        assert await content("n") == "outer"
        async with override(gateway, providers=[inner]) as seen_inside:
            assert await content("n") == "inner", "priced by the outer override's prices"
            assert (await gateway.usage()).totals.calls == 1, "stores of its own"
        assert (await gateway.usage()).totals.calls == 1
    assert (len(seen_outside.records), len(seen_inside.records)) == (1, 1)


async def test_other_settings_can_be_given_and_stores_of_one_s_own(gateway: AIGateway) -> None:
    clock = FakeClock()
    kept = AIGateway.in_memory(clock=clock)
    async with kept, override(gateway, clock=clock, keys=kept._keys, principal=ADA, resolve_principal=nobody) as recorded:
        raw_key, key = await kept.create_key("elsewhere")
        clock.advance(60)
        async with ASGIClient(app_of(gateway)) as client:
            answer = await client.get("/ask", headers={"x-api-key": raw_key})
            assert (answer.status, answer.json()) == (200, "hello")
    assert (recorded.records[0].key_id, recorded.records[0].created_at) == (key.id, clock())


async def test_an_administrator_can_be_logged_in(gateway: AIGateway) -> None:
    with override(gateway, admin=Admin("root"), principal=ADA):
        async with ASGIClient(app_of(gateway)) as client:
            made = await client.post("/ai/keys", json={"name": "app"})
            assert made.status == 201
            assert (await client.get("/ask", headers={"authorization": f"Bearer {made.json()['key']}"})).status == 200
    async with ASGIClient(app_of(gateway)) as client:
        assert (await client.get("/ai/keys")).status == 404
        refused = await client.get("/ask", headers={"authorization": f"Bearer {made.json()['key']}"})
        assert refused.status == 401, "the key was the override's"


def test_a_test_that_is_not_asynchronous_can_override_too(gateway: AIGateway) -> None:
    with override(gateway, providers=[ScriptedProvider(Say("a"), "b")], principal=ADA) as recorded, TestClient(app_of(gateway)) as client:
        assert [client.get("/ask").json(), client.get("/ask").json()] == ["a", "a"]
    assert len(recorded.calls) == 1


async def test_the_host_s_observers_hear_of_what_happens_inside(tmp_path: Path) -> None:
    heard: list[Any] = []

    async def observe(event: Any) -> None:
        heard.append(event)

    gateway = AIGateway(providers=[Expensive()], data_dir=tmp_path, observers=[observe])
    async with override(gateway) as recorded:
        await gateway.acting_as(Principal("ada")).complete(model="m", messages=HELLO)
    assert heard == recorded.events


async def test_providers_that_are_opened_and_closed_are_so_inside(gateway: AIGateway) -> None:
    said: list[str] = []

    class Connected(EchoProvider):
        async def __aenter__(self) -> Connected:
            said.append("opened")
            return self

        async def __aexit__(self, *_: object) -> None:
            said.append("closed")

    async with override(gateway, providers=[Connected()]):
        assert said == ["opened"]
    assert said == ["opened", "closed"]


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"principal": "ada"}, "principal"),
        ({"admin": True}, "admin"),
        ({"providers": [object()]}, "name"),
        ({"provider": []}, "provider"),
        ({"limits": 5}, "limits"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_gateway_as_it_was(gateway: AIGateway, arguments: dict[str, Any], param: str) -> None:
    def entered() -> None:
        with override(gateway, **arguments):
            raise AssertionError

    with pytest.raises((InvalidArgument, ConfigurationError)) as caught:
        entered()
    assert caught.value.param == param
    assert repr(gateway) == "AIGateway(name='default', providers=['expensive'])"


def test_only_a_gateway_can_be_overridden() -> None:
    with pytest.raises(InvalidArgument):
        override(object())  # type: ignore[arg-type]  # what is wrong with it is the test


async def test_stores_of_the_host_s_own_are_not_touched(tmp_path: Path) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            async def verb(*arguments: Any, **named: Any) -> Any:
                raise AssertionError(f"a test has asked the host's own store: {name}")

            return verb

    kept: Any = Untouchable()
    gateway = AIGateway(
        data_dir=tmp_path / "real", keys=kept, tenants=kept, price_store=kept, prompts=kept, responses=kept, windows=kept,
        idempotency=kept, audit_store=kept,
    )  # fmt: skip
    async with override(gateway) as recorded:
        raw_key, _ = await gateway.create_key("inside", tenant="acme", requests_per_minute=5)
        await gateway.save_prompt("p", "hello")
        async with ASGIClient(app_of(gateway)) as client:
            body = {"model": "m", "prompt": {"name": "p"}, "messages": HELLO}
            answer = await client.post("/ai/complete", json=body, headers={"x-api-key": raw_key, "idempotency-key": "k"})
    assert answer.status == 200
    assert len(recorded.calls) == 1


async def test_what_was_kept_inside_is_gone_with_the_block(gateway: AIGateway) -> None:
    async with override(gateway, principal=ADA):
        await gateway.create_key("inside")
        directory = gateway._composition.embedded.directory  # type: ignore[union-attr]  # it has one
        assert directory.exists()
    assert not directory.exists()


async def test_the_login_of_the_host_stays_where_no_principal_is_given(gateway: AIGateway) -> None:
    async with override(gateway):
        with pytest.raises(AuthenticationError):
            await gateway.caller({"type": "http", "headers": [], "path": "/", "method": "GET"})
