"""The Chat Completions wire (https://platform.openai.com/docs/api-reference/chat), for both ends: what the rest of the library imports."""

from __future__ import annotations

from .openai_chat_answer import WIRE, decode_completion, encode_completion, error_facts
from .openai_chat_assembly import Assembly
from .openai_chat_cost import PARAMETERS, Cost, asks_for_reasoning, kind_of, unbounded_parameters
from .openai_chat_images import NO_IMAGES, images
from .openai_chat_request import DECIDED, ChatCall, decode_request, encode_request
from .openai_chat_rules import validate
from .openai_chat_stream import (
    DONE,
    EventReader,
    assemble,
    chunks,
    decode_events,
    encode_chunk,
    encode_items,
    has_content,
    has_output,
    output_bytes,
    replay,
    usage_only,
)

__all__ = [
    "DECIDED",
    "DONE",
    "NO_IMAGES",
    "PARAMETERS",
    "WIRE",
    "Assembly",
    "ChatCall",
    "Cost",
    "EventReader",
    "asks_for_reasoning",
    "assemble",
    "chunks",
    "decode_completion",
    "decode_events",
    "decode_request",
    "encode_chunk",
    "encode_completion",
    "encode_items",
    "encode_request",
    "error_facts",
    "has_content",
    "has_output",
    "images",
    "kind_of",
    "output_bytes",
    "replay",
    "unbounded_parameters",
    "usage_only",
    "validate",
]
