"""`AIGatewayMiddleware` as ASGI: which requests are its own and where they stand, what passes untouched, and the lifespan protocol."""

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from starlette_aigateway import AIGateway, AIGatewayMiddleware, Caller, RateLimitExceeded, SpendCapExceeded

from .test_lifecycle import Door, gateway_of

pytestmark = pytest.mark.anyio


async def own_page(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("the host's own")(scope, receive, send)


def client_of(app: Any, root_path: str = "") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path=root_path), base_url="http://host")


# -- whose request it is ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root_path", "asked", "stands_at"),
    [
        ("", "/api/ai-gateway", "/api/ai-gateway"),
        ("/below", "/below/api/ai-gateway", "/below/api/ai-gateway"),
        ("/below/", "/below//api/ai-gateway", "/below/api/ai-gateway"),
        ("/below", "/api/ai-gateway", "/below/api/ai-gateway"),  # hypercorn leaves its root path out of `path`
        ("/api", "/api/api/ai-gateway", "/api/api/ai-gateway"),
        ("/api/ai-gateway", "/api/ai-gateway/api/ai-gateway", "/api/ai-gateway/api/ai-gateway"),
    ],
)
async def test_the_segment_is_found_below_any_root_path_and_the_gateway_knows_where_it_stands(
    root_path: str, asked: str, stands_at: str
) -> None:
    app = AIGatewayMiddleware(own_page, gateway_of(Door()), path="/api/ai-gateway/")
    async with client_of(app, root_path) as client:
        answer = await client.get(f"{asked}/openapi.json")
        assert answer.json()["servers"] == [{"url": stands_at}]
        assert (await client.get(asked)).json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("root_path", "asked"),
    [
        ("", "/api/ai-gatewayx/healthz"),
        ("", "/api/ai-gateway-2"),
        ("", "/api/ai-gateway.json"),
        ("", "/API/ai-gateway/healthz"),
        ("", "/x/api/ai-gateway/healthz"),
        ("", "/api/ai-gateway%2e/healthz"),
        ("/below", "/below/api/ai-gatewayx/healthz"),
        ("/api", "/api/ai-gateway/healthz"),  # that is the host's own /ai-gateway
    ],
)
async def test_no_other_path_is_taken_for_it(root_path: str, asked: str) -> None:
    async with client_of(AIGatewayMiddleware(own_page, gateway_of(Door()), path="/api/ai-gateway"), root_path) as client:
        assert (await client.get(asked)).text == "the host's own"


@pytest.mark.parametrize("asked", ["/outer/ai/openapi.json", "/below/outer/ai/openapi.json"])
async def test_a_mount_below_a_mount_stands_where_it_is_whether_the_server_s_path_holds_its_root_or_not(asked: str) -> None:
    inner = AIGatewayMiddleware(own_page, gateway_of(Door()), path="/ai")
    async with client_of(Starlette(routes=[Mount("/outer", inner)]), "/below") as client:
        assert (await client.get(asked)).json()["servers"] == [{"url": "/below/outer/ai"}]


@pytest.mark.parametrize("asked", ["/ai/openapi.json", "/below/ai/openapi.json"])
async def test_a_bare_mount_is_found_whether_the_server_s_path_holds_its_root_or_not(asked: str) -> None:
    async with client_of(Starlette(routes=[Mount("/ai", gateway_of(Door()))]), "/below") as client:
        assert (await client.get(asked)).json()["servers"] == [{"url": "/below/ai"}]


async def test_one_gateway_may_stand_in_several_places() -> None:
    door = Door()
    gateway = gateway_of(door)
    inner = Starlette(routes=[Mount("/one", gateway), Mount("/two", gateway)])
    app = AIGatewayMiddleware(AIGatewayMiddleware(inner, gateway, path="/three"), gateway, state_name="again")
    async with lifespan(app), client_of(app) as client:
        for where in ("/one", "/two", "/three"):
            assert (await client.get(f"{where}/openapi.json")).json()["servers"] == [{"url": where}]
    assert door.log == ["open", "close"]


# -- what passes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["websocket", "webtransport"])
async def test_websockets_and_scopes_that_nobody_knows_pass_with_what_they_came_with(kind: str) -> None:
    seen: list[Any] = []

    async def host(*arguments: Any) -> None:
        seen.extend(arguments)

    scope: dict[str, Any] = {"type": kind, "path": "/api/ai-gateway/complete", "headers": []}

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError

    await AIGatewayMiddleware(host, gateway_of(Door()), path="/api/ai-gateway")(scope, receive, send)
    assert [each is given for each, given in zip(seen, (scope, receive, send), strict=True)] == [True] * 3
    if kind == "websocket":
        assert isinstance(scope["state"]["aigateway"], Caller)
    else:
        assert scope.keys() == {"type", "path", "headers"}


async def test_an_error_of_the_gateway_in_a_host_s_websocket_is_the_host_s() -> None:
    async def host(scope: Any, receive: Any, send: Any) -> None:
        raise SpendCapExceeded("no", scope="principal")

    with pytest.raises(SpendCapExceeded):
        await AIGatewayMiddleware(host, gateway_of(Door()))({"type": "websocket", "path": "/", "headers": []}, None, None)


async def test_two_gateways_in_one_process_are_told_apart_by_the_names_in_the_state() -> None:
    async def page(request: Any) -> Response:
        return JSONResponse({"small": request.state.small is not request.state.large})

    app = Starlette(
        routes=[Route("/", page)],
        middleware=[
            Middleware(AIGatewayMiddleware, gateway=gateway_of(Door()), state_name="small", path="/small"),
            Middleware(AIGatewayMiddleware, gateway=gateway_of(Door()), state_name="large", path="/large"),
        ],
    )
    async with client_of(app) as client:
        assert (await client.get("/")).json() == {"small": True}
        assert [(await client.get(f"/{name}/healthz")).status_code for name in ("small", "large")] == [200, 200]


# -- errors in the host's routes -------------------------------------------------------------------------------------------------------


async def refused(request: Any) -> Response:
    raise SpendCapExceeded("this would pass the cap", scope="principal", window="day")


async def refused_in_a_group(request: Any) -> Response:
    async def too_fast() -> None:
        raise RateLimitExceeded("too fast", retry_after=7.5, scope="principal", window="requests", limit=1)

    async with anyio.create_task_group() as group:
        group.start_soon(too_fast)
    raise AssertionError


async def broken_in_a_group(request: Any) -> Response:
    async def broken() -> None:
        raise RuntimeError("the host's own fault")

    async with anyio.create_task_group() as group:
        group.start_soon(refused, request)
        group.start_soon(broken)
    raise AssertionError


async def broken(request: Any) -> Response:
    raise RuntimeError("the host's own fault")


async def streamed_500(request: Any) -> Response:
    async def parts() -> Any:
        yield b"one "
        yield b"two"

    return StreamingResponse(parts(), status_code=500)


ROUTES = [Route(f"/{page.__name__}", page) for page in (refused, refused_in_a_group, broken_in_a_group, broken, streamed_500)]


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Any, call_next: Any) -> Response:
        answer: Response = await call_next(request)
        return answer


def added(gateway: AIGateway) -> Any:
    return Starlette(routes=ROUTES, middleware=[Middleware(AIGatewayMiddleware, gateway=gateway)])


def wrapped(gateway: AIGateway) -> Any:
    return AIGatewayMiddleware(Starlette(routes=ROUTES), gateway)


def inside_of_another(gateway: AIGateway) -> Any:
    return Starlette(routes=ROUTES, middleware=[Middleware(AIGatewayMiddleware, gateway=gateway), Middleware(Passing)])


def outside_of_all(gateway: AIGateway) -> Any:
    return AIGatewayMiddleware(Starlette(debug=True, routes=ROUTES, middleware=[Middleware(Passing)]), gateway)


@pytest.mark.parametrize("build", [added, wrapped, inside_of_another, outside_of_all])
async def test_an_error_of_the_gateway_becomes_its_json_answer_and_one_of_the_host_stays_the_host_s(
    build: Callable[[AIGateway], Any],
) -> None:
    transport = httpx.ASGITransport(build(gateway_of(Door())), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
        over_the_cap = await client.get("/refused")
        assert (over_the_cap.status_code, over_the_cap.json()["error"]["code"]) == (402, "spend_cap_exceeded")
        assert over_the_cap.headers["x-request-id"] == over_the_cap.json()["error"]["request_id"]
        too_fast = await client.get("/refused_in_a_group")
        assert (too_fast.status_code, too_fast.headers["retry-after"]) == (429, "8")
        for page in ("/broken", "/broken_in_a_group"):
            own = await client.get(page)
            assert (own.status_code, own.headers["content-type"]) == (500, "text/plain; charset=utf-8")
        streamed = await client.get("/streamed_500")
        assert (streamed.status_code, streamed.text) == (500, "one two")


# -- the lifespan protocol -------------------------------------------------------------------------------------------------------------


class Server:
    """Speaks the lifespan protocol with an app, as servers do."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.state: dict[str, Any] = {}
        self._to_app, self._inbox = anyio.create_memory_object_stream[Any](4)
        self._news = anyio.Event()

    async def ask(self, what: str, *answers: str) -> Any:
        await self._to_app.send({"type": f"lifespan.{what}"})
        return await self.hears(*answers)

    async def hears(self, *answers: str) -> Any:
        with anyio.fail_after(10):
            while True:
                for message in self.said:
                    if message["type"] in {f"lifespan.{answer}" for answer in answers}:
                        return message
                await self._news.wait()

    async def serve(self, app: Any) -> None:
        async def send(message: Any) -> None:
            self.said.append(message)
            news, self._news = self._news, anyio.Event()
            news.set()

        with self._to_app, self._inbox:
            await app({"type": "lifespan", "state": self.state}, self._inbox.receive, send)

    @property
    def heard(self) -> list[str]:
        return [message["type"].removeprefix("lifespan.") for message in self.said]


@asynccontextmanager
async def lifespan(app: Any) -> Any:
    server = Server()
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, app)
        await server.ask("startup", "startup.complete")
        yield server
        await server.ask("shutdown", "shutdown.complete", "shutdown.failed")


async def no_lifespan(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise ValueError(f"this app knows no {scope['type']}")


async def returns_at_once(scope: Any, receive: Any, send: Any) -> None:
    """As apps that only look for `http` do."""


@pytest.mark.parametrize("host", [no_lifespan, returns_at_once, Starlette()])
async def test_the_gateway_is_open_for_exactly_as_long_as_the_lifespan_also_of_a_host_that_has_none(host: Any) -> None:
    door = Door()
    async with lifespan(AIGatewayMiddleware(host, gateway_of(door))) as server:
        assert door.log == ["open"]
    assert server.heard == ["startup.complete", "shutdown.complete"]
    assert door.log == ["open", "close"]


async def test_a_gateway_that_is_the_whole_app_has_a_lifespan_too() -> None:
    door = Door()
    async with lifespan(gateway_of(door)) as server:
        assert door.log == ["open"]
    assert server.heard == ["startup.complete", "shutdown.complete"]
    assert door.log == ["open", "close"]


@pytest.mark.parametrize("whole_app", [False, True])
async def test_a_start_that_fails_by_whatever_error_is_told_to_the_server_with_its_reason(whole_app: bool) -> None:
    async def no() -> None:
        raise RuntimeError("no route to db")

    seen: list[str] = []

    async def host(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    gateway = gateway_of(Door(opening=no))
    server = Server()
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, gateway if whole_app else AIGatewayMiddleware(host, gateway))
        failed = await server.ask("startup", "startup.failed", "startup.complete")
    assert failed == {"type": "lifespan.startup.failed", "message": "the gateway could not start: RuntimeError: no route to db"}
    assert seen == [], "the host is not started for nothing"


async def test_a_stop_that_fails_is_told_to_the_server() -> None:
    async def no() -> None:
        raise RuntimeError("the connection is gone")

    async with lifespan(AIGatewayMiddleware(Starlette(), gateway_of(Door(closing=no)))) as server:
        pass
    assert server.said[-1] == {"type": "lifespan.shutdown.failed", "message": "the connection is gone"}


async def test_a_host_that_fails_to_start_says_so_itself_and_the_gateway_is_closed() -> None:
    @asynccontextmanager
    async def own(app: Any) -> Any:
        raise RuntimeError("the host's own fault")
        yield

    door = Door()
    server = Server()

    async def serve() -> None:
        with pytest.raises(RuntimeError, match="the host's own fault"):
            await server.serve(AIGatewayMiddleware(Starlette(lifespan=own), gateway_of(door)))

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await server.ask("startup", "startup.failed")
    assert server.heard == ["startup.failed"]
    assert door.log == ["open", "close"]


async def test_the_gateway_is_open_while_the_host_starts_and_stops() -> None:
    door = Door()

    @asynccontextmanager
    async def own(app: Any) -> Any:
        door.log.append("host starts")
        yield {"kept": "by the host"}
        door.log.append("host stops")

    async with lifespan(AIGatewayMiddleware(Starlette(lifespan=own), gateway_of(door))) as server:
        assert server.state == {"kept": "by the host"}
    assert door.log == ["open", "host starts", "host stops", "close"]
