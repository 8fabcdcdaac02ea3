"""The headers of a request, looked up by a dictionary: Starlette's walk the list at each look, and a call takes a dozen."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import HTTPConnection
from starlette.types import Scope


class Connection(HTTPConnection):
    """What resolvers and authorizers of the host get: an `HTTPConnection` in every respect. `first` is what `first_values` tells."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.first = _first(scope)


def first_values(connection: HTTPConnection) -> Mapping[bytes, bytes]:
    """The first value of each header, as the bytes that came, by its name in lower case."""
    return connection.first if isinstance(connection, Connection) else _first(connection.scope)


def _first(scope: Scope) -> dict[bytes, bytes]:
    headers = scope["headers"]
    if not isinstance(headers, list):  # ASGI lets it be any iterable, also one that can be read once
        headers = scope["headers"] = list(headers)
    return dict(reversed(headers))
