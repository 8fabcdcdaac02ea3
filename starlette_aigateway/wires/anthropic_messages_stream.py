"""Streams of the Messages wire, read into chunks of the canonical form.

https://platform.claude.com/docs/en/build-with-claude/streaming
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from ..errors import ProviderError
from ..types import Chunk, Usage
from . import sse
from .anthropic_messages_answer import Kind, TextBlock, ThinkingBlock, ToolUseBlock, decode, decode_usage, finish_reason, tool_call
from .openai_chat_answer import error_facts, is_null

_NOTHING = Raw(b"")
_NO_INPUT = frozenset({"", "{}", "null"})


class MessageStart(Struct):
    usage: Raw = _NOTHING
    model: str | None = None
    id: str | None = None


class WireEvent(Struct):
    type: str
    index: int = 0
    message: Raw = _NOTHING
    content_block: Raw = _NOTHING
    delta: Raw = _NOTHING
    usage: Raw = _NOTHING


class TextDelta(Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputDelta(Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    """Most of the events of a stream."""

    delta: TextDelta | ThinkingDelta | InputDelta
    index: int = 0


DELTAS = frozenset({"text_delta", "thinking_delta", "input_json_delta"})
_delta_decoder = msgspec.json.Decoder(BlockDelta)


class MessageDelta(Struct):
    stop_reason: str | None = None


class EventReader:
    """Reads the bytes of one upstream's stream into chunks: the role, texts, thinking (as `reasoning_content`) and calls of tools as they
    come, at the end the finish reason and then the usage.

    The chunks do not depend on where the bytes were split. A ping is an empty chunk: it shows that the provider is still there. Events,
    blocks and deltas of unknown kinds are left out, as Anthropic asks of clients. An error event, garbage and an event without end raise
    `ProviderError(billed="unknown")`, after what came before them. `complete` tells a whole stream from one that was cut short.
    """

    def __init__(self, *, max_event_bytes: int = sse.MAX_EVENT_BYTES) -> None:
        self._events = sse.SSEDecoder(max_event_bytes=max_event_bytes)
        self._begun = MessageStart()
        self._stop_reason: str | None = None
        self._end_usage = _NOTHING
        self._calls: dict[int, int] = {}
        self._unsaid: dict[int, str] = {}
        self.saw_done = False

    @property
    def complete(self) -> bool:
        return self.saw_done

    def feed(self, data: bytes) -> Iterator[Chunk]:
        if self.saw_done:
            return
        try:
            events = self._events.feed(data)
        except sse.SSEError:
            raise ProviderError("the provider sent an event that is too long") from None
        for event in events:
            yield from self._chunks(event)
            if self.saw_done:
                return

    def close(self) -> Iterator[Chunk]:
        """At the end of the bytes: the last event, if only its blank line is missing. A cut one says nothing and is dropped."""
        for event in () if self.saw_done else self._events.close():
            try:
                decode(event.data, Kind)
            except ValueError:
                return
            yield from self._chunks(event)

    def _chunks(self, event: sse.SSEEvent) -> Sequence[Chunk]:
        if not event.data.strip():
            return ()
        if event.event == "error":
            raise _reported(event.data)
        try:
            delta = _delta_decoder.decode(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            try:
                return self._read(decode(event.data, WireEvent), event.data)
            except ValueError:
                raise ProviderError("the provider sent an event that is not of the Messages API") from None
        return self._continue_block(delta)

    def _read(self, event: WireEvent, data: bytes) -> Sequence[Chunk]:
        match event.type:
            case "message_start":
                self._begun = decode(event.message, MessageStart)
                return (self._chunk({"role": "assistant"}),)
            case "content_block_start":
                return self._start_block(event)
            case "content_block_delta" if decode(event.delta, Kind).type in DELTAS:
                raise ValueError("its delta is not what it says")
            case "content_block_stop":
                return self._stop_block(event)
            case "message_delta":
                self._stop_reason = decode(event.delta, MessageDelta).stop_reason or self._stop_reason
                self._end_usage = self._end_usage if is_null(event.usage) else event.usage
            case "message_stop":
                self.saw_done = True
                return self._end()
            case "ping":
                return (Chunk(),)
            case "error":
                raise _reported(data)
        return ()

    def _start_block(self, event: WireEvent) -> Sequence[Chunk]:
        block = event.content_block
        match decode(block, Kind).type:
            case "text":
                return self._say("content", decode(block, TextBlock).text)
            case "thinking":
                return self._say("reasoning_content", decode(block, ThinkingBlock).thinking)
            case "tool_use":
                use = decode(block, ToolUseBlock)
                place = self._calls[event.index] = len(self._calls)
                given = bytes(use.input).decode()
                self._unsaid[event.index] = "{}" if given in _NO_INPUT else given
                return (self._chunk({"tool_calls": [{"index": place, **tool_call(use, "")}]}),)
        return ()

    def _continue_block(self, event: BlockDelta) -> Sequence[Chunk]:
        delta = event.delta
        if isinstance(delta, TextDelta):
            return self._say("content", delta.text)
        if isinstance(delta, ThinkingDelta):
            return self._say("reasoning_content", delta.thinking)
        if delta.partial_json and event.index in self._calls:
            self._unsaid.pop(event.index, None)
            return self._arguments(event.index, delta.partial_json)
        return ()

    def _stop_block(self, event: WireEvent) -> Sequence[Chunk]:
        """A call without arguments streams none, but the canonical form wants a JSON object."""
        unsaid = self._unsaid.pop(event.index, None)
        return () if unsaid is None else self._arguments(event.index, unsaid)

    def _end(self) -> Sequence[Chunk]:
        finish = self._chunk({}, finish=finish_reason(self._stop_reason))
        # The usage of `message_start` counts the output that there is at the start; only with the one of the end it is all of it.
        usage = None if is_null(self._end_usage) else decode_usage(self._begun.usage, self._end_usage)
        return (finish,) if usage is None else (finish, self._chunk({}, usage=usage))

    def _say(self, name: str, text: str) -> Sequence[Chunk]:
        return (self._chunk({name: text}),) if text else ()

    def _arguments(self, index: int, piece: str) -> Sequence[Chunk]:
        return (self._chunk({"tool_calls": [{"index": self._calls[index], "function": {"arguments": piece}}]}),)

    def _chunk(self, delta: Mapping[str, Any], *, finish: str | None = None, usage: Usage | None = None) -> Chunk:
        return Chunk(delta=delta, finish_reason=finish, usage=usage, model=self._begun.model, id=self._begun.id)


def _reported(data: bytes) -> ProviderError:
    return ProviderError("the provider reported an error on its stream", details=dict(error_facts(data)) or None)
