"""A provider that does what a test tells it, call by call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio

from ..errors import ProviderError
from ..types import Chunk, Completion, CompletionRequest, Message, Usage
from .clock import FakeClock


@dataclass(frozen=True, slots=True)
class Say:
    """Answers `text`; as a stream, word by word. `usage` of None reports none. `message` replaces the whole message.

    `pause` is how many seconds of the provider's clock pass before a whole answer and before each word of a stream. A stream waits for
    `until` after its first `after` words, and a whole answer before it is given."""

    text: str = ""
    usage: Usage | None = field(default=Usage(input_tokens=10, output_tokens=5))
    finish_reason: str = "stop"
    message: Message | None = None
    pause: float = 0.0
    until: anyio.Event | None = None
    after: int = 0


@dataclass(frozen=True, slots=True)
class Die:
    """Raises `error`; as a stream, after the first `after` words of `text`. `pause` is as in `Say`."""

    error: BaseException = field(default_factory=lambda: ProviderError("the stream was cut short"))
    after: int = 0
    text: str = ""
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Hang:
    """Answers never; `arrived` is set when the call is in. As a stream, it hangs after the first `after` words of `text`."""

    arrived: anyio.Event | None = None
    after: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class After:
    """Does `step` once `event` is set; sets `arrived` when the call is in."""

    event: anyio.Event
    step: Step
    arrived: anyio.Event | None = None


Step: TypeAlias = "str | Say | Die | Hang | After | BaseException"


class ScriptedProvider:
    """Each call takes the next step: a text, a `Say`, an exception to raise, `Die`, `Hang` or `After`. With `repeat`, the last step holds
    for all further calls; without, a call too many fails.

    `calls` are the requests that it got, `closed` how many streams ended before their last chunk was taken. Pauses are slept on `clock`, a
    `FakeClock` that the test moves on, or in real time.
    """

    def __init__(
        self,
        *steps: Step,
        name: str = "scripted",
        models: Sequence[str] | Mapping[str, str] | None = None,
        timeout: float | None = None,
        max_output_tokens: int | None = None,
        bounds_output: bool = True,
        reasons: bool = False,
        repeat: bool = False,
        clock: FakeClock | None = None,
    ) -> None:
        self.name = name
        self.models = models
        self.timeout = timeout
        self.max_output_tokens = max_output_tokens
        self.bounds_output = bounds_output
        self.reasons = reasons
        self.calls: list[CompletionRequest] = []
        self.closed = 0
        self._steps = list(steps)
        self._repeat = repeat
        self._sleep = anyio.sleep if clock is None else clock.sleep

    async def complete(self, request: CompletionRequest) -> Completion:
        step = await self._next(request)
        await self._pause(step)
        if isinstance(step, Die):
            raise step.error
        if isinstance(step, Hang):
            await anyio.sleep_forever()
        assert isinstance(step, Say)
        if step.until is not None:
            await step.until.wait()
        message = step.message or Message(role="assistant", content=step.text)
        return Completion(message=message, finish_reason=step.finish_reason, usage=step.usage, model=request.model)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        step = await self._next(request)
        complete = False
        try:
            for position, chunk in enumerate(_chunks(step, request.model)):
                if isinstance(step, Say) and step.until is not None and position == step.after:
                    await step.until.wait()
                if chunk.delta:
                    await self._pause(step)
                yield chunk
            if isinstance(step, Hang):
                await anyio.sleep_forever()
            complete = True
            if isinstance(step, Die):
                raise step.error
        finally:
            self.closed += not complete

    async def _pause(self, step: Say | Die | Hang) -> None:
        if isinstance(step, Say | Die) and step.pause:
            await self._sleep(step.pause)

    async def _next(self, request: CompletionRequest) -> Say | Die | Hang:
        self.calls.append(request)
        if not self._steps:
            raise AssertionError(f"{self.name} was called {len(self.calls)} times, more often than it has steps")
        step = self._steps[0] if self._repeat and len(self._steps) == 1 else self._steps.pop(0)
        if isinstance(step, After | Hang) and step.arrived is not None:
            step.arrived.set()
        if isinstance(step, After):
            await step.event.wait()
            step = step.step
        if isinstance(step, BaseException):
            return Die(step)
        if isinstance(step, str):
            return Say(step)
        assert not isinstance(step, After), "an After cannot wait for another After"
        return step


def _chunks(step: Say | Die | Hang, model: str) -> Sequence[Chunk]:
    words = [word + " " for word in step.text.split(" ")] if step.text else []
    if words:
        words[-1] = words[-1].removesuffix(" ")
    if not isinstance(step, Say):
        return [Chunk(delta={"content": word}, model=model) for word in words[: step.after]]
    deltas = [dict(step.message)] if step.message else [{"content": word} for word in words]
    chunks = [Chunk(delta=delta, model=model) for delta in deltas]
    chunks.append(Chunk(finish_reason=step.finish_reason, model=model))
    if step.usage is not None:
        chunks.append(Chunk(usage=step.usage, model=model))
    return chunks
