"""The gateway in somebody else's app, on a real server: lifespans, streams that are left, the caller in the state, host routes."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import quart
import websockets.exceptions
import websockets.sync.client
from quart import Quart
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    AIGatewayMiddleware,
    Caller,
    Chunk,
    Completion,
    CompletionRequest,
    Price,
    Principal,
    Usage,
    UsageRecord,
    render_error,
)
from starlette_aigateway.events import CallRecorded, Event
from starlette_aigateway.providers import EchoProvider

from .serving import serve

USAGE = Usage(input_tokens=10, output_tokens=5)


class GatedProvider:
    """Streams its first words at once and the others when `go` is set; tells when it is through."""

    name = "gated"
    models = ("m",)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.through = threading.Event()

    async def complete(self, request: CompletionRequest) -> Completion:
        raise AssertionError("only streamed")

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(delta={"content": "first "})
        await anyio.to_thread.run_sync(self.go.wait)
        for _ in range(50):
            yield Chunk(delta={"content": "more "})
        yield Chunk(finish_reason="stop")
        yield Chunk(usage=USAGE)
        self.through.set()


class Booked:
    """An observer that hands records to the test's thread."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.arrived = threading.Event()

    async def __call__(self, event: Event) -> None:
        if isinstance(event, CallRecorded):
            self.records.append(event.record)
            self.arrived.set()


async def session_user(connection: Any) -> Principal | None:
    user = connection.headers.get("x-user")
    return Principal(user, hard_cap_usd="0.00002" if user == "poor" else "100", tenant="acme") if user else None


@asynccontextmanager
async def host_lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
    yield {"from_host": "yes"}


async def ask(request: Request) -> Response:
    caller: Caller = request.state.aigateway
    answer = await caller.complete(model="echo", messages=[{"role": "user", "content": request.query_params["q"]}], max_tokens=50)
    return JSONResponse({"text": answer.message["content"], "host": request.state.from_host})


async def ask_streamed(request: Request) -> Response:
    caller: Caller = request.state.aigateway
    messages: Any = [{"role": "user", "content": request.query_params["q"]}]
    return await caller.stream_response(model="echo", messages=messages, format="openai", max_tokens=50)


def make_app(gateway: AIGateway, how: str) -> Any:
    routes = [Route("/ask", ask), Route("/ask-streamed", ask_streamed)]
    if how == "mounted":
        return Starlette(routes=[*routes, Mount("/api/ai-gateway", gateway)])
    if how == "middleware":
        app = Starlette(routes=[*routes, Mount("/api/ai-gateway", gateway)], lifespan=host_lifespan)
        app.add_middleware(AIGatewayMiddleware, gateway=gateway)
        return app
    return AIGatewayMiddleware(Starlette(routes=routes, lifespan=host_lifespan), gateway, path="/api/ai-gateway")


@pytest.fixture(params=["mounted", "middleware", "wrapped"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gated() -> GatedProvider:
    return GatedProvider()


@pytest.fixture
def booked() -> Booked:
    return Booked()


@pytest.fixture
def gateway(gated: GatedProvider, booked: Booked) -> AIGateway:
    return AIGateway.in_memory(
        providers=[gated, EchoProvider()],
        prices={"m": Price("1000", "2000"), "echo": Price("1", "1")},
        resolve_principal=session_user,
        observers=[booked],
    )


@pytest.fixture
def base(gateway: AIGateway, how: str) -> Iterator[str]:
    with serve(make_app(gateway, how)) as url:
        yield url


BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 100}


@pytest.mark.parametrize("path", ["/complete", "/v1/chat/completions"])
def test_a_stream_is_incremental_and_one_that_is_left_is_read_on_and_booked_exactly(
    base: str, path: str, gated: GatedProvider, booked: Booked
) -> None:
    with httpx.stream("POST", f"{base}/api/ai-gateway{path}", json=BODY, headers={"x-user": "ada"}, timeout=20) as answer:
        first = next(answer.iter_bytes())
        assert b"first " in first
        assert not gated.through.is_set()
    gated.go.set()
    assert gated.through.wait(10)
    assert booked.arrived.wait(10)
    (record,) = booked.records
    assert (record.outcome, record.usage, record.principal, record.tenant) == ("completed", USAGE, "ada", "acme")


def test_a_stream_still_running_at_shutdown_is_booked(gateway: AIGateway, how: str, gated: GatedProvider, booked: Booked) -> None:
    with serve(make_app(gateway, how), timeout_graceful_shutdown=1) as base:
        client = httpx.Client(timeout=20)
        answer = client.send(
            client.build_request("POST", f"{base}/api/ai-gateway/complete", json=BODY, headers={"x-user": "ada"}), stream=True
        )
        assert b"first " in next(answer.iter_bytes())
        gated.go.set()
        answer.close()
        client.close()
    assert booked.arrived.wait(10)
    assert [record.outcome for record in booked.records] == ["completed"]


@pytest.mark.parametrize("how", ["middleware", "wrapped"])
def test_the_caller_in_the_state_is_the_logged_in_user_and_the_host_keeps_its_lifespan(base: str) -> None:
    answer = httpx.get(f"{base}/ask?q=hi", headers={"x-user": "ada"})
    assert answer.json() == {"text": "hi", "host": "yes"}
    assert httpx.get(f"{base}/ask?q=hi").json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("how", ["middleware", "wrapped"])
@pytest.mark.parametrize("route", ["/ask", "/ask-streamed"])
def test_a_refusal_in_a_host_s_own_route_is_its_own_status(base: str, route: str) -> None:
    refused = httpx.get(f"{base}{route}?q=hi", headers={"x-user": "poor"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "spend_cap_exceeded")
    assert refused.headers["x-request-id"].startswith("req_")
    assert refused.json()["error"]["request_id"] == refused.headers["request-id"]


@pytest.mark.parametrize("how", ["middleware", "wrapped"])
def test_a_host_s_route_streams_in_the_openai_dialect(base: str) -> None:
    answer = httpx.get(f"{base}/ask-streamed?q=one%20two", headers={"x-user": "ada"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("how", ["wrapped"])
def test_only_the_segment_itself_is_the_gateway_s(base: str) -> None:
    assert httpx.get(f"{base}/api/ai-gateway/healthz").status_code == 200
    assert httpx.get(f"{base}/api/ai-gatewayx/healthz").headers["content-type"].startswith("text/plain")
    assert httpx.get(f"{base}/api/ai-gateway").status_code == 404


def test_behind_a_root_path_and_an_outer_mount(gateway: AIGateway) -> None:
    inner = AIGatewayMiddleware(Starlette(), gateway, path="/api/ai-gateway")
    with serve(Starlette(routes=[Mount("/outer", inner)]), root_path="/below") as base:
        assert httpx.get(f"{base}/outer/api/ai-gateway/healthz").status_code == 200


def test_a_data_dir_that_cannot_be_used_fails_the_start_with_the_reason_and_a_bare_mount_with_503(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    gateway = AIGateway(data_dir=occupied, providers=[EchoProvider()])
    with pytest.raises(AssertionError, match="did not start"), serve(make_app(gateway, "middleware")):
        pass
    with serve(make_app(gateway, "mounted")) as base:
        answer = httpx.post(f"{base}/api/ai-gateway/complete", json={}, headers={"authorization": "Bearer x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "configuration_error")
        assert str(tmp_path) not in answer.text
        occupied.unlink()
        recovered = httpx.post(f"{base}/api/ai-gateway/complete", json={}, headers={"authorization": "Bearer x"})
        assert recovered.status_code == 401


def test_constructing_opens_and_creates_nothing(tmp_path: Path) -> None:
    AIGateway(data_dir=tmp_path / "data", providers=[EchoProvider()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_lifespans_may_overlap_and_follow_one_another(gateway: AIGateway) -> None:
    async with gateway.lifespan():
        async with gateway.lifespan():
            await gateway.create_key("a")
        await gateway.create_key("b")
    async with gateway:
        assert [key.name for key in await gateway.list_keys()] == ["a", "b"]


def test_a_host_without_a_lifespan_still_works(gateway: AIGateway) -> None:
    async def host(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError("only http here")
        await Response("host")(scope, receive, send)

    with serve(AIGatewayMiddleware(host, gateway, path="/ai"), lifespan="on") as base:
        assert httpx.get(base).text == "host"
        assert httpx.get(f"{base}/ai/readyz").status_code == 200


def test_with_lifespans_turned_off_the_gateway_starts_at_its_first_request_and_books_what_is_left(
    gateway: AIGateway, gated: GatedProvider, booked: Booked
) -> None:
    with serve(make_app(gateway, "wrapped"), lifespan="off") as base:
        with httpx.stream("POST", f"{base}/api/ai-gateway/complete", json=BODY, headers={"x-user": "ada"}, timeout=20) as answer:
            assert b"first " in next(answer.iter_bytes())
        gated.go.set()
        assert booked.arrived.wait(10)
    assert booked.records[0].outcome == "completed"


@pytest.mark.parametrize("how", ["mounted", "middleware", "wrapped"])
def test_a_websocket_of_the_host_passes_and_calls_as_whoever_opened_it_and_the_gateway_takes_none(gateway: AIGateway, how: str) -> None:
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        caller = await gateway.caller(socket)
        async for text in socket.iter_text():
            answer = await caller.complete(model="echo", messages=[{"role": "user", "content": text}], max_tokens=50)
            await socket.send_text(f"{(await caller.principal()).id}: {answer.message['content']}")

    app = make_app(gateway, how)
    (app if how != "wrapped" else app.app).router.routes.insert(0, WebSocketRoute("/chat", chat))
    with serve(app, ws="websockets-sansio") as base:
        url = base.replace("http", "ws")
        with websockets.sync.client.connect(f"{url}/chat", additional_headers={"x-user": "ada"}) as socket:
            socket.send("one")
            assert socket.recv(10) == "ada: one"
            socket.send("two")
            assert socket.recv(10) == "ada: two"
        with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
            websockets.sync.client.connect(f"{url}/api/ai-gateway/complete", additional_headers={"x-user": "ada"})


def test_a_resolver_that_fails_lets_nobody_through_and_its_own_refusals_keep_their_status() -> None:
    from starlette.exceptions import HTTPException

    async def resolve(connection: Any) -> Any:
        match connection.headers.get("x-user"):
            case "teapot":
                raise HTTPException(418, "short and stout", {"x-own": "1"})
            case "broken":
                raise RuntimeError("secret dsn")
            case "late":
                raise HTTPException(502)
            case "redirect":
                raise HTTPException(302, headers={"location": "/login", "content-length": "3"})
            case "unchanged":
                raise HTTPException(304)
            case "object":
                raise HTTPException(403, {"reason": object()})  # type: ignore[arg-type]  # FastAPI's takes any detail
            case "odd":
                return "not a principal"
        return None

    gateway = AIGateway.in_memory(providers=[EchoProvider()], resolve_principal=resolve)
    with serve(Starlette(routes=[Mount("/ai", gateway)])) as base:

        def status(user: str) -> tuple[int, str]:
            answer = httpx.post(f"{base}/ai/complete", json={}, headers={"x-user": user})
            assert "secret" not in answer.text
            return answer.status_code, answer.json()["error"]["code"]

        assert status("teapot") == (418, "refused_by_host")
        assert status("broken") == status("late") == status("odd") == (503, "login_unavailable")
        assert status("redirect") == (302, "refused_by_host")
        assert status("object") == (403, "refused_by_host")
        assert httpx.post(f"{base}/ai/complete", json={}, headers={"x-user": "unchanged"}).status_code == 304
        assert status("nobody") == (401, "invalid_api_key")
        mistyped = httpx.post(f"{base}/ai/complete", json={}, headers={"x-user": "teapot", "authorization": "Bearer aigw_typo"})
        assert mistyped.status_code == 401, "a credential that looks like a stored key never reaches the resolver"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_quart_answers_errors_of_the_gateway_in_its_own_routes_with_our_renderer() -> None:
    async def who(connection: Any) -> Principal:
        return Principal("u", requests_per_minute=1)

    gateway = AIGateway.in_memory(providers=[EchoProvider()], resolve_principal=who)
    app = Quart(__name__)
    app.register_error_handler(AIGatewayError, render_error)

    @app.get("/ask")
    async def ask_quart() -> str:
        caller = await gateway.caller(quart.request.scope)
        answer = await caller.complete(model="echo", messages=[{"role": "user", "content": "hi"}])
        return str(answer.message["content"])

    app.asgi_app = AIGatewayMiddleware(app.asgi_app, gateway=gateway, path="/ai")  # type: ignore[method-assign]  # as its documentation says
    with serve(app) as base:
        async with httpx.AsyncClient(base_url=base) as client:
            assert (await client.get("/ask")).text == "hi"
            refused = await client.get("/ask")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 50
