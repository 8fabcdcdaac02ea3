"""The Chat Completions wire: requests."""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.errors import InvalidRequest
from starlette_aigateway.types import (
    CompletionRequest,
    Message,
    PromptRef,
)
from starlette_aigateway.wires import openai_chat

USER: Message = {"role": "user", "content": "hi"}


def request(*messages: Any, **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="gpt-4o-mini", messages=list(messages) or [USER], **fields)


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
