"""The rules of idempotency keys: what one may be, which call is the same, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway import (
    Chunk,
    CompletionRequest,
    IdempotencyPolicy,
    InvalidRequest,
    Principal,
    PromptRef,
    Usage,
)
from starlette_aigateway.policy import idempotency as policy
from starlette_aigateway.policy.caching import CachedCompletion
from starlette_aigateway.types import CallOptions, Native, RawEvents, StreamItem

from .test_pipeline import ask

DAY = 86_400


@given(st.text(alphabet=st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255))
def test_any_printable_ascii_of_up_to_255_characters_is_a_key(key: str) -> None:
    assert policy.check_key(key) == key


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\t", "line\n", "ümlaut", "\x7f", None, 7, b"bytes"])
def test_anything_else_is_no_key(key: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        policy.check_key(key)
    assert raised.value.param == "idempotency-key"


def slot_of(
    request: CompletionRequest, who: str = "user", route: str = "/complete", key: str = "k", *, stream: bool = False
) -> policy.Slot:
    return policy.slot(Principal(who), request, CallOptions(idempotency_key=key, route=route), stream=stream)


def test_a_slot_is_of_one_principal_one_route_and_one_key_and_names_none_of_them() -> None:
    slots = [slot_of(ask()), slot_of(ask(), who="other"), slot_of(ask(), route="/v1/chat/completions"), slot_of(ask(), key="other")]
    assert len({slot.key for slot in slots}) == 4
    assert len({slot.fingerprint for slot in slots}) == 1
    assert slot_of(ask()) == slots[0]
    assert slot_of(ask(), who="a/complete", route="") .key != slot_of(ask(), who="a", route="/complete").key  # fmt: skip


def test_a_fingerprint_is_of_everything_that_is_asked_for_in_any_order() -> None:
    requests = [
        ask(),
        ask("other"),
        ask(model="other"),
        ask(temperature=0.5),
        ask(max_tokens=5),
        ask(n=2),
        ask(prompt=PromptRef(name="p")),
        ask(params={"seed": 1}),
        ask(params={"seed": 2}),
    ]
    fingerprints = {policy.fingerprint(request, stream=stream) for request in requests for stream in (False, True)}
    assert len(fingerprints) == 2 * len(requests)
    one, two = ask(params={"a": 1, "b": {"c": 2, "d": 3}}), ask(params={"b": {"d": 3, "c": 2}, "a": 1})
    assert policy.fingerprint(one, stream=False) == policy.fingerprint(two, stream=False)


def test_a_request_that_no_json_can_carry_is_refused_with_a_key() -> None:
    with pytest.raises(InvalidRequest) as raised:
        slot_of(ask(params={"tool": object()}))
    assert raised.value.param == "idempotency-key"


def kept(content: Any) -> policy.KeptAnswer:
    return policy.KeptAnswer(request_id="req_1", created=1, provider="p", cost=5, cache="miss", content=content)


def test_what_is_kept_comes_back_as_it_was() -> None:
    items: list[StreamItem] = [
        RawEvents("openai_chat", b"data: {}\n\n", 1),
        Chunk(delta={"content": "hi", "x": [1, {"y": None}]}, index=1, model="m", id="i"),
        Chunk(finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=2), native=Native("openai_chat", b"data: 7\n\n")),
    ]
    answer = policy.decode(policy.encode(kept(policy.kept_stream(items)), max_bytes=10_000))
    assert isinstance(answer, policy.KeptAnswer)
    assert isinstance(answer.content, policy.KeptStream)
    assert policy.stream_items(answer.content) == items


@pytest.mark.parametrize("content", [{"content": "x" * 2000}, {"content": object()}])
def test_of_what_is_too_large_or_no_data_only_the_fact_is_kept(content: Any) -> None:
    value = policy.encode(kept(CachedCompletion(message=content)), max_bytes=1000)
    assert policy.decode(value) == policy.NotKept()


@given(st.binary(max_size=200))
def test_bytes_that_cannot_be_read_still_say_that_the_call_was_carried_out(value: bytes) -> None:
    policy.decode(b"\x02" + value)
    assert isinstance(policy.decode(b"\x01" + value), policy.Outcome)
    assert policy.decode(b"\x02" + value) == policy.NotKept()


def test_a_policy_may_keep_no_answer_at_all() -> None:
    bound = IdempotencyPolicy(max_answer_bytes=1).max_answer_bytes
    assert policy.decode(policy.encode(kept(CachedCompletion()), max_bytes=bound)) == policy.NotKept()


@pytest.mark.parametrize("wrong", [{"keep_seconds": 0}, {"keep_seconds": "1"}, {"max_answer_bytes": 1.5}, {"max_answer_bytes": True}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest):
        IdempotencyPolicy(**wrong)
