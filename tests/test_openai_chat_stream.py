"""The Chat Completions wire: streams."""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from starlette_aigateway.errors import ProviderError
from starlette_aigateway.types import (
    Chunk,
    Completion,
    Native,
    RawEvents,
    StreamItem,
    Usage,
)
from starlette_aigateway.wires import openai_chat, sse


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
    completion = openai_chat.decode_completion(json.dumps({"choices": both}).encode())
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
