"""One request to an ASGI app, and its answer while it comes: nothing is buffered, and the app waits until what it sent was taken."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Self, TypeVar

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

from ..wires.sse import SSEDecoder, SSEEvent

T = TypeVar("T")


class ServerSentEvent:
    """`event` is None where it has no name."""

    def __init__(self, event: SSEEvent) -> None:
        self.event = event.event
        self.data = event.data.decode()

    def json(self) -> Any:
        return json.loads(self.data)

    def __repr__(self) -> str:
        return f"ServerSentEvent(event={self.event!r}, data={self.data!r})"


class Chunks:
    """No generator: it may be left at any point, and nothing has to be closed."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        data = await self._exchange.next_chunk()
        if data is None:
            raise StopAsyncIteration
        return data


class Events:
    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._decoder = SSEDecoder()
        self._decoded: deque[SSEEvent] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ServerSentEvent:
        while not self._decoded:
            data = await self._exchange.next_chunk()
            self._decoded.extend(self._decoder.close() if data is None else self._decoder.feed(data))
            if data is None and not self._decoded:
                raise StopAsyncIteration
        return ServerSentEvent(self._decoded.popleft())


class Exchange:
    """A request that was sent. `status` and `headers` are known once `head()` has returned.

    What the app raises is raised by whatever waits for it here, and at the latest where the block of the request ends.
    """

    def __init__(self, app: ASGIApp, scope: Scope, content: AsyncIterator[bytes], *, raise_when_left: bool) -> None:
        self._app = app
        self._scope = scope
        self._content = content
        self._asked = False
        self._raise_when_left = raise_when_left
        self._head: tuple[int, Headers] | None = None
        self._headed = anyio.Event()
        self._to_reader, self._from_app = anyio.create_memory_object_stream[bytes](0)
        self._answered = False
        self._over = anyio.Event()
        self._left = anyio.Event()
        self._ended = anyio.Event()
        self._error: Exception | None = None

    # -- what a test looks at ----------------------------------------------------------------------------------------

    async def head(self) -> None:
        """Waits for the status and the headers, which come before the body. Raises `AssertionError` if the app ends without them."""
        await self._headed.wait()
        if self._head is None:
            self.check()
            raise AssertionError("the app ended without an answer")

    @property
    def status(self) -> int:
        return self._known_head[0]

    @property
    def headers(self) -> Headers:
        return self._known_head[1]

    @property
    def _known_head(self) -> tuple[int, Headers]:
        assert self._head is not None, "the head has not come yet: await head() first"
        return self._head

    async def next_chunk(self) -> bytes | None:
        """The next piece of the body as the app sent it; None at the end. Raises `AssertionError` where the app ends in the middle."""
        await self.head()
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError):
            return await self._from_app.receive()
        if not self._answered and not self._left.is_set():
            self.check()
            raise AssertionError("the app ended in the middle of its body")
        return None

    def chunks(self) -> Chunks:
        """The body, piece by piece."""
        return Chunks(self)

    def events(self) -> Events:
        """The body as server-sent events, each as soon as it is whole."""
        return Events(self)

    async def read(self) -> bytes:
        """The rest of the body."""
        return b"".join([data async for data in self.chunks()])

    def disconnect(self) -> None:
        """The client is gone: the app hears `http.disconnect`, and what it still sends reaches nobody."""
        self._left.set()
        self._from_app.close()

    @property
    def ended(self) -> bool:
        """Whether the app has returned or raised."""
        return self._ended.is_set()

    async def returned(self) -> None:
        """Waits until the app has returned or raised."""
        await self._ended.wait()

    def check(self) -> None:
        """Raises what the app raised and nobody has heard of."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def explain(self, failure: BaseException) -> None:
        """What the app raised is often why a test has failed."""
        error, self._error = self._error, None
        if error is not None and error is not failure:
            failure.add_note(f"the app raised {error!r}")

    # -- what the app sees -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  # it is raised in the test, wherever that waits
            self._error = error
        finally:
            self._to_reader.close()
            self._ended.set()
            self._over.set()
            self._headed.set()

    async def _receive(self) -> Message:
        if not self._asked and not self._left.is_set():
            data = await self._until_left(self._next_content)
            if not self._left.is_set():
                self._asked = data is None
                return {"type": "http.request", "body": data or b"", "more_body": not self._asked}
        await self._until_left(self._over.wait)
        return {"type": "http.disconnect"}

    async def _next_content(self) -> bytes | None:
        return await anext(self._content, None)

    async def _until_left(self, wait: Callable[[], Awaitable[T]]) -> T | None:
        """What `wait` brings; None once the client has left."""
        found: T | None = None
        failure: BaseException | None = None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await self._left.wait()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                found = await wait()
            except Exception as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return found

    async def _send(self, message: Message) -> None:
        if self._left.is_set():
            return self._refuse()
        if message["type"] == "http.response.start":
            assert self._head is None, "the app has sent http.response.start twice"
            self._head = message["status"], Headers(raw=[*message.get("headers", ())])
            self._headed.set()
            return None
        assert message["type"] == "http.response.body", f"the app has sent {message['type']!r}"
        assert self._head is not None, "the app has sent a body before http.response.start"
        assert not self._answered, "the app has sent more after its last body"
        if body := message.get("body", b""):
            try:
                await self._to_reader.send(bytes(body))
            except anyio.BrokenResourceError:  # the client left while the app was sending
                return self._refuse()
        if not message.get("more_body", False):
            self._answered = True
            self._over.set()
            self._to_reader.close()
        return None

    def _refuse(self) -> None:
        if self._raise_when_left:
            raise OSError("the client has left")
