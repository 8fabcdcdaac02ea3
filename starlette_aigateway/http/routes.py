"""Every route in one table: method, path, who may pass, and who answers. OpenAPI and the guards' test read the same table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

from msgspec import Struct
from starlette.responses import Response

from . import calls
from .exchange import Exchange

Guard = Literal["open", "caller", "admin", "caller_or_admin"]
Handler = Callable[[Exchange], Awaitable[Response]]


class Route(Struct, frozen=True):
    """`path` may hold `{name}` segments. `guard` is checked before the body is read."""

    method: str
    path: str
    guard: Guard
    handler: Handler
    summary: str


ROUTES: tuple[Route, ...] = (
    Route("POST", "/complete", "caller", calls.complete, "A completion, whole or streamed"),
    Route("POST", "/v1/chat/completions", "caller", calls.chat_completions, "A completion on the OpenAI Chat Completions wire"),
)


class Match(Struct, frozen=True):
    """What a path is: the routes by method, and its `{name}` segments. No route at all is a 404, one with other methods a 405."""

    routes: Mapping[str, Route]
    path: Mapping[str, str]


class Router:
    """Exact paths by one dictionary lookup, the others segment by segment."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: dict[tuple[str, ...], dict[str, Route]] = {}
        for route in routes:
            if "{" in route.path:
                self._patterns.setdefault(tuple(route.path.split("/")), {})[route.method] = route
            else:
                self._exact.setdefault(route.path, {})[route.method] = route

    def match(self, path: str) -> Match | None:
        exact = self._exact.get(path)
        if exact is not None:
            return Match(exact, {})
        segments = path.split("/")
        for pattern, routes in self._patterns.items():
            values = _fit(pattern, segments)
            if values is not None:
                return Match(routes, values)
        return None


def _fit(pattern: Sequence[str], segments: Sequence[str]) -> dict[str, str] | None:
    if len(pattern) != len(segments):
        return None
    values: dict[str, str] = {}
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted.startswith("{"):
            if not segment:
                return None
            values[wanted[1:-1]] = segment
        elif wanted != segment:
            return None
    return values
