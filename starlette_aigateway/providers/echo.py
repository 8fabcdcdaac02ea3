"""A provider that needs no account: it says what it was told. For examples, tests and trying a mount."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio

from ..errors import InvalidArgument
from ..types import Chunk, Completion, CompletionRequest, Message, Usage

CHARACTERS_PER_TOKEN = 4
_WORD = re.compile(r"\s*\S+\s*|\s+")


class EchoProvider:
    """Answers with the text of the last user message.

    Four characters count as one token, begun ones included; `max_tokens` is obeyed (finish reason `length`). The same request always
    gets the same answer and usage. `latency` is seconds before an answer and before each chunk of a stream, which comes word by
    word, or in pieces of `chunk_size` characters.
    """

    def __init__(
        self, name: str = "echo", models: Sequence[str] | None = None, *, latency: float = 0.0, chunk_size: int | None = None
    ) -> None:
        if not 0 <= latency < 3600:
            raise InvalidArgument("latency must be between 0 and 3600 seconds", param="latency")
        if chunk_size is not None and chunk_size < 1:
            raise InvalidArgument("chunk_size must be at least 1 character", param="chunk_size")
        self.name = name
        self.models = models
        self._latency = latency
        self._chunk_size = chunk_size

    def __repr__(self) -> str:
        return f"EchoProvider(name={self.name!r})"

    async def complete(self, request: CompletionRequest) -> Completion:
        await self._pause()
        text, finish_reason = _answer(request)
        return Completion(
            message=Message(role="assistant", content=text), finish_reason=finish_reason, usage=_usage(request, text), model=request.model
        )

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        text, finish_reason = _answer(request)
        for piece in self._pieces(text):
            await self._pause()
            yield Chunk(delta={"content": piece}, model=request.model)
        yield Chunk(finish_reason=finish_reason, model=request.model)
        yield Chunk(usage=_usage(request, text), model=request.model)

    async def _pause(self) -> None:
        if self._latency:
            await anyio.sleep(self._latency)

    def _pieces(self, text: str) -> Sequence[str]:
        if self._chunk_size is None:
            return _WORD.findall(text)
        return [text[start : start + self._chunk_size] for start in range(0, len(text), self._chunk_size)]


def _answer(request: CompletionRequest) -> tuple[str, str]:
    spoken = next((_text(message.get("content")) for message in reversed(request.messages) if message.get("role") == "user"), "")
    if request.max_tokens is None or len(spoken) <= request.max_tokens * CHARACTERS_PER_TOKEN:
        return spoken, "stop"
    return spoken[: request.max_tokens * CHARACTERS_PER_TOKEN], "length"


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    return ""


def _usage(request: CompletionRequest, answer: str) -> Usage:
    return Usage(input_tokens=sum(_tokens(_text(message.get("content"))) for message in request.messages), output_tokens=_tokens(answer))


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
