"""The gateway as an ASGI app: finds the route, lets in who may pass, and renders what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..administration import Administration
from ..errors import AIGatewayError, NotFound, RequestError, RequestTimeout, RequestTooLarge
from ..lifecycle import Lifecycle
from ..observing import Observers
from ..pipeline import Pipeline
from .bodies import ClientLeft
from .connection import first_of
from .door import Door
from .errors import TO_THE_HOST, error_response, host_refusal
from .exchange import Exchange
from .replies import answer_nobody, as_text
from .router import Guard, Match, Route, Router
from .routes import ROUTES

MAX_PLACES = 256
"""Paths below mounts whose route is remembered."""

log = logging.getLogger("starlette_aigateway")


class HTTPApp:
    def __init__(
        self,
        *,
        pipeline: Pipeline,
        administration: Administration,
        door: Door,
        observers: Observers,
        lifecycle: Lifecycle,
        check: Callable[[], Awaitable[None]],
        mint_request_id: Callable[[], str],
        max_body_bytes: int,
        receive_seconds: float,
    ) -> None:
        self._pipeline = pipeline
        self._administration = administration
        self._door = door
        self._observers = observers
        self._lifecycle = lifecycle
        self.check = check
        self._mint_request_id = mint_request_id
        self._max_body_bytes = max_body_bytes
        self._receive_seconds = receive_seconds
        self._router = Router(ROUTES if door.has_admins else without_admins(ROUTES))
        self._places: dict[tuple[str, str | None, str | None], Match] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        exchange = Exchange(
            scope=scope,
            first=first_of(scope),
            receive=receive,
            request_id=self._mint_request_id(),
            path={},
            pipeline=self._pipeline,
            administration=self._administration,
            max_body_bytes=self._max_body_bytes,
            receive_seconds=self._receive_seconds,
            emit=self._observers.emit,
            check=self.check,
            has_admins=self._door.has_admins,
        )
        try:
            route = self._route(exchange)
            if route.guard == "caller" and self._lifecycle.started:
                exchange.caller = self._door.recognised(exchange.first)
            if exchange.caller is None:
                await self._let_in(exchange, route.guard)
            response = await route.handler(exchange)
        except ClientLeft:
            await answer_nobody(send)
            return
        except Exception as error:  # noqa: BLE001  # whatever goes wrong has an answer
            response = refusal(error, exchange)
        await response(scope, receive, send)
        if self._observers.untold:
            await self._observers.tell()

    def _route(self, exchange: Exchange) -> Route:
        """Raises `NotFound` and `OtherMethods`."""
        scope = exchange.scope
        place = (scope["path"], scope.get("root_path"), scope.get("app_root_path"))
        match = self._places.get(place)
        if match is None:
            match = self._router.match(route_path(scope))
            if match is None:
                raise NotFound("there is no such route")
            if not match.path and len(self._places) < MAX_PLACES:
                self._places[place] = match
        method = scope["method"]
        route = match.routes.get("GET" if method == "HEAD" else method)
        if route is None:
            raise OtherMethods(match.routes)
        exchange.path = match.path
        return route

    async def _let_in(self, exchange: Exchange, guard: Guard) -> None:
        """Before the body is read: a credential that is refused costs no upload."""
        if guard == "open":
            return
        await self._lifecycle.ensure()
        if guard == "caller":
            exchange.caller = await self._door.caller(exchange.connection)
        elif guard == "admin":
            exchange.admin = await self._door.admin(exchange.connection)
        else:
            await self._let_in_either(exchange)

    async def _let_in_either(self, exchange: Exchange) -> None:
        """A caller sees its own, an administrator everything. An administrator is whoever the host says, and never a data key."""
        exchange.admin = await self._door.admin_if_any(exchange.connection)
        if exchange.admin is None:
            exchange.caller = await self._door.caller(exchange.connection)


def route_path(scope: Scope) -> str:
    """The path below the mount (ASGI: `path` holds `root_path`, for servers and mounts that follow the specification)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if (below := below_root(path, root)) is not None:
        return below
    of_server = scope.get("app_root_path")  # what a mount of Starlette was told, before it added itself
    if of_server and root.startswith(of_server) and (below := below_root(path, root[len(of_server) :])) is not None:
        return below  # a server that leaves its root path out of `path` (hypercorn)
    return path


def below_root(path: str, root: str) -> str | None:
    """`path` below `root`, where it lies there."""
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :] or "/"
    return None


def without_admins(routes: Sequence[Route]) -> Sequence[Route]:
    """The routes of a host that has no administrators: the paths that are for them alone do not exist."""
    paths = {route.path for route in routes if route.guard != "admin"}
    return [route for route in routes if route.path in paths]


class OtherMethods(Exception):
    """The path is a route, which takes these methods alone."""

    def __init__(self, methods: Iterable[str]) -> None:
        self.methods = ", ".join(sorted(methods))


def refusal(error: Exception, exchange: Exchange) -> Response:
    """The answer to a request that went wrong."""
    if isinstance(error, AIGatewayError):
        response = error_response(named(error, exchange))
        if isinstance(error, tuple(TO_THE_HOST)):
            log.error("request %s was refused, the host has to mend this: %s", exchange.request_id, error.message)
    elif isinstance(error, HTTPException):
        response = host_refusal(error, exchange.request_id)
    elif isinstance(error, OtherMethods):
        response = error_response(named(RequestError(f"this route takes {error.methods}", code="method_not_allowed"), exchange))
        response.status_code = 405
        response.headers["allow"] = error.methods
    else:
        log.error("request %s failed unexpectedly", exchange.request_id, exc_info=error)
        response = error_response(named(AIGatewayError("something went wrong in the gateway; its log has the details"), exchange))
    if exchange.has_unread_body or isinstance(error, RequestTimeout | RequestTooLarge):
        close_after(response, exchange)
    response.headers.update(as_text(exchange.id_headers))
    return response


def close_after(response: Response, exchange: Exchange) -> None:
    """The rest of the body would have to be read before the next request, however long it is. A server that closes the connection without
    a word takes the client's next request with it (RFC 9112, section 9.6)."""
    if exchange.scope.get("http_version", "1.1").startswith("1"):
        response.headers["connection"] = "close"


def named(error: AIGatewayError, exchange: Exchange) -> AIGatewayError:
    error.request_id = exchange.request_id
    return error
