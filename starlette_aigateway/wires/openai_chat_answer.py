"""Whole answers of the Chat Completions wire: read from upstreams, written for callers.

https://platform.openai.com/docs/api-reference/chat/object
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from ..types import Answer, Completion, Native, Usage

WIRE = "openai_chat"
MAX_PLAUSIBLE_TOKENS = 2**31
_NULLS = frozenset({b"", b"null"})
_SAFE_IDENTIFIER = re.compile(r"[a-z][a-z0-9_.]{0,63}")
_encoder = msgspec.json.Encoder()


class InputDetails(Struct, gc=False):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class OutputDetails(Struct, gc=False):
    reasoning_tokens: int | None = None


class WireUsage(Struct, gc=False):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None


class WireChoice(Struct, gc=False):
    message: dict[str, Any]
    finish_reason: str | None = None


class OfAnyUsage(Struct, gc=False):
    """A completion whose `usage` says nothing that we could believe, or is not there."""

    choices: list[WireChoice]
    model: str | None = None
    id: str | None = None


class WireCompletion(OfAnyUsage):
    usage: WireUsage | None = None


_completion_decoder = msgspec.json.Decoder(WireCompletion)
_of_any_usage_decoder = msgspec.json.Decoder(OfAnyUsage)
_usage_decoder = msgspec.json.Decoder(WireUsage)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_completion(body: bytes) -> Completion:
    """The answer in `body`, which it keeps as `native`; with several choices, `message` is the first.

    Raises `ValueError`, which repeats nothing of the body, if it is not a chat completion.
    """
    usage: Usage | None = None
    wire: OfAnyUsage
    try:
        wire = metered = _completion_decoder.decode(body)
        usage = _tokens(metered.usage) if metered.usage is not None else None
    except _UNREADABLE:
        wire = _of_any_usage(body)
    if not wire.choices:
        raise ValueError("the chat completion has no choices")
    choice = wire.choices[0]
    return Completion(
        message=choice.message,  # type: ignore[arg-type]  # a mapping in the shape of `Message`, fields of the vendor included
        finish_reason=choice.finish_reason or None,
        usage=usage,
        model=wire.model,
        id=wire.id,
        native=Native(WIRE, body),
    )


def _of_any_usage(body: bytes) -> OfAnyUsage:
    try:
        return _of_any_usage_decoder.decode(body)
    except _UNREADABLE:
        raise ValueError("the body is not a chat completion") from None


def decode_usage(raw: Raw) -> Usage | None:
    """Tokens of a `usage` object; None where it is missing or cannot be believed (negative, fractional, absurd, contradicting)."""
    if is_null(raw):
        return None
    try:
        return _tokens(_usage_decoder.decode(raw))
    except _UNREADABLE:
        return None


def _tokens(wire: WireUsage) -> Usage | None:
    """Upstreams that leave hidden reasoning out of `completion_tokens` bill it all the same: what `total_tokens` or `reasoning_tokens` say
    beyond it is output."""
    read = written = reasoning = 0
    if (inputs := wire.prompt_tokens_details) is not None:
        read, written = inputs.cached_tokens or 0, inputs.cache_write_tokens or 0
    if (outputs := wire.completion_tokens_details) is not None:
        reasoning = outputs.reasoning_tokens or 0
    spoken, sent = wire.completion_tokens, wire.prompt_tokens
    output = spoken + reasoning if reasoning > spoken else spoken
    if (wire.total_tokens or 0) > sent + output:
        output = (wire.total_tokens or 0) - sent
    if sent < 0 or spoken < 0 or read < 0 or written < 0 or reasoning < 0 or read + written > sent:
        return None
    if sent > MAX_PLAUSIBLE_TOKENS or output > MAX_PLAUSIBLE_TOKENS or reasoning > MAX_PLAUSIBLE_TOKENS:
        return None
    return Usage(
        input_tokens=sent,
        output_tokens=output,
        cache_read_input_tokens=read,
        cache_creation_input_tokens=written,
        reasoning_output_tokens=reasoning,
    )


def is_null(raw: Raw) -> bool:
    return bytes(raw) in _NULLS


def encode_completion(answer: Answer, *, created: int) -> bytes:
    """The body for a caller: the provider's own where it spoke this wire, else built. `created` is Unix seconds."""
    if answer.native is not None and answer.native.wire == WIRE:
        return answer.native.body
    body: dict[str, Any] = {
        "id": f"chatcmpl-{answer.request_id}",
        "object": "chat.completion",
        "created": created,
        "model": answer.model or "",
        "choices": choices(answer),
    }
    if answer.usage is not None:
        body["usage"] = usage_object(answer.usage)
    return _encoder.encode(body)


def choices(completion: Completion) -> Sequence[Mapping[str, Any]]:
    """All choices in the wire's shape: the provider's own where it spoke this wire, else the one message."""
    if completion.native is not None and completion.native.wire == WIRE:
        own: Sequence[Mapping[str, Any]] = msgspec.json.decode(completion.native.body)["choices"]
        return own
    message = {"role": "assistant", "content": None, **completion.message}
    return [{"index": 0, "message": message, "logprobs": None, "finish_reason": completion.finish_reason or "stop"}]


def usage_object(usage: Usage) -> Mapping[str, Any]:
    """`usage` in the wire's shape."""
    details: dict[str, int] = {"cached_tokens": usage.cache_read_input_tokens}
    if usage.cache_creation_input_tokens:
        details["cache_write_tokens"] = usage.cache_creation_input_tokens
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_output_tokens},
    }


def error_facts(body: bytes) -> Mapping[str, str]:
    """`code`, `type` and `param` of an error body, as far as they are plain identifiers (`context_length_exceeded`).

    All other text of an upstream's error may hold a credential or a prompt, and is dropped.
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    error = decoded.get("error") if isinstance(decoded, dict) else None
    if not isinstance(error, dict):
        return {}
    facts = {name: error.get(name) for name in ("code", "type", "param")}
    return {name: value for name, value in facts.items() if isinstance(value, str) and _SAFE_IDENTIFIER.fullmatch(value)}
