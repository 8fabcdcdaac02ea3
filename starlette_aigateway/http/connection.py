"""A connection whose headers are looked up by a dictionary: Starlette's walk the list at each look, and a call takes a dozen."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Scope


class IndexedHeaders(Headers):
    """Starlette's headers, with an index of the first value of each name."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope=scope)
        self._first = dict(reversed(self._list))

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower().encode("latin-1")].decode("latin-1")

    def get(self, key: str, default: Any = None) -> Any:
        value = self._first.get(key.lower().encode("latin-1", "replace"))
        return default if value is None else value.decode("latin-1")

    def __contains__(self, key: Any) -> bool:
        return key.lower().encode("latin-1", "replace") in self._first


class Connection(HTTPConnection):
    """What resolvers and authorizers of the host get: an `HTTPConnection` in every respect."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._indexed = IndexedHeaders(scope)

    @property
    def headers(self) -> Headers:
        return self._indexed
