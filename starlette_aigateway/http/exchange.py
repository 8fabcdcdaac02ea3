"""One request and what is known of it: who asks, with which id, and what the handlers work with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import Receive, Scope

from ..administration import Administration
from ..calls import Served
from ..errors import AuthenticationError, PermissionDenied
from ..events import AdminActed, Event
from ..pipeline import Pipeline
from ..policy import caching
from ..repeats import Repeat
from ..types import CallOptions, CompletionRequest, Principal
from . import bodies
from .connection import Connection
from .door import Admin
from .presence import present, while_present
from .query import Query
from .replies import NO_STORE, Header, Reply

CLIENT_ID_LENGTH = 128
PLAIN = CallOptions()
log = logging.getLogger("starlette_aigateway")


class Exchange(Struct, kw_only=True):
    """`first` are the headers, as `first_of` tells them. `request_id` is minted by us; `x-request-id` of the client is echoed and is never
    an identity. `check` raises where a call could not be metered now; `has_admins` says whether the admin routes exist."""

    scope: Scope
    first: Mapping[bytes, bytes]
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
    body_read: bool = False

    @property
    def connection(self) -> Connection:
        """The request as the host's functions see it. Most calls are let in without one."""
        return Connection(self.scope, self.first)

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

    def header(self, name: bytes) -> str | None:
        """Its first value; `name` is in lower case."""
        value = self.first.get(name)
        return None if value is None else value.decode("latin-1")

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises `InvalidRequest` and its kin."""
        return bodies.decode_object(await self.body())

    def body(self) -> Awaitable[bytes]:
        """The body, which has to say that it is JSON. Raises as `json` does."""
        first = self.first
        bodies.require_json(first.get(b"content-type", b""))
        self.body_read = True
        return bodies.read(self.receive, first.get(b"content-length", b""), self.max_body_bytes, self.receive_seconds)

    def complete(self, request: CompletionRequest, options: CallOptions) -> Awaitable[Served]:
        """A whole answer. Where a client that leaves is to end its call, somebody has to look for it; otherwise the call goes on to its
        end, and it is enough that it looks before another attempt. Raises `ClientLeft`."""
        pipeline = self.pipeline
        if pipeline.ends_with_its_caller:
            return while_present(self.receive, partial(pipeline.complete, self.principal, request, options, self.request_id))
        return pipeline.complete(self.principal, request, options, self.request_id)

    def repeat(self, body: bytes) -> Repeat | None:
        """What is known of a call with this body, which may then be served `again`. None also for one that ends with its caller, or has an
        idempotency key: those go the whole way."""
        if self.pipeline.ends_with_its_caller or b"idempotency-key" in self.first:
            return None
        return self.pipeline.repeats.get(body)

    def again(self, repeat: Repeat) -> Awaitable[Served | None]:
        control = self.header(b"cache-control")
        options = PLAIN if control is None else CallOptions(cache=caching.parse_cache_control(control))
        return self.pipeline.again(self.principal, repeat, options, self.request_id)

    def learn(self, body: bytes, served: Served) -> None:
        """An answer that came from the cache is given `again` to the same body."""
        if served.call is not None:
            self.pipeline.repeats.learn(body, served.call)

    @property
    def has_unread_body(self) -> bool:
        return not self.body_read and (self.first.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.first)

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
        return Reply(msgspec.json.encode(value), [*self.id_headers, NO_STORE], status)

    @property
    def id_headers(self) -> list[Header]:
        minted = self.request_id.encode()
        given = self.first.get(b"x-request-id", b"")
        echoed = given if 0 < len(given) <= CLIENT_ID_LENGTH and given.isascii() and given.decode().isprintable() else minted
        return [(b"x-request-id", echoed), (b"request-id", minted)]
