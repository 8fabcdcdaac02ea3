"""The providers that come with the gateway."""

from .echo import EchoProvider

__all__ = ["EchoProvider"]
