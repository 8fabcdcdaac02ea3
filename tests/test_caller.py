"""`Caller`: the gateway in the host's own routes, WebSockets and jobs. What it takes, as whom it calls, and what its streams tell."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from decimal import Decimal
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Annotated, Any, assert_type

import anyio
import django
import django.conf
import pytest
import quart
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import Response as FastAPIResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket as StarletteWebSocket

import starlette_aigateway
from starlette_aigateway import (
    AIGateway,
    AIGatewayError,
    AIGatewayMiddleware,
    AuthenticationError,
    CacheControl,
    CompletionRequest,
    ConfigurationError,
    InvalidRequest,
    PermissionDenied,
    Price,
    Principal,
    PromptRef,
    SpendCapExceeded,
    UsageRecord,
    render_error,
)
from starlette_aigateway.arguments import CallFields
from starlette_aigateway.errors import InvalidArgument, ProviderError
from starlette_aigateway.events import CallRecorded, Event
from starlette_aigateway.fastapi import Caller, caller_from
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.testing import ASGIClient, Die, Say, ScriptedProvider, override
from starlette_aigateway.types import Message, Usage
from starlette_aigateway.wires import openai_chat

pytestmark = pytest.mark.anyio

HELLO: list[Message] = [{"role": "user", "content": "hello there"}]
USER = Principal("user", hard_cap_usd="10")
POOR = Principal("poor", hard_cap_usd="0.000001")
PRICES = {"m": Price("1000", "2000"), "echo": Price("1000", "2000")}
ANEW = CacheControl(read=False, store=False)
COST = Decimal("0.020")
"""Of ten input tokens and five output tokens, as `Say` reports them."""


def gateway_with(*providers: object, **settings: Any) -> AIGateway:
    return AIGateway.in_memory(providers=providers or [ScriptedProvider(Say("one two"), repeat=True)], prices=PRICES, **settings)


async def by_header(connection: Any) -> Principal | None:
    return {"user": USER, "poor": POOR}.get(connection.headers.get("x-user", ""))


# -- what a call takes ---------------------------------------------------------------------------------------------------

METHODS = ("complete", "stream", "stream_response", "event_stream", "quote")


async def make(caller: starlette_aigateway.Caller, method: str, arguments: Mapping[str, Any]) -> None:
    if method == "stream":
        async with caller.stream(**arguments):
            return
    made = await getattr(caller, method)(**arguments)
    if method == "stream_response":
        sent: list[Any] = []

        async def receive() -> Any:
            await anyio.sleep_forever()

        async def send(message: Any) -> None:
            sent.append(message)

        await made({"type": "http"}, receive, send)
        assert sent[0]["status"] == 400
        raise InvalidRequest("told by the status", param=sent[1]["body"].decode().split('"param":"')[1].split('"')[0])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": {"name": "p", "nmae": 1}}, "prompt.nmae"),
    ({"prompt": {"name": "p", 5: 1}}, "prompt.5"),
    ({"prompt": {"version": 1}}, "prompt.name"),
    ({"prompt": {"name": 5}}, "prompt.name"),
    ({"prompt": {"name": "p", "version": "1"}}, "prompt.version"),
    ({"prompt": PromptRef(name="p", label=5)}, "prompt.label"),  # type: ignore[arg-type]  # what is wrong with it is the test
    ({"prompt": PromptRef(name="p", variables=[1])}, "prompt.variables"),  # type: ignore[arg-type]  # as above
    ({"prompt": "p"}, "prompt"),
    ({"model": 5}, "model"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"n": "2"}, "n"),
    ({"stream_options": True}, "stream_options"),
    ({"timeout": "soon"}, "timeout"),
    ({"timeout": True}, "timeout"),
    ({"tags": ["a"]}, "tags"),
    ({"tags": {"a": 1}}, "tags"),
    ({"cache": "no-store"}, "cache"),
    ({"idempotency_key": 5}, "idempotency_key"),
    ({"params": [5]}, "params"),
    ({"params": {"model": "x"}}, "params"),
    ({"params": {"seed": 1}, "seed": 2}, "params"),
    ({"params": {"timeout": 2}}, "params"),
    ({"seed": object()}, "seed"),
]


@pytest.mark.parametrize("method", METHODS)
async def test_an_argument_that_is_wrong_is_named(method: str) -> None:
    async with gateway_with() as gateway:
        caller = gateway.acting_as(USER)
        for wrong, param in WRONG:
            with pytest.raises(InvalidRequest) as caught:
                await make(caller, method, {"model": "m", "messages": HELLO, **wrong})
            assert caught.value.param == param, wrong
        assert (await gateway.usage()).data == []


@pytest.mark.parametrize("method", ["complete", "stream"])
async def test_whether_a_call_streams_is_said_by_the_method(method: str) -> None:
    async with gateway_with() as gateway:
        with pytest.raises(InvalidArgument) as caught:
            await make(gateway.acting_as(USER), method, {"model": "m", "messages": HELLO, "stream": True})
        assert caught.value.param == "stream"


@pytest.mark.parametrize("method", ["stream_response", "event_stream"])
async def test_a_dialect_that_there_is_not_is_refused(method: str) -> None:
    async with gateway_with() as gateway:
        with pytest.raises(InvalidArgument) as caught:
            await getattr(gateway.acting_as(USER), method)(model="m", messages=HELLO, format="xml")
        assert caught.value.param == "format"


async def test_the_gateway_names_what_is_wrong_as_its_callers_do() -> None:
    request = CompletionRequest(model="m", messages=HELLO)
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (5, request, {}, "who"),
        (USER, {"model": "m"}, {}, "request"),
        (USER, request, {"timeout": "soon"}, "timeout"),
        (USER, request, {"tags": 5}, "tags"),
        (USER, request, {"cache": True}, "cache"),
        (USER, request, {"idempotency_key": 5}, "idempotency_key"),
        (USER, request, {"time_out": 5}, "time_out"),
        (USER, CompletionRequest(model="m", prompt="p"), {}, "prompt"),  # type: ignore[arg-type]  # what is wrong with it is the test
    ]
    async with gateway_with() as gateway:
        for who, asked, options, param in wrong:
            for method in ("complete", "quote", "event_stream"):
                with pytest.raises(InvalidRequest) as caught:
                    await getattr(gateway, method)(who, asked, **options)
                assert caught.value.param == param
            with pytest.raises(InvalidRequest) as caught:
                async with gateway.stream(who, asked, **options):
                    pass
            assert caught.value.param == param


async def test_filters_of_usage_that_are_wrong_are_named() -> None:
    async with gateway_with() as gateway:
        caller = gateway.acting_as(USER)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"principal": "other"}, "principal"), ({"tenant": 5}, "tenant"), ({"model": 5}, "model"), ({"group_by": "day"}, "group_by"),
            ({"group_by": 5}, "group_by"), ({"since": "today"}, "since"), ({"limit": "many"}, "limit"), ({"cursor": 5}, "cursor"),
        ]  # fmt: skip
        for filters, param in wrong:
            with pytest.raises(InvalidArgument) as caught:
                await caller.usage(**filters)
            assert caught.value.param == param


async def test_parameters_travel_to_the_provider_however_they_are_given() -> None:
    provider = ScriptedProvider("a", "b")
    async with gateway_with(provider) as gateway:
        caller = gateway.acting_as(Principal("free"))
        await caller.complete(model="m", messages=HELLO, seed=1, max_completion_tokens=7, params={"vendors_own": [1]})
        await caller.complete(model="m", messages=HELLO, vendors_own=[1])  # type: ignore[call-arg]  # untyped code may do so
    assert provider.calls[0].params == {"seed": 1, "vendors_own": [1]}
    assert provider.calls[0].max_tokens == 7
    assert provider.calls[1].params == {"vendors_own": [1]}


def test_every_documented_parameter_is_a_typed_argument() -> None:
    assert openai_chat.PARAMETERS.keys() - {"stream"} <= CallFields.__annotations__.keys()


async def test_a_prompt_may_be_a_mapping_or_a_reference() -> None:
    provider = ScriptedProvider("a", "b")
    async with gateway_with(provider) as gateway:
        await gateway.save_prompt("greet", "Greet {{name}}.")
        caller = gateway.acting_as(USER)
        await caller.complete(model="m", prompt={"name": "greet", "variables": {"name": "Ada"}})
        await caller.complete(model="m", prompt=PromptRef(name="greet", variables={"name": "Bob"}))
    assert [call.messages[0]["content"] for call in provider.calls] == ["Greet Ada.", "Greet Bob."]


# -- as whom it calls ----------------------------------------------------------------------------------------------------


async def test_a_job_acts_as_a_principal_or_as_a_stored_key() -> None:
    async with gateway_with() as gateway:
        _, key = await gateway.create_key("job")
        for who in (USER, key, key.id):
            answer = await gateway.acting_as(who).complete(model="m", messages=HELLO, tags={"job": "nightly"}, params={"user": str(who)})
            assert answer.cost_usd == COST
        assert [record.principal for record in (await gateway.usage()).data] == [key.id, key.id, "user"]


@pytest.mark.parametrize("wrong", [5, None, "ada", "aigw_something"])
async def test_a_job_acts_as_nobody_else(wrong: Any) -> None:
    gateway = gateway_with()
    with pytest.raises(InvalidArgument) as caught:
        gateway.acting_as(wrong)
    assert caught.value.param == "who"
    assert "something" not in str(caught.value)


async def test_a_key_that_is_changed_or_revoked_in_the_middle_of_a_job_is_seen() -> None:
    async with gateway_with() as gateway:
        _, key = await gateway.create_key("job")
        caller = gateway.acting_as(key.id)
        await caller.complete(model="m", messages=HELLO)
        await gateway.update_key(key.id, allowed_models=["other"])
        with pytest.raises(PermissionDenied):
            await caller.complete(model="m", messages=HELLO)
        await gateway.revoke_key(key.id)
        with pytest.raises(AuthenticationError, match="revoked"):
            await caller.complete(model="m", messages=HELLO)
        with pytest.raises(AuthenticationError):
            await gateway.acting_as("key_unknown").complete(model="m", messages=HELLO)


async def test_the_host_s_login_is_asked_once_in_a_request() -> None:
    asked: list[str] = []

    async def resolve(connection: Any) -> Principal:
        asked.append(connection.url.path)
        return USER

    async def route(request: Request) -> Response:
        caller = request.state.aigateway
        await caller.complete(model="m", messages=HELLO)
        await caller.budgets()
        return JSONResponse((await caller.usage()).totals.calls)

    gateway = gateway_with(resolve_principal=resolve)
    async with ASGIClient(AIGatewayMiddleware(Starlette(routes=[Route("/ask", route)]), gateway)) as client:
        assert (await client.get("/ask")).json() == 1
    assert asked == ["/ask"]


@pytest.mark.parametrize("wrong", [None, 5, {}, {"type": "lifespan"}, SimpleNamespace(scope={})])
async def test_what_is_no_scope_is_named(wrong: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await gateway_with().caller(wrong)
    assert caught.value.param == "scope"


async def test_a_read_only_scope_and_a_request_are_scopes_too() -> None:
    gateway = gateway_with(resolve_principal=by_header)
    scope = {"type": "http", "headers": [(b"x-user", b"user")], "path": "/", "method": "GET"}
    for given in (scope, MappingProxyType(scope), Request(scope)):
        assert await (await gateway.caller(given)).principal() == USER


async def test_observers_hear_of_calls_also_where_nothing_runs_beside_them() -> None:
    heard: list[UsageRecord] = []

    async def observe(event: Event) -> None:
        if isinstance(event, CallRecorded):
            heard.append(event.record)

    gateway = gateway_with(observers=[observe])
    caller = gateway.acting_as(USER)
    await caller.complete(model="m", messages=HELLO)
    assert len(heard) == 1
    async with caller.stream(model="m", messages=HELLO) as stream:
        async for _ in stream:
            pass
    assert len(heard) == 2


# -- WebSockets ----------------------------------------------------------------------------------------------------------


class WebSocketClient:
    """The server's half of one WebSocket: what the app sends comes out, and the other way round."""

    def __init__(self, path: str, headers: Mapping[str, str]) -> None:
        self.scope = {
            "type": "websocket", "asgi": {"version": "3.0"}, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "subprotocols": [], "scheme": "ws",
            "server": ("testserver", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self._to_app, self.receive = anyio.create_memory_object_stream[Any](8)
        self.send, self._from_app = anyio.create_memory_object_stream[Any](8)

    @asynccontextmanager
    async def connected(self, app: Any) -> AsyncIterator[Callable[[str], Any]]:
        async def say(text: str) -> Any:
            await self._to_app.send({"type": "websocket.receive", "text": text})
            return (await self._from_app.receive())["text"]

        with self._to_app, self.receive, self.send, self._from_app:
            async with anyio.create_task_group() as group:
                group.start_soon(app, self.scope, self.receive.receive, self.send.send)
                await self._to_app.send({"type": "websocket.connect"})
                assert (await self._from_app.receive())["type"] == "websocket.accept"
                yield say
                await self._to_app.send({"type": "websocket.disconnect", "code": 1000})


async def talk(websocket: StarletteWebSocket, caller: starlette_aigateway.Caller) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        try:
            answer = await caller.complete(model="echo", messages=[{"role": "user", "content": text}])
            await websocket.send_text(str(answer.message["content"]))
        except AIGatewayError as error:
            await websocket.send_text(error.code)


async def test_a_websocket_calls_as_whoever_opened_it_and_ends_with_the_key_that_it_came_by() -> None:
    gateway = gateway_with(EchoProvider())

    async def by_state(websocket: StarletteWebSocket) -> None:
        await talk(websocket, websocket.state.aigateway)

    async def by_scope(websocket: StarletteWebSocket) -> None:
        await talk(websocket, await gateway.caller(websocket.scope))

    fastapi = FastAPI()

    @fastapi.websocket("/fastapi")
    async def by_dependency(websocket: WebSocket, caller: Caller) -> None:
        await talk(websocket, caller)

    starlette = Starlette(routes=[WebSocketRoute("/state", by_state), WebSocketRoute("/scope", by_scope)])
    async with gateway:
        for app, path in ((starlette, "/state"), (starlette, "/scope"), (fastapi, "/fastapi")):
            raw_key, key = await gateway.create_key("browser")
            client = WebSocketClient(path, {"authorization": f"Bearer {raw_key}"})
            async with client.connected(AIGatewayMiddleware(app, gateway)) as say:
                assert await say("hi") == "hi"
                await gateway.revoke_key(key.id)
                assert await say("hi again") == "invalid_api_key"


# -- FastAPI -------------------------------------------------------------------------------------------------------------


def fastapi_app(gateway: AIGateway, ended: list[Any] | None = None) -> FastAPI:
    app = FastAPI()
    app.add_middleware(AIGatewayMiddleware, gateway=gateway)

    @app.post("/ask")
    async def ask(text: str, caller: Caller) -> dict[str, str]:
        assert_type(caller, starlette_aigateway.Caller)
        answer = await caller.complete(model="m", messages=[{"role": "user", "content": text}])
        return {"text": answer.message["content"], "cost_usd": f"{answer.cost_usd:f}"}

    @app.post("/stream")
    async def stream(text: str, caller: Caller, tasks: BackgroundTasks) -> FastAPIResponse:
        response = await caller.stream_response(model="m", messages=[{"role": "user", "content": text}], format="openai")
        tasks.add_task(lambda: (ended if ended is not None else []).append((response.usage, response.cost_usd)))
        return response

    return app


async def test_a_route_of_fastapi_gets_the_caller_by_its_annotation() -> None:
    gateway = gateway_with(resolve_principal=by_header)
    async with ASGIClient(fastapi_app(gateway), headers={"x-user": "user"}) as client:
        assert (await client.post("/ask?text=hi")).json() == {"text": "one two", "cost_usd": "0.020000000"}
        refused = await client.post("/ask?text=hi", headers={"x-user": "poor"})
        assert (refused.status, refused.json()["error"]["code"]) == (402, "spend_cap_exceeded")
        assert (await client.post("/ask?text=hi", headers={"x-user": "nobody"})).status == 401


async def test_the_openapi_of_fastapi_knows_nothing_of_the_caller() -> None:
    operation = fastapi_app(gateway_with()).openapi()["paths"]["/ask"]["post"]
    assert [parameter["name"] for parameter in operation["parameters"]] == ["text"]
    assert "requestBody" not in operation
    assert "security" not in operation


async def test_background_tasks_of_fastapi_run_after_a_stream_and_know_its_cost() -> None:
    ended: list[Any] = []
    async with ASGIClient(fastapi_app(gateway_with(resolve_principal=by_header), ended), headers={"x-user": "user"}) as client:
        assert (await client.post("/stream?text=hi")).text.endswith("data: [DONE]\n\n")
        assert ended == [(Usage(input_tokens=10, output_tokens=5), COST)]
        assert (await client.post("/stream?text=hi", headers={"x-user": "poor"})).status == 402
        assert ended[1:] == [(None, None)]


async def test_without_the_middleware_the_dependency_says_what_is_missing() -> None:
    app = FastAPI()

    @app.get("/ask")
    async def ask(caller: Caller) -> str:
        raise AssertionError

    @app.get("/billed")
    async def billed(caller: Annotated[starlette_aigateway.Caller, Depends(caller_from("billing"))]) -> str:
        raise AssertionError

    with pytest.raises(ConfigurationError, match=r"request\.state\.aigateway: app\.add_middleware\(AIGatewayMiddleware, gateway=gateway\)"):
        await ASGIClient(app).get("/ask")
    with pytest.raises(ConfigurationError, match="state_name='billing'"):
        await ASGIClient(app).get("/billed")


InBatch = Annotated[starlette_aigateway.Caller, Depends(caller_from("batch"))]


async def test_two_gateways_in_one_app_are_told_apart_by_their_state_names() -> None:
    chat = AIGateway.in_memory(name="chat", providers=[ScriptedProvider("from chat", repeat=True)], resolve_principal=by_header)
    batch = AIGateway.in_memory(name="batch", providers=[ScriptedProvider("from batch", repeat=True)], resolve_principal=by_header)
    app = FastAPI()

    @app.get("/both")
    async def both(caller: Caller, in_batch: InBatch) -> list[Any]:
        return [(await one.complete(model="m", messages=HELLO)).message["content"] for one in (caller, in_batch)]

    app.add_middleware(AIGatewayMiddleware, gateway=chat)
    app.add_middleware(AIGatewayMiddleware, gateway=batch, state_name="batch")
    async with ASGIClient(app, headers={"x-user": "user"}) as client:
        # a cap needs a price, and there is none: each gateway is asked for itself
        assert (await client.get("/both")).status == 503
        for gateway in (chat, batch):
            await gateway.set_price("m", Price.free())
        assert (await client.get("/both")).json() == ["from chat", "from batch"]
        assert [(await gateway.usage()).totals.calls for gateway in (chat, batch)] == [1, 1]
    assert repr(batch) == "AIGateway(name='batch', providers=['scripted'])"


# -- streams as responses ------------------------------------------------------------------------------------------------


def starlette_app(gateway: AIGateway, ended: list[Any], **call: Any) -> Any:
    async def route(request: Request) -> Response:
        caller: starlette_aigateway.Caller = request.state.aigateway
        response = await caller.stream_response(model="m", messages=HELLO, cache=ANEW, **call)
        response.background = BackgroundTask(lambda: ended.append((response.cost_usd, response.finish_reason)))
        return response

    return AIGatewayMiddleware(Starlette(routes=[Route("/", route)]), gateway)


@pytest.mark.parametrize("format", ["openai", "native"])
async def test_a_stream_from_a_route_is_incremental_in_either_dialect_and_its_cost_is_known_at_its_end(format: str) -> None:  # noqa: A002
    ended: list[Any] = []
    gateway = gateway_with(resolve_principal=by_header)
    async with ASGIClient(starlette_app(gateway, ended, format=format), headers={"x-user": "user"}) as client:
        async with client.stream("GET", "/") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [event async for event in answer.events()]
            assert not answer.ended or ended
        if format == "openai":
            assert events[-1].data == "[DONE]"
            assert not any(event.json().get("usage") for event in events[:-1])
        else:
            assert (events[-1].event, events[-1].json()["cost_usd"]) == ("done", "0.02")
    assert ended == [(COST, "stop")]


async def test_a_stream_from_a_route_tells_its_usage_where_that_is_asked_for() -> None:
    app = starlette_app(gateway_with(resolve_principal=by_header), [], format="openai", stream_options={"include_usage": True})
    async with ASGIClient(app, headers={"x-user": "user"}) as client:
        text = (await client.get("/")).text
    assert '"prompt_tokens":10' in text


async def test_a_stream_that_is_left_or_breaks_off_still_runs_its_background_task() -> None:
    ended: list[Any] = []
    provider = ScriptedProvider(Say("one two three"), Die(ProviderError("gone"), after=1, text="one two"))
    async with ASGIClient(starlette_app(gateway_with(provider, resolve_principal=by_header), ended), headers={"x-user": "user"}) as client:
        async with client.stream("GET", "/") as answer:
            assert (await anext(answer.events())).event == "delta"
        assert len(ended) == 1
        assert (await client.get("/")).text.splitlines()[-2].startswith('data: {"error"')
        assert ended[1] == (None, None)


# -- streams in frameworks with responses of their own -------------------------------------------------------------------


def quart_app(gateway: AIGateway, kept: list[Any]) -> Any:
    app = quart.Quart(__name__)
    app.register_error_handler(AIGatewayError, render_error)

    @app.get("/")
    async def route() -> Any:
        caller = await gateway.caller(quart.request.scope)
        events = await caller.event_stream(model="m", messages=HELLO, format="openai", cache=ANEW)
        kept.append(events)
        return aiter(events), 200, events.headers

    app.asgi_app = AIGatewayMiddleware(app.asgi_app, gateway)  # type: ignore[method-assign]  # as its documentation says
    return app


def django_app(gateway: AIGateway, kept: list[Any]) -> Any:
    if not django.conf.settings.configured:
        django.conf.settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="x", USE_TZ=True)
        django.setup()
    from django.core.handlers.asgi import ASGIHandler
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    async def view(request: Any) -> Any:
        try:
            caller = await gateway.caller(request.scope)
            events = await caller.event_stream(model="m", messages=HELLO, format="openai", cache=ANEW)
        except AIGatewayError as error:
            body, status, headers = render_error(error)
            return HttpResponse(body, status=status, headers=headers)
        kept.append(events)
        return StreamingHttpResponse(aiter(events), headers=events.headers)

    urls = ModuleType("urls")
    vars(urls)["urlpatterns"] = [path("", view)]
    django.conf.settings.ROOT_URLCONF = urls
    return AIGatewayMiddleware(ASGIHandler(), gateway)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("make_app", [quart_app, django_app])
async def test_a_framework_with_responses_of_its_own_streams_admitted_and_incremental(make_app: Any) -> None:
    go = anyio.Event()

    class Gated:
        name = "gated"

        async def complete(self, request: CompletionRequest) -> Any:
            raise AssertionError("only streamed")

        async def stream(self, request: CompletionRequest) -> Any:
            yield starlette_aigateway.Chunk(delta={"content": "one "})
            await go.wait()
            yield starlette_aigateway.Chunk(delta={"content": "two"}, finish_reason="stop", usage=Usage(input_tokens=10, output_tokens=5))

    kept: list[Any] = []
    gateway = gateway_with(Gated(), resolve_principal=by_header)
    async with ASGIClient(make_app(gateway, kept), headers={"x-user": "user"}) as client:
        async with client.stream("GET", "/") as answer:
            assert answer.status == 200
            assert answer.headers["x-aigateway-provider"] == "gated"
            events = answer.events()
            assert (await anext(events)).json()["choices"][0]["delta"]["content"] == "one "
            go.set()
            assert [event.data async for event in events][-1] == "[DONE]"
        assert (kept[0].cost_usd, kept[0].finish_reason, kept[0].usage.output_tokens) == (COST, "stop", 5)
        refused = await client.get("/", headers={"x-user": "poor"})
        assert (refused.status, refused.json()["error"]["code"]) == (402, "spend_cap_exceeded")
        go = anyio.Event()
        async with client.stream("GET", "/") as answer:
            await anext(answer.events())
        go.set()
    async with gateway:
        outcomes = [record.outcome for record in (await gateway.usage()).data]
    assert outcomes == ["completed", "completed"], "what was left was read to its end, and booked"


async def test_an_open_event_stream_can_be_closed_unread() -> None:
    provider = ScriptedProvider(Say("one two three"))
    async with gateway_with(provider) as gateway:
        events = await gateway.acting_as(USER).event_stream(model="m", messages=HELLO)
        await events.aclose()
        await events.aclose()
    async with gateway:
        assert [record.cost_usd for record in (await gateway.usage()).data] == [COST]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_event_stream_that_a_framework_forgets_is_settled_all_the_same() -> None:
    gateway = gateway_with()
    async with override(gateway, providers=[ScriptedProvider(Say("word " * 100))]) as recorded:
        events = await gateway.acting_as(USER).event_stream(model="m", messages=HELLO)
        del events
        gc.collect()
        with anyio.fail_after(20):
            (record,) = await recorded.booked(1)
    assert record.cost_usd == COST


async def test_an_event_stream_ends_with_the_error_that_broke_it_off() -> None:
    async with gateway_with(ScriptedProvider(Die(ProviderError("gone"), after=1, text="one two"))) as gateway:
        events = await gateway.acting_as(USER).event_stream(model="m", messages=HELLO)
        async with aclosing(aiter(events)) as parts:
            last = [part async for part in parts][-1]
    assert last.startswith(b"event: error\n")
    assert events.cost_usd is None


async def test_what_refuses_an_event_stream_is_raised_before_there_is_one() -> None:
    async with gateway_with() as gateway:
        with pytest.raises(SpendCapExceeded):
            await gateway.acting_as(POOR).event_stream(model="m", messages=HELLO)


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_an_event_stream_needs_somebody_who_owns_it_on_trio() -> None:
    with pytest.raises(ConfigurationError, match="lifespan"):
        await gateway_with().acting_as(USER).event_stream(model="m", messages=HELLO)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("whole", [True, False])
async def test_an_event_stream_on_asyncio_needs_no_lifespan(whole: bool) -> None:
    gateway = gateway_with(ScriptedProvider(Say("word " * 100)))
    events = await gateway.acting_as(USER).event_stream(model="m", messages=HELLO)

    async def read() -> None:
        async with aclosing(aiter(events)) as parts:
            async for _ in parts:
                if not whole:
                    return

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
    assert [record.outcome for record in (await gateway.usage()).data] == ["completed"]
    assert events.cost_usd == (COST if whole else None)
