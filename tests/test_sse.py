"""Server-sent events on bytes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.wires import sse


def decode(*pieces: bytes) -> list[tuple[str | None, bytes]]:
    decoder = sse.SSEDecoder()
    return [(event.event, event.data) for piece in pieces for event in decoder.feed(piece)]


@st.composite
def splits(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    data = draw(source)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    edges = [0, *cuts, len(data)]
    return data, [data[start:end] for start, end in pairwise(edges)]


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            b"\xef\xbb\xbf",
            b"data",
            b"data:",
            b"data: x",
            b": comment",
            b"event: e",
            b"id: 1",
            b"retry: 5",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            b"x:",
            b" ",
        ]
    ),
    max_size=30,
).map(b"".join)


@given(splits(FRAGMENTS))
def test_events_are_the_same_wherever_the_bytes_are_split(case: tuple[bytes, list[bytes]]) -> None:
    data, pieces = case
    whole, split = sse.SSEDecoder(), sse.SSEDecoder()
    assert [event for piece in pieces for event in split.feed(piece)] == whole.feed(data)
    assert split.close() == whole.close()


def reference(data: bytes) -> list[tuple[str | None, bytes]]:
    """The algorithm of the standard, letter by letter (WHATWG HTML, section 9.2.6), without `id` and `retry`."""
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events: list[tuple[str | None, bytes]] = []
    name, buffer = "", b""
    for line in text.split(b"\n")[:-1]:
        if not line:
            if buffer:
                events.append((name or None, buffer.removesuffix(b"\n")))
            name, buffer = "", b""
        elif not line.startswith(b":"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                buffer += value + b"\n"
            elif field == b"event":
                name = value.decode()
    return events


@given(FRAGMENTS)
def test_events_are_those_of_the_standard(data: bytes) -> None:
    assert decode(data) == reference(data)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_each_kind_of_line_end_is_understood(end: bytes) -> None:
    data = b"event: e" + end + b"data: a" + end + b"data: b" + end + end
    assert decode(*[data[index : index + 1] for index in range(len(data))]) == [("e", b"a\nb")]


def test_an_event_ended_by_two_carriage_returns_does_not_wait_for_more_bytes() -> None:
    assert decode(b"data: a\r\r") == [(None, b"a")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_a_line_does_not_end_at_unicode_separators(separator: str) -> None:
    data = f'{{"text":"a{separator}b"}}'.encode()
    assert decode(b"data: " + data + b"\n\n") == [(None, data)]


def test_a_byte_order_mark_at_the_start_is_dropped_even_if_it_is_split() -> None:
    assert decode(b"\xef", b"\xbb", b"\xbfdata: a\n\n") == [(None, b"a")]


def test_comments_and_fields_without_data_dispatch_nothing() -> None:
    assert decode(b": ping\n\nevent: x\n\nid: 1\n\ndata: a\n\n") == [(None, b"a")]


def test_an_event_name_does_not_leak_into_the_next_event() -> None:
    assert decode(b"event: x\n\ndata: a\n\n") == [(None, b"a")]


def test_an_endless_event_is_refused_before_it_fills_the_memory() -> None:
    decoder = sse.SSEDecoder(max_event_bytes=100)
    assert [decoder.feed(b"data: aaaa") for _ in range(10)] == [[]] * 10
    with pytest.raises(sse.SSEError):
        decoder.feed(b"a")


def test_a_long_event_in_one_piece_is_refused_too() -> None:
    with pytest.raises(sse.SSEError):
        sse.SSEDecoder(max_event_bytes=10).feed(b"data: a\n\ndata: " + b"a" * 20 + b"\n\n")


def test_many_short_events_in_one_piece_are_not_a_long_one() -> None:
    assert len(sse.SSEDecoder(max_event_bytes=10).feed(b"data: a\n\n" * 50)) == 50


def test_the_event_that_a_stream_ends_in_is_given_at_the_end() -> None:
    decoder = sse.SSEDecoder()
    assert decoder.feed(b"data: [DONE]") == []
    assert [event.data for event in decoder.close()] == [b"[DONE]"]
    assert decoder.close() == []


@given(st.binary().map(lambda data: data.replace(b"\r", b"")), st.none() | st.sampled_from(["delta", "done"]))
def test_what_is_encoded_is_decoded_again(data: bytes, name: str | None) -> None:
    assert decode(sse.encode_event(data, name)) == [(name, data)]


@given(st.binary())
def test_what_is_encoded_never_smuggles_a_second_event(data: bytes) -> None:
    assert len(decode(sse.encode_event(data))) == 1


def test_an_event_name_of_two_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="one line"):
        sse.encode_event(b"x", "a\ndata: b")


def test_a_comment_reaches_no_client_as_an_event() -> None:
    assert decode(sse.encode_comment("keep\nalive\rdata: x")) == []


@given(FRAGMENTS.filter(lambda data: sse.BOM not in data))
def test_raw_bytes_say_the_same_as_the_events(data: bytes) -> None:
    events = sse.SSEDecoder().feed(data)
    assert sse.SSEDecoder().feed(b"".join(event.raw for event in events)) == events
