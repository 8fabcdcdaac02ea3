"""A body that was answered from the cache before is not read again, and nothing but the time it takes tells the difference."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from starlette_aigateway import AIGateway, Completion, Price
from starlette_aigateway.http import bodies, calls
from starlette_aigateway.repeats import MAX_BODIES, MAX_BODY
from starlette_aigateway.testing import ASGIClient, FakeClock, ScriptedProvider
from starlette_aigateway.testing.client import WholeAnswer
from starlette_aigateway.types import CallOptions

pytestmark = pytest.mark.anyio
TURN = {"model": "m", "messages": [{"role": "user", "content": "What is a sliding window?"}], "temperature": 0.5}
OWN = {"x-request-id", "request-id", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"}


class Host:
    def __init__(self, gateway: AIGateway, client: ASGIClient) -> None:
        self.gateway = gateway
        self.client = client
        self.key_id = ""
        self.headers: dict[str, str] = {}

    async def login(self, **fields: Any) -> None:
        raw, key = await self.gateway.create_key("app", **fields)
        self.headers, self.key_id = {"authorization": f"Bearer {raw}"}, key.id

    async def ask(self, turn: Any = TURN, path: str = "/v1/chat/completions", **headers: str) -> WholeAnswer:
        sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, json=turn, headers=sent)


@asynccontextmanager
async def host(provider: Any = None, **settings: Any) -> AsyncIterator[Host]:
    provider = provider or ScriptedProvider("first", "second", "third")
    gateway = AIGateway.in_memory(providers=[provider], prices={"m": Price("1", "2")}, **settings)
    async with gateway.lifespan(), ASGIClient(gateway) as client:
        host = Host(gateway, client)
        await host.login()
        yield host


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies that were decoded."""
    seen: list[bytes] = []
    decode = bodies.decode_object

    def counted(body: bytes) -> dict[str, Any]:
        seen.append(body)
        return decode(body)

    monkeypatch.setattr(calls, "decode_object", counted)
    return seen


def shown(answer: WholeAnswer) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Without what is each call's own."""
    headers = {name: value for name, value in answer.headers.items() if name not in OWN}
    return answer.status, answer.json() | {"id": ""}, headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/complete"])
async def test_the_third_answer_is_the_second_one_again_and_its_body_was_not_decoded(path: str, decoded: list[bytes]) -> None:
    async with host(clock=FakeClock()) as served:
        await served.login(requests_per_minute=10)
        first, second, third, fourth = [await served.ask(path=path) for _ in range(4)]
        assert [answer.headers["x-cache"] for answer in (first, second, third, fourth)] == ["miss", "hit", "hit", "hit"]
        assert shown(second) == shown(third) == shown(fourth)
        assert len({answer.json()["id"] for answer in (second, third, fourth)}) == 3
        assert [*second.headers] == [*third.headers]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (second, third, fourth)] == ["8", "7", "6"]
        assert len({answer.headers["request-id"] for answer in (second, third, fourth)}) == 3
        assert len(decoded) == 2
        report = await served.gateway.usage(principal=served.key_id)
        assert sorted(str(record.outcome) for record in report.data) == ["cached", "cached", "cached", "completed"]


async def test_other_bytes_are_another_call(decoded: list[bytes]) -> None:
    async with host() as served:
        for _ in range(3):
            await served.ask()
        assert (await served.ask({**TURN, "temperature": 1})).headers["x-cache"] == "miss"
        assert len(decoded) == 3


async def test_who_may_not_use_the_model_any_more_is_refused(decoded: list[bytes]) -> None:
    async with host() as served:
        for _ in range(3):
            await served.ask()
        await served.gateway.update_key(served.key_id, allowed_models=["other"])
        refused = await served.ask()
        assert (refused.status, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        assert refused.json()["error"]["request_id"] == refused.headers["request-id"]


async def test_windows_hold_for_repeated_calls() -> None:
    async with host() as served:
        await served.login(requests_per_minute=4)
        assert [(await served.ask()).status for _ in range(5)] == [200, 200, 200, 200, 429]


async def test_whoever_has_answers_of_its_own_is_not_given_anothers() -> None:
    async with host() as served:
        for tenant in ("a", "b"):
            await served.login(tenant=tenant)
            texts = [(await served.ask()).json()["choices"][0]["message"]["content"] for _ in range(3)]
            assert texts == ["first" if tenant == "a" else "second"] * 3


async def test_an_answer_that_has_expired_is_asked_for_anew_and_what_is_repeated_then_is_the_new_one() -> None:
    clock = FakeClock()
    async with host(clock=clock) as served:
        for _ in range(3):
            await served.ask()
        clock.advance(4000)
        answers = [await served.ask() for _ in range(3)]
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit", "hit"]
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"second"}
        clock.advance(7)
        assert (await served.ask()).headers["age"] == "7"


async def test_a_purge_holds_for_repeated_calls() -> None:
    async with host() as served:
        for _ in range(3):
            await served.ask()
        await served.gateway._composition.responses.purge()
        assert (await served.ask()).headers["x-cache"] == "miss"


async def test_cache_control_holds_for_repeated_calls(decoded: list[bytes]) -> None:
    clock = FakeClock()
    async with host(clock=clock) as served:
        for _ in range(3):
            await served.ask()
        clock.advance(60)
        assert (await served.ask(cache_control="max-age=60")).headers["x-cache"] == "hit"
        assert len(decoded) == 2
        assert (await served.ask(cache_control="no-store")).headers["x-cache"] == "bypass"
        assert (await served.ask(cache_control="max-age=59")).headers["x-cache"] == "miss"
        refused = await served.ask(cache_control="max-age=soon")
        assert (refused.status, refused.json()["error"]["param"]) == (400, "cache-control")


async def test_an_idempotency_key_is_claimed_for_a_body_that_was_seen_before() -> None:
    async with host() as served:
        for _ in range(3):
            await served.ask()
        one, again = [await served.ask(idempotency_key="k") for _ in range(2)]
        assert "idempotency-replayed" not in one.headers
        assert again.headers["idempotency-replayed"] == "true"


async def test_several_choices_are_refused_where_there_is_one_also_by_a_body_that_was_answered_elsewhere() -> None:
    async with host() as served:
        turn = {**TURN, "n": 2}
        assert [(await served.ask(turn)).status for _ in range(3)] == [200, 200, 200]
        refused = await served.ask(turn, path="/complete")
        assert (refused.status, refused.json()["error"]["param"]) == (400, "n")


async def test_a_call_that_ends_with_its_caller_is_answered_from_the_cache_too() -> None:
    async with host(on_disconnect="cancel") as served:
        assert [(await served.ask()).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]


async def test_a_provider_that_changes_what_it_was_given_changes_no_other_call() -> None:
    seen: list[str] = []

    class Vandal:
        name = "vandal"
        models = ("m",)

        async def complete(self, request: Any) -> Completion:
            seen.append(json.dumps(list(request.messages)))
            request.messages.append({"role": "system", "content": "say no"})
            return Completion(message={"role": "assistant", "content": "yes"})

    clock = FakeClock()
    async with host(Vandal(), clock=clock) as served:
        for _ in range(2):
            for _ in range(3):
                await served.ask()
            clock.advance(4000)
        assert len(seen) == 2
        assert seen[0] == seen[1] == json.dumps(TURN["messages"])


async def test_what_is_remembered_is_bounded() -> None:
    async with host(ScriptedProvider("short", repeat=True)) as served:
        large = {**TURN, "messages": [{"role": "user", "content": "x" * MAX_BODY}]}
        for _ in range(3):
            await served.ask(large)
        repeats = served.gateway._composition.pipeline.repeats
        assert not repeats._known
        for _ in range(2):
            await served.ask()
        (repeat,) = repeats._known.values()
        call = await served.gateway._composition.pipeline.admission.asked(
            await served.gateway.principal_of(served.key_id), repeat.request, CallOptions(), "", stream=False
        )
        for number in range(2 * MAX_BODIES):
            repeats.learn(b"%d" % number, call)
        assert len(repeats._known) == MAX_BODIES
