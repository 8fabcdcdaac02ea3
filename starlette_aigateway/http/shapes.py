"""The JSON shapes of the native routes (design, section 7). Money goes out as a decimal string, times as RFC 3339 in UTC."""

from __future__ import annotations

from typing import Any

from .. import money
from ..streams import AnswerStream
from ..types import Answer, Completion, Usage


def usage(value: Usage | None) -> dict[str, int] | None:
    if value is None:
        return None
    return {
        "input_tokens": value.input_tokens,
        "output_tokens": value.output_tokens,
        "cache_read_input_tokens": value.cache_read_input_tokens,
        "cache_creation_input_tokens": value.cache_creation_input_tokens,
        "reasoning_output_tokens": value.reasoning_output_tokens,
    }


def answer(value: Answer, model: str) -> dict[str, Any]:
    return {
        "id": value.request_id,
        "model": value.model or model,
        "provider": value.provider,
        "message": value.message,
        "finish_reason": value.finish_reason,
        "usage": usage(value.usage),
        "cost_usd": money.text(value.cost_usd),
        "cached": value.cached,
    }


def stream_end(stream: AnswerStream, completion: Completion, model: str) -> dict[str, Any]:
    return {
        "id": stream.request_id,
        "model": stream.model or model,
        "provider": stream.provider,
        "message": completion.message,
        "finish_reason": stream.finish_reason,
        "usage": usage(stream.usage),
        "cost_usd": money.text(stream.cost_usd),
        "cached": stream.cached,
    }
