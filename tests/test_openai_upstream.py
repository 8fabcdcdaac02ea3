"""The whole way with a real upstream that speaks OpenAI's wire over a socket: what passes through, what is metered, what is kept."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from starlette_aigateway import AIGateway, Price, Principal, RetryPolicy
from starlette_aigateway.providers import OpenAIProvider

from .serving import serve

USAGE = {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16, "prompt_tokens_details": {"cached_tokens": 8}}
WHOLE: dict[str, Any] = {
    "id": "chatcmpl-upstream",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m-2026",
    "system_fingerprint": "fp_unknown_to_us",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}


def chunk(**fields: Any) -> bytes:
    body = {"id": "chatcmpl-s", "object": "chat.completion.chunk", "created": 1700000000, "model": "m-2026", "x_own": {"a": [1]}, **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


EVENTS = [
    chunk(**choice({"role": "assistant", "content": ""})),
    chunk(**choice({"content": 'He said "usage" '})),
    chunk(**choice({"content": "\u2028world"})),
    chunk(**choice({}, "stop")),
    chunk(choices=[], usage=USAGE),
]


class Upstream:
    """Answers what the test puts into `answers`, by default well; records what it got."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.answers: list[Response] = []

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.got.append((dict(request.headers), body))
        if self.answers:
            return self.answers.pop(0)
        if not body.get("stream"):
            return JSONResponse(WHOLE)

        async def stream() -> AsyncIterator[bytes]:
            for event in EVENTS:
                yield event
            yield b"data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def base(upstream: Upstream) -> Iterator[str]:
    async def who(connection: Any) -> Principal | None:
        return Principal(connection.headers.get("x-user", "u"), hard_cap_usd="100")

    with serve(Starlette(routes=[Route("/v1/chat/completions", upstream.chat, methods=["POST"])])) as upstream_url:
        gateway = AIGateway.in_memory(
            providers=[OpenAIProvider("sk-upstream", base_url=f"{upstream_url}/v1", models={"m": "m-2026"})],
            prices={"m": Price("1000", "2000", cache_read="100")},
            resolve_principal=who,
            retries=RetryPolicy(rounds=2, backoff=0.01),
        )
        with serve(Starlette(routes=[Mount("/ai", gateway)])) as url:
            yield f"{url}/ai"


def post(base: str, path: str, **body: Any) -> httpx.Response:
    messages = body.pop("messages", [{"role": "user", "content": "hi"}])
    return httpx.post(base + path, json={"model": "m", "messages": messages, **body}, headers=body.pop("headers", {}), timeout=20)


COST = "0.0128"
"""Four plain and eight cached input tokens, four of output: 4 * 0.001 + 8 * 0.0001 + 4 * 0.002."""


def test_an_answer_passes_through_whole_and_is_billed_by_its_own_figures(base: str, upstream: Upstream) -> None:
    answer = post(base, "/v1/chat/completions", max_completion_tokens=50, seed=7)
    assert answer.json() == WHOLE
    assert answer.headers["x-aigateway-cost-usd"] == COST
    headers, body = upstream.got[0]
    assert headers["authorization"] == "Bearer sk-upstream"
    assert (body["model"], body["max_tokens"], body["seed"]) == ("m-2026", 50, 7)
    assert "max_completion_tokens" not in body
    again = post(base, "/v1/chat/completions", max_completion_tokens=50, seed=7)
    assert (again.json(), again.headers["x-cache"]) == (WHOLE, "hit")
    native = post(base, "/complete", max_tokens=50, seed=7).json()
    assert (native["message"]["content"], native["cached"], native["usage"]["cache_read_input_tokens"]) == ("hello world", True, 8)
    assert len(upstream.got) == 1


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_passes_through_as_the_bytes_that_came_and_usage_only_to_who_asked(
    base: str, upstream: Upstream, include_usage: bool
) -> None:
    answer = post(base, "/v1/chat/completions", stream=True, stream_options={"include_usage": include_usage})
    expected = EVENTS if include_usage else EVENTS[:-1]
    assert answer.content == b"".join(expected) + b"data: [DONE]\n\n"
    assert upstream.got[0][1]["stream_options"] == {"include_usage": True}
    replayed = post(base, "/v1/chat/completions", stream=True, stream_options={"include_usage": include_usage})
    assert (replayed.content, replayed.headers["x-cache"]) == (answer.content, "hit")
    whole = post(base, "/complete").json()
    assert (whole["message"]["content"], whole["cached"]) == ('He said "usage" \u2028world', True)
    assert len(upstream.got) == 1


def test_a_whole_answer_is_replayed_as_a_stream(base: str, upstream: Upstream) -> None:
    post(base, "/complete")
    with openai.OpenAI(api_key="unused", base_url=f"{base}/v1", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        chunks = list(client.chat.completions.create(model="m", messages=messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 12
    assert len(upstream.got) == 1


def test_tool_calls_come_back_whole_and_streamed_also_from_the_cache(base: str, upstream: Upstream) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    upstream.answers.append(JSONResponse({**WHOLE, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert post(base, "/complete", tools=tools).json()["message"]["tool_calls"] == [call]
    streamed = post(base, "/v1/chat/completions", tools=tools, stream=True)
    deltas = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    numbered = [found for delta in deltas for one in delta["choices"] for found in one["delta"].get("tool_calls") or []]
    assert numbered == [{"index": 0, **call}]


def test_a_rate_limit_upstream_is_waited_out_and_an_exhausted_one_is_503_with_its_wait(base: str, upstream: Upstream) -> None:
    upstream.answers.append(JSONResponse({"error": {"message": "sk-upstream leaked"}}, 429, {"retry-after-ms": "10"}))
    assert post(base, "/complete").status_code == 200
    upstream.answers += [JSONResponse({}, 429, {"retry-after": "0.05"}) for _ in range(2)]
    refused = post(base, "/complete", messages=[{"role": "user", "content": "other"}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_provider_available")
    assert refused.headers["retry-after"] == "1"
    assert "x-should-retry" not in refused.headers


def test_an_upstream_s_error_body_is_never_relayed(base: str, upstream: Upstream) -> None:
    upstream.answers.append(JSONResponse({"error": {"message": "key sk-upstream is bad", "code": "context_length_exceeded"}}, 400))
    answer = post(base, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "provider_rejected")
    assert "sk-upstream" not in answer.text


def test_a_stream_that_is_cut_short_ends_with_an_error_and_is_not_kept(base: str, upstream: Upstream) -> None:
    upstream.answers.append(Response(b"".join(EVENTS[:2]), media_type="text/event-stream"))
    answer = post(base, "/v1/chat/completions", stream=True)
    assert answer.content.startswith(EVENTS[0] + EVENTS[1])
    assert "provider_error" in answer.text.splitlines()[-2]
    assert b"[DONE]" not in answer.content
    assert post(base, "/v1/chat/completions", stream=True).headers["x-cache"] == "miss"
