"""The Messages wire: what is said in it, what is refused, and that its answers and streams come out in the canonical form."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import anthropic.types as official
import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from anthropic.types.shared import ErrorResponse
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from starlette_aigateway.errors import ProviderError, ProviderRejected
from starlette_aigateway.types import Chunk, CompletionRequest, Usage
from starlette_aigateway.wires import anthropic_messages, openai_chat, sse

REQUESTS: TypeAdapter[Any] = TypeAdapter(MessageCreateParamsNonStreaming)
EVENTS: TypeAdapter[Any] = TypeAdapter(official.RawMessageStreamEvent)
PIXEL = "data:image/png;base64,iVBORw0KGgo="
MARK = {"type": "ephemeral"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def exhaust(value: Any) -> Any:
    """Pydantic checks what is iterable only while it is iterated."""
    if isinstance(value, Mapping):
        return {name: exhaust(member) for name, member in value.items()}
    if isinstance(value, Iterator | list | tuple):
        return [exhaust(member) for member in value]
    return value


def encode(*messages: Any, max_tokens: int | None = None, temperature: float | None = None, n: int | None = None, **params: Any) -> Any:
    """The decoded body, after the official types have found nothing wrong with it."""
    request = CompletionRequest(
        model="claude-x",
        messages=messages or ({"role": "user", "content": "x"},),
        max_tokens=max_tokens,
        temperature=temperature,
        n=n,
        params=params,
    )
    openai_chat.validate(request)
    body = json.loads(anthropic_messages.encode_request(request, stream=False))
    known = exhaust(REQUESTS.validate_python(body))
    assert body.keys() - known.keys() <= {"temperature", "top_p", "top_k"}, "the official types leave out what older models take"
    return body


def refused(*messages: Any, **fields: Any) -> ProviderRejected:
    with pytest.raises(ProviderRejected) as caught:
        encode(*messages, **fields)
    assert (caught.value.retryable, caught.value.billed, caught.value.status) == (True, "no", None)
    assert caught.value.param is not None
    assert caught.value.param in str(caught.value)
    return caught.value


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def call(arguments: Any = '{"city": "Bern"}', **fields: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}, **fields}


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_plain_request_says_what_was_asked_and_no_more() -> None:
    assert encode({"role": "user", "content": "hello"}, max_tokens=9) == {
        "model": "claude-x",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": [text("hello")]}],
    }


def test_the_required_bound_is_given_where_nobody_gave_one() -> None:
    assert encode()["max_tokens"] == anthropic_messages.DEFAULT_MAX_TOKENS == 4096
    request = CompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])
    assert json.loads(anthropic_messages.encode_request(request, stream=True, default_max_tokens=77))["max_tokens"] == 77


def test_a_stream_is_asked_for() -> None:
    request = CompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])
    assert json.loads(anthropic_messages.encode_request(request, stream=True))["stream"] is True


def test_system_and_developer_messages_become_the_system_prompt_wherever_they_stand() -> None:
    body = encode(
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [text("two"), text(" ")]},
        {"role": "user", "content": "a"},
        {"role": "system", "content": "three"},
        {"role": "user", "content": "b"},
    )
    assert body["system"] == "one\ntwo\nthree"
    assert body["messages"] == [{"role": "user", "content": [text("a"), text("b")]}]


def test_a_system_prompt_that_is_to_be_cached_stays_in_its_parts() -> None:
    parts = [{**text("long"), "cache_control": MARK}, text("short")]
    assert encode({"role": "system", "content": parts}, {"role": "user", "content": "x"})["system"] == parts


def test_a_conversation_with_tools_is_turns_of_blocks() -> None:
    body = encode(
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [call(), call(id="c2", arguments="")],
            "refusal": None,
            "annotations": [],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "why?"},
        tools=[WEATHER],
    )
    assert body["messages"] == [
        {"role": "user", "content": [text("weather?")]},
        {
            "role": "assistant",
            "content": [
                text("let me see"),
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [text("sunny")]},
                {"type": "tool_result", "tool_use_id": "c2"},
                text("thanks"),
            ],
        },
        {"role": "assistant", "content": [text("no")]},
        {"role": "user", "content": [text("why?")]},
    ]
    assert body["tools"] == [
        {"name": "weather", "description": "of a city", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    ]


def test_arguments_travel_as_they_were_written() -> None:
    request = CompletionRequest(
        model="m", messages=[{"role": "assistant", "tool_calls": [call('{"n": 123456789012345678901234567890, "x": 1.10}')]}]
    )
    assert b'{"n": 123456789012345678901234567890, "x": 1.10}' in anthropic_messages.encode_request(request, stream=False)


def test_images_are_sent_inlined_or_by_address() -> None:
    body = encode(
        user(
            text("look"),
            {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
            {"type": "image_url", "image_url": "https://host/cat.png", "cache_control": MARK},
        )
    )
    assert body["messages"][0]["content"][1:] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "image", "source": {"type": "url", "url": "https://host/cat.png"}, "cache_control": MARK},
    ]


def test_a_tool_may_answer_with_an_image() -> None:
    body = encode({"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]})
    assert body["messages"][0]["content"][0]["content"][0]["type"] == "image"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
        ({"stop": []}, {}),
        ({"top_p": 0.5, "top_k": 3}, {"top_p": 0.5, "top_k": 3}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1.0}, {"temperature": 1.0}),
        ({"user": "u1", "safety_identifier": "s1"}, {"metadata": {"user_id": "u1"}}),
        ({"safety_identifier": "s1"}, {"metadata": {"user_id": "s1"}}),
        ({"metadata": {"a": "b"}, "prompt_cache_key": "k"}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        ({"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}}),
        ({"cache_control": MARK}, {"cache_control": MARK}),
        ({"cache_control": {**MARK, "ttl": "5m"}}, {"cache_control": {**MARK, "ttl": "5m"}}),
        ({"cache_control": {**MARK, "ttl": "1h"}}, {"cache_control": {**MARK, "ttl": "1h"}}),
        ({"reasoning_effort": "low"}, {"output_config": {"effort": "low"}}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}},
                "reasoning_effort": "max",
            },
            {"output_config": {"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}}},
        ),
        ({"n": 1, "seed": None, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "logit_bias": {}}, {}),
        ({"store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium", "parallel_tool_calls": False}, {}),
        ({"tool_choice": "none", "tools": []}, {}),
    ],
)
def test_each_parameter_has_its_place(params: dict[str, Any], said: dict[str, Any]) -> None:
    body = encode(**params)
    assert {name: value for name, value in body.items() if name not in {"model", "max_tokens", "messages"}} == said


@pytest.mark.parametrize(
    ("choice", "parallel", "said"),
    [
        (None, None, None),
        (None, True, None),
        (None, False, {"type": "auto", "disable_parallel_tool_use": True}),
        ("auto", None, {"type": "auto"}),
        ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
        ("none", False, {"type": "none"}),
        ({"type": "function", "function": {"name": "weather"}}, None, {"type": "tool", "name": "weather"}),
    ],
)
def test_the_choice_of_a_tool_is_said(choice: Any, parallel: Any, said: Any) -> None:
    assert encode(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=parallel).get("tool_choice") == said


def test_a_tool_may_be_strict_cached_and_without_parameters() -> None:
    tool = {"type": "function", "function": {"name": "now", "strict": True}, "cache_control": MARK}
    assert encode(tools=[tool])["tools"] == [
        {"name": "now", "input_schema": {"type": "object", "properties": {}}, "strict": True, "cache_control": MARK}
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 1.1}, "temperature"),
        ({"seed": 42}, "seed"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"no such": 1}, "params"),
        ({"x" * 65: 1}, "params"),
        ({"stop": [" "]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"user": 5}, "user"),
        ({"reasoning_effort": "minimal"}, "reasoning_effort"),
        ({"reasoning_effort": ["low"]}, "reasoning_effort"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "web_search_20250305", "name": "web_search"}]}, "tools[1]"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{**WEATHER, "cache_control": {"type": "ephemeral", "ttl": "2h"}}]}, "tools[0].cache_control"),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "cache_control"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": ["auto"]}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_parameter_that_the_wire_cannot_say_is_refused_by_name_and_others_may_serve_it(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": " \n"}, "messages[0].content"),
        (user(), "messages[0].content"),
        ({"role": "system", "content": "alone"}, "messages"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        (user({"type": "text"}), "messages[0].content[0].text"),
        (user(text("x"), {"type": "input_audio", "input_audio": {}}), "messages[0].content[1]"),
        (user({"type": "file", "file": {"file_id": "f"}}), "messages[0].content[0]"),
        (user({"type": "image_url"}), "messages[0].content[0].image_url"),
        (user({"type": "image_url", "image_url": {"url": "ftp://x"}}), "messages[0].content[0].image_url"),
        (user({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,eA=="}}), "messages[0].content[0].image_url"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png,raw"}}), "messages[0].content[0].image_url"),
        (user({**text("x"), "cache_control": {"type": "ephemeral", "ttl": "2h"}}), "messages[0].content[0].cache_control"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": PIXEL}]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "messages[0].function_call"),
        ({"role": "assistant", "content": None, "tool_calls": [{"type": "custom"}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "content": None, "tool_calls": [call(id=None)]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "content": None, "tool_calls": [call("[1]")]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "assistant", "content": None, "tool_calls": [call('{"a": ')]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "assistant", "content": None, "tool_calls": [call("[" * 100_000)]}, "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_a_message_that_the_wire_cannot_say_is_refused_by_its_place(message: Any, param: str) -> None:
    error = refused(message)
    assert error.param == param
    assert "alone" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4), lambda inner: st.lists(inner, max_size=2), max_leaves=3
)
OBJECTS = st.dictionaries(
    st.sampled_from(["type", "function", "name", "parameters", "json_schema", "schema", "url", "ttl"]),
    JSON | st.sampled_from(["function", "json_schema", "ephemeral"]),
    max_size=3,
)


@given(
    st.dictionaries(
        st.sampled_from(sorted(openai_chat.PARAMETERS.keys() - {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n"}))
        | st.sampled_from(["top_k", "thinking", "cache_control"]),
        JSON | OBJECTS | st.lists(OBJECTS, max_size=2),
        max_size=4,
    ),
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "tool_call_id": st.just("c")},
            optional={
                "content": st.text(max_size=3) | st.lists(OBJECTS.map(lambda part: {"type": "image_url", "image_url": part}), max_size=2),
                "tool_calls": st.lists(OBJECTS, max_size=2),
            },
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_whatever_is_valid_is_either_said_or_refused(params: dict[str, Any], messages: list[Any]) -> None:
    params = {name: value for name, value in params.items() if name not in {"temperature", "stream", "stream_options"}}
    request = CompletionRequest(model="m", messages=messages, params=params)
    with suppress(ProviderRejected):
        json.loads(anthropic_messages.encode_request(request, stream=False))


# -- answers -----------------------------------------------------------------------------------------------------------

FIGURES = {"input_tokens": 3, "output_tokens": 7, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 100}
USED = Usage(input_tokens=123, output_tokens=7, cache_read_input_tokens=100, cache_creation_input_tokens=20)


def message(*blocks: Any, stop_reason: str | None = "end_turn", usage: Any = FIGURES, official_too: bool = True) -> bytes:
    body = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x-1",
        "content": list(blocks),
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }
    if official_too:
        official.Message.model_validate(body)
    return json.dumps(body).encode()


def test_an_answer_has_its_text_its_usage_and_its_names() -> None:
    completion = anthropic_messages.decode_completion(message(text("Hel"), text("lo")))
    assert completion.message == {"role": "assistant", "content": "Hello"}
    assert (completion.finish_reason, completion.model, completion.id) == ("stop", "claude-x-1", "msg_1")
    assert completion.usage == USED
    assert completion.native is None, "the cache would take a body of another wire for one of its own"


def test_uses_of_tools_become_calls_with_their_arguments_as_text() -> None:
    completion = anthropic_messages.decode_completion(
        message(
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}},
            {"type": "tool_use", "id": "t2", "name": "now", "input": {}},
            stop_reason="tool_use",
        )
    )
    assert completion.message["content"] is None
    assert completion.message["tool_calls"] == [
        {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}},
        {"id": "t2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    assert completion.finish_reason == "tool_calls"


def test_thinking_is_kept_as_text_and_what_nobody_can_read_is_left_out() -> None:
    completion = anthropic_messages.decode_completion(
        message(
            {"type": "thinking", "thinking": "hm", "signature": "sig"},
            {"type": "redacted_thinking", "data": "xx"},
            text("yes"),
        )
    )
    assert completion.message == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    unknown = message(text("a"), {"type": "hologram", "text": {"x": 1}}, official_too=False)
    assert anthropic_messages.decode_completion(unknown).message["content"] == "a"


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
    ],
)
def test_each_reason_to_stop_has_its_counterpart(stop_reason: str, finish_reason: str) -> None:
    completion = anthropic_messages.decode_completion(message(stop_reason=stop_reason))
    assert (completion.finish_reason, completion.message["content"]) == (finish_reason, "")


def test_a_reason_that_nobody_knows_ends_the_answer_all_the_same() -> None:
    assert anthropic_messages.decode_completion(message(stop_reason="later", official_too=False)).finish_reason == "stop"


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "x",
        {},
        {"input_tokens": 3},
        {"output_tokens": 3},
        {**FIGURES, "input_tokens": -1},
        {**FIGURES, "output_tokens": 1.5},
        {**FIGURES, "output_tokens": True},
        {**FIGURES, "cache_read_input_tokens": "9"},
        {**FIGURES, "cache_creation_input_tokens": -1},
        {**FIGURES, "input_tokens": 2**40},
        {**FIGURES, "output_tokens_details": 7},
        {**FIGURES, "cache_creation": 7},
        {**FIGURES, "cache_creation": {"ephemeral_1h_input_tokens": -1}},
    ],
)
def test_a_usage_that_cannot_be_true_is_none(usage: Any) -> None:
    assert anthropic_messages.decode_completion(message(text("x"), usage=usage, official_too=False)).usage is None


@pytest.mark.parametrize(
    ("kept", "written", "hour"),
    [
        (None, 20, 0),
        ({}, 20, 0),
        ({"ephemeral_5m_input_tokens": 15, "ephemeral_1h_input_tokens": 5}, 20, 5),
        ({"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 20}, 20, 20),
        ({"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 5}, 25, 5),
    ],
)
def test_writes_for_an_hour_are_told_apart_whole_and_streamed(kept: Any, written: int, hour: int) -> None:
    usage = {**FIGURES, "cache_creation": kept}
    expected = Usage(
        input_tokens=103 + written,
        output_tokens=7,
        cache_read_input_tokens=100,
        cache_creation_input_tokens=written,
        cache_creation_1h_input_tokens=hour,
    )
    assert anthropic_messages.decode_completion(message(text("x"), usage=usage, official_too=False)).usage == expected
    begun = event("message_start", official_too=False, message={"id": "msg_1", "usage": {**usage, "output_tokens": 1}})
    assert read(begun, end(usage={"output_tokens": 7}), STOP)[-1].usage == expected


def test_thinking_is_part_of_the_output() -> None:
    usage = {**FIGURES, "cache_creation_input_tokens": None, "output_tokens_details": {"thinking_tokens": 5}}
    decoded = anthropic_messages.decode_completion(message(text("x"), usage=usage)).usage
    assert decoded == Usage(input_tokens=103, output_tokens=7, cache_read_input_tokens=100, reasoning_output_tokens=5)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"content": "x"}',
        b'{"content": [{"type": "text"}]}',
        b'{"content": [{"type": "tool_use", "id": 1, "name": "n", "input": {}}]}',
        b'{"content": [{"text": "secret"}]}',
        b'{"content": [' + b"[" * 100_000,
        b'{"content": [{"type": "text", "text": "\xff"}]}',
    ],
)
def test_garbage_is_told_apart_and_not_repeated(body: bytes) -> None:
    with pytest.raises(ValueError, match="Messages API") as caught:
        anthropic_messages.decode_completion(body)
    assert "secret" not in str(caught.value)


# -- streams -----------------------------------------------------------------------------------------------------------


def event(kind: str, *, official_too: bool = True, **fields: Any) -> bytes:
    body = {"type": kind, **fields}
    if official_too and kind == "error":
        ErrorResponse.model_validate(body)
    elif official_too and kind != "ping":
        EVENTS.validate_python(body)
    return sse.encode_event(json.dumps(body).encode(), kind)


START = event("message_start", message={**json.loads(message(usage={**FIGURES, "output_tokens": 1})), "stop_reason": None})
STOP = event("message_stop")


END_FIGURES = {"output_tokens": 7}


def begin(index: int, block: Any) -> bytes:
    return event("content_block_start", index=index, content_block=block)


def go_on(index: int, kind: str, **fields: Any) -> bytes:
    return event("content_block_delta", index=index, delta={"type": kind, **fields})


def finish(index: int) -> bytes:
    return event("content_block_stop", index=index)


def end(stop_reason: str = "end_turn", usage: Any = END_FIGURES) -> bytes:
    return event("message_delta", delta={"stop_reason": stop_reason, "stop_sequence": None}, usage=usage)


TEXT = begin(0, text("")) + go_on(0, "text_delta", text="Hel") + go_on(0, "text_delta", text="lo\u2028 ü") + finish(0)
TOOLS = (
    begin(1, {"type": "tool_use", "id": "t1", "name": "weather", "input": {}})
    + go_on(1, "input_json_delta", partial_json="")
    + go_on(1, "input_json_delta", partial_json='{"city": ')
    + go_on(1, "input_json_delta", partial_json='"Bern"}')
    + finish(1)
    + begin(2, {"type": "tool_use", "id": "t2", "name": "now", "input": {}})
    + go_on(2, "input_json_delta", partial_json="")
    + finish(2)
)
THINKING = (
    begin(0, {"type": "thinking", "thinking": "", "signature": ""})
    + go_on(0, "thinking_delta", thinking="h")
    + go_on(0, "thinking_delta", thinking="m")
    + go_on(0, "signature_delta", signature="abc")
    + finish(0)
    + begin(1, {"type": "redacted_thinking", "data": "xx"})
    + finish(1)
)
ALL = START + event("ping") + TEXT + TOOLS + end("tool_use") + STOP


def read(*pieces: bytes) -> list[Chunk]:
    reader = anthropic_messages.EventReader()
    chunks = [chunk for piece in pieces for chunk in reader.feed(piece)]
    chunks += reader.close()
    assert reader.complete
    return chunks


def test_a_stream_says_role_text_calls_finish_and_usage_in_this_order() -> None:
    chunks = read(ALL)
    assert [dict(chunk.delta) for chunk in chunks] == [
        {"role": "assistant"},
        {},
        {"content": "Hel"},
        {"content": "lo\u2028 ü"},
        {"tool_calls": [{"index": 0, "id": "t1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Bern"}'}}]},
        {"tool_calls": [{"index": 1, "id": "t2", "type": "function", "function": {"name": "now", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
        {},
    ]
    assert [(chunk.finish_reason, chunk.usage) for chunk in chunks[-2:]] == [("tool_calls", None), (None, USED)]
    assert openai_chat.usage_only(chunks[-1])
    assert {chunk.model for chunk in chunks if chunk.delta} == {"claude-x-1"}


def test_a_stream_makes_the_answer_that_the_whole_one_is() -> None:
    whole = anthropic_messages.decode_completion(
        message(
            {"type": "thinking", "thinking": "hm", "signature": "abc"},
            text("Hello\u2028 ü"),
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}},
            {"type": "tool_use", "id": "t2", "name": "now", "input": {}},
            stop_reason="tool_use",
        )
    )
    events = (
        THINKING
        + TEXT.replace(b'"index": 0', b'"index": 2')
        + TOOLS.replace(b'"index": 2', b'"index": 4').replace(b'"index": 1', b'"index": 3')
    )
    assert openai_chat.assemble(read(START + events + end("tool_use") + STOP)) == whole


@given(st.lists(st.integers(0, len(ALL)), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
@example([], b"\n")
def test_the_chunks_do_not_depend_on_where_the_bytes_are_split(cuts: list[int], line_end: bytes) -> None:
    data = ALL.replace(b"\n", line_end)
    edges = [0, *sorted(cuts), len(data)]
    assert read(*(data[start:stop] for start, stop in pairwise(edges))) == read(ALL)


def test_bytes_one_by_one_give_the_same_chunks() -> None:
    assert read(*(ALL[place : place + 1] for place in range(len(ALL)))) == read(ALL)


def test_the_figures_of_the_end_replace_those_of_the_start() -> None:
    usage = {"output_tokens": 9, "input_tokens": 5, "cache_read_input_tokens": None, "output_tokens_details": {"thinking_tokens": 2}}
    assert read(START, end(usage=usage), STOP)[-1].usage == Usage(
        input_tokens=125, output_tokens=9, cache_read_input_tokens=100, cache_creation_input_tokens=20, reasoning_output_tokens=2
    )


def test_of_several_ends_the_last_holds_and_one_finish_is_said() -> None:
    chunks = read(START, end("pause_turn", {"output_tokens": 3}), end("end_turn", {"output_tokens": 8}), STOP)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.output_tokens == 8


@pytest.mark.parametrize(
    "ending", [b"", event("message_delta", delta={"stop_reason": "end_turn"}, official_too=False), end(usage={"output_tokens": -1})]
)
def test_the_usage_of_the_start_alone_is_not_believed(ending: bytes) -> None:
    chunks = read(START, TEXT, ending, STOP)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"


def test_what_comes_after_the_end_is_not_read() -> None:
    reader = anthropic_messages.EventReader()
    chunks = [*reader.feed(START + STOP + b"data: garbage\n\n"), *reader.feed(b"data: garbage\n\n"), *reader.close()]
    assert reader.saw_done
    assert [chunk.finish_reason for chunk in chunks] == [None, "stop"]


def test_unknown_events_blocks_and_deltas_are_left_out() -> None:
    strange = [
        event("weather_report", official_too=False, delta="sunny", index=0),
        event("content_block_start", official_too=False, index=0, content_block={"type": "hologram", "text": 5}),
        event("content_block_delta", official_too=False, index=0, delta={"type": "hologram_delta", "text": 5}),
        event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": "{}"}),
        finish(0),
    ]
    assert len(read(START, *strange, end(), STOP)) == 3


def test_a_block_may_start_with_something_in_it() -> None:
    given = {"type": "tool_use", "id": "t", "name": "n", "input": {"a": 1}}
    answer = openai_chat.assemble(read(START, begin(0, text("Hi")), finish(0), begin(1, given), finish(1), end(), STOP))
    assert answer.message["content"] == "Hi"
    assert answer.message["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_the_last_event_may_lack_its_blank_line_and_a_cut_one_is_dropped() -> None:
    assert read(START + end() + STOP.rstrip(b"\n")) == read(START + end() + STOP)
    reader = anthropic_messages.EventReader()
    chunks = [*reader.feed(START + TEXT[:-20]), *reader.close()]
    assert not reader.complete
    assert [chunk.text for chunk in chunks][-1] == "lo\u2028 ü"


@pytest.mark.parametrize(
    ("bad", "details"),
    [
        (event("error", error={"type": "overloaded_error", "message": "secret"}), {"type": "overloaded_error"}),
        (b'data: {"type": "error", "error": {"type": "api_error", "message": "secret"}}\n\n', {"type": "api_error"}),
        (b'event: error\ndata: {"type": "later", "error": {"type": "api_error", "message": "secret"}}\n\n', {"type": "api_error"}),
        (b"event: error\ndata: secret\n\n", None),
        (b"data: secret\n\n", None),
        (b'data: {"no": "type"}\n\n', None),
        (event("content_block_delta", official_too=False, delta={"type": "text_delta", "text": 5}), None),
        (event("content_block_start", official_too=False, content_block={"type": "tool_use", "id": "x"}), None),
        (event("message_start", official_too=False, message=5), None),
        (b"data: " + b"x" * (sse.MAX_EVENT_BYTES + 1), None),
    ],
    ids=range(10),
)
def test_errors_and_garbage_are_errors_of_the_provider_after_what_was_said(bad: bytes, details: Any) -> None:
    reader = anthropic_messages.EventReader()
    assert len(list(reader.feed(START + TEXT))) == 3
    with pytest.raises(ProviderError) as caught:
        list(reader.feed(bad))
    assert (caught.value.billed, caught.value.retryable, caught.value.details) == ("unknown", True, details)
    assert "secret" not in str(caught.value)
    assert not reader.complete


PIECES: Sequence[bytes] = [
    START,
    TEXT,
    TOOLS,
    THINKING,
    end(),
    STOP,
    event("ping"),
    b"data: {}\n\n",
    b'data: {"type": "message_delta"}\n\n',
    b"\xff\n\n",
]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=20), max_size=8))
def test_whatever_comes_is_read_or_is_an_error_of_the_provider(pieces: list[bytes]) -> None:
    reader = anthropic_messages.EventReader()
    with suppress(ProviderError):
        for piece in pieces:
            list(reader.feed(piece))
        list(reader.close())
