"""The Messages wire of Anthropic (https://platform.claude.com/docs/en/api/messages), from and to the canonical form: what the rest of the
library imports. Only upstreams speak it so far."""

from __future__ import annotations

from .anthropic_messages_answer import decode_completion
from .anthropic_messages_request import DEFAULT_MAX_TOKENS, encode_request
from .anthropic_messages_stream import EventReader
from .openai_chat_answer import error_facts  # an error body has the same shape: `{"error": {"type": …}}`

__all__ = ["DEFAULT_MAX_TOKENS", "EventReader", "decode_completion", "encode_request", "error_facts"]
