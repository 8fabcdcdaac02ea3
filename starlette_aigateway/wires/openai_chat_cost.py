"""What each parameter of the Chat Completions wire can do to the bill.

The worst case of a call is (bytes of everything sent, as input tokens) + (output bound * n, as output tokens). `neutral` changes
nothing of that, `bounded` adds input tokens that its own bytes bound, `unbounded` can cost more than the two terms say.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ..types import CompletionRequest

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
"""Every documented parameter; what is not listed counts as unbounded."""

HARMLESS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "service_tier": ("auto", "default", "flex"),  # `auto` is what an absent field means; flex is cheaper
        "modalities": (["text"], []),
        "prompt_cache_options": ({},),
    }
)
"""Values of unbounded parameters that cost nothing extra."""

LOCAL_TOOLS = frozenset({"function", "custom"})
TEXT_PARTS = frozenset({"text", "refusal"})
CACHE_MARKS = ("prompt_cache_breakpoint", "cache_control")  # OpenAI's and Anthropic's: cache writes may cost more than plain input

MAX_IMAGE_TOKENS = 50_000
"""What one inlined image can cost in input tokens at the most. Its bytes do not bound that: a blank picture compresses to nothing and
is billed by its tiles. gpt-4o-mini: 2,833 + 5,667 * 8 tiles of 512 pixels = 48,169
(https://platform.openai.com/docs/guides/images-vision#calculating-costs)."""


def unbounded_parameter(request: CompletionRequest) -> str | None:
    """The first thing in `request` whose cost has no bound (`web_search_options`, `messages[0].content[1].image_url`), or None."""
    for name, value in request.params.items():
        if value is not None and PARAMETERS.get(name, "unbounded") == "unbounded" and value not in HARMLESS.get(name, ()):
            return name
    return _unbounded_tool(request.params.get("tools")) or _unbounded_message(request)


def inline_images(request: CompletionRequest) -> int:
    """How many images `request` carries in itself; the worst case of each is `MAX_IMAGE_TOKENS`."""
    return sum(
        part.get("type") == "image_url"
        for message in request.messages
        if isinstance(parts := message.get("content"), list | tuple)
        for part in parts
    )


def _unbounded_tool(tools: Any) -> str | None:
    if not isinstance(tools, list | tuple):
        return None
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") not in LOCAL_TOOLS:
            return f"tools[{index}]"
        if tool.get("cache_control") is not None:
            return f"tools[{index}].cache_control"
    return None


def _unbounded_message(request: CompletionRequest) -> str | None:
    for index, message in enumerate(request.messages):
        if message.get("audio"):  # a spoken answer of before, by id
            return f"messages[{index}].audio"
        parts = message.get("content")
        if isinstance(parts, list | tuple):
            for place, part in enumerate(parts):
                found = _unbounded_part(part)
                if found is not None:
                    return f"messages[{index}].content[{place}]{found}"
    return None


def _unbounded_part(part: Mapping[str, Any]) -> str | None:
    for mark in CACHE_MARKS:
        if part.get(mark) is not None:
            return f".{mark}"
    kind = part.get("type")
    if kind in TEXT_PARTS:
        return None
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        inlined = isinstance(url, str) and url[:5].lower() == "data:" and not (isinstance(image, dict) and image.get("file_id"))
        return None if inlined else ".image_url"
    return f".{kind}" if kind in {"input_audio", "file"} else ""
