"""The headers of a request, looked up by a dictionary: Starlette's walk the list at each look, and a call takes a dozen."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import HTTPConnection
from starlette.types import Scope


class Connection(HTTPConnection):
    """What resolvers and authorizers of the host get: an `HTTPConnection` in every respect. `first` is what `first_of` tells."""

    def __init__(self, scope: Scope, first: Mapping[bytes, bytes]) -> None:
        super().__init__(scope)
        self.first = first


def first_values(connection: HTTPConnection) -> Mapping[bytes, bytes]:
    """The first value of each header, as the bytes that came, by its name in lower case."""
    return connection.first if isinstance(connection, Connection) else first_of(connection.scope)


def first_of(scope: Scope) -> dict[bytes, bytes]:
    """The same, of a scope."""
    headers = scope["headers"]
    if not isinstance(headers, list):  # ASGI lets it be any iterable, also one that can be read once
        headers = scope["headers"] = list(headers)
    return dict(reversed(headers))
