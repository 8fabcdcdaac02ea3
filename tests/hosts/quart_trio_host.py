"""Quart as it runs on trio."""

from quart_trio import QuartTrio

from .quart_routes import furnish, gateway

__all__ = ["app", "gateway"]

app = QuartTrio(__name__)
furnish(app)
