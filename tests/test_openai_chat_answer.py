"""The Chat Completions wire: whole answers."""

import json
from decimal import Decimal
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from starlette_aigateway.types import (
    Answer,
    Completion,
    Native,
    Usage,
)
from starlette_aigateway.wires import openai_chat


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
