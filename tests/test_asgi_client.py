"""The streaming ASGI client that hosts test with: nothing is buffered, it can leave at any point, and no error gets lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import quart
from fastapi import FastAPI
from fastapi.responses import StreamingResponse as FastAPIStream
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from starlette_aigateway.testing import ASGIClient

pytestmark = pytest.mark.anyio


async def start(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-a", b"1"), (b"x-a", b"2")]})


async def say(send: Any, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def test_the_head_is_read_before_the_body_is_made() -> None:
    go = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send, 201)
        await go.wait()
        await say(send, b"late", more=False)

    async with ASGIClient(app).stream("GET", "/") as answer:
        assert (answer.status, answer.headers.getlist("x-a")) == (201, ["1", "2"])
        go.set()
        assert await answer.read() == b"late"


async def test_the_app_waits_until_what_it_sent_was_taken() -> None:
    sent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        for number in range(3):
            await say(send, b"%d" % number, more=number < 2)
            sent.append(number)

    async with ASGIClient(app).stream("GET", "/") as answer:
        await anyio.wait_all_tasks_blocked()
        assert sent == []
        seen = []
        async for data in answer.chunks():
            await anyio.wait_all_tasks_blocked()
            seen.append((data, len(sent)))
        assert seen == [(b"0", 1), (b"1", 2), (b"2", 3)]


async def test_events_come_one_by_one_however_the_bytes_are_cut() -> None:
    whole = b'event: delta\ndata: {"a": 1}\n\ndata: two\ndata: lines\n\n: comment\n\ndata: [DONE]\n\n'

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        for position in range(len(whole)):
            await say(send, whole[position : position + 1])
        await say(send, b"", more=False)

    async with ASGIClient(app).stream("GET", "/") as answer:
        events = [event async for event in answer.events()]
    assert [(event.event, event.data) for event in events] == [("delta", '{"a": 1}'), (None, "two\nlines"), (None, "[DONE]")]
    assert events[0].json() == {"a": 1}


async def test_a_body_is_sent_chunk_by_chunk_when_the_app_asks_for_it() -> None:
    made: list[str] = []

    async def content() -> AsyncIterator[bytes]:
        for piece in ("a", "b", "c"):
            made.append(piece)
            yield piece.encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert dict(scope["headers"])[b"transfer-encoding"] == b"chunked"
        first = await receive()
        await start(send)
        await say(send, b"%s/%d" % (first["body"], len(made)))
        rest = b""
        while first["more_body"]:
            first = await receive()
            rest += first["body"]
        await say(send, rest, more=False)

    async with ASGIClient(app).stream("POST", "/", content=content()) as answer:
        assert [data async for data in answer.chunks()] == [b"a/1", b"bc"]


@pytest.mark.parametrize("content", [b"hello", [b"he", b"llo"]])
async def test_a_request_arrives_as_it_was_meant(content: Any) -> None:
    async def route(request: Request) -> Response:
        return JSONResponse(
            {
                "body": (await request.body()).decode(), "q": request.query_params["q"], "path": request.url.path,
                "user": request.headers["x-user"], "host": request.headers["host"],
            }
        )  # fmt: skip

    app = Starlette(routes=[Route("/a b", route, methods=["POST"])])
    answer = await ASGIClient(app, headers={"X-User": "ada"}, root_path="/below").post("/a%20b?q=1%2B1", content=content)
    assert (answer.status, answer.json()) == (
        200, {"body": "hello", "q": "1+1", "path": "/below/a b", "user": "ada", "host": "testserver"},
    )  # fmt: skip


async def test_a_client_that_leaves_is_told_of_and_the_rest_reaches_nobody() -> None:
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await start(send)
        await say(send, b"first")
        heard.append((await receive())["type"])
        await say(send, b"nobody reads this", more=False)
        heard.append((await receive())["type"])

    async with ASGIClient(app).stream("GET", "/") as answer:
        assert await anext(answer.chunks()) == b"first"
        assert not answer.ended
        answer.disconnect()
        await answer.returned()
        assert answer.ended
    assert heard == ["http.disconnect", "http.disconnect"]


async def test_leaving_the_block_is_leaving_the_app() -> None:
    told = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await start(send)
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with ASGIClient(app).stream("GET", "/"):
        assert not told.is_set()
    assert told.is_set()


async def test_a_client_may_leave_before_the_answer_begins_and_while_it_sends() -> None:
    heard: list[Any] = []
    asked = anyio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"some"
        asked.set()
        await anyio.sleep_forever()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["body"])
        heard.append((await receive())["type"])

    async with ASGIClient(app).open("POST", "/", content=content()) as answer:
        await asked.wait()
        answer.disconnect()
        await answer.returned()
    assert heard == [b"some", "http.disconnect"]


async def test_sending_to_a_client_who_has_left_raises_where_that_is_asked_for() -> None:
    failed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["asgi"]["spec_version"] == "2.4"
        await start(send)
        try:
            while True:
                await say(send, b"x")
        except OSError as error:
            failed.append(str(error))

    async with ASGIClient(app, closed_send="raise").stream("GET", "/") as answer:
        await anext(answer.chunks())
    assert failed == ["the client has left"]


async def test_what_the_app_raises_is_raised_wherever_the_test_waits() -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("before the head")

    async def midway(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await say(send, b"a")
        raise ValueError("in the body")

    async def after(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await say(send, b"a", more=False)
        raise ValueError("after the answer")

    with pytest.raises(ValueError, match="before the head"):
        await ASGIClient(early).get("/")
    async with ASGIClient(midway).stream("GET", "/") as answer:
        with pytest.raises(ValueError, match="in the body"):
            await answer.read()
    with pytest.raises(ValueError, match="after the answer"):
        await ASGIClient(after).get("/")
    assert (await ASGIClient(after, raise_errors=False).get("/")).body == b"a"


async def test_a_failed_assertion_tells_what_the_app_had_raised() -> None:
    async def broken(request: Request) -> Response:
        raise KeyError("what went wrong")

    async def test() -> None:
        async with ASGIClient(Starlette(routes=[Route("/", broken)])).stream("GET", "/") as answer:
            await answer.read()
            assert answer.status == 200

    with pytest.raises(AssertionError) as caught:
        await test()
    assert caught.value.__notes__ == ["the app raised KeyError('what went wrong')"]


async def test_an_app_that_answers_half_or_not_at_all_fails_the_test() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return

    async def half(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await say(send, b"a")

    async def confused(scope: Any, receive: Any, send: Any) -> None:
        await say(send, b"a")

    with pytest.raises(AssertionError, match="without an answer"):
        await ASGIClient(silent).get("/")
    with pytest.raises(AssertionError, match="middle of its body"):
        await ASGIClient(half).get("/")
    with pytest.raises(AssertionError, match=r"before http\.response\.start"):
        await ASGIClient(confused).get("/")


async def test_an_app_that_goes_on_for_ever_without_a_client_fails_the_test_and_is_ended() -> None:
    ended: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(AssertionError, match="went on for"):
        async with ASGIClient(app, patience=0.01).stream("GET", "/"):
            pass
    assert ended == [True]


async def test_a_test_that_is_out_of_time_is_not_held_up() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.01) as scope:
        await ASGIClient(app).get("/")
    assert scope.cancelled_caught


# -- lifespans -----------------------------------------------------------------------------------------------------------


async def test_the_lifespan_runs_around_the_block_and_gives_its_state_to_requests() -> None:
    said: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        said.append("started")
        yield {"name": "x"}
        said.append("stopped")

    async def route(request: Request) -> Response:
        return JSONResponse(request.state.name)

    async with ASGIClient(Starlette(routes=[Route("/", route)], lifespan=lifespan)) as client:
        assert said == ["started"]
        assert (await client.get("/")).json() == "x"
    assert said == ["started", "stopped"]


@pytest.mark.parametrize("when", ["start", "stop"])
async def test_an_app_that_fails_to_start_or_to_stop_fails_the_test(when: str) -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if when == "start":
            raise ValueError("no database")
        yield
        raise ValueError("no database")

    with pytest.raises((ValueError, RuntimeError), match="no database"):
        async with ASGIClient(Starlette(lifespan=lifespan)):
            assert when == "stop"


async def test_an_app_without_a_lifespan_is_served_all_the_same() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await Response("hello")(scope, receive, send)

    async with ASGIClient(app) as client:
        assert (await client.get("/")).text == "hello"


# -- frameworks ----------------------------------------------------------------------------------------------------------


class Steps:
    """A body whose second piece waits for the test; tells when it was closed."""

    def __init__(self) -> None:
        self.go = anyio.Event()
        self.closed = anyio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        try:
            yield b"data: 1\n\n"
            await self.go.wait()
            yield b"data: 2\n\n"
        finally:
            self.closed.set()


def starlette_app(steps: Steps) -> Any:
    async def route(request: Request) -> Response:
        return StreamingResponse(steps.body())

    return Starlette(routes=[Route("/", route)])


def fastapi_app(steps: Steps) -> Any:
    app = FastAPI()

    @app.get("/")
    async def route() -> FastAPIStream:
        return FastAPIStream(steps.body())

    return app


def quart_app(steps: Steps) -> Any:
    app = quart.Quart(__name__)

    @app.get("/")
    async def route() -> Any:
        return steps.body(), 200

    return app


def bare_app(steps: Steps) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await StreamingResponse(steps.body())(scope, receive, send)

    return app


APPS = {"starlette": starlette_app, "fastapi": fastapi_app, "quart": quart_app, "bare": bare_app}


@pytest.mark.parametrize(
    ("framework", "anyio_backend"),
    [(framework, backend) for framework in APPS for backend in ("asyncio", "trio") if (framework, backend) != ("quart", "trio")],
)
async def test_streams_of_every_framework_come_as_they_are_made_and_can_be_left(framework: str) -> None:
    with anyio.fail_after(20):
        steps = Steps()
        async with ASGIClient(APPS[framework](steps)) as client:
            async with client.stream("GET", "/") as answer:
                events = answer.events()
                assert (await anext(events)).json() == 1
                steps.go.set()
                assert (await anext(events)).json() == 2
            left = steps.go = anyio.Event()
            steps.closed = anyio.Event()
            async with client.stream("GET", "/") as answer:
                await anext(answer.events())
            assert not left.is_set()
            await steps.closed.wait()


async def test_a_client_that_leaves_while_starlette_reads_its_body_is_told_of() -> None:
    left = anyio.Event()
    sending = anyio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield json.dumps("half").encode()
        sending.set()
        await anyio.sleep_forever()

    async def route(request: Request) -> Response:
        try:
            await request.body()
        except ClientDisconnect:
            left.set()
        return Response()

    async with ASGIClient(Starlette(routes=[Route("/", route, methods=["POST"])])).open("POST", "/", content=content()) as answer:
        await sending.wait()
        answer.disconnect()
        await answer.returned()
    assert left.is_set()
