"""What each parameter of the Chat Completions wire can do to the bill.

The worst case of a call is (bytes of everything sent, as input tokens) + (output bound * n, as output tokens). `neutral` changes
nothing of that, `bounded` adds input tokens that its own bytes bound, `unbounded` can cost more than the two terms say. What is not
listed, in whatever place, is unbounded: it may be the name under which some upstream takes another bound of the output
(`max_output_tokens`, `num_predict`), several answers (`best_of`) or a tool of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ..types import CompletionRequest
from .openai_chat_images import inlined

Cost: TypeAlias = Literal["neutral", "bounded", "unbounded"]

PARAMETERS: Mapping[str, Cost] = MappingProxyType(
    {
        "model": "bounded",  # the target's price is looked up for it
        "messages": "bounded",  # parts are looked at one by one
        "prompt": "bounded",  # rendered to messages before the estimate
        "max_tokens": "bounded",
        "max_completion_tokens": "bounded",
        "n": "bounded",  # a factor of the output term
        "stream": "neutral",
        "stream_options": "neutral",
        "temperature": "neutral",
        "top_p": "neutral",
        "frequency_penalty": "neutral",
        "presence_penalty": "neutral",
        "logit_bias": "neutral",
        "logprobs": "neutral",  # sent along, not billed as tokens
        "top_logprobs": "neutral",
        "seed": "neutral",
        "stop": "neutral",
        "user": "neutral",
        "safety_identifier": "neutral",
        "prompt_cache_key": "neutral",
        "prompt_cache_retention": "neutral",  # the length of stay is not billed
        "prompt_cache_options": "unbounded",  # asks for cache writes, which may cost more than plain input
        "metadata": "neutral",
        "store": "neutral",  # keeps the answer at the vendor, without a charge; never makes a later call longer by itself
        "reasoning_effort": "neutral",  # reasoning counts as output and stays below the output bound
        "thinking": "bounded",  # its tokens are output and count for max_tokens; its budget is looked at by `_thinking`
        "top_k": "neutral",
        "cache_control": "unbounded",  # asks for cache writes, as below
        "verbosity": "neutral",
        "parallel_tool_calls": "neutral",
        "response_format": "bounded",  # a schema is input
        "tools": "bounded",  # definitions are input; kinds that run at the vendor are found by `unbounded_parameter`
        "tool_choice": "bounded",
        "functions": "bounded",
        "function_call": "bounded",
        "audio": "unbounded",  # spoken output has a price of its own
        "modalities": "unbounded",  # other outputs than text have prices of their own
        "prediction": "unbounded",  # rejected predicted tokens are billed as output, besides the bound
        "service_tier": "unbounded",  # a faster tier multiplies the price
        "web_search_options": "unbounded",  # billed per search, and what is found becomes input
        "moderation": "unbounded",  # runs another model
    }
)
"""Every documented parameter (https://platform.openai.com/docs/api-reference/chat/create), and those that Anthropic's wire takes besides
(https://platform.claude.com/docs/en/api/messages/create). Thinking: https://platform.claude.com/docs/en/build-with-claude/thinking says
that it is billed as output, shown or not, and counts for `max_tokens` together with the answer."""

BOUND_ALIASES = frozenset(
    {"max_output_tokens", "max_new_tokens", "max_tokens_to_sample", "max_gen_len", "max_length", "num_predict", "n_predict"}
)
"""Under which OpenAI-compatible upstreams take an output bound too (llama.cpp, Ollama, TGI, SageMaker, …). Where the gateway sends a
bound, none of these goes out beside it."""

HARMLESS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "service_tier": ("auto", "default", "flex"),  # `auto` is what an absent field means; flex is cheaper
        "modalities": (["text"], []),
        "prompt_cache_options": ({},),
    }
)
"""Values of unbounded parameters that cost nothing extra."""

LOCAL_TOOLS = frozenset({"function", "custom"})
TOOL_FIELDS = frozenset({"type", *LOCAL_TOOLS})
MESSAGE_FIELDS = frozenset(
    {
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "refusal",
        "function_call",
        "reasoning_content",
        "reasoning",
        "annotations",
    }
)
"""What is text of a message, or marks it."""

TEXT_PARTS = frozenset({"text", "refusal"})
THINKING = frozenset({"enabled", "adaptive", "disabled"})
_PLACE = re.compile(r"\[\d+\]")
MAX_NAME = 64  # what is longer is not repeated in an error


def unbounded_parameters(request: CompletionRequest) -> Iterator[str]:
    """Everything in `request` whose cost has no bound: `web_search_options`, `messages[0].content[1].image_url`."""
    params = request.params
    if params:
        for name, value in params.items():
            if value is not None and PARAMETERS.get(name, "unbounded") == "unbounded" and value not in HARMLESS.get(name, ()):
                yield name
        yield from _tools(params.get("tools"))
        yield from _functions(params.get("functions"))
        yield from _thinking(params.get("thinking"), request.max_tokens)
    for index, message in enumerate(request.messages):
        if len(message) != 2 or type(message.get("content")) is not str or "role" not in message:
            yield from _message(message, f"messages[{index}]")


def kind_of(path: str) -> str:
    """The name by which a host allows what is found at `path`: without the places in lists, `messages.content.image_url`."""
    return _PLACE.sub("", path)


def _tools(tools: Any) -> Iterator[str]:
    if not tools:
        return
    if not isinstance(tools, list | tuple):
        yield "tools"
        return
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str) or kind not in LOCAL_TOOLS:
            yield f"tools[{index}]"
        else:
            yield from _unlisted(tool, TOOL_FIELDS, f"tools[{index}]")


def _functions(functions: Any) -> Iterator[str]:
    if not functions:
        return
    if not isinstance(functions, list | tuple):
        yield "functions"
        return
    for index, function in enumerate(functions):
        if not isinstance(function, dict):
            yield f"functions[{index}]"


def _thinking(thinking: Any, max_tokens: int | None) -> Iterator[str]:
    """A budget is for the whole turn and may be above the bound of one call where thinking goes on between calls of tools
    (https://platform.claude.com/docs/en/build-with-claude/extended-thinking, "Interleaved thinking"); only below it is all clear."""
    if not thinking:
        return
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if not isinstance(kind, str) or kind not in THINKING:
        yield "thinking"
        return
    budget = thinking.get("budget_tokens")
    if budget is not None and not (type(budget) is int and max_tokens is not None and budget < max_tokens):
        yield "thinking.budget_tokens"


def _message(message: Mapping[str, Any], where: str) -> Iterator[str]:
    yield from _unlisted(message, MESSAGE_FIELDS, where)
    content = message.get("content")
    if isinstance(content, list | tuple):
        for place, part in enumerate(content):
            yield from _part(part, f"{where}.content[{place}]")
    elif content is not None and not isinstance(content, str):
        yield f"{where}.content"


def _part(part: Any, where: str) -> Iterator[str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        yield where
    elif kind in TEXT_PARTS:
        if not isinstance(part.get(kind), str):
            yield f"{where}.{kind}"
        yield from _unlisted(part, {"type", kind}, where)
    elif kind == "image_url":
        if inlined(part) is None:
            yield f"{where}.image_url"
        yield from _unlisted(part, {"type", kind}, where)
    else:
        yield f"{where}.{kind}" if kind in {"input_audio", "file"} else where


def _unlisted(holder: Mapping[str, Any], known: AbstractSet[str], where: str) -> Iterator[str]:
    """Fields that nobody decided on, except where they say nothing: null, false, or an empty value."""
    for name, value in holder.items():
        if value and name not in known:
            yield f"{where}.{name if len(name) <= MAX_NAME else '…'}"


REASONING = ("reasoning_effort", "thinking", "reasoning", "enable_thinking", "thinking_budget", "think", "chat_template_kwargs")
"""Parameters that ask a model to think before it answers: OpenAI, Anthropic, OpenRouter, Qwen, Ollama, vLLM."""

NO_REASONING: tuple[Any, ...] = (
    None,
    False,
    0,
    "none",
    {"type": "disabled"},
    {"enabled": False},
    {"effort": "none"},
    {"enable_thinking": False},
)


def asks_for_reasoning(request: CompletionRequest) -> bool:
    """Whether `request` asks for output that is billed and need not be sent."""
    return bool(request.params) and _asks_for_reasoning(request.params)


def _asks_for_reasoning(params: Mapping[str, Any]) -> bool:
    return any(name in params and params[name] not in NO_REASONING for name in REASONING)
