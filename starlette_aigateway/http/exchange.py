"""One request and what is known of it: who asks, with which id, and what the handlers work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive

from ..administration import Administration
from ..errors import AuthenticationError, PermissionDenied
from ..pipeline import Pipeline
from ..types import Principal
from . import bodies
from .door import Admin

CLIENT_ID_LENGTH = 128


@dataclass(slots=True, kw_only=True)
class Exchange:
    """`request_id` is minted by us; `x-request-id` of the client is echoed and is never an identity."""

    connection: HTTPConnection
    receive: Receive
    request_id: str
    path: Mapping[str, str]
    pipeline: Pipeline
    administration: Administration
    max_body_bytes: int
    caller: Principal | None = None
    admin: Admin | None = None

    @property
    def principal(self) -> Principal:
        if self.caller is None:
            raise AuthenticationError("this route needs a caller")
        return self.caller

    @property
    def administrator(self) -> Admin:
        if self.admin is None:
            raise PermissionDenied("this route needs an administrator")
        return self.admin

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises `InvalidRequest` and its kin."""
        headers = self.connection.headers
        bodies.require_json(headers)
        return bodies.decode_object(await bodies.read(self.receive, headers, self.max_body_bytes))

    @property
    def id_headers(self) -> dict[str, str]:
        given = self.connection.headers.get("x-request-id", "")
        echoed = given if 0 < len(given) <= CLIENT_ID_LENGTH and given.isascii() and given.isprintable() else self.request_id
        return {"x-request-id": echoed, "request-id": self.request_id}


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")
