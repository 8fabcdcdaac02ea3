"""A stream becomes a cached answer, and a cached answer becomes a stream or a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from .policy import caching
from .policy.caching import CachedAnswer, CachedCompletion, CachedEvents
from .types import Chunk, Completion, Message, RawEvents, StreamItem, Usage
from .wires import openai_chat


def kept(items: Sequence[StreamItem]) -> CachedCompletion | CachedEvents:
    """What is kept of a complete stream: its own bytes if all of it came on the wire, else the answer that it makes."""
    events = _events(items)
    if events is None:
        return caching.kept(openai_chat.assemble(items))
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None
    for item in items:
        if isinstance(item, Chunk):
            finish_reason = finish_reason if finish_reason is not None else item.finish_reason
            usage = item.usage if item.usage is not None else usage
            model = model if model is not None else item.model
    return CachedEvents(wire=openai_chat.WIRE, data=events, finish_reason=finish_reason, usage=usage, model=model)


def completion_of(stored: CachedAnswer) -> Completion:
    """The whole answer; decoded from the provider's own bytes where those are what was kept."""
    content = stored.content
    if isinstance(content, CachedEvents):
        return openai_chat.assemble(items_of(stored))
    if content.native is not None:
        return openai_chat.decode_completion(content.native.body)
    return Completion(
        message=_message(content),
        finish_reason=content.finish_reason,
        usage=content.usage,
        model=content.model,
        id=content.id,
    )


def items_of(stored: CachedAnswer) -> Sequence[StreamItem]:
    """The answer as a stream: its own events, or one chunk of content, the finish and the usage."""
    content = stored.content
    if isinstance(content, CachedEvents):
        reader = openai_chat.EventReader()
        return [*reader.feed(content.data), *reader.close()]
    completion = completion_of(stored)
    return [
        Chunk(delta=_delta(completion.message), model=completion.model, id=completion.id),
        Chunk(finish_reason=completion.finish_reason, model=completion.model, id=completion.id),
        Chunk(usage=completion.usage, model=completion.model, id=completion.id),
    ]


def _message(content: CachedCompletion) -> Message:
    return cast("Message", content.message or {"role": "assistant", "content": ""})


def _delta(message: Message) -> Mapping[str, Any]:
    """A whole message as one delta; in a delta, tool calls are numbered."""
    delta: dict[str, Any] = {name: value for name, value in message.items() if value is not None}
    if calls := message.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return delta


def _events(items: Sequence[StreamItem]) -> bytes | None:
    parts = []
    for item in items:
        if isinstance(item, RawEvents):
            wire, data = item.wire, item.data
        elif item.native is not None:
            wire, data = item.native.wire, item.native.body
        else:
            return None
        if wire != openai_chat.WIRE:
            return None
        parts.append(data)
    return b"".join(parts)
