"""OpenAI, and every API that speaks its Chat Completions: vLLM, Ollama, Groq, OpenRouter, Azure's v1, …"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

import anyio

from ..errors import InvalidArgument, ProviderError
from ..protocols import HTTPAnswer, HTTPRequest, ProviderAnswer, Transport
from ..types import Completion, ProviderCall, StreamItem
from ..wires import openai_chat
from .transport import as_transport
from .upstream import status_error

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_MODELS = re.compile(r"(ft:)?(gpt-|chatgpt-|codex-|o[1-9]\d*(-|:|$))")
MAX_ANSWER_BYTES = 32 * 2**20
MAX_ERROR_BYTES = 64 * 2**10
LAST_BYTES_SECONDS = 0.25
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]+")


class OpenAIProvider:
    """An adapter for the Chat Completions API at `base_url`.

    - `models`: what it serves, a list of names or `{public: upstream}`. Without it, OpenAI's own address serves OpenAI's names (`gpt-*`,
      `o3`, …) and any other address every name.
    - `timeout`: seconds for one attempt, None for the gateway's. `max_output_tokens`: what the models give at the most.
    - `max_tokens_field`: the field that bounds the output; by default `max_completion_tokens` at OpenAI, `max_tokens` elsewhere.
    - `headers`: sent with each request, such as `{"api-key": …}`; `organization` and `project` are OpenAI's.
    - `transport`: a `Transport`, an `httpx.AsyncClient` or an `httpx2.AsyncClient`; None chooses one.

    `base_url` may be `http` for a server of your own: key and prompts are then readable on the way. Neither `repr` nor an error shows
    the key, and the object cannot be pickled. Raises `InvalidArgument`.
    """

    bounds_output = True

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str = OPENAI_URL,
        *,
        name: str = "openai",
        models: Sequence[str] | Mapping[str, str] | None = None,
        timeout: float | None = None,
        max_output_tokens: int | None = None,
        max_tokens_field: str | None = None,
        headers: Mapping[str, str] | None = None,
        organization: str | None = None,
        project: str | None = None,
        transport: Any = None,
    ) -> None:
        self.name = name
        self.models = models
        self.timeout = timeout
        self.max_output_tokens = max_output_tokens
        self.base_url = _base_url(base_url)
        self._preset = self.base_url == OPENAI_URL
        self._max_tokens_field = _max_tokens_field(max_tokens_field, self._preset)
        self._headers = _headers(api_key, organization, project, headers or {})
        if self._preset and "authorization" not in self._headers:
            raise InvalidArgument("api_key is missing: OpenAI answers nobody without one", param="api_key")
        self._owns_transport = transport is None
        self._transport: Transport = as_transport(transport)

    def __repr__(self) -> str:
        return f"OpenAIProvider(name={self.name!r}, base_url={self.base_url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an OpenAIProvider holds a credential and cannot be pickled or copied; construct it where it is used")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections of the running event loop; a transport that was given stays its owner's to close."""
        if self._owns_transport:
            await self._transport.aclose()

    def serves(self, model: str) -> bool:
        """Whether calls for the public name `model` may go here."""
        if self.models is not None:
            return model in self.models
        return not self._preset or OPENAI_MODELS.match(model) is not None

    def open(self, call: ProviderCall) -> AbstractAsyncContextManager[ProviderAnswer]:
        return self._open(call)

    @asynccontextmanager
    async def _open(self, call: ProviderCall) -> AsyncIterator[ProviderAnswer]:
        request = HTTPRequest(
            f"{self.base_url}/chat/completions",
            self._headers_for(call),
            openai_chat.encode_request(call.request, stream=call.stream, max_tokens_field=self._max_tokens_field),
        )
        connect, read = min(call.connect, call.timeout), min(call.read, call.timeout)
        async with self._transport.send(request, connect=connect, read=read) as answer:
            if not 200 <= answer.status < 300:
                raise await self._failure(answer)
            opened = OpenAIAnswer(self.name, answer)
            try:
                yield opened
            finally:
                await opened.aclose()

    def _headers_for(self, call: ProviderCall) -> Mapping[str, str]:
        passed_on = {name.lower(): value for name, value in call.headers.items()}
        return {**passed_on, **self._headers, "accept": "text/event-stream" if call.stream else "application/json"}

    async def _failure(self, answer: HTTPAnswer) -> ProviderError:
        try:
            facts = openai_chat.error_facts(await answer.read(MAX_ERROR_BYTES))
        except ProviderError:  # the status came back and says what there is to know; the body is only for details
            facts = {}
        return status_error(self.name, answer.status, answer.headers, facts, now=time.time())


class OpenAIAnswer:
    def __init__(self, name: str, answer: HTTPAnswer) -> None:
        self._name = name
        self._answer = answer
        self._events: AsyncGenerator[StreamItem, None] | None = None

    async def completion(self) -> Completion:
        body = await self._answer.read(MAX_ANSWER_BYTES)
        try:
            return openai_chat.decode_completion(body)
        except ValueError:
            raise ProviderError(
                f"the provider {self._name} answered with something that is not a chat completion",
                status=self._answer.status,
                details=dict(openai_chat.error_facts(body)) or None,
            ) from None

    def events(self) -> AsyncIterator[StreamItem]:
        if self._events is None:
            self._events = self._read_events()
        return self._events

    async def aclose(self) -> None:
        if self._events is not None:
            await self._events.aclose()

    async def _read_events(self) -> AsyncGenerator[StreamItem, None]:
        reader = openai_chat.EventReader()
        async with _closing(self._answer.chunks()) as chunks:
            async for data in chunks:
                for item in reader.feed(data):
                    yield item
                if reader.saw_done:
                    await _read_last_bytes(chunks)
                    return
        for item in reader.close():
            yield item
        if not (reader.saw_done or reader.saw_finish):
            raise ProviderError(f"the stream of the provider {self._name} was cut short", status=self._answer.status)


@asynccontextmanager
async def _closing(chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """`contextlib.aclosing`, for a transport of the host's own, whose iterator need not be a generator."""
    try:
        yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


async def _read_last_bytes(chunks: AsyncIterator[bytes]) -> None:
    """Waits a moment for the end of the body, which comes right behind `[DONE]`: only a body read to its end gives its connection back."""
    with anyio.move_on_after(LAST_BYTES_SECONDS):
        try:
            async for _ in chunks:
                pass
        except ProviderError:  # the answer is complete; how its connection ends changes nothing
            return


def _base_url(value: Any) -> str:
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
    return value.rstrip("/").removesuffix("/chat/completions")


def _max_tokens_field(value: str | None, preset: bool) -> str:
    if value is None:
        return "max_completion_tokens" if preset else "max_tokens"
    if value not in ("max_tokens", "max_completion_tokens"):
        raise InvalidArgument("max_tokens_field must be 'max_tokens' or 'max_completion_tokens'", param="max_tokens_field")
    return value


def _headers(api_key: str | None, organization: str | None, project: str | None, extra: Mapping[str, str]) -> Mapping[str, str]:
    headers = {"user-agent": f"starlette_aigateway/{version('starlette_aigateway')}"}
    for name, value in extra.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidArgument("headers must have names as RFC 9110 allows them", param="headers")
        headers[name.lower()] = _header_value(value, "headers")
    headers["content-type"] = "application/json"
    if api_key is not None:
        headers["authorization"] = f"Bearer {_header_value(api_key, 'api_key')}"
    if organization is not None:
        headers["openai-organization"] = _header_value(organization, "organization")
    if project is not None:
        headers["openai-project"] = _header_value(project, "project")
    return headers


def _header_value(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value) or value != value.strip():
        raise InvalidArgument(f"{name} must be visible ASCII text without surrounding blanks or line breaks", param=name)
    return value
