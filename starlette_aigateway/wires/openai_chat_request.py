"""Requests of the Chat Completions wire: taken in from callers, sent out to upstreams.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
from msgspec import Struct

from ..errors import InvalidRequest
from ..types import CompletionRequest, PromptRef
from .openai_chat_cost import BOUND_ALIASES

DECIDED = frozenset({"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "n", "prompt", "stream", "stream_options"})
"""Fields that the gateway decides on: they never travel in `params`."""

DECIDED_WITH_BOUND = DECIDED | BOUND_ALIASES
PROMPT_FIELDS = frozenset({"name", "version", "label", "variables"})
_encoder = msgspec.json.Encoder()


class ChatCall(Struct, frozen=True, gc=False):
    """A decoded body. `include_usage` is whether the caller asked for the usage chunk of a stream."""

    request: CompletionRequest
    stream: bool
    include_usage: bool


def decode_request(body: Mapping[str, Any]) -> ChatCall:
    """The call of a decoded JSON object; `/complete` takes the same fields. Parameters that are not named here go to `params` untouched.

    Raises `InvalidRequest` for `stream`, `stream_options`, `prompt` and contradicting bounds; `validate` looks at all else.
    """
    given = body.get
    request = CompletionRequest(
        model=given("model", ""),
        messages=given("messages", ()),
        temperature=given("temperature"),
        max_tokens=_bound(given("max_tokens"), given("max_completion_tokens")),
        n=given("n"),
        prompt=_prompt(given("prompt")),
        params={name: value for name, value in body.items() if name not in DECIDED},
    )
    return ChatCall(request, _flag(given("stream"), "stream"), _include_usage(given("stream_options")))


def encode_request(request: CompletionRequest, *, stream: bool, max_tokens_field: str = "max_tokens") -> bytes:
    """The body for an upstream. The output bound goes under `max_tokens_field` alone, other names of it are left out, and a stream
    always reports its usage.

    `request` must have passed `validate`, and its prompt must be rendered.
    """
    body: dict[str, Any] = {"model": request.model, "messages": request.messages}
    if request.params:
        body |= _without(DECIDED if request.max_tokens is None else DECIDED_WITH_BOUND, request.params)
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.n is not None:
        body["n"] = request.n
    if request.max_tokens is not None:
        body[max_tokens_field] = request.max_tokens
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return _encoder.encode(body)


def _without(left_out: AbstractSet[str], params: Mapping[str, Any]) -> Mapping[str, Any]:
    return params if left_out.isdisjoint(params) else {name: value for name, value in params.items() if name not in left_out}


def _bound(max_tokens: Any, max_completion_tokens: Any) -> Any:
    if max_completion_tokens is None:
        return max_tokens
    if max_tokens is not None and max_tokens != max_completion_tokens:
        raise InvalidRequest("max_tokens and max_completion_tokens say different things; give one of them", param="max_completion_tokens")
    return max_completion_tokens


def _flag(value: Any, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f"{name} must be true or false", param=name)


def _include_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, Mapping):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    return _flag(options.get("include_usage"), "stream_options.include_usage")


def _prompt(value: Any) -> PromptRef | None:
    if value is None or isinstance(value, PromptRef):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            "prompt must be an object {name, version?, label?, variables?} that refers to a stored prompt; text belongs into messages",
            param="prompt",
        )
    for field in value:
        if field not in PROMPT_FIELDS:
            shown = str(field)[:100]
            raise InvalidRequest(f"prompt has no field {shown!r}; it has {', '.join(sorted(PROMPT_FIELDS))}", param=f"prompt.{shown}")
    if "name" not in value:
        raise InvalidRequest("prompt.name is missing", param="prompt.name")
    variables = value.get("variables")
    return PromptRef(
        name=value["name"],
        version=value.get("version"),
        label=value.get("label"),
        variables={} if variables is None else variables,
    )
