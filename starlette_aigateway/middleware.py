"""`AIGatewayMiddleware`: the gateway at home in any ASGI app, as pure ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from .errors import AIGatewayError, ConfigurationError
from .gateway import AIGateway
from .http.errors import error_response

AnyASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]
"""Each framework types scope, receive and send in its own way (Quart by typed dictionaries); all of them mean ASGI."""


class AIGatewayMiddleware:
    """Starts and stops `gateway` with the host's lifespan, and puts a `Caller` into the state of every request (`request.state.aigateway`;
    `state_name` renames it).

    With a `path` such as `/api/ai-gateway` it also serves the gateway below it; without one the host mounts it. An error of the
    gateway that leaves the host's app becomes its JSON answer; where the framework handles all errors itself (Quart), register
    `render_error` with it.
    """

    def __init__(self, app: AnyASGIApp, gateway: AIGateway, *, path: str | None = None, state_name: str = "aigateway") -> None:
        if not isinstance(gateway, AIGateway):
            raise ConfigurationError(f"gateway must be an AIGateway, not {type(gateway).__name__}", param="gateway")
        if path is not None and (not path.startswith("/") or path.rstrip("/") == ""):
            raise ConfigurationError("path must start with '/' and name a segment, such as '/api/ai-gateway'", param="path")
        self.app = app
        self.gateway = gateway
        self._path = path.rstrip("/") if path is not None else None
        self._state_name = state_name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await Lifespan(self.app, self.gateway)(scope, receive, send)
        elif scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif self._path is not None and scope["type"] == "http" and (inner := self._inside(scope, self._path)) is not None:
            await self.gateway(inner, receive, send)
        else:
            scope.setdefault("state", {})[self._state_name] = self.gateway.lazy_caller(HTTPConnection(scope))
            await self._host(scope, receive, send)

    def _inside(self, scope: Scope, path: str) -> Scope | None:
        """The scope of a request below `path`, which then counts as its root. None: it is the host's."""
        root: str = scope.get("root_path", "")
        whole: str = scope["path"]
        below = whole[len(root) :] if root and whole.startswith(root + "/") else whole
        if below != path and not below.startswith(path + "/"):
            return None
        mounted = whole[: len(whole) - len(below)] + path
        return {**scope, "root_path": mounted}

    async def _host(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = HeldAnswer(send)
        try:
            await self.app(scope, receive, answer.send)
        except AIGatewayError as error:
            if answer.begun:
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


class Lifespan:
    """The host's lifespan inside the gateway's. A host that has none gets one here."""

    def __init__(self, app: AnyASGIApp, gateway: AIGateway) -> None:
        self._app = app
        self._gateway = gateway
        self._answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        startup = await receive()
        last: Message | None = None
        try:
            async with self._gateway.lifespan():
                last = await self._run_host(scope, startup, receive, send)
        except AIGatewayError as error:
            if self._answered:
                raise
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        if last is not None:
            await send(last)

    async def _run_host(self, scope: Scope, startup: Message, receive: Receive, send: Send) -> Message | None:
        """Gives back the host's last message: it goes out when the gateway has stopped too."""
        first: list[Message] = [startup]
        last: Message | None = None

        async def replay() -> Message:
            return first.pop() if first else await receive()

        async def hold_back(message: Message) -> None:
            nonlocal last
            if message["type"].startswith("lifespan.shutdown."):
                last = message
                return
            self._answered = True
            await send(message)

        try:
            await self._app(scope, replay, hold_back)
        except Exception:
            if self._answered:
                raise
            await self._stand_in(receive, send)
            return {"type": "lifespan.shutdown.complete"}
        if not self._answered:
            await self._stand_in(receive, send)
            return {"type": "lifespan.shutdown.complete"}
        return last

    async def _stand_in(self, receive: Receive, send: Send) -> None:
        """For a host that does not know the lifespan protocol."""
        self._answered = True
        await send({"type": "lifespan.startup.complete"})
        await receive()
