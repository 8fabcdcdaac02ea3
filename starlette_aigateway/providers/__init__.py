"""The providers that come with the gateway."""

from .echo import EchoProvider
from .openai import OpenAIProvider

__all__ = ["EchoProvider", "OpenAIProvider"]
