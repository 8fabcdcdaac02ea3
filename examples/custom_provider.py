"""Providers of your own: a name and one method is all it takes; a second method makes it stream. Nothing has to be inherited.

$ python examples/custom_provider.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from starlette_aigateway import AIGateway, Chunk, Completion, CompletionRequest, Price, ProviderError, Usage


class ReverseProvider:
    """The least there is. Asked for a stream, the gateway gives this answer as one piece."""

    name = "reverse"
    models = ("reverse-1",)  # the names it serves; without this, every name

    async def complete(self, request: CompletionRequest) -> Completion:
        text = last_words(request)
        return Completion(message={"role": "assistant", "content": text[::-1]}, usage=counted(request, text))


class CountdownProvider:
    """One that streams: an async generator, which the gateway closes when its reader has left."""

    name = "countdown"
    models = ("countdown-1",)
    max_output_tokens = 100  # what an answer is at the most, since this one does not look at request.max_tokens
    bounds_output = False

    async def complete(self, request: CompletionRequest) -> Completion:
        text = " ".join(self.numbers(request))
        return Completion(message={"role": "assistant", "content": text}, usage=counted(request, text))

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        numbers = self.numbers(request)
        for number in numbers:
            yield Chunk(delta={"content": f"{number} "})
        yield Chunk(finish_reason="stop", usage=counted(request, " ".join(numbers)))

    def numbers(self, request: CompletionRequest) -> list[str]:
        """Says what is known of a failure: that nothing was charged, and that asking again would not help."""
        text = last_words(request)
        if not text.isdecimal() or int(text) > 25:
            raise ProviderError("count down from what? send a number of at most 25", retryable=False, billed="no", status=400)
        return [str(number) for number in range(int(text), -1, -1)]


def last_words(request: CompletionRequest) -> str:
    return str(request.messages[-1].get("content", ""))


def counted(request: CompletionRequest, answer: str) -> Usage:
    """What the bill is made of. Without `usage`, the gateway books an estimate that is never too low."""
    return Usage(input_tokens=len(last_words(request).split()), output_tokens=len(answer.split()))


async def main() -> None:
    gateway = AIGateway.in_memory(
        providers=[ReverseProvider(), CountdownProvider()],
        prices={"reverse-1": Price(1, 2), "countdown-1": Price(1, 2)},  # US dollars per million tokens
    )
    async with gateway:
        raw_key, _ = await gateway.create_key("example", monthly_cap_usd="1.00")
        answer = await gateway.complete(raw_key, CompletionRequest(model="reverse-1", messages=[{"role": "user", "content": "stressed"}]))
        print(f"reverse-1: {answer.message['content']} (${answer.cost_usd:f})")

        request = CompletionRequest(model="countdown-1", messages=[{"role": "user", "content": "5"}])
        async with gateway.stream(raw_key, request) as stream:
            pieces = [chunk.text async for chunk in stream]
        print(f"countdown-1: {''.join(pieces)}in {len([piece for piece in pieces if piece])} pieces (${stream.cost_usd:f})")

        try:
            await gateway.complete(raw_key, CompletionRequest(model="countdown-1", messages=[{"role": "user", "content": "ten"}]))
        except ProviderError as error:
            print(f"refused: {error}")
        report = await gateway.usage()
        print(f"{report.totals.calls} calls, ${report.totals.cost_usd:f}")


if __name__ == "__main__":
    anyio.run(main)
