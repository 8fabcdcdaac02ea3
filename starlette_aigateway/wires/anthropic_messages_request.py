"""Requests of the Messages wire, made from the canonical form.

https://platform.claude.com/docs/en/api/messages/create
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from ..types import CompletionRequest
from .anthropic_messages_turns import cache_mark, converse, refusal

DEFAULT_MAX_TOKENS = 4096
"""The API requires a bound; this one where nobody gives any. It is also what the gateway then holds money for."""

MAX_TEMPERATURE = 1
MAX_NAME = 64  # what is longer is not repeated in an error
EFFORTS = ("low", "medium", "high", "xhigh", "max")

AS_IT_IS = ("top_p", "top_k", "thinking")
CARRIED = frozenset(
    {
        *AS_IT_IS,
        "cache_control",
        "stop",
        "user",
        "safety_identifier",
        "response_format",
        "reasoning_effort",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    }
)
LABELS = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention"})
"""Parameters that say nothing about the answer; they are left out."""

WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "modalities": (["text"], []),
        "verbosity": ("medium",),
        "functions": ([],),
    }
)
"""Values that ask for nothing but the usual."""

_encoder = msgspec.json.Encoder()


def encode_request(request: CompletionRequest, *, stream: bool, default_max_tokens: int = DEFAULT_MAX_TOKENS) -> bytes:
    """The body for an upstream. `default_max_tokens` is the output bound, in tokens, of a request without one.

    `request` must have passed `openai_chat.validate`, and its prompt must be rendered. What the wire cannot say raises
    `ProviderRejected(retryable=True, billed="no")`, whose `param` names it: nothing that a caller asked for is dropped or bent in
    silence. So a temperature above 1 is refused, not lowered, and `seed` is refused too.
    """
    params = {name: value for name, value in request.params.items() if value is not None and name not in LABELS}
    _check(request, params)
    conversation = converse(request.messages)
    body: dict[str, Any] = {
        "model": request.model,
        "max_tokens": default_max_tokens if request.max_tokens is None else request.max_tokens,
        "messages": conversation.turns,
    }
    if conversation.system:
        body["system"] = conversation.system
    if request.temperature is not None:
        body["temperature"] = request.temperature
    body |= {name: params[name] for name in AS_IT_IS if name in params}
    body |= cache_mark(params, "") | _stop(params) | _user(params) | _output_config(params) | _tools(params)
    if stream:
        body["stream"] = True
    return _encoder.encode(body)


def _check(request: CompletionRequest, params: Mapping[str, Any]) -> None:
    if request.n is not None and request.n > 1:
        raise refusal("n", "must be 1 for a Claude model, which gives one answer")
    if request.temperature is not None and request.temperature > MAX_TEMPERATURE:
        raise refusal("temperature", f"must be at most {MAX_TEMPERATURE} for a Claude model")
    for name, value in params.items():
        if name not in CARRIED and value not in WITHOUT_EFFECT.get(name, ()):
            raise refusal(
                name if name.isidentifier() and len(name) <= MAX_NAME else "params", "is not supported for a Claude model; leave it out"
            )


def _stop(params: Mapping[str, Any]) -> dict[str, Any]:
    stop = params.get("stop")
    if not stop:
        return {}
    sequences = [stop] if isinstance(stop, str) else stop
    if not isinstance(sequences, list | tuple) or not all(isinstance(sequence, str) and sequence.strip() for sequence in sequences):
        raise refusal("stop", "must be a text, or a list of texts, none of them blank, for a Claude model")
    return {"stop_sequences": sequences}


def _user(params: Mapping[str, Any]) -> dict[str, Any]:
    user = params.get("user") or params.get("safety_identifier")
    if not user:
        return {}
    if not isinstance(user, str):
        raise refusal("user" if params.get("user") else "safety_identifier", "must be a string")
    return {"metadata": {"user_id": user}}


def _output_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """https://platform.claude.com/docs/en/build-with-claude/effort, https://platform.claude.com/docs/en/build-with-claude/structured-outputs"""
    config: dict[str, Any] = {}
    effort = params.get("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            raise refusal("reasoning_effort", f"must be one of {', '.join(EFFORTS)} for a Claude model")
        config["effort"] = effort
    shape = params.get("response_format")
    if shape is not None and shape != {"type": "text"}:
        config["format"] = {"type": "json_schema", "schema": _schema(shape)}
    return {"output_config": config} if config else {}


def _schema(shape: Any) -> Mapping[str, Any]:
    described = shape.get("json_schema") if isinstance(shape, Mapping) and shape.get("type") == "json_schema" else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise refusal("response_format", "must be text, or a json_schema with its schema, for a Claude model")
    return schema


def _tools(params: Mapping[str, Any]) -> dict[str, Any]:
    tools, choice = params.get("tools"), params.get("tool_choice")
    if not tools:
        if choice not in (None, "auto", "none"):
            raise refusal("tool_choice", "needs tools to choose from")
        return {}
    if not isinstance(tools, list | tuple):
        raise refusal("tools", "must be a list of functions")
    body: dict[str, Any] = {"tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]}
    chosen = None if choice is None else _tool_choice(choice)
    if params.get("parallel_tool_calls") is False and (chosen is None or chosen["type"] != "none"):
        chosen = {**(chosen or {"type": "auto"}), "disable_parallel_tool_use": True}
    if chosen is not None:
        body["tool_choice"] = chosen
    return body


def _tool(tool: Any, param: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise refusal(param, "must be a function with a name for a Claude model")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"properties": {}}
    if not isinstance(parameters, Mapping):
        raise refusal(f"{param}.function.parameters", "must be a JSON schema")
    definition: dict[str, Any] = {"name": function["name"], "input_schema": {"type": "object", **parameters}}
    if function.get("description"):
        definition["description"] = function["description"]
    if function.get("strict"):
        definition["strict"] = True
    return definition | cache_mark(tool, f"{param}.")


def _tool_choice(choice: Any) -> dict[str, Any]:
    if isinstance(choice, str) and choice in ("auto", "none"):
        return {"type": choice}
    if choice == "required":
        return {"type": "any"}
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise refusal("tool_choice", "must be auto, none, required or one function for a Claude model")
    return {"type": "tool", "name": name}
