"""What adapters over HTTP have in common: their arguments, their secrecy, one attempt, and how its answer is read."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self
from urllib.parse import urlsplit

from msgspec import Struct

from ..deadlines import deadline
from ..errors import InvalidArgument, ProviderError
from ..pouring import pour
from ..protocols import HTTPAnswer, HTTPRequest, ProviderAnswer, Transport
from ..types import Completion, ProviderCall, StreamItem
from .transport import as_transport
from .upstream import AMBIGUOUS, status_error

MAX_ANSWER_BYTES = 32 * 2**20
MAX_ERROR_BYTES = 64 * 2**10
LAST_BYTES_SECONDS = 0.25
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]+")


class EventReader(Protocol):
    """Turns the bytes of a stream into items and raises `ProviderError`. `saw_done`: the mark that ends a stream came, there is nothing
    more to read; `complete`: it was not cut short."""

    saw_done: bool

    @property
    def complete(self) -> bool: ...

    def feed(self, data: bytes) -> Iterator[StreamItem]: ...

    def close(self) -> Iterator[StreamItem]: ...


class Wire(Struct, frozen=True, kw_only=True):
    """How the answers of an upstream are read. `answer` is what it calls a whole one; `decode_completion` raises `ValueError`."""

    answer: str
    decode_completion: Callable[[bytes], Completion]
    error_facts: Callable[[bytes], Mapping[str, str]]
    event_reader: Callable[[], EventReader]


class HTTPAdapter(ABC):
    """An `Adapter` over a `Transport`. A subclass has a `wire`, makes requests of calls and says which models it serves.

    `ambiguous` are the statuses after which nobody knows whether the call was billed; a subclass for an upstream behind other gateways
    names theirs too. Neither `repr` nor an error shows a header, and the object cannot be pickled.
    """

    bounds_output = True
    ambiguous: Collection[int] = AMBIGUOUS
    wire: Wire

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        models: Sequence[str] | Mapping[str, str] | None,
        timeout: float | None,
        max_output_tokens: int | None,
        headers: Mapping[str, str],
        transport: Any,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self.models = models
        self.timeout = timeout
        self.max_output_tokens = max_output_tokens
        self._headers = {stream: {**headers, "accept": "text/event-stream" if stream else "application/json"} for stream in (False, True)}
        self._owns_transport = transport is None
        self._transport: Transport = as_transport(transport)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, base_url={self.base_url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a credential and cannot be pickled or copied; construct it where it is used")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections of the running event loop; a transport that was given stays its owner's to close."""
        if self._owns_transport:
            await self._transport.aclose()

    @abstractmethod
    def serves(self, model: str) -> bool:
        """Whether calls for the public name `model` may go here."""

    @abstractmethod
    def _encode(self, call: ProviderCall) -> tuple[str, bytes]:
        """The path below `base_url`, and the body. Raises `ProviderError` for what the wire cannot say."""

    def open(self, call: ProviderCall) -> AbstractAsyncContextManager[ProviderAnswer]:
        return Opening(self, self._sent(call))

    def _sent(self, call: ProviderCall) -> AbstractAsyncContextManager[HTTPAnswer]:
        path, body = self._encode(call)
        headers = self._headers[call.stream]
        if call.headers:
            headers = {name.lower(): value for name, value in call.headers.items()} | headers
        connect, read = min(call.connect, call.timeout), min(call.read, call.timeout)
        return self._transport.send(HTTPRequest(self.base_url + path, headers, body), connect=connect, read=read)


class Opening:
    """One attempt; `sent` is its request. A class, because a generator is ten times as dear, and there is one for each call."""

    __slots__ = ("_adapter", "_opened", "_sent")

    def __init__(self, adapter: HTTPAdapter, sent: AbstractAsyncContextManager[HTTPAnswer]) -> None:
        self._adapter = adapter
        self._sent = sent

    @property
    def unsent(self) -> bool:
        return getattr(self._sent, "unsent", False)

    async def __aenter__(self) -> UpstreamAnswer:
        answer = await self._sent.__aenter__()
        if 200 <= answer.status < 300:
            self._opened = UpstreamAnswer(self._adapter.name, answer, self._adapter.wire)
            return self._opened
        try:
            raise await self._failure(answer)
        except BaseException as error:
            await self._sent.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            await self._opened.aclose()
        finally:
            await self._sent.__aexit__(kind, error, trace)
        return None

    async def _failure(self, answer: HTTPAnswer) -> ProviderError:
        adapter = self._adapter
        try:
            facts = adapter.wire.error_facts(await answer.read(MAX_ERROR_BYTES))
        except ProviderError:  # the status came back and says what there is to know; the body is only for details
            facts = {}
        return status_error(adapter.name, answer.status, answer.headers, facts, now=time.time(), ambiguous=adapter.ambiguous)


class UpstreamAnswer:
    """An answer with a status of success, whole or as a stream."""

    def __init__(self, name: str, answer: HTTPAnswer, wire: Wire) -> None:
        self._name = name
        self._answer = answer
        self._wire = wire
        self._events: Events | None = None

    async def completion(self) -> Completion:
        body = await self._answer.read(MAX_ANSWER_BYTES)
        try:
            return self._wire.decode_completion(body)
        except ValueError:
            raise ProviderError(
                f"the provider {self._name} answered with something that is not a {self._wire.answer}",
                status=self._answer.status,
                details=dict(self._wire.error_facts(body)) or None,
            ) from None

    def events(self) -> AsyncIterator[StreamItem]:
        if self._events is None:
            self._events = Events(self._name, self._answer, self._wire.event_reader())
        return self._events

    async def aclose(self) -> None:
        if self._events is not None:
            await self._events.aclose()


class Events:
    """The items of a stream as its bytes come. A class: the event loop keeps a list of generators, and puts each of them on it."""

    __slots__ = ("_answer", "_chunks", "_failure", "_flows", "_items", "_name", "_over", "_reader", "_take")

    def __init__(self, name: str, answer: HTTPAnswer, reader: EventReader) -> None:
        self._name = name
        self._answer = answer
        self._chunks = answer.chunks()
        self._reader = reader
        self._items: Iterator[StreamItem] = iter(())
        self._take: Callable[[StreamItem], bool] = _nothing
        self._flows = True
        self._failure: BaseException | None = None
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamItem:
        items: list[StreamItem] = []

        def take(item: StreamItem) -> bool:
            items.append(item)
            return False

        if not await self.pour(take):
            raise StopAsyncIteration
        return items[0]

    async def pour(self, take: Callable[[StreamItem], bool]) -> bool:
        """As `pouring.pour`."""
        self._take = take
        self._give(self._items)
        while self._flows:
            if self._over:
                return False
            await self._read()
        return True

    async def _read(self) -> None:
        """Bytes until `take` says no, or until their end."""
        more = self._reader.saw_done or await pour(self._chunks, self._arrived)
        if self._failure is not None:
            raise self._failure
        if not self._flows:
            return
        if self._reader.saw_done:
            self._over = True
            if more:
                await _read_last_bytes(self._chunks)
        elif not more:
            self._over = True
            self._give(self._last())

    def _arrived(self, data: bytes) -> bool:
        try:
            self._items = self._reader.feed(data)
            for item in self._items:
                if not self._take(item):
                    self._flows = False
                    return False
        except BaseException as error:  # noqa: BLE001  # for the task that reads: this may be called outside of it
            self._failure = error
            return False
        return not self._reader.saw_done

    def _give(self, items: Iterator[StreamItem]) -> None:
        self._items = items
        self._flows = True
        for item in items:
            if not self._take(item):
                self._flows = False
                return

    def _last(self) -> Iterator[StreamItem]:
        yield from self._reader.close()
        if not self._reader.complete:
            raise ProviderError(f"the stream of the provider {self._name} was cut short", status=self._answer.status)

    async def aclose(self) -> None:
        self._over = True
        close = getattr(self._chunks, "aclose", None)  # a transport's iterator need not be a generator
        if close is not None:
            await close()


def _nothing(item: StreamItem) -> bool:
    return False


async def _read_last_bytes(chunks: AsyncIterator[bytes]) -> None:
    """Waits a moment for the end of the body, which comes right behind the end mark: only a body read to its end gives its connection
    back."""
    with deadline(LAST_BYTES_SECONDS):
        try:
            async for _ in chunks:
                pass
        except ProviderError:  # the answer is complete; how its connection ends changes nothing
            return


def base_url(value: Any, *endings: str) -> str:
    """An address without a slash and without the first of `endings` at its end. Raises `InvalidArgument`."""
    if not isinstance(value, str):
        raise InvalidArgument("base_url must be a string such as 'https://host/v1'", param="base_url")
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not value.isascii() or not value.isprintable() or " " in value:
        raise InvalidArgument("base_url must be an absolute http or https URL such as 'https://host/v1'", param="base_url")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidArgument("base_url must hold no user, password, query or fragment; give credentials as api_key", param="base_url")
    address = value.rstrip("/")
    return next((address.removesuffix(ending) for ending in endings if address.endswith(ending)), address)


def json_headers(extra: Mapping[str, str]) -> dict[str, str]:
    """What goes out with each request besides the provider's own headers: `extra` by lower-case names. Raises `InvalidArgument`."""
    headers = {"user-agent": f"starlette_aigateway/{version('starlette_aigateway')}"}
    for name, value in extra.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidArgument("headers must have names as RFC 9110 allows them", param="headers")
        headers[name.lower()] = header_value(value, "headers")
    headers["content-type"] = "application/json"
    return headers


def header_value(value: Any, name: str) -> str:
    """`value`, if it can be sent as a header. Raises `InvalidArgument`, which names `name` and does not repeat the value."""
    if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value) or value != value.strip():
        raise InvalidArgument(f"{name} must be visible ASCII text without surrounding blanks or line breaks", param=name)
    return value
