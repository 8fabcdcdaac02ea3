"""Registration: what a provider can do is established once, and simple providers are wrapped into the adapter seam.

What comes out of a host's code is checked here: whatever it returns or raises, the pipeline sees completions, chunks and
`ProviderError`, nothing else.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar, cast

import anyio
from msgspec import Struct

from ..errors import ConfigurationError, ProviderError, ProviderTimeout
from ..protocols import Adapter, Provider, ProviderAnswer, StreamingProvider
from ..types import Chunk, Completion, Message, Native, ProviderCall, Usage
from ..wires.json_values import json_fault

T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CLOSE_SECONDS = 5.0
_END: Any = object()


class RegisteredProvider(Struct, frozen=True, kw_only=True):
    """A provider with its capabilities. `provider` is the host's object (it may be an async context manager), `adapter` what is called.

    `timeout` is in seconds for one attempt, None for the gateway's; `max_output_tokens` what it produces at the most, None where
    that is not known; `bounds_output` whether it obeys `max_tokens`; `streams` whether it streams of itself: others give a stream in
    one piece.
    """

    name: str
    provider: Any
    adapter: Adapter
    models: Mapping[str, str] | None = None
    timeout: float | None = None
    max_output_tokens: int | None = None
    bounds_output: bool = True
    streams: bool = True

    def serves(self, model: str) -> str | None:
        """The upstream's name of the public name `model`; None if this provider does not serve it."""
        if self.models is not None:
            return self.models.get(model)
        knows = getattr(self.provider, "serves", None)
        return model if knows is None or knows(model) else None

    def reasons(self, model: str, upstream: str) -> bool:
        """Whether the model, by its public or its upstream's name, may make tokens that it does not send."""
        reasons = getattr(self.provider, "reasons", False)
        return reasons(upstream) or reasons(model) if callable(reasons) else reasons is True


def adapt(provider: object) -> RegisteredProvider:
    """Registers a `Provider`, a `StreamingProvider` or an `Adapter`. Raises `ConfigurationError`, naming the provider and what to mend."""
    if inspect.isclass(provider):
        raise ConfigurationError(f"a provider must be an object: write {provider.__name__}(...), not the class", param="providers")
    name = _name(provider)
    adapter, streams = _adapter(provider, name)
    return RegisteredProvider(
        name=name,
        provider=provider,
        adapter=adapter,
        models=_models(getattr(provider, "models", None), name),
        timeout=_seconds(getattr(provider, "timeout", None), name),
        max_output_tokens=_tokens(getattr(provider, "max_output_tokens", None), name),
        bounds_output=_flag(getattr(provider, "bounds_output", True), name),
        streams=streams,
    )


def _name(provider: object) -> str:
    name = getattr(provider, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigurationError(
            f"{type(provider).__name__} needs a name: an attribute `name` of 1 to 64 letters, digits, '.', '_' or '-'", param="name"
        )
    return name


def _adapter(provider: object, name: str) -> tuple[Adapter, bool]:
    complete = getattr(provider, "complete", None)
    if complete is None:
        if callable(getattr(provider, "open", None)):
            return cast("Adapter", provider), True
        raise ConfigurationError(f"provider {name} needs a method `async def complete(self, request)`", param="complete")
    if not _is_async(complete):
        raise ConfigurationError(f"provider {name}: `complete` must be an async method (`async def`)", param="complete")
    stream = getattr(provider, "stream", None)
    if stream is None:
        return SimpleAdapter(cast("Provider", provider), name), False
    if not callable(stream) or _is_async(stream):
        raise ConfigurationError(
            f"provider {name}: `stream` must be an async generator: `async def` with `yield`, called without await", param="stream"
        )
    return SimpleAdapter(cast("Provider", provider), name, cast("StreamingProvider", provider)), True


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004  # the method itself is looked at


def _models(value: Any, name: str) -> Mapping[str, str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence | set | frozenset):
        raise ConfigurationError(
            f"provider {name}: models must be a list of names or a mapping of public to upstream names", param="models"
        )
    upstream = value.values() if isinstance(value, Mapping) else value
    names = (*value, *upstream)
    if not names:
        raise ConfigurationError(f"provider {name}: models is empty, so it would serve nothing; None serves every name", param="models")
    for model in names:
        if not isinstance(model, str) or not 1 <= len(model) <= 200 or not model.isprintable():
            raise ConfigurationError(
                f"provider {name}: the names in models must be strings of 1 to 200 printable characters", param="models"
            )
    return dict(zip(value, upstream, strict=True))


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"provider {name}: timeout must be a positive number of seconds or None", param="timeout")
    return float(value)


def _tokens(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"provider {name}: max_output_tokens must be a positive integer or None", param="max_output_tokens")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"provider {name}: bounds_output must be True or False", param="bounds_output")
    return value


class SimpleAdapter:
    """A simple provider behind the adapter seam. Without `streaming`, a stream is the whole answer in one piece."""

    def __init__(self, provider: Provider, name: str, streaming: StreamingProvider | None = None) -> None:
        self.name = name
        self._provider = provider
        self._streaming = streaming

    def open(self, call: ProviderCall) -> AbstractAsyncContextManager[ProviderAnswer]:
        return self._open(call)

    @asynccontextmanager
    async def _open(self, call: ProviderCall) -> AsyncIterator[ProviderAnswer]:
        answer = SimpleAnswer(self.name, call, self._provider, self._streaming)
        try:
            yield answer
        finally:
            await answer.aclose()


class SimpleAnswer:
    def __init__(self, name: str, call: ProviderCall, provider: Provider, streaming: StreamingProvider | None) -> None:
        self._name = name
        self._call = call
        self._provider = provider
        self._streaming = streaming
        self._source: AsyncIterator[Chunk] | None = None
        self._events: AsyncGenerator[Chunk, None] | None = None

    async def completion(self) -> Completion:
        return _checked_completion(await self._guard(lambda: self._provider.complete(self._call.request)), self._name)

    def events(self) -> AsyncIterator[Chunk]:
        if self._events is None:
            self._events = self._read_events()
        return self._events

    async def _read_events(self) -> AsyncGenerator[Chunk, None]:
        if self._streaming is None:
            for chunk in _pieces(await self.completion()):
                yield chunk
            return
        source = await self._start(self._streaming)
        finished = False
        first = True
        while (given := await self._guard(lambda: anext(source, _END))) is not _END:
            chunk = _checked_chunk(given, self._name)
            finished = finished or chunk.finish_reason is not None
            yield _with_role(chunk) if first else chunk
            first = False
        if not finished:
            yield Chunk(finish_reason="stop")

    async def aclose(self) -> None:
        """Closes the host's generator, also when this task is being cancelled; what it raises then can change nothing any more."""
        if self._events is not None:
            await self._events.aclose()
        close = getattr(self._source, "aclose", None)
        if close is None:
            return
        # The answer is over: a fault in the host's cleanup must not turn it into a failure.
        with anyio.move_on_after(CLOSE_SECONDS, shield=True), suppress(Exception):
            await close()

    async def _start(self, streaming: StreamingProvider) -> AsyncIterator[Chunk]:
        async def start() -> Any:
            return streaming.stream(self._call.request)

        source = await self._guard(start)
        if not hasattr(source, "__anext__"):
            if inspect.iscoroutine(source):
                source.close()
            raise _nonsense(self._name, f"stream() gave {type(source).__name__}, not an async iterator")
        self._source = source
        return cast("AsyncIterator[Chunk]", source)

    async def _guard(self, step: Callable[[], Awaitable[T]]) -> T:
        """Runs a step of the host's code; only `ProviderError` and cancellation come out."""
        try:
            return await step()
        except ProviderError as error:
            raise _checked_error(error) from error.__cause__
        except TimeoutError as error:
            raise ProviderTimeout(f"the provider {self._name} timed out") from error
        except Exception as error:  # the host's code may raise anything; its text may hold a secret, so only its type is told
            raise _foreign(error, self._name) from error


def _foreign(error: Exception, name: str) -> ProviderError:
    inner: BaseException = error
    while isinstance(inner, ExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    if isinstance(inner, ProviderError):
        return _checked_error(inner)
    return ProviderError(f"the provider {name} failed ({type(inner).__name__})")


def _checked_error(error: ProviderError) -> ProviderError:
    """Makes sure of what the money depends on: a `billed` that says nothing we know is `"unknown"`."""
    if not (error.billed in ("no", "unknown") or (isinstance(error.billed, Usage) and _is_usage(error.billed))):
        error.billed = "unknown"
    return error


def _nonsense(name: str, what: str) -> ProviderError:
    return ProviderError(f"the provider {name} returned nonsense: {what}")


def _checked_completion(completion: Any, name: str) -> Completion:
    if not isinstance(completion, Completion):
        raise _nonsense(name, f"{type(completion).__name__}, not a Completion")
    if not isinstance(completion.message, dict):
        raise _nonsense(name, "a message that is not a dict")
    _check_common(completion, name)
    fault = json_fault(completion.message)
    if fault is not None:
        raise _nonsense(name, f"a message that is not JSON: {fault.message}")
    return completion


def _checked_chunk(chunk: Any, name: str) -> Chunk:
    if not isinstance(chunk, Chunk):
        raise _nonsense(name, f"{type(chunk).__name__} in a stream, not a Chunk")
    if not isinstance(chunk.delta, dict):
        raise _nonsense(name, "a delta that is not a dict")
    if not _is_count(chunk.index):
        raise _nonsense(name, "an index that is not a count")
    _check_common(chunk, name)
    calls = chunk.delta.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise _nonsense(name, "tool calls that are not a list of objects")
    fault = json_fault(chunk.delta)
    if fault is not None:
        raise _nonsense(name, f"a delta that is not JSON: {fault.message}")
    return chunk


def _check_common(answer: Completion | Chunk, name: str) -> None:
    for field in ("finish_reason", "model", "id"):
        if not isinstance(getattr(answer, field), str | None):
            raise _nonsense(name, f"a {field} that is not a string")
    if answer.usage is not None and not _is_usage(answer.usage):
        raise _nonsense(name, "a usage that is not a Usage of counts, the cached tokens among the input tokens")
    if not isinstance(answer.native, Native | None):
        raise _nonsense(name, "a native body that is not a Native")


def _is_usage(usage: Any) -> bool:
    return (
        isinstance(usage, Usage)
        and all(_is_count(getattr(usage, field)) for field in usage.__struct_fields__)
        and usage.cache_read_input_tokens + usage.cache_creation_input_tokens <= usage.input_tokens
        and usage.cache_creation_1h_input_tokens <= usage.cache_creation_input_tokens
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _with_role(chunk: Chunk) -> Chunk:
    if "role" in chunk.delta or chunk.native is not None:
        return chunk
    return Chunk(
        delta={"role": "assistant", **chunk.delta},
        index=chunk.index,
        finish_reason=chunk.finish_reason,
        usage=chunk.usage,
        model=chunk.model,
        id=chunk.id,
    )


def _pieces(completion: Completion) -> Sequence[Chunk]:
    """A whole answer as a stream: what it says, how it ended, what it took."""
    model, identity = completion.model, completion.id
    delta = {"role": "assistant", **_delta(completion.message)}
    pieces = [
        Chunk(delta=delta, model=model, id=identity),
        Chunk(finish_reason=completion.finish_reason or "stop", model=model, id=identity),
    ]
    if completion.usage is not None:
        pieces.append(Chunk(usage=completion.usage, model=model, id=identity))
    return pieces


def _delta(message: Message) -> Mapping[str, Any]:
    delta = {name: value for name, value in message.items() if value is not None}
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return delta
