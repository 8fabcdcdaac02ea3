"""The gateway as an ASGI app: finds the route, lets in who may pass, and renders what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..administration import Administration
from ..errors import AIGatewayError, AuthenticationError, ConfigurationError, NotFound
from ..observing import Observers
from ..pipeline import Pipeline
from .bodies import ClientLeft
from .door import Door, credential
from .errors import error_response, host_refusal
from .exchange import Exchange
from .routes import ROUTES, Route, Router

log = logging.getLogger("starlette_aigateway")


class HTTPApp:
    def __init__(
        self,
        *,
        pipeline: Pipeline,
        administration: Administration,
        door: Door,
        observers: Observers,
        check: Callable[[], Awaitable[None]],
        mint_request_id: Callable[[], str],
        max_body_bytes: int,
    ) -> None:
        self._pipeline = pipeline
        self._administration = administration
        self._door = door
        self._observers = observers
        self.check = check
        self._mint_request_id = mint_request_id
        self._max_body_bytes = max_body_bytes
        self._router = Router(ROUTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        exchange = Exchange(
            connection=HTTPConnection(scope),
            receive=receive,
            request_id=self._mint_request_id(),
            path={},
            pipeline=self._pipeline,
            administration=self._administration,
            max_body_bytes=self._max_body_bytes,
        )
        try:
            response = await self._answer(exchange, scope)
        except ClientLeft:
            return
        await response(scope, receive, send)
        if not self._observers.worked:
            await self._observers.flush()

    async def _answer(self, exchange: Exchange, scope: Scope) -> Response:
        try:
            match = self._router.match(route_path(scope))
            if match is None:
                raise NotFound("there is no such route")
            route = match.routes.get(scope["method"])
            if route is None:
                return method_not_allowed(sorted(match.routes), exchange)
            exchange.path = match.path
            await self._let_in(exchange, route)
            return await route.handler(exchange)
        except AIGatewayError as error:
            error.request_id = exchange.request_id
            if isinstance(error, ConfigurationError):
                log.error("the gateway cannot start: %s", error.message)
            response = error_response(error)
        except HTTPException as refusal:
            response = host_refusal(refusal, exchange.request_id)
        except ClientLeft:
            raise
        except Exception:
            log.exception("request %s failed unexpectedly", exchange.request_id)
            response = unexpected(exchange)
        response.headers.update(exchange.id_headers)
        return response

    async def _let_in(self, exchange: Exchange, route: Route) -> None:
        """Before the body is read: a credential that is refused costs no upload."""
        if route.guard == "open":
            return
        await self._administration.ready()
        if route.guard == "admin":
            exchange.admin = await self._door.admin(exchange.connection)
        elif route.guard == "caller":
            exchange.caller = await self._door.principal(exchange.connection)
        else:
            await self._let_in_either(exchange)

    async def _let_in_either(self, exchange: Exchange) -> None:
        """A caller sees its own, an administrator everything. An administrator is whoever the host says, and never a data key."""
        given = credential(exchange.connection)
        try:
            exchange.caller = await self._door.principal(exchange.connection)
        except (AuthenticationError, HTTPException):
            if not self._door.has_admins or (given is not None and given.startswith("aigw_")):
                raise
        if exchange.caller is None or exchange.caller.key_id is None:
            exchange.admin = await self._door.admin_if_any(exchange.connection)
            if exchange.caller is None and exchange.admin is None:
                raise AuthenticationError("this needs an API key or an administrator's login")


def route_path(scope: Scope) -> str:
    """The path below the mount (ASGI: `path` holds `root_path`, for servers and mounts that follow the specification)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :] or "/"
    return path


def method_not_allowed(methods: list[str], exchange: Exchange) -> Response:
    error = AIGatewayError(f"this route takes {', '.join(methods)}", code="method_not_allowed")
    error.request_id = exchange.request_id
    response = error_response(error)
    response.status_code = 405
    response.headers.update({"allow": ", ".join(methods)} | exchange.id_headers)
    return response


def unexpected(exchange: Exchange) -> Response:
    error = AIGatewayError("something went wrong in the gateway; its log has the details")
    error.request_id = exchange.request_id
    return error_response(error)
