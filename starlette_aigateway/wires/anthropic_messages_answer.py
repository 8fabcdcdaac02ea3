"""Whole answers of the Messages wire, read into the canonical form.

https://platform.claude.com/docs/en/api/messages/create#returns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Raw, Struct

from ..types import Completion, Message, Usage
from .openai_chat_answer import MAX_PLAUSIBLE_TOKENS, is_null

T = TypeVar("T")

FINISH_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "model_context_window_exceeded": "length",
        "pause_turn": "length",  # a turn that the server broke off, to be continued: not a whole answer
        "tool_use": "tool_calls",
        "refusal": "content_filter",
    }
)
"""https://platform.claude.com/docs/en/build-with-claude/handling-stop-reasons"""

_NOTHING = Raw(b"")


class Kind(Struct):
    type: str


class TextBlock(Struct):
    text: str


class ThinkingBlock(Struct):
    thinking: str


class ToolUseBlock(Struct):
    id: str
    name: str
    input: Raw


class OutputDetails(Struct):
    thinking_tokens: int | None = None


class CacheCreation(Struct):
    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class WireUsage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: CacheCreation | None = None
    cache_read_input_tokens: int | None = None
    output_tokens_details: OutputDetails | None = None


class WireMessage(Struct):
    content: list[Raw]
    usage: Raw = _NOTHING
    stop_reason: str | None = None
    model: str | None = None
    id: str | None = None


def decode(data: bytes | Raw, kind: type[T]) -> T:
    """Raises `ValueError`, which repeats nothing of `data`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("this is not of the Messages API") from None


def decode_completion(body: bytes) -> Completion:
    """The answer in `body`: texts joined, thinking joined as `reasoning_content`, uses of tools as `tool_calls`. Blocks of other kinds are
    left out, signatures of thinking as well.

    Raises `ValueError`, which repeats nothing of the body, if it is not a message.
    """
    wire = decode(body, WireMessage)
    return Completion(
        message=_message(wire.content),
        finish_reason=finish_reason(wire.stop_reason),
        usage=decode_usage(wire.usage),
        model=wire.model,
        id=wire.id,
    )


def finish_reason(stop_reason: str | None) -> str:
    """A reason that is not known ends an answer all the same."""
    return FINISH_REASONS.get(stop_reason or "", "stop")


def _message(blocks: Sequence[Raw]) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Mapping[str, Any]] = []
    for block in blocks:
        kind = decode(block, Kind).type
        if kind == "text":
            texts.append(decode(block, TextBlock).text)
        elif kind == "thinking":
            thoughts.append(decode(block, ThinkingBlock).thinking)
        elif kind == "tool_use":
            use = decode(block, ToolUseBlock)
            calls.append(tool_call(use, bytes(use.input).decode()))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return cast("Message", message)


def tool_call(use: ToolUseBlock, arguments: str) -> dict[str, Any]:
    return {"id": use.id, "type": "function", "function": {"name": use.name, "arguments": arguments}}


def decode_usage(*raws: Raw) -> Usage | None:
    """Tokens of a `usage` object; of several, the later figures hold (a stream's are cumulative). None where they are missing or cannot
    be believed (negative, fractional, absurd).

    The wire's `input_tokens` leave out what was read from and written to the cache; ours include both. How long writes are kept is told
    beside their sum (https://platform.claude.com/docs/en/build-with-claude/prompt-caching#1-hour-cache-duration); where the parts are
    more than the sum, they are what was written.
    """
    figures: dict[str, int] = {}
    for raw in raws:
        if not is_null(raw):
            try:
                wire = decode(raw, WireUsage)
            except ValueError:
                return None
            figures |= _figures(wire)
    if "input_tokens" not in figures or "output_tokens" not in figures:
        return None
    if min(figures.values()) < 0 or max(figures.values()) > MAX_PLAUSIBLE_TOKENS:
        return None
    read, hour = figures.get("cache_read_input_tokens", 0), figures.get("ephemeral_1h_input_tokens", 0)
    written = max(figures.get("cache_creation_input_tokens", 0), figures.get("ephemeral_5m_input_tokens", 0) + hour)
    return Usage(
        input_tokens=figures["input_tokens"] + read + written,
        output_tokens=figures["output_tokens"],
        cache_read_input_tokens=read,
        cache_creation_input_tokens=written,
        cache_creation_1h_input_tokens=hour,
        reasoning_output_tokens=min(figures.get("thinking_tokens", 0), figures["output_tokens"]),
    )


def _figures(wire: WireUsage) -> dict[str, int]:
    details = wire.output_tokens_details or OutputDetails()
    kept = wire.cache_creation or CacheCreation()
    given = {
        "input_tokens": wire.input_tokens,
        "output_tokens": wire.output_tokens,
        "cache_creation_input_tokens": wire.cache_creation_input_tokens,
        "ephemeral_5m_input_tokens": kept.ephemeral_5m_input_tokens,
        "ephemeral_1h_input_tokens": kept.ephemeral_1h_input_tokens,
        "cache_read_input_tokens": wire.cache_read_input_tokens,
        "thinking_tokens": details.thinking_tokens,
    }
    return {name: figure for name, figure in given.items() if figure is not None}
