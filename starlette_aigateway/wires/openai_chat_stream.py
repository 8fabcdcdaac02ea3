"""Streams of the Chat Completions wire. Most events carry nothing that the gateway needs and pass as the bytes that they came as.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from ..errors import ProviderError
from ..types import Chunk, Completion, Native, RawEvents, StreamItem, Usage
from . import sse
from .openai_chat_answer import WIRE, choices, decode_usage, error_facts, is_null, usage_object
from .openai_chat_assembly import Assembly

DONE = b"data: [DONE]\n\n"
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
NEXT_DATA = b"\n\ndata:"
END_MARK = b" [DONE]"
_NOTHING = Raw(b"")
_FOLLOWER = Native(WIRE, b"")
_encoder = msgspec.json.Encoder()


class WireDelta(Struct, gc=False):
    index: int = 0
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class WireChunk(Struct, gc=False):
    choices: list[WireDelta] | None = None
    usage: Raw = _NOTHING
    error: Raw = _NOTHING
    object: str | None = None
    model: str | None = None
    id: str | None = None


class PlainChoice(Struct, gc=False):
    finish_reason: None = None


class PlainEvent(Struct, gc=False):
    """An event that carries nothing which the gateway needs: what carries more cannot be decoded as one."""

    choices: list[PlainChoice] | None = None
    usage: None = None
    error: None = None
    object: Literal["chat.completion.chunk"] | None = None


_chunk_decoder = msgspec.json.Decoder(WireChunk)
_decode_plain = msgspec.json.Decoder(PlainEvent).decode


class EventReader:
    """Reads the bytes of one upstream's stream.

    `feed` gives, lazily, `RawEvents` for runs of events that carry neither usage, a finish reason nor an error, and a `Chunk` for every
    other event. Joined up, its results do not depend on where the bytes were split. An error event, garbage and an event without end
    raise `ProviderError(billed="unknown")`, after what came before them. `saw_done` and `saw_finish`, true once the iterator is
    exhausted, tell a complete stream from one that was cut short.
    """

    __slots__ = ("_blocks", "saw_done", "saw_finish")

    def __init__(self, *, max_event_bytes: int = sse.MAX_EVENT_BYTES) -> None:
        self._blocks = sse.BlockReader(max_event_bytes=max_event_bytes)
        self.saw_done = False
        self.saw_finish = False

    @property
    def complete(self) -> bool:
        """Once the iterator is exhausted: whether the stream was not cut short. Some servers send a finish reason and no end mark."""
        return self.saw_done or self.saw_finish

    def feed(self, data: bytes) -> Iterator[StreamItem]:
        if self.saw_done:
            return iter(())
        try:
            blocks = self._blocks.feed(data)
        except sse.SSEError:
            raise ProviderError("the provider sent an event that is too long") from None
        if not blocks.startswith(b"data:"):
            return self._items(blocks)
        pieces, plain = blocks[5:-2].split(NEXT_DATA), 0
        if not blocks.endswith(DONE):
            try:
                for piece in pieces:
                    _decode_plain(piece)
                    plain += 1
            except UNREADABLE:
                pass
            else:
                return iter((RawEvents(WIRE, blocks, plain),))
        return self._pieces(pieces, plain)

    def close(self) -> Iterator[StreamItem]:
        """At the end of the bytes: the event that lacks its blank line. A cut one says nothing and is dropped."""
        event = None if self.saw_done else sse.decode_block(self._blocks.close())
        if event is not None and (_is_done(event) or _is_json(event.data)):
            yield from self._items(event.raw)

    def _items(self, blocks: bytes) -> Iterator[StreamItem]:
        before, *pieces = (b"\n\n" + blocks[:-2]).split(NEXT_DATA)
        if before:
            yield from self._chunks(sse.decode_events(before))
        yield from self._pieces(pieces, 0)

    def _pieces(self, pieces: list[bytes], plain: int) -> Iterator[StreamItem]:
        """Of what came behind `data:` in each; the first `plain` of them are known to be that."""
        run = pieces[:plain]
        for piece in pieces[plain:]:
            if piece != END_MARK and _is_plain(piece):
                run.append(piece)
                continue
            if run:
                yield _raw(run)
                run = []
            yield from self._chunks(_events(piece))
            if self.saw_done:
                return
        if run:
            yield _raw(run)

    def _chunks(self, events: Iterable[sse.SSEEvent]) -> Iterator[Chunk]:
        for event in events:
            if _is_done(event):
                self.saw_done = True
                return
            for chunk in _decode_event(event):
                if chunk.finish_reason is not None:
                    self.saw_finish = True
                yield chunk


def _events(piece: bytes) -> Sequence[sse.SSEEvent]:
    """Of what came behind `data:`, most often one line."""
    block = b"data:" + piece
    if sse.LF in piece:
        return sse.decode_events(block)
    return (sse.SSEEvent(None, piece.removeprefix(b" "), block + b"\n\n"),)


def _raw(run: list[bytes]) -> RawEvents:
    """Of what came behind `data:` in each."""
    return RawEvents(WIRE, b"data:" + NEXT_DATA.join(run) + b"\n\n", len(run))


def _is_plain(line: bytes) -> bool:
    try:
        _decode_plain(line)
    except UNREADABLE:
        return _says_nothing(line)
    return True


def _says_nothing(line: bytes) -> bool:
    """Of what is not JSON, or not as it should be: whether it holds nothing that the gateway needs. It may say no where that is so (a token
    that reads "usage"), never the other way round: a key of a JSON object stands in the bytes as it is, or with a letter written as
    `\\u006x` or `\\u007x`."""
    return (
        b"\n" not in line
        and _only_nulls(line, b'"finish_reason"')
        and _only_nulls(line, b'"usage"')
        and _only_nulls(line, b'"error"')
        and b"[DONE]" not in line
        and b"\\u006" not in line
        and b"\\u007" not in line
    )


def _only_nulls(line: bytes, key: bytes) -> bool:
    found = line.count(key)
    return not found or found == line.count(key + b":null") + line.count(key + b": null")


def _is_done(event: sse.SSEEvent) -> bool:
    return event.data.strip() == b"[DONE]"


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=Raw)
    except UNREADABLE:
        return False
    return True


def _decode_event(event: sse.SSEEvent) -> Sequence[Chunk]:
    if not event.data.strip():
        return ()
    try:
        wire = _chunk_decoder.decode(event.data)
    except UNREADABLE:
        raise ProviderError("the provider sent an event that is not a chat completion chunk") from None
    if event.event == "error" or wire.object == "error" or not (wire.error is _NOTHING or is_null(wire.error)):
        raise ProviderError("the provider reported an error on its stream", details=dict(error_facts(event.data)) or None)
    found: list[Chunk] = []
    usage = decode_usage(wire.usage)
    native = Native(WIRE, event.raw)
    for choice in wire.choices or (WireDelta(),):
        found.append(
            Chunk(
                delta=choice.delta or {},
                index=choice.index,
                finish_reason=choice.finish_reason or None,
                usage=usage,
                model=wire.model,
                id=wire.id,
                native=native,
            )
        )
        usage, native = None, _FOLLOWER
    return found


def decode_events(raw: RawEvents) -> Iterator[Chunk]:
    """The chunks of `raw`. An event with several choices gives one chunk for each: the first carries the whole event as `native`, the
    others an empty one. Raises `ProviderError` for what is not a chunk."""
    for event in sse.events_of(raw.data):
        if not _is_done(event):
            yield from _decode_event(event)


def chunks(items: Iterable[StreamItem]) -> Iterator[Chunk]:
    """All chunks of a stream, those in raw events included. Raises `ProviderError` as `decode_events` does."""
    for item in items:
        if isinstance(item, RawEvents):
            yield from decode_events(item)
        else:
            yield item


def has_content(item: StreamItem) -> bool:
    """Whether the caller gets something by `item`: text, a refusal, a tool call, or the end of the answer. A role alone is nothing yet,
    and until then another provider may still answer. Raises `ProviderError` as `decode_events` does."""
    for chunk in decode_events(item) if isinstance(item, RawEvents) else (item,):
        if chunk.finish_reason is not None or chunk.usage is not None or has_output(chunk):
            return True
    return False


def has_output(chunk: Chunk) -> bool:
    """Whether its delta brings more than a role."""
    for name, value in chunk.delta.items():  # noqa: SIM110  # a generator costs more than what it looks at
        if value and name != "role":
            return True
    return False


def usage_only(chunk: Chunk) -> bool:
    """Whether `chunk` is there for its usage alone; a caller that did not ask for `include_usage` must not get it."""
    return chunk.usage is not None and not chunk.delta and chunk.finish_reason is None


def encode_chunk(chunk: Chunk, *, id: str, model: str, created: int) -> bytes:  # noqa: A002  # the wire's name
    """The event for a caller: the provider's own where it spoke this wire, else built. `created` is Unix seconds."""
    if chunk.native is not None and chunk.native.wire == WIRE:
        return chunk.native.body
    deltas = [] if usage_only(chunk) else [_delta(chunk.delta, index=chunk.index, finish_reason=chunk.finish_reason)]
    return _event(deltas, id=id, model=chunk.model or model, created=created, usage=chunk.usage)


def encode_items(items: Iterable[StreamItem], *, id: str, model: str, created: int, include_usage: bool) -> Iterator[bytes]:  # noqa: A002  # the wire's name
    """What a caller of this wire gets for `items`, without `DONE`: raw events of this wire as they came, those of another by their
    chunks; usage chunks only if asked for."""
    for item in items:
        if isinstance(item, RawEvents):
            yield item.data
        elif include_usage or not usage_only(item):
            encoded = encode_chunk(item, id=id, model=model, created=created)
            if encoded:
                yield encoded


def replay(completion: Completion, *, id: str, model: str, created: int, include_usage: bool) -> list[bytes]:  # noqa: A002  # the wire's name
    """A whole answer as the events of a stream, `DONE` included: for each choice its role, its content and its finish."""
    model = completion.model or model
    events: list[bytes] = []
    for place, choice in enumerate(choices(completion)):
        index = choice.get("index", place)
        delta = _message_delta(choice["message"])
        steps = (
            _delta({"role": delta.pop("role", "assistant"), "content": ""}, index=index),
            _delta(delta, index=index, logprobs=choice.get("logprobs")),
            _delta({}, index=index, finish_reason=choice.get("finish_reason") or "stop"),
        )
        events += [_event([step], id=id, model=model, created=created) for step in steps]
    if include_usage and completion.usage is not None:
        events.append(_event([], id=id, model=model, created=created, usage=completion.usage))
    return [*events, DONE]


def _message_delta(message: Mapping[str, Any]) -> dict[str, Any]:
    delta = {name: value for name, value in message.items() if value is not None}
    if isinstance(calls := delta.get("tool_calls"), list):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return delta


def _delta(delta: Mapping[str, Any], *, index: int, finish_reason: str | None = None, logprobs: Any = None) -> Mapping[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(deltas: Sequence[Mapping[str, Any]], *, id: str, model: str, created: int, usage: Usage | None = None) -> bytes:  # noqa: A002  # the wire's name
    body: dict[str, Any] = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": deltas}
    if usage is not None:
        body["usage"] = usage_object(usage)
    return b"data: " + _encoder.encode(body) + b"\n\n"


def assemble(items: Iterable[StreamItem]) -> Completion:
    """The whole answer of a stream, as `Assembly` makes it. Raises `ProviderError` as `decode_events` does."""
    assembly = Assembly()
    for chunk in chunks(items):
        assembly.add(chunk)
    return assembly.completion()


def output_bytes(items: Iterable[StreamItem]) -> int:
    """UTF-8 bytes of all text that the deltas brought, over all choices, arguments of tool calls included: what an estimate of output
    tokens builds on. What cannot be decoded counts in full."""
    total = 0
    for item in items:
        try:
            total += sum(_text_bytes(value) for chunk in chunks((item,)) for name, value in chunk.delta.items() if name != "role")
        except ProviderError:
            total += len(item.data) if isinstance(item, RawEvents) else 0
    return total


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, Mapping):
        return sum(_text_bytes(member) for name, member in value.items() if name not in {"id", "type"})
    if isinstance(value, list | tuple):
        return sum(_text_bytes(member) for member in value)
    return 0
