"""Quart, with the middleware around its ASGI app."""

from quart import Quart

from .quart_routes import furnish, gateway

__all__ = ["app", "gateway"]

app = Quart(__name__)
furnish(app)
