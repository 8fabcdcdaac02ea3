"""`Idempotency-Key` over a real socket: both routes, whole and streamed, with raw HTTP and with the official `openai` client."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest

from starlette_aigateway import AIGateway, Chunk, Completion, CompletionRequest, IdempotencyPolicy, ProviderError, RetryPolicy, Usage
from starlette_aigateway.http.routes import ROUTES
from starlette_aigateway.providers import EchoProvider, OpenAIProvider
from starlette_aigateway.testing.providers import Say, ScriptedProvider

from .http_host import ALICE, ROOT, Service, settings
from .serving import serve
from .test_openapi import check

MESSAGES: Any = [{"role": "user", "content": "hello there"}]
ROUTES_OF_CALLS = ["/complete", "/v1/chat/completions"]
both_routes = pytest.mark.parametrize("path", ROUTES_OF_CALLS)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
OF_ONE_REQUEST = {"date", "request-id", "x-request-id", "idempotency-replayed", "content-length", "transfer-encoding"}


@contextmanager
def hosting(*providers: Any, **more: Any) -> Iterator[Service]:
    gateway = AIGateway.in_memory(**settings(providers=providers, retries=RetryPolicy(rounds=1), **more))
    with serve(gateway) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield Service(client, gateway)


def post(service: Service, path: str, key: str | None = "k", who: dict[str, str] = ALICE, **body: Any) -> httpx.Response:
    headers = who if key is None else who | {"idempotency-key": key}
    return service.call("POST", path, headers, json={"model": "echo", "messages": MESSAGES, **body})


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def lasting(answer: httpx.Response) -> dict[str, str]:
    """The headers that say something of the answer and not of the request that got it."""
    return {name: value for name, value in answer.headers.items() if name not in OF_ONE_REQUEST and not name.startswith("x-ratelimit-")}


def billed(service: Service) -> tuple[int, str]:
    totals = service.call("GET", "/usage").json()["totals"]
    return totals["calls"], totals["cost_usd"]


@pytest.fixture(params=["echo", "upstream"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A gateway with a provider of chunks, or with one that speaks the OpenAI wire, which passes through as bytes."""
    if request.param == "echo":
        with hosting(EchoProvider()) as service:
            yield service
        return
    with hosting(EchoProvider()) as upstream:
        key, _ = upstream.key()
        provider = OpenAIProvider(
            api_key=key["authorization"].removeprefix("Bearer "), base_url=f"{upstream.client.base_url}/v1", models=["echo"], name="echo"
        )
        with hosting(provider) as service:
            yield service


@both_routes
@both_ways
def test_the_same_post_again_is_the_same_answer_byte_by_byte_and_is_billed_once(service: Service, path: str, stream: bool) -> None:
    key, _ = service.key(requests_per_minute=1)
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    first = post(service, path, who=key, **body)
    assert (first.status_code, first.headers.get("idempotency-replayed")) == (200, None)
    bill = billed(service)
    for _ in range(2):
        again = post(service, path, who=key, **body)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
        assert again.content == first.content
        assert lasting(again) == lasting(first)
        assert again.headers["request-id"] != first.headers["request-id"]
        assert not [name for name in again.headers if name.startswith("x-ratelimit-")]
    assert billed(service) == bill
    assert bill[0] == 1
    assert first.headers["x-aigateway-provider"] == "echo"
    assert first.headers["x-cache"] == "miss"


def test_routes_principals_and_keys_do_not_meet(service: Service) -> None:
    bob = {"x-user": "bob"}
    answers = [post(service, path, who=who, key=key) for path in ROUTES_OF_CALLS for who in (ALICE, bob) for key in ("a", "b")]
    assert {answer.status_code for answer in answers} == {200}
    assert all("idempotency-replayed" not in answer.headers for answer in answers)
    assert "idempotency-replayed" in post(service, "/complete", key="a").headers


@both_routes
@both_ways
def test_another_body_under_the_key_is_422(service: Service, path: str, stream: bool) -> None:
    assert post(service, path, stream=stream).status_code == 200
    others: list[dict[str, Any]] = [{"max_tokens": 5}, {"stream": not stream}, {"messages": [{"role": "user", "content": "other"}]}]
    for other in others:
        answer = post(service, path, **{"stream": stream, **other})
        assert (answer.status_code, code(answer), answer.json()["error"]["param"]) == (422, "idempotency_key_reused", "idempotency-key")


@both_routes
@pytest.mark.parametrize("key", ["", "x" * 256, "\u00fc".encode("latin-1")], ids=["empty", "long", "latin"])
def test_a_header_that_is_no_key_is_400(service: Service, path: str, key: Any) -> None:
    answer = post(service, path, key=key)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")


def test_a_bad_credential_or_body_claims_nothing(service: Service) -> None:
    assert post(service, "/complete", who={"authorization": "Bearer aigw_wrong"}).status_code == 401
    assert post(service, "/complete", temperature="hot").status_code == 400
    assert post(service, "/complete", prompt={"name": "none"}).status_code == 404
    assert post(service, "/complete").status_code == 200


@both_ways
def test_the_official_client_gets_the_same_again(service: Service, stream: bool) -> None:
    raw = service.key()[0]["authorization"].removeprefix("Bearer ")
    headers = {"idempotency-key": "from-the-client"}
    with openai.OpenAI(api_key=raw, base_url=f"{service.client.base_url}/v1", max_retries=0) as client:
        if stream:
            create = client.chat.completions.create
            chunks = [
                [chunk.model_dump() for chunk in create(model="echo", messages=MESSAGES, stream=True, extra_headers=headers)]
                for _ in range(2)
            ]
            assert chunks[0] == chunks[1]
            assert chunks[0]
        else:
            answers = [
                client.chat.completions.with_raw_response.create(model="echo", messages=MESSAGES, extra_headers=headers) for _ in range(2)
            ]
            assert answers[0].parse() == answers[1].parse()
            assert answers[1].headers["idempotency-replayed"] == "true"
        with pytest.raises(openai.UnprocessableEntityError) as other:
            client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=3, extra_headers=headers)
        assert other.value.code == "idempotency_key_reused"
    assert billed(service)[0] == 1


# -- calls that run ----------------------------------------------------------------------------------------------------


class Gated:
    """Answers once `go` is set; `arrived` is set when the first call is in."""

    name = "gated"
    models = ("echo",)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.arrived = threading.Event()
        self.calls = 0

    async def complete(self, request: CompletionRequest) -> Completion:
        await self._wait()
        return Completion(message={"role": "assistant", "content": "first more"}, usage=Usage(input_tokens=2, output_tokens=2))

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "first "})
        await self._wait()
        yield Chunk(delta={"content": "more"})
        yield Chunk(finish_reason="stop")
        yield Chunk(usage=Usage(input_tokens=2, output_tokens=2))

    async def _wait(self) -> None:
        self.calls += 1
        self.arrived.set()
        await anyio.to_thread.run_sync(self.go.wait)


@both_routes
@both_ways
def test_twenty_equal_posts_at_once_are_one_call_and_one_bill(path: str, stream: bool) -> None:
    provider = Gated()
    with hosting(provider) as service, ThreadPoolExecutor(20) as threads:
        first = threads.submit(post, service, path, stream=stream)
        provider.arrived.wait()
        others = [threads.submit(post, service, path, stream=stream) for _ in range(19)]
        for other in others:
            answer = other.result()
            assert (answer.status_code, code(answer), answer.headers["retry-after"]) == (409, "idempotency_in_progress", "1")
            assert "x-should-retry" not in answer.headers
        provider.go.set()
        assert first.result().status_code == 200
        late = [post(service, path, stream=stream) for _ in range(3)]
        assert {answer.content for answer in late} == {first.result().content}
        assert provider.calls == 1
        assert billed(service)[0] == 1


def test_the_official_client_waits_for_the_call_that_runs_and_gets_its_answer() -> None:
    provider = Gated()
    with hosting(provider) as service, ThreadPoolExecutor(1) as threads:
        headers = ALICE | {"idempotency-key": "k"}
        first = threads.submit(post, service, "/v1/chat/completions")
        provider.arrived.wait()

        def refused(response: Any) -> None:
            if response.status_code == 409:
                provider.go.set()

        http = openai.DefaultHttpxClient(event_hooks={"response": [refused]})
        with openai.OpenAI(api_key="none", base_url=f"{service.client.base_url}/v1", http_client=http, max_retries=3) as client:
            answer = client.chat.completions.create(model="echo", messages=MESSAGES, extra_headers=headers)
        assert answer.choices[0].message.content == "first more"
        assert first.result().json()["id"] == answer.id
        assert provider.calls == 1


@both_routes
def test_a_client_that_leaves_a_stream_finds_all_of_it_when_it_comes_back(path: str) -> None:
    provider = Gated()
    with hosting(provider) as service:
        body = {"model": "echo", "messages": MESSAGES, "stream": True}
        with service.client.stream("POST", path, json=body, headers=ALICE | {"idempotency-key": "k"}) as answer:
            assert "first" in next(answer.iter_text())
        assert code(post(service, path, stream=True)) == "idempotency_in_progress"
        provider.go.set()
        answer = post(service, path, stream=True)
        while answer.status_code == 409:
            answer = post(service, path, stream=True)
        assert answer.headers["idempotency-replayed"] == "true"
        assert "first " in answer.text
        assert "more" in answer.text
        assert provider.calls == 1
        assert billed(service)[0] == 1


# -- failures ----------------------------------------------------------------------------------------------------------


@both_routes
@both_ways
def test_a_failure_that_may_have_been_billed_is_the_same_failure_again(path: str, stream: bool) -> None:
    provider = ScriptedProvider(ProviderError("no answer came", retry_after=3), name="p", models=["echo"])
    with hosting(provider) as service:
        first, again = (post(service, path, stream=stream) for _ in range(2))
        assert (first.status_code, again.status_code) == (502, 502)
        assert first.json()["error"] | {"request_id": 0} == again.json()["error"] | {"request_id": 0}
        assert again.json()["error"]["request_id"] == again.headers["request-id"]
        assert (again.headers["idempotency-replayed"], again.headers["x-should-retry"]) == ("true", "false")
        assert "retry-after" not in again.headers
        assert len(provider.calls) == 1


@both_routes
@both_ways
def test_an_answer_too_large_to_keep_is_a_final_409(path: str, stream: bool) -> None:
    provider = ScriptedProvider(Say("word " * 300), name="p", models=["echo"])
    with hosting(provider, idempotency_policy=IdempotencyPolicy(max_answer_bytes=500)) as service:
        assert post(service, path, stream=stream).status_code == 200
        again = post(service, path, stream=stream)
        assert (again.status_code, code(again), again.headers["x-should-retry"]) == (409, "idempotency_answer_not_kept", "false")
        assert len(provider.calls) == 1


def test_a_store_that_is_down_is_503_before_anything_is_billed(tmp_path: Path) -> None:
    (tmp_path / "answers.db").mkdir()
    gateway = AIGateway(data_dir=tmp_path, **settings())
    with serve(gateway) as url, httpx.Client(base_url=url, timeout=30) as client:
        service = Service(client, gateway)
        for path in ROUTES_OF_CALLS:
            for stream in (False, True):
                refused = post(service, path, stream=stream)
                assert (refused.status_code, code(refused)) == (503, "storage_unavailable")
        assert billed(service) == (0, "0")
        assert post(service, "/complete", key=None).status_code == 200


# -- the document ------------------------------------------------------------------------------------------------------


def test_replays_and_refusals_fit_the_openapi_document() -> None:
    provider = ScriptedProvider("hi", ProviderError("gone"), Say("x" * 5000), "hi", name="p", models=["echo"])
    with hosting(provider, idempotency_policy=IdempotencyPolicy(max_answer_bytes=4000)) as service:
        document = service.call("GET", "/openapi.json", {}).json()
        complete = next(route for route in ROUTES if route.path == "/complete")
        by_key = {"ok": 200, "failed": 502, "large": 200, "streamed": 200}
        for key, status in by_key.items():
            first = post(service, "/complete", key=key, stream=key == "streamed", messages=[{"role": "user", "content": key}])
            assert first.status_code == status
            check(document, complete, first)
            again = post(service, "/complete", key=key, stream=key == "streamed", messages=[{"role": "user", "content": key}])
            assert again.headers["idempotency-replayed"] == "true"
            check(document, complete, again)
        check(document, complete, post(service, "/complete", key="ok", messages=[{"role": "user", "content": "other"}]))
        check(document, complete, post(service, "/complete", key="x" * 300))
        parameters = document["paths"]["/complete"]["post"]["parameters"]
        assert {"idempotency-key", "cache-control"} == {parameter["name"] for parameter in parameters if parameter["in"] == "header"}
        assert service.call("GET", "/usage", ROOT).json()["totals"]["calls"] == 4


def test_a_call_that_runs_fits_the_openapi_document() -> None:
    provider = Gated()
    with hosting(provider) as service, ThreadPoolExecutor(1) as threads:
        document = service.call("GET", "/openapi.json", {}).json()
        first = threads.submit(post, service, "/complete")
        provider.arrived.wait()
        check(document, next(route for route in ROUTES if route.path == "/complete"), post(service, "/complete"))
        provider.go.set()
        assert first.result().status_code == 200
