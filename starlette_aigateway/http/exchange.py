"""One request and what is known of it: who asks, with which id, and what the handlers work with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive

from ..administration import Administration
from ..calls import Served
from ..errors import AuthenticationError, PermissionDenied
from ..events import AdminActed, Event
from ..pipeline import Pipeline
from ..types import CallOptions, CompletionRequest, Principal
from . import bodies
from .door import Admin
from .presence import present, while_present
from .query import Query

CLIENT_ID_LENGTH = 128
log = logging.getLogger("starlette_aigateway")


@dataclass(slots=True, kw_only=True)
class Exchange:
    """`request_id` is minted by us; `x-request-id` of the client is echoed and is never an identity. `check` raises where a call could
    not be metered now; `has_admins` says whether the admin routes exist."""

    connection: HTTPConnection
    receive: Receive
    request_id: str
    path: Mapping[str, str]
    pipeline: Pipeline
    administration: Administration
    max_body_bytes: int
    receive_seconds: float
    emit: Callable[[Event], None]
    check: Callable[[], Awaitable[None]]
    has_admins: bool
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
        return bodies.decode_object(await bodies.read(self.receive, headers, self.max_body_bytes, self.receive_seconds))

    async def complete(self, request: CompletionRequest, options: CallOptions) -> Served:
        """A whole answer. Where a client that leaves is to end its call, somebody has to look for it; otherwise the call goes on to its
        end, and it is enough that it looks before another attempt. Raises `ClientLeft`."""
        pipeline = self.pipeline
        if pipeline.ends_with_its_caller:
            return await while_present(self.receive, lambda: pipeline.complete(self.principal, request, options, self.request_id))
        return await pipeline.complete(self.principal, request, options, self.request_id)

    async def present(self) -> bool:
        return await present(self.receive)

    def query(self, *known: str) -> Query:
        """The query string, in which only the `known` parameters may be. Raises `InvalidRequest`."""
        return Query(self.connection, known)

    def acted(self, action: str, subject: str) -> None:
        """Tells log and observers what an administrator has changed."""
        actor = self.administrator.actor
        log.info("admin %r: %s %r (request %s)", actor, action, subject, self.request_id)
        self.emit(AdminActed(actor=actor, action=action, subject=subject))

    def answer(self, value: object, status: int = 200) -> Response:
        """JSON that is this caller's alone, and only now."""
        return json_response(value, status, {**self.id_headers, "cache-control": "no-store"})

    @property
    def id_headers(self) -> dict[str, str]:
        given = self.connection.headers.get("x-request-id", "")
        echoed = given if 0 < len(given) <= CLIENT_ID_LENGTH and given.isascii() and given.isprintable() else self.request_id
        return {"x-request-id": echoed, "request-id": self.request_id}


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")
