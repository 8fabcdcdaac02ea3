"""Providers of the host's own: what is established at registration, and what comes out of them into the pipeline."""

import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import pytest

from starlette_aigateway.errors import ConfigurationError, InvalidArgument, InvalidRequest, ProviderError, ProviderTimeout
from starlette_aigateway.protocols import Provider, StreamingProvider
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.providers.simple import RegisteredProvider, adapt
from starlette_aigateway.testing.providers import After, Die, Hang, Say, ScriptedProvider
from starlette_aigateway.types import Chunk, Completion, CompletionRequest, Message, Native, ProviderCall, StreamItem, Usage

pytestmark = pytest.mark.anyio

SECRET = "sk-very-secret"
USAGE = Usage(input_tokens=10, output_tokens=5)
HI = Message(role="assistant", content="hi")


class Simple:
    """A provider whose one method is given."""

    def __init__(self, complete: Callable[[CompletionRequest], Coroutine[Any, Any, Any]], **attributes: Any) -> None:
        self.name = "simple"
        self.complete = complete
        self.__dict__.update(attributes)


async def hi(request: CompletionRequest) -> Completion:
    return Completion(message=HI, usage=USAGE, model="m", id="i")


def call(*, text: str = "hello big world", stream: bool = False, **fields: Any) -> ProviderCall:
    request = CompletionRequest(model="m", messages=[{"role": "user", "content": text}], **fields)
    return ProviderCall(request=request, stream=stream, timeout=20, request_id="r")


async def complete(provider: object, **fields: Any) -> Completion:
    async with adapt(provider).adapter.open(call(**fields)) as answer:
        return await answer.completion()


async def stream(provider: object, **fields: Any) -> list[StreamItem]:
    async with adapt(provider).adapter.open(call(stream=True, **fields)) as answer:
        return [item async for item in answer.events()]


# --- registration


def test_capabilities_are_established_at_registration() -> None:
    registered = adapt(Simple(hi, models={"a": "b"}, timeout=3, max_output_tokens=7, bounds_output=False))
    assert isinstance(registered, RegisteredProvider)
    assert (registered.name, registered.timeout, registered.max_output_tokens) == ("simple", 3.0, 7)
    assert (registered.bounds_output, registered.streams) == (False, False)
    assert (registered.serves("a"), registered.serves("b")) == ("b", None)


def test_a_provider_that_says_nothing_serves_every_model_and_bounds_its_output() -> None:
    registered = adapt(Simple(hi))
    assert registered.serves("whatever") == "whatever"
    assert (registered.models, registered.timeout, registered.max_output_tokens, registered.bounds_output) == (None, None, None, True)


def test_a_generator_method_makes_it_stream() -> None:
    assert adapt(EchoProvider()).streams
    assert isinstance(EchoProvider(), StreamingProvider)
    assert isinstance(ScriptedProvider(), Provider)


class NoName:
    async def complete(self, request: CompletionRequest) -> Completion:
        return await hi(request)


class Nothing:
    name = "x"


class Sync:
    name = "x"

    def complete(self, request: CompletionRequest) -> Completion:
        return Completion(message=HI)


class AwaitedStream(NoName):
    name = "x"

    async def stream(self, request: CompletionRequest) -> list[Chunk]:
        return []


class NotCallable(NoName):
    name = "x"
    stream = True


@pytest.mark.parametrize(
    ("provider", "param"),
    [
        (EchoProvider, "providers"),
        (NoName(), "name"),
        (EchoProvider(name=""), "name"),
        (EchoProvider(name="a b"), "name"),
        (EchoProvider(name="a\n"), "name"),
        (EchoProvider(name="x" * 65), "name"),
        (EchoProvider(name=5), "name"),  # type: ignore[arg-type]  # what hosts get wrong
        (Nothing(), "complete"),
        (Sync(), "complete"),
        (AwaitedStream(), "stream"),
        (NotCallable(), "stream"),
        ("openai", "name"),
        (None, "name"),
        (Simple(hi, models="gpt-4o"), "models"),
        (Simple(hi, models=5), "models"),
        (Simple(hi, models=[]), "models"),
        (Simple(hi, models=[1]), "models"),
        (Simple(hi, models=[["a"]]), "models"),
        (Simple(hi, models={"a": None}), "models"),
        (Simple(hi, timeout=0), "timeout"),
        (Simple(hi, timeout=True), "timeout"),
        (Simple(hi, timeout="5"), "timeout"),
        (Simple(hi, timeout=float("inf")), "timeout"),
        (Simple(hi, timeout=float("nan")), "timeout"),
        (Simple(hi, max_output_tokens=0), "max_output_tokens"),
        (Simple(hi, max_output_tokens=1.0), "max_output_tokens"),
        (Simple(hi, bounds_output=None), "bounds_output"),
    ],
)
def test_a_malformed_provider_is_refused_at_registration(provider: object, param: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        adapt(provider)
    assert caught.value.param == param


# --- whole answers


async def test_an_answer_comes_through_as_it_is() -> None:
    assert await complete(Simple(hi)) == await hi(call().request)


def giving(value: Any) -> Simple:
    async def give(request: CompletionRequest) -> Any:
        return value

    return Simple(give)


NONSENSE = [
    None,
    "text",
    HI,
    Completion(message="text"),  # type: ignore[arg-type]  # what hosts get wrong
    Completion(message={"role": "assistant", "content": float("nan")}),
    Completion(message={"role": "assistant", "content": b"bytes"}),
    Completion(message={"role": "assistant", "content": "\ud800"}),
    Completion(message=HI, finish_reason=5),  # type: ignore[arg-type]  # as above
    Completion(message=HI, model=5),  # type: ignore[arg-type]  # as above
    Completion(message=HI, usage={"input_tokens": 1}),  # type: ignore[arg-type]  # as above
    Completion(message=HI, usage=Usage(input_tokens=-1, output_tokens=0)),
    Completion(message=HI, usage=Usage(input_tokens=1.5, output_tokens=0)),  # type: ignore[arg-type]  # as above
    Completion(message=HI, usage=Usage(input_tokens=True, output_tokens=0)),
    Completion(message=HI, usage=Usage(input_tokens=1, output_tokens=0, cache_read_input_tokens=2)),
    Completion(message=HI, usage=Usage(input_tokens=2**60, output_tokens=0)),
    Completion(message=HI, native=b"{}"),  # type: ignore[arg-type]  # as above
]


@pytest.mark.parametrize("value", NONSENSE)
async def test_nonsense_is_an_error_of_the_provider_and_may_have_been_billed(value: Any) -> None:
    with pytest.raises(ProviderError, match="returned nonsense") as caught:
        await complete(giving(value))
    assert (caught.value.billed, caught.value.code, caught.value.retryable) == ("unknown", "provider_error", True)


def raising(error: BaseException) -> Simple:
    async def fail(request: CompletionRequest) -> Completion:
        raise error

    return Simple(fail)


@pytest.mark.parametrize(
    "error",
    [ValueError(SECRET), InvalidRequest(SECRET), KeyError(SECRET), StopIteration(SECRET), ExceptionGroup(SECRET, [ValueError(SECRET)])],
)
async def test_a_foreign_exception_is_chained_but_its_text_is_not_repeated(error: Exception) -> None:
    with pytest.raises(ProviderError) as caught:
        await complete(raising(error))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert (caught.value.billed, caught.value.retryable) == ("unknown", True)


async def test_a_timeout_of_the_provider_is_a_timeout() -> None:
    with pytest.raises(ProviderTimeout) as caught:
        await complete(raising(TimeoutError(SECRET)))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: ExceptionGroup("g", [ExceptionGroup("h", [error])])])
async def test_a_provider_error_comes_through_as_it_is(wrap: Callable[[ProviderError], Exception]) -> None:
    error = ProviderError("busy", retryable=True, billed="no", status=429, retry_after=3)
    with pytest.raises(ProviderError) as caught:
        await complete(raising(wrap(error)))
    assert caught.value is error


@pytest.mark.parametrize("billed", ["maybe", None, 0, Usage(input_tokens=-5, output_tokens=0)])
async def test_what_an_error_says_of_money_is_believed_only_if_it_makes_sense(billed: Any) -> None:
    with pytest.raises(ProviderError) as caught:
        await complete(raising(ProviderError("x", billed=billed)))
    assert caught.value.billed == "unknown"


async def test_usage_that_an_error_reports_is_kept() -> None:
    with pytest.raises(ProviderError) as caught:
        await complete(raising(ProviderError("x", billed=USAGE)))
    assert caught.value.billed == USAGE


async def test_cancellation_passes_through() -> None:
    arrived = anyio.Event()
    ended: list[str] = []

    async def run() -> None:
        try:
            await complete(ScriptedProvider(Hang(arrived)))
        except ProviderError:
            ended.append("error")
        finally:
            ended.append("left")

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await arrived.wait()
        group.cancel_scope.cancel()
    assert ended == ["left"]


# --- streams


async def test_a_provider_without_streams_streams_in_one_piece() -> None:
    assert await stream(Simple(hi)) == [
        Chunk(delta={"role": "assistant", "content": "hi"}, model="m", id="i"),
        Chunk(finish_reason="stop", model="m", id="i"),
        Chunk(usage=USAGE, model="m", id="i"),
    ]


async def test_tool_calls_in_one_piece_have_their_index() -> None:
    message: Message = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}, {"id": "b"}]}
    first = (await stream(giving(Completion(message=message, finish_reason="tool_calls"))))[0]
    assert isinstance(first, Chunk)
    assert first.delta == {"role": "assistant", "tool_calls": [{"index": 0, "id": "a"}, {"index": 1, "id": "b"}]}


class Streaming(NoName):
    """A provider whose stream is given, as a generator function."""

    name = "streaming"

    def __init__(self, generate: Callable[[], Any]) -> None:
        self._generate = generate

    def stream(self, request: CompletionRequest) -> Any:
        return self._generate()


def yielding(*values: Any) -> Streaming:
    async def generate() -> AsyncIterator[Any]:
        for value in values:
            if isinstance(value, Exception):
                raise value
            yield value

    return Streaming(generate)


async def test_the_first_chunk_gets_a_role_and_a_missing_end_is_added() -> None:
    assert await stream(yielding(Chunk(delta={"content": "a"}), Chunk(delta={"content": "b"}))) == [
        Chunk(delta={"role": "assistant", "content": "a"}),
        Chunk(delta={"content": "b"}),
        Chunk(finish_reason="stop"),
    ]


async def test_a_stream_that_says_its_end_is_left_as_it_is() -> None:
    native = Chunk(delta={"content": "a"}, native=Native("openai_chat", b"data: 1\n\n"))
    chunks = [native, Chunk(finish_reason="length"), Chunk(usage=USAGE)]
    assert await stream(yielding(*chunks)) == chunks


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        Chunk(delta="text"),  # type: ignore[arg-type]  # what hosts get wrong
        Chunk(delta={"content": b"x"}),
        Chunk(index=-1),
        Chunk(finish_reason=1),  # type: ignore[arg-type]  # as above
        Chunk(usage=Usage(input_tokens=-1, output_tokens=0)),
    ],
)
async def test_nonsense_in_a_stream_is_an_error_of_the_provider(value: Any) -> None:
    with pytest.raises(ProviderError, match="returned nonsense"):
        await stream(yielding(Chunk(delta={"content": "a"}), value))


@pytest.mark.parametrize("generate", [lambda: None, lambda: [Chunk()], lambda: hi(call().request)])
async def test_a_stream_that_is_no_iterator_is_an_error_of_the_provider(generate: Callable[[], Any]) -> None:
    with pytest.raises(ProviderError, match="not an async iterator"):
        await stream(Streaming(generate))
    gc.collect()  # a coroutine that nobody awaited would warn


async def test_a_stream_that_cannot_start_is_an_error_of_the_provider() -> None:
    def refuse() -> Any:
        raise ValueError(SECRET)

    with pytest.raises(ProviderError) as caught:
        await stream(Streaming(refuse))
    assert SECRET not in str(caught.value)


async def test_a_foreign_exception_in_a_stream_comes_after_what_was_said() -> None:
    async with adapt(yielding(Chunk(delta={"content": "a"}), ValueError(SECRET))).adapter.open(call(stream=True)) as answer:
        events = answer.events()
        assert (await anext(events)).delta["content"] == "a"  # type: ignore[union-attr]  # a chunk, not raw events
        with pytest.raises(ProviderError) as caught:
            await anext(events)
    assert SECRET not in str(caught.value)


async def test_the_hosts_generator_is_closed_when_the_stream_is_left_early() -> None:
    closed: list[str] = []

    async def generate() -> AsyncIterator[Chunk]:
        try:
            yield Chunk(delta={"content": "a"})
            yield Chunk(delta={"content": "b"})
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("generator")
            raise ValueError("a fault in the cleanup changes nothing any more")

    async with adapt(Streaming(generate)).adapter.open(call(stream=True)) as answer:
        events = answer.events()
        await anext(events)
        closed.append("left")
        await events.aclose()  # type: ignore[attr-defined]  # an async generator, as the pipeline closes it
    assert closed == ["left", "generator"]


async def test_the_hosts_generator_is_closed_when_the_call_is_cancelled() -> None:
    started = anyio.Event()
    closed: list[str] = []

    async def generate() -> AsyncIterator[Chunk]:
        try:
            yield Chunk(delta={"content": "a"})
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            closed.append("generator")

    async def run() -> None:
        async with adapt(Streaming(generate)).adapter.open(call(stream=True)) as answer:
            async for _ in answer.events():
                started.set()
                await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await started.wait()
        group.cancel_scope.cancel()
    assert closed == ["generator"]


# --- echo


async def test_echo_says_what_it_was_told() -> None:
    answer = await complete(EchoProvider())
    assert answer.message == {"role": "assistant", "content": "hello big world"}
    assert (answer.finish_reason, answer.usage) == ("stop", Usage(input_tokens=4, output_tokens=4))


async def test_echo_obeys_the_bound() -> None:
    answer = await complete(EchoProvider(), max_tokens=2)
    assert answer.message["content"] == "hello bi"
    assert (answer.finish_reason, answer.usage) == ("length", Usage(input_tokens=4, output_tokens=2))


@pytest.mark.parametrize(("chunk_size", "pieces"), [(None, ["hello ", "big ", "world"]), (4, ["hell", "o bi", "g wo", "rld"])])
async def test_echo_streams_what_it_would_answer(chunk_size: int | None, pieces: list[str]) -> None:
    items = [item for item in await stream(EchoProvider(chunk_size=chunk_size)) if isinstance(item, Chunk)]
    assert [item.text for item in items if item.text] == pieces
    assert [item.finish_reason for item in items if item.finish_reason] == ["stop"]
    assert [item.usage for item in items if item.usage] == [Usage(input_tokens=4, output_tokens=4)]


@pytest.mark.parametrize("text", ["", "  leading", "a\n\nb ", "é\u2028x"])
async def test_echo_loses_no_character(text: str) -> None:
    items = [item for item in await stream(EchoProvider(), text=text) if isinstance(item, Chunk)]
    assert "".join(item.text for item in items) == text


async def test_echo_reads_the_text_parts_of_the_last_user_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    request = CompletionRequest(
        messages=[{"role": "user", "content": "x"}, {"role": "user", "content": parts}, {"role": "assistant", "content": "z"}]
    )
    assert (await EchoProvider().complete(request)).message["content"] == "ab"


async def test_echo_waits_as_long_as_it_is_told() -> None:
    with anyio.move_on_after(0.01) as scope:
        await complete(EchoProvider(latency=3599))
    assert scope.cancelled_caught


@pytest.mark.parametrize("make", [lambda: EchoProvider(latency=-1), lambda: EchoProvider(chunk_size=0)])
def test_echo_refuses_arguments_that_make_no_sense(make: Callable[[], EchoProvider]) -> None:
    with pytest.raises(InvalidArgument):
        make()


# --- the scripted provider


async def test_a_script_is_played_step_by_step_and_what_was_asked_is_kept() -> None:
    provider = ScriptedProvider("one", Say("two", usage=None, finish_reason="length"), ProviderError("busy", billed="no"), ValueError("x"))
    assert (await complete(provider)).usage == USAGE
    second = await complete(provider)
    assert (second.message["content"], second.usage, second.finish_reason) == ("two", None, "length")
    for _ in range(2):
        with pytest.raises(ProviderError):
            await complete(provider)
    assert [request.model for request in provider.calls] == ["m"] * 4


async def test_a_call_too_many_fails_unless_the_last_step_repeats() -> None:
    with pytest.raises(AssertionError, match="more often"):
        await ScriptedProvider().complete(call().request)
    provider = ScriptedProvider("a", "b", repeat=True)
    assert [(await complete(provider)).message["content"] for _ in range(4)] == ["a", "b", "b", "b"]


async def test_a_stream_dies_after_as_many_words_as_told() -> None:
    provider = ScriptedProvider(Die(after=2, text="one two three"))
    items: list[str] = []
    async with adapt(provider).adapter.open(call(stream=True)) as answer:
        events = answer.events()
        items += [(await anext(events)).text for _ in range(2)]  # type: ignore[union-attr]  # chunks, not raw events
        with pytest.raises(ProviderError, match="cut short"):
            await anext(events)
    assert (items, provider.closed) == (["one ", "two "], 0)


async def test_a_stream_that_is_left_early_is_counted() -> None:
    provider = ScriptedProvider("one two three")
    async with adapt(provider).adapter.open(call(stream=True)) as answer:
        await anext(answer.events())
    assert provider.closed == 1


async def test_a_step_waits_for_its_event() -> None:
    arrived, go = anyio.Event(), anyio.Event()
    provider = ScriptedProvider(After(go, "late", arrived))
    answers: list[Completion] = []

    async def run() -> None:
        answers.append(await complete(provider))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await arrived.wait()
        assert answers == []
        go.set()
    assert answers[0].message["content"] == "late"


async def test_a_scripted_stream_says_the_same_as_the_answer() -> None:
    items = await stream(ScriptedProvider(Say("one two  three ")))
    assert "".join(item.text for item in items if isinstance(item, Chunk)) == "one two  three "
    tool: Message = {"role": "assistant", "tool_calls": [{"index": 0, "id": "a"}]}
    (first, *_) = await stream(ScriptedProvider(Say(message=tool)))
    assert isinstance(first, Chunk)
    assert first.delta == tool
