"""The Chat Completions wire."""

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from starlette_aigateway.errors import InvalidRequest, ProviderError
from starlette_aigateway.types import (
    Answer,
    Chunk,
    Completion,
    CompletionRequest,
    ImageTokens,
    Message,
    Native,
    PromptRef,
    RawEvents,
    StreamItem,
    Usage,
)
from starlette_aigateway.wires import openai_chat, sse

USER: Message = {"role": "user", "content": "hi"}


def request(*messages: Any, **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="gpt-4o-mini", messages=list(messages) or [USER], **fields)


# --- requests


def test_named_fields_are_taken_out_and_all_others_travel_untouched() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = openai_chat.decode_request(
        {"model": "m", "messages": [USER], "temperature": 0, "max_tokens": 5, "n": 2, "stream": True, "tools": tools, "x_new": {"a": None}}
    )
    assert call.request == CompletionRequest(
        model="m", messages=[USER], temperature=0, max_tokens=5, n=2, params={"tools": tools, "x_new": {"a": None}}
    )
    assert (call.stream, call.include_usage) == (True, False)


def test_both_names_of_the_output_bound_become_one() -> None:
    assert openai_chat.decode_request({"max_completion_tokens": 7}).request.max_tokens == 7
    assert openai_chat.decode_request({"max_completion_tokens": 7, "max_tokens": 7}).request.max_tokens == 7
    assert openai_chat.decode_request({"max_completion_tokens": None, "max_tokens": 7}).request.max_tokens == 7


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"prompt": "write a poem"}, "prompt"),
        ({"prompt": {}}, "prompt.name"),
        ({"prompt": {"name": "a", "variable": {}}}, "prompt.variable"),
    ],
)
def test_a_body_that_contradicts_itself_is_refused(body: Mapping[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_chat.decode_request(body)
    assert caught.value.param == param


def test_a_prompt_reference_is_taken_from_the_body() -> None:
    call = openai_chat.decode_request(
        {"prompt": {"name": "p", "version": 2, "variables": {"a": 1}}, "stream_options": {"include_usage": True}}
    )
    assert call.request.prompt == PromptRef(name="p", version=2, variables={"a": 1})
    assert call.include_usage


GOOD_REQUESTS: list[CompletionRequest] = [
    request(),
    request({"role": "developer", "content": "x", "name": "n"}),
    request({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:x"}}]}),
    request({"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}),
    request({"role": "assistant", "refusal": "no"}),
    request({"role": "assistant", "function_call": {"name": "f"}}),
    request({"role": "tool", "content": "42", "tool_call_id": "1"}),
    request({"role": "function", "name": "f", "content": None}),
    request(temperature=0),
    request(temperature=2.0, max_tokens=1, n=128),
    request(params={"logit_bias": {"1": -100}, "seed": 2**63, "stop": None}),
    CompletionRequest(prompt=PromptRef(name="p")),
    CompletionRequest(model="m", messages=(USER,)),
]


@pytest.mark.parametrize("good", GOOD_REQUESTS)
def test_a_request_that_makes_sense_is_accepted(good: CompletionRequest) -> None:
    openai_chat.validate(good)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (CompletionRequest(messages=[USER]), "model"),
        (CompletionRequest(model="x" * 201, messages=[USER]), "model"),
        (CompletionRequest(model="a\nb", messages=[USER]), "model"),
        (CompletionRequest(model="\ud800", messages=[USER]), "model"),
        (CompletionRequest(model=5, messages=[USER]), "model"),  # type: ignore[arg-type]  # what HTTP bodies may hold
        (CompletionRequest(model="m"), "messages"),
        (CompletionRequest(model="m", messages="hi"), "messages"),  # type: ignore[arg-type]  # as above
        (CompletionRequest(model="m", messages={"a": 1}), "messages"),  # type: ignore[arg-type]  # as above
        (CompletionRequest(model="m", messages=[USER] * 10_001), "messages"),
        (request("hi"), "messages[0]"),
        (request({}), "messages[0].role"),
        (request(USER, {"role": "User", "content": "x"}), "messages[1].role"),
        (request({"role": ["user"], "content": "x"}), "messages[0].role"),
        (request({"role": "user"}), "messages[0].content"),
        (request({"role": "user", "content": None}), "messages[0].content"),
        (request({"role": "assistant", "content": None}), "messages[0].content"),
        (request({"role": "assistant", "content": None, "tool_calls": []}), "messages[0].content"),
        (request({"role": "user", "content": None, "refusal": "no"}), "messages[0].content"),
        (request({"role": "user", "content": 5}), "messages[0].content"),
        (request({"role": "user", "content": ["x"]}), "messages[0].content[0]"),
        (request({"role": "user", "content": [{"text": "x"}]}), "messages[0].content[0]"),
        (request({"role": "tool", "content": "x"}), "messages[0].tool_call_id"),
        (request({"role": "assistant", "content": "", "tool_calls": {"a": 1}}), "messages[0].tool_calls"),
        (request({"role": "user", "content": "a\ud800"}), "messages[0].content"),
        (request({"role": "user", "content": "a", "name": "\udc00"}), "messages[0].name"),
        (request({"role": "user", "content": "a", "x": float("nan")}), "messages[0].x"),
        (request(temperature=True), "temperature"),
        (request(temperature=-0.1), "temperature"),
        (request(temperature=10**400), "temperature"),
        (request(temperature=float("nan")), "temperature"),
        (request(temperature=float("inf")), "temperature"),
        (request(temperature="1"), "temperature"),
        (request(max_tokens=0), "max_tokens"),
        (request(max_tokens=True), "max_tokens"),
        (request(max_tokens=1.0), "max_tokens"),
        (request(max_tokens=10_000_001), "max_tokens"),
        (request(n=0), "n"),
        (request(n=129), "n"),
        (request(params={"top_p": float("nan")}), "top_p"),
        (request(params={"a": {"b": [1, float("-inf")]}}), "a.b[1]"),
        (request(params={"a": {1: 2}}), "a"),
        (request(params={"a": b"bytes"}), "a"),
        (request(params={"a": [{"b": {1, 2}}]}), "a[0].b"),
        (request(params={"a": Decimal(1)}), "a"),
        (request(params={"a": 1 << 2000}), "a"),
        (request(params={"a": "\ud800"}), "a"),
        (request(params={"a": {"\ud800": 1}}), "a"),
        (request(params={1: 2}), "params"),
        (request(params={"max_completion_tokens": 10**9}), "max_completion_tokens"),
        (request(params={"stream": True}), "stream"),
        (request(prompt=PromptRef(name="")), "prompt.name"),
        (request(prompt=PromptRef(name="p", version=True)), "prompt.version"),
        (request(prompt=PromptRef(name="p", label=5)), "prompt.label"),  # type: ignore[arg-type]  # what HTTP bodies may hold
        (request(prompt=PromptRef(name="p", variables=[])), "prompt.variables"),  # type: ignore[arg-type]  # as above
        (request(prompt=PromptRef(name="p", variables={"a": float("nan")})), "prompt.variables.a"),
    ],
)
def test_a_request_that_makes_no_sense_names_the_field(bad: CompletionRequest, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_chat.validate(bad)
    assert caught.value.param == param
    str(caught.value).encode()


def test_nesting_is_bounded() -> None:
    openai_chat.validate(request(params={"a": deep(64)}))
    for levels in (65, 100_000):
        with pytest.raises(InvalidRequest, match="deeper than 64"):
            openai_chat.validate(request(params={"a": deep(levels)}))


def test_a_list_that_holds_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(InvalidRequest):
        openai_chat.validate(request(params={"a": ring}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
PARAM_NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1).filter(
    lambda name: name not in {"model", "messages", "temperature", "n", "stream", "prompt"}
)
REQUESTS = st.builds(
    CompletionRequest,
    model=st.just("m"),
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}), min_size=1, max_size=4
    ),
    temperature=st.none() | st.floats(0, 2),
    max_tokens=st.none() | st.integers(1, 10**7),
    n=st.none() | st.integers(1, 128),
    params=st.dictionaries(PARAM_NAMES, JSON, max_size=4),
)


@given(REQUESTS, st.booleans(), st.sampled_from(["max_tokens", "max_completion_tokens"]))
def test_what_is_sent_upstream_is_what_the_caller_sent(sent: CompletionRequest, stream: bool, field: str) -> None:
    openai_chat.validate(sent)
    body = json.loads(openai_chat.encode_request(sent, stream=stream, max_tokens_field=field))
    call = openai_chat.decode_request(body)
    assert call.request == sent
    assert call.stream == call.include_usage == stream
    assert body.get(field) == sent.max_tokens


def test_the_decided_bound_is_the_only_one_that_goes_out() -> None:
    sent = CompletionRequest(model="m", messages=[USER], max_tokens=5, params={"max_tokens": 999, "max_completion_tokens": 999, "n": 9})
    body = json.loads(openai_chat.encode_request(sent, stream=False, max_tokens_field="max_completion_tokens"))
    assert body == {"model": "m", "messages": [USER], "max_completion_tokens": 5}


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_no_other_name_of_the_bound_goes_out_beside_ours_and_without_ours_the_callers_does(field: str) -> None:
    aliases = dict.fromkeys(["max_output_tokens", "max_new_tokens", "max_tokens_to_sample", "num_predict", "n_predict"], 999)
    sent = CompletionRequest(model="m", messages=[USER], max_tokens=5, params={**aliases, "max_tokens": 999, "max_completion_tokens": 999})
    assert json.loads(openai_chat.encode_request(sent, stream=False, max_tokens_field=field)) == {
        "model": "m",
        "messages": [USER],
        field: 5,
    }
    theirs = CompletionRequest(model="m", messages=[USER], params=aliases)
    assert json.loads(openai_chat.encode_request(theirs, stream=False)) == {"model": "m", "messages": [USER], **aliases}


# --- cost


def test_every_parameter_that_the_official_client_knows_has_a_cost() -> None:
    known = set(CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert known - set(openai_chat.PARAMETERS) == set()


def part(**fields: Any) -> CompletionRequest:
    return request({"role": "user", "content": [{"type": "text", "text": "a"}, fields]})


PICTURE = "data:image/png;base64,AA=="
FIRST_PART = "messages[0].content[1]"


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (request(params={"web_search_options": {}}), "web_search_options"),
        (request(params={"service_tier": "priority"}), "service_tier"),
        (request(params={"service_tier": ["default"]}), "service_tier"),
        (request(params={"brand_new": 1}), "brand_new"),
        (request(params={"cache_control": {"type": "ephemeral"}}), "cache_control"),
        (request(params={"modalities": ["text", "audio"]}), "modalities"),
        (request(params={"modalities": "audio"}), "modalities"),
        (request(params={"modalities": {"text": True}}), "modalities"),
        (request(params={"prediction": {"type": "content", "content": "x"}}), "prediction"),
        (request(params={"tools": [{"type": "function"}, {"type": "web_search"}]}), "tools[1]"),
        (request(params={"tools": ["web_search"]}), "tools[0]"),
        (request(params={"tools": {"type": "web_search"}}), "tools"),
        (request(params={"tools": "web_search"}), "tools"),
        (request(params={"tools": [{"type": ["function"]}]}), "tools[0]"),
        (
            request(params={"tools": [{"type": "function", "function": {}, "allowed_callers": ["code_execution"]}]}),
            "tools[0].allowed_callers",
        ),
        (request(params={"tools": [{"type": "function", "cache_control": {"type": "ephemeral"}}]}), "tools[0].cache_control"),
        (request(params={"functions": {"name": "f"}}), "functions"),
        (request(params={"functions": ["f"]}), "functions[0]"),
        (request(params={"thinking": True}), "thinking"),
        (request(params={"thinking": {"type": ["enabled"]}}), "thinking"),
        (request(params={"thinking": {"type": "enabled", "budget_tokens": 2000}}), "thinking.budget_tokens"),
        (request(max_tokens=2000, params={"thinking": {"type": "enabled", "budget_tokens": 2000}}), "thinking.budget_tokens"),
        (request(max_tokens=2000, params={"thinking": {"type": "enabled", "budget_tokens": "9"}}), "thinking.budget_tokens"),
        (part(type="image_url", image_url={"url": "https://x/y.png"}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url="HTTP://x/y.png"), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"file_id": "f"}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": PICTURE, "file_id": "f"}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": PICTURE, "detail": ["low"]}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": "data:application/pdf;base64,AA=="}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": [PICTURE]}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url="data:image/png,text"), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url="data:image/svg+xml;base64,AA=="), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url=PICTURE, file={"file_id": "f"}), f"{FIRST_PART}.file"),
        (part(type="input_audio", input_audio={}), f"{FIRST_PART}.input_audio"),
        (part(type="file", file={"file_data": "x"}), f"{FIRST_PART}.file"),
        (part(type="video_url"), FIRST_PART),
        (part(type="tool_result", content=[{"type": "image_url", "image_url": PICTURE}]), FIRST_PART),
        (part(type="text", text=[{"type": "image_url", "image_url": PICTURE}]), f"{FIRST_PART}.text"),
        (part(type="text", text="a", image_url={"url": "https://x/y.png"}), f"{FIRST_PART}.image_url"),
        (part(type="text", text="a", prompt_cache_breakpoint={"mode": "explicit"}), f"{FIRST_PART}.prompt_cache_breakpoint"),
        (request({"role": "assistant", "content": None, "audio": {"id": "a"}}), "messages[0].audio"),
        (request({"role": "user", "content": "a", "images": ["AA=="]}), "messages[0].images"),
        (request({"role": "user", "content": {"type": "file"}}), "messages[0].content"),
        (request({"role": "user", "content": [["a"]]}), "messages[0].content[0]"),
        (request({"role": "user", "content": "a", "x" * 1000: 1}), "messages[0].…"),
    ],
)
def test_what_has_no_bound_is_found_and_named(sent: CompletionRequest, found: str) -> None:
    assert list(openai_chat.unbounded_parameters(sent)) == [found]


@pytest.mark.parametrize(
    "alias",
    [
        "best_of", "max_output_tokens", "max_tokens_to_sample", "max_new_tokens", "num_predict", "n_predict", "max_length",
        "max_gen_len", "min_tokens", "options", "num_completions", "num_generations", "candidate_count", "generation_config",
        "extra_body", "max_tool_calls", "use_beam_search", "thinking_budget", "thinking_token_budget", "plugins", "models", "N",
        "MAX_TOKENS", "max_tokens ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [1, {"num_predict": 10**6}])
def test_every_other_name_of_a_bound_is_without_bound(alias: str, value: Any) -> None:
    assert list(openai_chat.unbounded_parameters(request(max_tokens=5, params={alias: value}))) == [alias]


def test_all_that_has_no_bound_is_found_so_that_one_that_is_allowed_hides_no_other() -> None:
    parts = [{"type": "image_url", "image_url": "https://x/y.png"}, {"type": "file", "file": {"file_id": "f"}}]
    sent = request({"role": "user", "content": parts}, params={"web_search_options": {}, "tools": ["a", "b"]})
    found = list(openai_chat.unbounded_parameters(sent))
    assert found == ["web_search_options", "tools[0]", "tools[1]", "messages[0].content[0].image_url", "messages[0].content[1].file"]
    assert [openai_chat.kind_of(path) for path in found] == [
        "web_search_options", "tools", "tools", "messages.content.image_url", "messages.content.file",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sent",
    [
        request(),
        request(params={"web_search_options": None, "service_tier": "default", "modalities": ["text"], "top_p": 0.1, "store": True}),
        request(params={"tools": [{"type": "function", "function": {}}, {"type": "custom"}], "response_format": {"type": "json_object"}}),
        request(params={"functions": [{"name": "f"}], "top_k": 5, "thinking": {"type": "adaptive"}}),
        request(max_tokens=2001, params={"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        part(type="image_url", image_url={"url": PICTURE}),
        part(type="image_url", image_url={"url": "DATA:image/JPEG;charset=x;BASE64,AA==", "detail": "low"}),
        request(
            {"role": "tool", "tool_call_id": "t", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": PICTURE}]}
        ),
        request({"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None, "tool_calls": [{"id": "t"}]}),
    ],
)
def test_what_is_bounded_passes(sent: CompletionRequest) -> None:
    assert list(openai_chat.unbounded_parameters(sent)) == []


BOUNDS = ImageTokens(low=10, high=300, auto=2000)


@pytest.mark.parametrize(
    ("detail", "tokens"), [("low", 10), ("high", 300), ("auto", 2000), ("original", 2000), (None, 2000), (["low"], 2000)]
)
def test_an_image_costs_what_its_detail_can_cost_at_the_most(detail: Any, tokens: int) -> None:
    assert openai_chat.images(part(type="image_url", image_url={"url": PICTURE, "detail": detail}), BOUNDS).tokens == tokens
    assert openai_chat.images(part(type="input_image", detail=detail), BOUNDS).tokens == tokens
    assert openai_chat.images(request(), BOUNDS) == (0, 0, 0)


def test_an_image_without_a_detail_may_be_the_dearest() -> None:
    picture = {"type": "image_url", "image_url": PICTURE}
    assert openai_chat.images(part(**picture), BOUNDS).tokens == 2000
    assert openai_chat.images(part(**picture), ImageTokens(low=500, high=300)).tokens == 500
    assert openai_chat.images(part(**picture), ImageTokens()).tokens >= 2833 + 8 * 5667


def test_images_in_messages_of_tools_and_inside_of_other_parts_count() -> None:
    picture = {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}
    nested = {"type": "tool_result", "content": [picture, {"deeper": [picture]}]}
    sent = request({"role": "tool", "tool_call_id": "t", "content": [picture]}, {"role": "user", "content": [nested, picture]})
    assert openai_chat.images(sent, BOUNDS) == (4, 40, 4 * len(PICTURE))


def test_the_bytes_of_an_inlined_image_are_its_own_and_those_of_an_address_are_text() -> None:
    assert openai_chat.images(part(type="image_url", image_url={"url": PICTURE}), BOUNDS).bytes == len(PICTURE)
    assert openai_chat.images(part(type="image_url", image_url=PICTURE), BOUNDS).bytes == len(PICTURE)
    for url in ("https://x/y.png", "data:text/plain,a long text", PICTURE + "ü"):
        assert openai_chat.images(part(type="image_url", image_url={"url": url}), BOUNDS).bytes == 0


@pytest.mark.parametrize(
    "params",
    [
        {"reasoning_effort": "low"},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"reasoning": {"max_tokens": 5}},
        {"enable_thinking": True},
    ],
)
def test_a_call_that_asks_for_reasoning_is_told(params: dict[str, Any]) -> None:
    assert openai_chat.asks_for_reasoning(request(params=params))


@pytest.mark.parametrize("params", [{}, {"reasoning_effort": None}, {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}])
def test_a_call_that_asks_for_none_is_told(params: dict[str, Any]) -> None:
    assert not openai_chat.asks_for_reasoning(request(params=params))


# --- whole answers


def body(**changes: Any) -> bytes:
    whole: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-mini-2024",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello", "refusal": None}, "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    return json.dumps({**whole, **changes}).encode()


def test_an_answer_is_read_and_its_body_kept() -> None:
    answer = openai_chat.decode_completion(body())
    assert answer == Completion(
        message={"role": "assistant", "content": "Hello", "refusal": None},
        finish_reason="stop",
        usage=Usage(input_tokens=10, output_tokens=5),
        model="gpt-4o-mini-2024",
        id="chatcmpl-1",
        native=Native("openai_chat", body()),
    )


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"null",
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": "hi"}]}',
        b'{"error": {"message": "sk-secret"}}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        b"[" * 100_000,
        body()[:-10],
    ],
)
def test_what_is_not_a_completion_is_refused_without_repeating_it(garbage: bytes) -> None:
    with pytest.raises(ValueError, match=r"^the (body is not a chat completion|chat completion has no choices)$"):
        openai_chat.decode_completion(garbage)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        5,
        {},
        {"prompt_tokens": 1},
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": 1.5, "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": "1", "completion_tokens": 1},
        {"prompt_tokens": 10**12, "completion_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 10**12},
        {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}},
        {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": -2}},
        {"prompt_tokens": 1, "completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": -2}},
    ],
)
def test_a_usage_that_cannot_be_believed_is_none(usage: Any) -> None:
    assert openai_chat.decode_completion(body(usage=usage)).usage is None


def test_cached_and_reasoning_tokens_are_read() -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    assert openai_chat.decode_completion(body(usage=usage)).usage == Usage(
        input_tokens=10, output_tokens=5, cache_read_input_tokens=4, cache_creation_input_tokens=2, reasoning_output_tokens=3
    )


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115, "completion_tokens_details": {"reasoning_tokens": 100}},
        {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115},
        {"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 100}},
    ],
)
def test_reasoning_that_an_upstream_leaves_out_of_the_output_is_counted(usage: Any) -> None:
    found = openai_chat.decode_completion(body(usage=usage)).usage
    assert found is not None
    assert found.output_tokens == 105


def answered(**fields: Any) -> Answer:
    defaults: dict[str, Any] = {
        "message": {"content": "Hello"},
        "usage": Usage(input_tokens=10, output_tokens=5, cache_read_input_tokens=2, reasoning_output_tokens=1),
        "model": "m",
        "provider": "p",
        "cost_usd": Decimal(0),
        "cached": False,
        "request_id": "req_1",
    }
    return Answer(**{**defaults, **fields})


def test_an_answer_of_this_wire_passes_through_byte_for_byte() -> None:
    native = body(x_vendor={"kept": True})
    assert openai_chat.encode_completion(answered(native=Native("openai_chat", native)), created=1) == native


def test_an_answer_of_another_wire_is_built_so_that_the_official_client_reads_it() -> None:
    encoded = openai_chat.encode_completion(answered(native=Native("anthropic", b"{}")), created=77)
    parsed = ChatCompletion.model_validate_json(encoded, strict=True)
    assert (parsed.id, parsed.created, parsed.model, parsed.object) == ("chatcmpl-req_1", 77, "m", "chat.completion")
    assert (parsed.choices[0].message.role, parsed.choices[0].message.content, parsed.choices[0].finish_reason) == (
        "assistant",
        "Hello",
        "stop",
    )
    assert openai_chat.decode_completion(encoded).usage == answered().usage


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (
            {"code": "context_length_exceeded", "type": "invalid_request_error", "param": "messages", "message": "sk-secret"},
            {"code", "type", "param"},
        ),
        ({"code": "sk-proj-AbCdEf", "type": "Bearer x", "param": None}, set()),
        ({"code": "x" * 65, "type": 5}, set()),
        ("text", set()),
    ],
)
def test_of_an_error_body_only_plain_identifiers_survive(error: Any, facts: set[str]) -> None:
    assert set(openai_chat.error_facts(json.dumps({"error": error}).encode())) == facts


def test_an_error_body_that_is_garbage_says_nothing() -> None:
    assert openai_chat.error_facts(b"<html>sk-secret") == {}
    assert openai_chat.error_facts(b'["error"]') == {}


# --- streams


def event(delta: Mapping[str, Any] | None = None, finish: str | None = None, index: int = 0, **fields: Any) -> bytes:
    choices = [] if delta is None else [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]
    data = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, "usage": None, **fields}
    return sse.encode_event(json.dumps(data).encode())


USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
STREAM = [
    event({"role": "assistant", "content": ""}),
    event({"content": "Hel"}),
    event({"content": "lo"}),
    event({}, "stop"),
    event(usage=USAGE),
]


def read(*pieces: bytes, reader: openai_chat.EventReader | None = None) -> list[StreamItem]:
    reader = reader or openai_chat.EventReader()
    items = [item for piece in pieces for item in reader.feed(piece)]
    return [*items, *reader.close()]


def test_events_that_carry_nothing_pass_as_one_run_of_bytes() -> None:
    reader = openai_chat.EventReader()
    items = read(b"".join(STREAM) + openai_chat.DONE, reader=reader)
    assert items[0] == RawEvents("openai_chat", b"".join(STREAM[:3]), 3)
    assert [type(item) for item in items[1:]] == [Chunk, Chunk]
    assert items[1] == Chunk(finish_reason="stop", model="m", id="c1", native=Native("openai_chat", STREAM[3]))
    assert items[2] == Chunk(usage=Usage(input_tokens=10, output_tokens=5), model="m", id="c1", native=Native("openai_chat", STREAM[4]))
    assert reader.saw_done
    assert reader.saw_finish


TRICKY = st.sampled_from(
    [
        "usage",
        '"usage"',
        '"usage":{"prompt_tokens":1}',
        '"finish_reason":"stop"',
        "[DONE]",
        'data: {"usage":1}\n\n',
        "error",
        '\\"usage\\":',
        "\u2028",
        "é\\u0075",
        "a\n\nb",
    ]
)
TEXTS = st.text(max_size=20) | TRICKY
EVENTS = st.one_of(
    TEXTS.map(lambda text: event({"content": text})),
    TEXTS.map(lambda text: event({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})),
    TEXTS.map(lambda text: event({"content": text}, logprobs={"content": [{"token": text}]})),
    st.just(event({"role": "assistant", "content": ""})),
    st.just(event({"content": "x"}, "stop")),
    st.just(event(usage=USAGE)),
    st.just(event()),
    st.just(b": keep-alive\n\n"),
    st.just(event({"content": "compact"}).replace(b'": ', b'":')),
    st.just(event({}, "length").replace(b'"finish_reason"', b'"f\\u0069nish_reason"')),
    st.just(event(usage=USAGE).replace(b'"usage"', b'"us\\u0061ge"')),
    st.just(event(usage=USAGE).replace(b'"usage": ', b'"usage"\ndata: :\ndata:  ')),
    st.just(event({}, "stop").replace(b'"finish_reason": ', b'"finish_reason" : ')),
)


def everything(items: Iterable[StreamItem]) -> list[Chunk]:
    """All chunks, without the bytes that they came as."""
    return [
        Chunk(delta=chunk.delta, index=chunk.index, finish_reason=chunk.finish_reason, usage=chunk.usage, model=chunk.model, id=chunk.id)
        for chunk in openai_chat.chunks(items)
    ]


def sent_on(items: Iterable[StreamItem]) -> bytes:
    return b"".join(openai_chat.encode_items(items, id="i", model="m", created=1, include_usage=True))


@given(st.lists(EVENTS, max_size=8), st.lists(st.integers(0, 10_000), max_size=10))
@example([event(usage=USAGE).replace(b'"usage"', b'"us\\u0061ge"')], [])
def test_no_usage_and_no_finish_reason_is_ever_missed_wherever_the_bytes_are_split(events: list[bytes], cuts: list[int]) -> None:
    data = b"".join(events)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    items = read(*[data[start:end] for start, end in pairwise(edges)])
    expected = [json.loads(found.data) for found in sse.SSEDecoder().feed(data)]
    assert [chunk.usage for chunk in everything(items) if chunk.usage] == [
        Usage(input_tokens=10, output_tokens=5) for one in expected if one["usage"]
    ]
    for item in items:
        if isinstance(item, RawEvents):
            raw = [json.loads(found.data) for found in sse.SSEDecoder().feed(item.data)]
            assert len(raw) == item.count
            assert not any(one["usage"] or any(choice["finish_reason"] for choice in one["choices"]) for one in raw)
    assert everything(items) == everything(read(data))
    assert sent_on(items) == sent_on(read(data))
    assert [json.loads(found.data) for found in sse.SSEDecoder().feed(sent_on(items))] == expected


@pytest.mark.parametrize("text", ["the usage of words", 'say "usage": 5 and "finish_reason": "stop"', '\\"usage\\"', "an error", "data: x"])
def test_text_that_talks_about_usage_stays_on_the_fast_path(text: str) -> None:
    assert [type(item) for item in read(event({"content": text}))] == [RawEvents]


def test_nothing_is_read_after_done() -> None:
    reader = openai_chat.EventReader()
    assert read(openai_chat.DONE + event({"content": "late"}), event({"content": "later"}), reader=reader) == []


@pytest.mark.parametrize(
    "bad",
    [
        b'data: {"error": {"message": "sk-secret", "code": "server_error"}}\n\n',
        b'event: error\ndata: {"message": "sk-secret"}\n\n',
        b'data: {"message": "sk-secret"}\nevent: error\n\n',
        b'data: {"object": "error", "message": "sk-secret"}\n\n',
        b'data: {"usage": {"sk-secret\n\n',
        b'data: {"choices": 5, "finish_reason": 1}\n\n',
    ],
)
def test_an_error_on_a_stream_comes_after_what_was_said_and_repeats_nothing(bad: bytes) -> None:
    found: list[StreamItem] = []
    with pytest.raises(ProviderError) as caught:
        found.extend(openai_chat.EventReader().feed(event({"content": "a"}) + event({"content": "b"}, "stop") + bad))
    assert [chunk.text for chunk in openai_chat.chunks(found)] == ["a", "b"]
    assert caught.value.billed == "unknown"
    assert "secret" not in f"{caught.value} {caught.value.details}"


def test_an_event_without_end_is_an_error() -> None:
    reader = openai_chat.EventReader(max_event_bytes=10)
    with pytest.raises(ProviderError, match="too long"):
        list(reader.feed(b"data: " + b"x" * 20))


def test_a_last_event_without_its_blank_line_counts_and_a_cut_one_does_not() -> None:
    whole, cut = openai_chat.EventReader(), openai_chat.EventReader()
    assert [chunk.usage for chunk in everything(read(STREAM[4][:-2], reader=whole))] == [Usage(input_tokens=10, output_tokens=5)]
    assert read(STREAM[4][:-12], reader=cut) == []
    done = openai_chat.EventReader()
    assert read(b"data: [DONE]", reader=done) == []
    assert done.saw_done


def test_an_event_with_several_choices_goes_out_once() -> None:
    both = [{"index": index, "delta": {"content": "x"}, "finish_reason": "stop"} for index in (0, 1)]
    sent = sse.encode_event(json.dumps({"id": "c", "choices": both, "usage": USAGE}).encode())
    items = read(sent)
    assert [(chunk.index, chunk.usage is not None) for chunk in everything(items)] == [(0, True), (1, False)]
    assert sent_on(items) == sent


@pytest.mark.parametrize(
    ("delta", "content"),
    [
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant"}, False),
        ({"content": None, "tool_calls": None}, False),
        ({"content": "a"}, True),
        ({"refusal": "no"}, True),
        ({"tool_calls": [{"index": 0}]}, True),
        ({"reasoning_content": "hm"}, True),
    ],
)
def test_a_role_alone_is_not_content(delta: Mapping[str, Any], content: bool) -> None:
    (item,) = read(event(delta))
    assert openai_chat.has_content(item) is content
    assert openai_chat.has_content(Chunk(delta=delta)) is content


def test_the_end_of_an_empty_answer_is_content_enough() -> None:
    assert openai_chat.has_content(Chunk(finish_reason="stop"))


def test_a_chunk_that_is_there_for_its_usage_is_stripped_for_whoever_did_not_ask() -> None:
    items = read(b"".join(STREAM))
    assert [openai_chat.usage_only(item) for item in items if isinstance(item, Chunk)] == [False, True]
    out = b"".join(openai_chat.encode_items(items, id="i", model="m", created=1, include_usage=False))
    assert out == b"".join(STREAM[:4])


def test_a_chunk_of_another_wire_is_built_so_that_the_official_client_reads_it() -> None:
    chunk = Chunk(delta={"content": "x"}, native=Native("anthropic", b"event: y\n\n"))
    (found,) = sse.SSEDecoder().feed(openai_chat.encode_chunk(chunk, id="i", model="m", created=7))
    parsed = ChatCompletionChunk.model_validate_json(found.data, strict=True)
    assert (parsed.id, parsed.model, parsed.created, parsed.choices[0].delta.content) == ("i", "m", 7, "x")
    (found,) = sse.SSEDecoder().feed(
        openai_chat.encode_chunk(Chunk(usage=Usage(input_tokens=1, output_tokens=2)), id="i", model="m", created=7)
    )
    parsed = ChatCompletionChunk.model_validate_json(found.data, strict=True)
    assert parsed.choices == []
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 3


def test_a_stream_is_put_together_again() -> None:
    calls: list[dict[str, Any]] = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}],
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ]
    items = read(*[event(delta) for delta in calls], event({"content": "other"}, index=1), event({}, "tool_calls"), event(usage=USAGE))
    whole = openai_chat.assemble(items)
    assert whole.message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert (whole.finish_reason, whole.usage, whole.model, whole.id) == ("tool_calls", Usage(input_tokens=10, output_tokens=5), "m", "c1")


def test_an_old_function_call_is_put_together_again() -> None:
    deltas: list[dict[str, Any]] = [
        {"function_call": {"name": "f", "arguments": "{"}},
        {"function_call": {"arguments": "}"}},
        {"refusal": "n"},
        {"refusal": "o"},
    ]
    whole = openai_chat.assemble(read(*[event(delta) for delta in deltas]))
    assert whole.message == {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}, "refusal": "no"}


CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.text(min_size=1),
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": st.text(min_size=1), "arguments": st.text()}),
        }
    ),
    min_size=1,
    max_size=3,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | st.text()}, optional={"tool_calls": CALLS, "refusal": st.text()}
)


@given(MESSAGES, st.sampled_from(["stop", "length"]), st.booleans())
def test_a_replayed_answer_is_the_answer(message: Any, finish: str, include_usage: bool) -> None:
    usage = Usage(input_tokens=3, output_tokens=4, cache_read_input_tokens=1)
    completion = Completion(message=message, finish_reason=finish, usage=usage, model="m", id="c")
    reader = openai_chat.EventReader()
    items = read(*openai_chat.replay(completion, id="c", model="m", created=1, include_usage=include_usage), reader=reader)
    whole = openai_chat.assemble(items)
    assert reader.saw_done
    expected = {name: value for name, value in message.items() if value is not None}
    found = {name: value for name, value in whole.message.items() if value is not None}
    if message["content"] is None:
        expected["content"] = ""  # the role chunk opens the text
    assert found == expected
    assert (whole.finish_reason, whole.model, whole.id) == (finish, "m", "c")
    assert whole.usage == (usage if include_usage else None)


def test_a_replay_holds_all_choices_of_the_provider() -> None:
    both = [{"index": index, "message": {"role": "assistant", "content": str(index)}, "finish_reason": "stop"} for index in (0, 1)]
    completion = openai_chat.decode_completion(body(choices=both))
    items = read(*openai_chat.replay(completion, id="c", model="m", created=1, include_usage=False))
    assert [(chunk.index, chunk.text) for chunk in openai_chat.chunks(items) if chunk.text] == [(0, "0"), (1, "1")]


def test_received_output_is_counted_in_bytes() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": "é"},
        {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": "{}"}}]},
    ]
    assert openai_chat.output_bytes(read(*[event(delta) for delta in deltas])) == 2 + 3
    assert openai_chat.output_bytes([RawEvents("openai_chat", b"data: {garbage\n\n", 1)]) == 16


def test_the_official_client_reads_a_replay() -> None:
    completion = Completion(message={"role": "assistant", "content": "Hello"}, usage=Usage(input_tokens=1, output_tokens=2))
    events = openai_chat.replay(completion, id="c", model="m", created=1, include_usage=True)
    parsed = [ChatCompletionChunk.model_validate_json(found.data, strict=True) for found in sse.SSEDecoder().feed(b"".join(events[:-1]))]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parsed if chunk.choices) == "Hello"
