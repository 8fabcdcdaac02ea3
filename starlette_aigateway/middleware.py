"""`AIGatewayMiddleware`: the gateway at home in any ASGI app, as pure ASGI."""

from __future__ import annotations

from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from .caller import STATE_NAME
from .errors import AIGatewayError, ConfigurationError
from .gateway import AIGateway
from .http.app import below_root, route_path
from .http.errors import error_response
from .http.lifespan import AnyASGIApp, Lifespan


class AIGatewayMiddleware:
    """Starts and stops `gateway` with the host's lifespan, and puts a `Caller` into the state of every request (`request.state.aigateway`;
    `state_name` renames it).

    With a `path` such as `/api/ai-gateway` it also serves the gateway below it; without one the host mounts it. An error of the
    gateway that leaves the host's app becomes its JSON answer; where the framework handles all errors itself (Quart), register
    `render_error` with it.
    """

    def __init__(self, app: AnyASGIApp, gateway: AIGateway, *, path: str | None = None, state_name: str = STATE_NAME) -> None:
        if not isinstance(gateway, AIGateway):
            raise ConfigurationError(f"gateway must be an AIGateway, not {type(gateway).__name__}", param="gateway")
        if not callable(app):
            raise ConfigurationError(f"app must be an ASGI app, not {type(app).__name__}", param="app")
        if not isinstance(state_name, str) or not state_name.isidentifier():
            raise ConfigurationError("state_name must be a name that `request.state` can have", param="state_name")
        if path is not None and (not isinstance(path, str) or not path.startswith("/") or path.rstrip("/") == ""):
            raise ConfigurationError("path must start with '/' and name a segment, such as '/api/ai-gateway'", param="path")
        self.app = app
        self.gateway = gateway
        self._path = path.rstrip("/") if path is not None else None
        self._state_name = state_name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await Lifespan(self.gateway.lifespan, self.app)(scope, receive, send)
        elif scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif self._path is not None and scope["type"] == "http" and (inner := self._inside(scope, self._path)) is not None:
            await self.gateway(inner, receive, send)
        else:
            scope.setdefault("state", {})[self._state_name] = self.gateway.lazy_caller(HTTPConnection(scope))
            await self._host(scope, receive, send)

    def _inside(self, scope: Scope, path: str) -> Scope | None:
        """The scope of a request below `path`, which then counts as its root. None: it is the host's."""
        inside = below_root(route_path(scope), path)
        if inside is None:
            return None
        mounted = scope.get("root_path", "").rstrip("/") + path
        return {**scope, "root_path": mounted, "path": mounted + inside}

    async def _host(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = HeldAnswer(send)
        try:
            await self.app(scope, receive, answer.send)
        except Exception as raised:
            error = domain_error(raised)
            if error is None or answer.begun:
                await answer.let_go()
                raise
            error.request_id = error.request_id or self.gateway.mint_request_id()
            response = error_response(error)
            response.headers["x-request-id"] = response.headers["request-id"] = error.request_id
            await response(scope, receive, send)
        except BaseException:
            await answer.let_go()
            raise
        else:
            await answer.let_go()


def domain_error(raised: BaseException) -> AIGatewayError | None:
    """The error of the gateway that `raised` is, or the first of those that a task group of the host's has put together."""
    if isinstance(raised, BaseExceptionGroup):
        found = [domain_error(each) for each in raised.exceptions]
        return found[0] if all(found) else None
    return raised if isinstance(raised, AIGatewayError) else None


class HeldAnswer:
    """The host's answer on its way out. A short 500 is held back until the host has returned: where Starlette's own error handling lies
    inside of us it answers 500 first and raises then, and an error of the gateway deserves its own status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []
        self.begun = False

    async def send(self, message: Message) -> None:
        if self.begun:
            await self._send(message)
            return
        self._held.append(message)
        failed = self._held[0].get("status") == 500
        if not failed or (message["type"] == "http.response.body" and message.get("more_body", False)):
            await self.let_go()

    async def let_go(self) -> None:
        held, self._held = self._held, []
        for message in held:
            self.begun = True
            await self._send(message)
