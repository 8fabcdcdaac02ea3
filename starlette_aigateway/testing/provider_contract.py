"""What the gateway relies on in every provider: a simple one of the host's own, or an adapter.

Subclass it in your own tests, mark the subclass with `pytest.mark.anyio`, and give it three fixtures. None of the providers need be open:
what is a context manager is entered by the tests.

- `provider` answers whatever it is asked;
- `broken` fails each call, in the way that your upstream does;
- `stuck` is a `Stuck`: a provider that gives no whole answer, and of a stream one piece of content and then nothing more.

`ask`, the request that all of them get, may be another one: its answer must be longer than one token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from ..errors import ProviderError
from ..providers.simple import RegisteredProvider, adapt
from ..types import Chunk, Completion, CompletionRequest, ProviderCall, Usage
from ..wires import openai_chat

PATIENCE = 20.0
MARK = "xyzzy"
"""Stands in the prompt, and must not stand in an error."""

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@dataclass(slots=True)
class Stuck:
    """`arrived` is set when a call has come to where it is stuck, `released` when all that it held is given back: the generator closed,
    the connection, the task ended."""

    provider: object
    arrived: anyio.Event = field(default_factory=anyio.Event)
    released: anyio.Event = field(default_factory=anyio.Event)


class ProviderContract:
    """See the module's docstring for the fixtures."""

    @pytest.fixture
    def ask(self) -> CompletionRequest:
        text = f"{MARK} one two three four five six seven eight nine ten"
        return CompletionRequest(model="contract-model", messages=[{"role": "user", "content": text}], max_tokens=100)

    async def test_it_can_be_registered_and_serves_the_model(self, provider: object, ask: CompletionRequest) -> None:
        assert adapt(provider).serves(ask.model) is not None

    async def test_a_whole_answer_is_a_message_that_says_how_it_ended_and_what_it_took(
        self, provider: object, ask: CompletionRequest
    ) -> None:
        async with opened(provider) as registered:
            answer = await complete(registered, ask)
        assert answer.message.get("role") == "assistant"
        assert answer.message.get("content")
        assert answer.finish_reason is not None
        _check_usage(answer.usage)

    async def test_a_stream_gives_content_then_says_once_how_it_ended_and_what_it_took(
        self, provider: object, ask: CompletionRequest
    ) -> None:
        async with opened(provider) as registered:
            chunks = await streamed(registered, ask)
        ended = [position for position, chunk in enumerate(chunks) if chunk.finish_reason is not None]
        assert len(ended) == 1, "one finish_reason"
        assert any(chunk.text for chunk in chunks[: ended[0] + 1])
        assert not any(chunk.text for chunk in chunks[ended[0] + 1 :]), "nothing is said after the end"
        _check_usage(next((chunk.usage for chunk in reversed(chunks) if chunk.usage is not None), None))

    @both_ways
    async def test_the_bound_of_the_output_is_obeyed(self, provider: object, ask: CompletionRequest, stream: bool) -> None:
        """The money that is held for a call is computed from it. Who does not obey it says so (`bounds_output = False`), and how much an
        answer is at the most (`max_output_tokens`)."""
        short = CompletionRequest(model=ask.model, messages=ask.messages, max_tokens=1)
        async with opened(provider) as registered:
            usage = await used(registered, short, stream=stream)
        bound = 1 if registered.bounds_output else registered.max_output_tokens
        assert bound is None or usage.output_tokens <= bound

    @both_ways
    async def test_a_request_is_left_as_it_was(self, provider: object, ask: CompletionRequest, stream: bool) -> None:
        """Another provider may be asked with it next."""
        before = copy.deepcopy(ask)
        async with opened(provider) as registered:
            await used(registered, ask, stream=stream)
        assert ask == before

    @both_ways
    async def test_calls_at_the_same_time_do_not_disturb_each_other(self, provider: object, ask: CompletionRequest, stream: bool) -> None:
        seen: list[Usage] = []

        async def call() -> None:
            seen.append(await used(registered, ask, stream=stream))

        async with opened(provider) as registered:
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as group:
                    for _ in range(10):
                        group.start_soon(call)
        assert len(seen) == 10

    async def test_it_works_again_after_it_was_closed(self, provider: object, ask: CompletionRequest) -> None:
        for _ in range(2):
            async with opened(provider) as registered:
                await complete(registered, ask)

    @both_ways
    async def test_a_failure_is_an_error_that_says_what_is_known_and_repeats_nothing(
        self, broken: object, ask: CompletionRequest, stream: bool
    ) -> None:
        async with opened(broken) as registered:
            with pytest.raises(ProviderError) as caught:
                await used(registered, ask, stream=stream)
        error = caught.value
        assert error.billed in ("no", "unknown") or isinstance(error.billed, Usage)
        assert error.retry_after is None or 0 <= error.retry_after < math.inf
        assert error.status is None or 100 <= error.status < 600
        assert MARK not in f"{error.message} {error.details}", "an error is shown to callers, and may be logged"

    @both_ways
    async def test_a_call_that_is_cancelled_lets_go_of_what_it_held(self, stuck: Stuck, ask: CompletionRequest, stream: bool) -> None:
        async with opened(stuck.provider) as registered:
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as group:
                    group.start_soon(_call_for_ever, registered, ask, stream)
                    await stuck.arrived.wait()
                    group.cancel_scope.cancel()
                await stuck.released.wait()

    async def test_a_stream_that_is_left_is_closed(self, stuck: Stuck, ask: CompletionRequest) -> None:
        async with opened(stuck.provider) as registered:
            with anyio.fail_after(PATIENCE):
                async with registered.adapter.open(_call(ask, stream=True)) as answer:
                    async for item in answer.events():
                        if openai_chat.has_content(item):
                            break
                await stuck.released.wait()

    async def test_the_error_of_one_call_is_not_that_of_the_next(self, broken: object, ask: CompletionRequest) -> None:
        errors: list[ProviderError] = []
        async with opened(broken) as registered:
            for _ in range(2):
                with pytest.raises(ProviderError) as caught:
                    await complete(registered, ask)
                errors.append(caught.value)
        assert errors[0] is not errors[1], "the gateway writes the id of the call into it"


@asynccontextmanager
async def opened(provider: object) -> AsyncIterator[RegisteredProvider]:
    """Registered, and entered if it is a context manager, as the gateway does it."""
    registered = adapt(provider)
    if not isinstance(provider, AbstractAsyncContextManager):
        yield registered
        return
    async with provider:
        yield registered


async def complete(registered: RegisteredProvider, ask: CompletionRequest) -> Completion:
    with anyio.fail_after(PATIENCE):
        async with registered.adapter.open(_call(ask, stream=False)) as answer:
            return await answer.completion()


async def streamed(registered: RegisteredProvider, ask: CompletionRequest) -> list[Chunk]:
    with anyio.fail_after(PATIENCE):
        async with registered.adapter.open(_call(ask, stream=True)) as answer:
            return [chunk async for item in answer.events() for chunk in openai_chat.chunks((item,))]


async def used(registered: RegisteredProvider, ask: CompletionRequest, *, stream: bool) -> Usage:
    """What a call took, either way."""
    if stream:
        usage = next((chunk.usage for chunk in reversed(await streamed(registered, ask)) if chunk.usage is not None), None)
    else:
        usage = (await complete(registered, ask)).usage
    assert usage is not None, "without a usage the gateway books an estimate that is never too low"
    return usage


async def _call_for_ever(registered: RegisteredProvider, ask: CompletionRequest, stream: bool) -> None:
    async with registered.adapter.open(_call(ask, stream=stream)) as answer:
        if not stream:
            await answer.completion()
        async for _ in answer.events():
            pass
    raise AssertionError("this provider was to be stuck")


def _call(ask: CompletionRequest, *, stream: bool) -> ProviderCall:
    return ProviderCall(request=ask, stream=stream, timeout=PATIENCE, request_id="req_contract", connect=PATIENCE, read=PATIENCE)


def _check_usage(usage: Any) -> None:
    assert isinstance(usage, Usage), "without a usage the gateway books an estimate that is never too low"
    assert usage.input_tokens > 0
    assert usage.output_tokens > 0
    assert usage.cache_read_input_tokens + usage.cache_creation_input_tokens <= usage.input_tokens
    assert usage.reasoning_output_tokens <= usage.output_tokens
