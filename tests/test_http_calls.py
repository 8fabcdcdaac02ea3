"""`/complete` and `/v1/chat/completions` over a real socket, with raw HTTP and with the official `openai` client."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from starlette_aigateway import AIGateway, AIGatewayMiddleware, Price, ProviderError, ProviderRejected, RetryPolicy
from starlette_aigateway.errors import ProviderTimeout
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.testing.providers import Die, Say, ScriptedProvider

from .serving import serve

MESSAGES: Any = [{"role": "user", "content": "hello there"}]


class Service:
    """A served gateway and a key to it."""

    def __init__(self, base: str, gateway: AIGateway, admin_token: str) -> None:
        self.url = f"{base}/api/ai-gateway"
        self.gateway = gateway
        self.admin_token = admin_token
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def key(self, **fields: Any) -> str:
        answer = self.http.post("/keys", json={"name": "k", **fields}, headers=self.admin)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["key"])

    @property
    def admin(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.admin_token}"}

    def usage(self) -> Any:
        return self.http.get("/usage", headers=self.admin).json()

    def post(self, path: str, key: str | None, body: Any = None, **options: Any) -> httpx.Response:
        headers = {**({"authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        return self.http.post(path, json=body, headers=headers, **options)


@pytest.fixture
def providers() -> list[Any]:
    return [EchoProvider(models=["echo"])]


@pytest.fixture(params=["mounted", "middleware"])
def service(request: pytest.FixtureRequest, providers: list[Any]) -> Iterator[Service]:
    async def authorize_admin(connection: Any) -> bool:
        return bool(connection.headers.get("authorization") == "Bearer let-me-in")

    gateway = AIGateway.in_memory(
        providers=providers, prices={"echo": Price("1", "2"), "m": Price("1000", "2000")}, authorize_admin=authorize_admin,
        retries=RetryPolicy(rounds=1),
    )  # fmt: skip
    if request.param == "mounted":
        app: Any = Starlette(routes=[Mount("/api/ai-gateway", gateway)])
    else:
        app = AIGatewayMiddleware(Starlette(), gateway, path="/api/ai-gateway")
    with serve(app) as base:
        service = Service(base, gateway, "let-me-in")
        with service.http:
            yield service


def events(text: str) -> list[tuple[str, Any]]:
    parsed = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        parsed.append((lines.get("event", "message"), json.loads(lines["data"]) if lines["data"] != "[DONE]" else None))
    return parsed


def test_a_completion_and_the_same_again_from_the_cache_at_cost_zero(service: Service) -> None:
    key = service.key(requests_per_minute=10)
    first = service.post("/complete", key, {"model": "echo", "messages": MESSAGES})
    assert first.status_code == 200
    body = first.json()
    assert body["message"] == {"role": "assistant", "content": "hello there"}
    assert (body["model"], body["provider"], body["finish_reason"], body["cached"]) == ("echo", "echo", "stop", False)
    assert body["cost_usd"] == "0.000009"
    assert (first.headers["x-cache"], first.headers["x-aigateway-provider"]) == ("miss", "echo")
    assert first.headers["x-aigateway-cost-usd"] == "0.000009"
    assert first.headers["request-id"] == body["id"] == first.headers["x-request-id"]
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("10", "9")
    assert first.headers["x-ratelimit-reset-requests"] == "60s"
    second = service.post("/complete", key, {"model": "echo", "messages": MESSAGES}, headers={"x-request-id": "mine"})
    assert second.json() | {"id": 0} == body | {"id": 0, "cached": True, "cost_usd": "0"}
    assert (second.headers["x-cache"], second.headers["age"], second.headers["x-aigateway-cost-usd"]) == ("hit", "0", "0")
    assert second.headers["x-request-id"] == "mine"
    assert second.headers["request-id"].startswith("req_")
    bypassed = service.post("/complete", key, {"model": "echo", "messages": MESSAGES}, headers={"cache-control": "no-store"})
    assert bypassed.headers["x-cache"] == "bypass"
    usage = service.usage()
    assert usage["totals"] | {"input_tokens": 0, "output_tokens": 0} == {
        "calls": 3, "cached_calls": 1, "input_tokens": 0, "output_tokens": 0, "cost_usd": "0.000018",
    }  # fmt: skip


def test_a_native_stream_sends_deltas_and_then_the_whole_object(service: Service) -> None:
    key = service.key()
    answer = service.post("/complete", key, {"model": "echo", "messages": MESSAGES, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *deltas, (last, whole) = events(answer.text)
    assert {kind for kind, _ in deltas} == {"delta"}
    assert "".join(delta.get("content", "") for _, delta in deltas) == "hello there"
    assert last == "done"
    assert whole["message"] == {"role": "assistant", "content": "hello there"}
    assert (whole["cost_usd"], whole["cached"], whole["usage"]["input_tokens"]) == ("0.000009", False, 3)
    again = events(service.post("/complete", key, {"model": "echo", "messages": MESSAGES, "stream": True}).text)
    assert again[-1][1]["cached"] is True


def test_the_official_client_completes_streams_and_lists_models(service: Service) -> None:
    client = openai.OpenAI(api_key=service.key(), base_url=f"{service.url}/v1", max_retries=0)
    with client:
        completion = client.chat.completions.create(model="echo", messages=MESSAGES)
        assert completion.choices[0].message.content == "hello there"
        assert completion.usage is not None
        assert completion.usage.total_tokens == 6
        for include_usage in (False, True):
            stream = client.chat.completions.create(
                model="echo", messages=MESSAGES, stream=True, stream_options={"include_usage": include_usage}
            )
            chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello there"
            assert [chunk.usage is not None for chunk in chunks].count(True) == include_usage
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="none", messages=MESSAGES)
        assert unknown.value.code == "model_not_found"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_official_async_client_completes_and_streams(service: Service) -> None:
    async with openai.AsyncOpenAI(api_key=service.key(), base_url=f"{service.url}/v1", max_retries=0) as client:
        completion = await client.chat.completions.create(model="echo", messages=MESSAGES)
        assert completion.choices[0].message.content == "hello there"
        stream = await client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        text = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(text) == "hello there"


def test_refusals_are_the_official_client_s_own_errors(service: Service) -> None:
    limited = openai.OpenAI(api_key=service.key(requests_per_minute=1), base_url=f"{service.url}/v1", max_retries=0)
    capped = openai.OpenAI(api_key=service.key(hard_cap_usd="0.0000001"), base_url=f"{service.url}/v1", max_retries=0)
    stranger = openai.OpenAI(api_key="aigw_wrong", base_url=f"{service.url}/v1", max_retries=0)
    with limited, capped, stranger:
        limited.chat.completions.create(model="echo", messages=MESSAGES)
        with pytest.raises(openai.RateLimitError) as full:
            limited.chat.completions.create(model="echo", messages=MESSAGES)
        assert 50 < int(full.value.response.headers["retry-after"]) <= 60
        with pytest.raises(openai.APIStatusError) as broke:
            capped.chat.completions.create(model="echo", messages=MESSAGES)
        assert (broke.value.status_code, broke.value.code) == (402, "spend_cap_exceeded")
        assert broke.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIStatusError) as streamed:
            capped.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        assert streamed.value.status_code == 402
        with pytest.raises(openai.AuthenticationError) as mistyped:
            stranger.chat.completions.create(model="echo", messages=MESSAGES)
        assert mistyped.value.code == "invalid_api_key"


def test_expired_revoked_rotated_and_missing_keys(service: Service) -> None:
    body = {"model": "echo", "messages": MESSAGES}
    made = service.http.post("/keys", json={"name": "k"}, headers=service.admin).json()
    assert service.post("/complete", made["key"], body).status_code == 200
    assert service.http.post("/complete", json=body, headers={"x-api-key": made["key"]}).status_code == 200
    assert service.http.delete(f"/keys/{made['id']}", headers=service.admin).status_code == 200
    revoked = service.post("/complete", made["key"], body)
    assert (revoked.status_code, revoked.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "revoked" in revoked.json()["error"]["message"]
    assert service.post("/complete", None, body).json()["error"]["code"] == "invalid_api_key"
    assert service.post("/complete", made["key"][:-1] + "x", body).status_code == 401
    assert service.post("/complete", None, body).headers["www-authenticate"] == "Bearer"


class TestProvidersThatFail:
    @pytest.fixture
    def providers(self) -> list[Any]:
        return [
            ScriptedProvider(
                RuntimeError("sk-secret in the message"),
                Die(after=1, text="one two"),
                ProviderTimeout("too slow"),
                ProviderRejected("context too long", retryable=False, billed="no", status=400),
                ProviderError("bad request", retryable=False, billed="no", status=400),
                ProviderError("busy", billed="no", status=429, retry_after=7),
                Say("fine"),
            )
        ]

    def test_each_failure_has_its_status_and_leaks_nothing(self, service: Service) -> None:
        key = service.key()
        body = {"model": "m", "messages": MESSAGES}
        broken = service.post("/complete", key, body)
        assert (broken.status_code, broken.json()["error"]["code"]) == (502, "provider_error")
        assert "secret" not in broken.text
        assert broken.headers["x-should-retry"] == "false"
        cut = events(service.post("/complete", key, {**body, "stream": True}).text)
        assert [kind for kind, _ in cut] == ["delta", "error"]
        assert cut[-1][1]["error"]["code"] == "provider_error"
        assert service.post("/complete", key, body).status_code == 504
        rejected = service.post("/v1/chat/completions", key, body)
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (400, "provider_rejected")
        assert service.post("/complete", key, body).json()["error"]["code"] == "provider_rejected"
        busy = service.post("/v1/chat/completions", key, body)
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "7")
        assert service.post("/complete", key, body).json()["message"]["content"] == "fine"


BAD_BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[1]", None),
    (b'{"model": "echo", "messages": NaN}', None),
    (b'{"model": "echo", "messages": [' + b"[" * 2000 + b"]" * 2000 + b"]}", None),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "model"),
    (b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}', "model"),
    (b'{"model": "echo"}', "messages"),
    (b'{"model": "echo", "messages": []}', "messages"),
    (b'{"model": "echo", "messages": "hi"}', "messages"),
    (b'{"model": "echo", "messages": ["hi"]}', "messages[0]"),
    (b'{"model": "echo", "messages": [{"role": "king", "content": "x"}]}', "messages[0].role"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": 5}]}', "messages[0].content"),
    (b'{"model": "echo", "messages": [{"role": "user"}]}', "messages[0].content"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "temperature": true}', "temperature"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "temperature": 1e400}', None),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "temperature": 99}', "temperature"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": true}', "max_tokens"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e3}', "max_tokens"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99999999999999999999999}', "max_tokens"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "n": -1}', "n"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "stream": "yes"}', "stream"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "prompt": 5}', "prompt"),
    (b'{"model": "echo", "prompt": {"name": "none"}}', "prompt"),
    (b"\xff\xfe", None),
]


@pytest.mark.parametrize("path", ["/complete", "/v1/chat/completions"])
def test_bad_bodies_are_refused_with_the_field_and_hold_nothing(service: Service, path: str) -> None:
    raw = service.key(hard_cap_usd="1")
    headers = {"authorization": f"Bearer {raw}", "content-type": "application/json"}
    for body, param in BAD_BODIES:
        answer = service.http.post(path, content=body, headers=headers)
        error = answer.json()["error"]
        assert 400 <= answer.status_code < 500, (body[:80], answer.text)
        assert error["code"], body[:80]
        assert error["message"], body[:80]
        assert error["request_id"].startswith("req_"), body[:80]
        if param is not None:
            assert error["param"] == param, (body[:80], error)
    form = service.http.post(path, content=b"a=b", headers={**headers, "content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 415
    large = service.http.post(path, content=b" " * (10 * 2**20 + 1), headers=headers)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    me = service.http.get("/me", headers=headers).json()
    assert {(budget["spent_usd"], budget["held_usd"]) for budget in me["budgets"]} == {("0", "0")}
    assert service.usage()["data"] == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "echo", "max_tokens": 1e999}', "out of the range"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b" ", "empty"),
        (b'{"model": }', "not valid JSON"),
    ],
)
def test_json_that_cannot_be_read_is_refused_in_words_that_say_how_to_mend_it(service: Service, body: bytes, words: str) -> None:
    headers = {"authorization": f"Bearer {service.key()}", "content-type": "application/json"}
    answer = service.http.post("/complete", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert words in answer.json()["error"]["message"]


def test_unknown_routes_and_methods(service: Service) -> None:
    assert service.http.get("/nothing").status_code == 404
    wrong = service.http.get("/complete")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert service.http.post("/complete/", json={}).status_code == 404


def test_a_host_s_request_that_fails_is_a_json_answer(service: Service) -> None:
    answer = service.http.post("/complete", json={}, headers={"authorization": "Bearer something-else"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
