"""Finding the route of a path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

from msgspec import Struct
from starlette.responses import Response

from .exchange import Exchange

Guard = Literal["open", "caller", "admin", "caller_or_admin"]
Handler = Callable[[Exchange], Awaitable[Response]]

REST = ":path}"


class Route(Struct, frozen=True):
    """One row of the table in `routes.py`, and what OpenAPI says of it.

    `path` may hold `{name}` segments; a last `{name:path}` takes the rest of the path, slashes included. `guard` is checked before the
    body is read. `body` and `answer` name schemas in `schemas.py`, `query` parameters there; `status` is that of a success. `errors` are
    the statuses that it refuses with, besides those that come with its guard and with having a body. `csv`: it can also answer as CSV.
    `metered`: its answers carry the headers of a call, and may be server-sent events. `headers` are those of a call that it reads as well.
    """

    method: str
    path: str
    guard: Guard
    handler: Handler
    summary: str
    body: str | None = None
    answer: str | None = None
    status: int = 200
    query: tuple[str, ...] = ()
    errors: tuple[int, ...] = ()
    metered: bool = False
    csv: bool = False
    headers: tuple[str, ...] = ()


class Match(Struct, frozen=True):
    """What a path is: the routes by method, and its `{name}` segments. No route at all is a 404, one with other methods a 405."""

    routes: Mapping[str, Route]
    path: Mapping[str, str]


class Router:
    """Exact paths by one dictionary lookup, the others segment by segment."""

    def __init__(self, routes: Sequence[Route]) -> None:
        exact: dict[str, dict[str, Route]] = {}
        self._patterns: dict[tuple[str, ...], dict[str, Route]] = {}
        for route in routes:
            if "{" in route.path:
                self._patterns.setdefault(tuple(route.path.split("/")), {})[route.method] = route
            else:
                exact.setdefault(route.path, {})[route.method] = route
        self._exact = {path: Match(methods, {}) for path, methods in exact.items()}

    def match(self, path: str) -> Match | None:
        exact = self._exact.get(path)
        if exact is not None:
            return exact
        segments = path.split("/")
        for pattern, routes in self._patterns.items():
            values = _fit(pattern, segments)
            if values is not None:
                return Match(routes, values)
        return None


def _fit(pattern: Sequence[str], segments: Sequence[str]) -> dict[str, str] | None:
    if pattern[-1].endswith(REST) and len(segments) > len(pattern):
        last = len(pattern) - 1
        segments = [*segments[:last], "/".join(segments[last:])]
    if len(pattern) != len(segments):
        return None
    values: dict[str, str] = {}
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted.startswith("{"):
            if not segment:
                return None
            values[wanted[1:-1].removesuffix(":path")] = segment
        elif wanted != segment:
            return None
    return values
