"""The providers that come with the gateway."""

from .anthropic import AnthropicProvider
from .echo import EchoProvider
from .openai import OpenAIProvider

__all__ = ["AnthropicProvider", "EchoProvider", "OpenAIProvider"]
