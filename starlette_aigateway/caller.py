"""`Caller`: the gateway as one principal sees it. What a host's own routes and jobs hold in their hands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from starlette.responses import Response

from .accounts import Budget, UsageReport
from .administration import Administration
from .http.sse import stream_response
from .observing import ToldPipeline
from .quotes import Quote
from .streams import AnswerStream
from .types import Answer, CacheControl, CallOptions, CompletionRequest, Message, Principal, PromptRef


class Caller:
    """Calls as one principal, limited and billed to it. Parameters that are not named here go to the provider untouched."""

    def __init__(
        self,
        pipeline: ToldPipeline,
        administration: Administration,
        resolve: Callable[[], Awaitable[Principal]],
        mint_request_id: Callable[[], str],
    ) -> None:
        self._pipeline = pipeline
        self._administration = administration
        self._resolve = resolve
        self._mint_request_id = mint_request_id
        self._principal: Principal | None = None

    async def principal(self) -> Principal:
        """Who calls and who pays. Raises `AuthenticationError` where nobody is logged in."""
        if self._principal is None:
            self._principal = await self._resolve()
        return self._principal

    async def complete(
        self,
        *,
        model: str = "",
        messages: Sequence[Message] = (),
        prompt: PromptRef | Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
        **parameters: Any,
    ) -> Answer:
        """A whole answer. Raises any of the errors in `errors.py`."""
        principal = await self.principal()
        await self._administration.ready()
        request = _request(model, messages, prompt, temperature, max_tokens, parameters)
        options = CallOptions(
            cache=cache or CacheControl(), idempotency_key=idempotency_key, timeout=timeout, tags=tags if tags is not None else {}
        )
        served = await self._pipeline.complete(principal, request, options, self._mint_request_id())
        return served.answer

    @asynccontextmanager
    async def stream(
        self,
        *,
        model: str = "",
        messages: Sequence[Message] = (),
        prompt: PromptRef | Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
        **parameters: Any,
    ) -> AsyncIterator[AnswerStream]:
        """The answer as a stream of `Chunk`s; `usage` and `cost_usd` are known after its end."""
        principal = await self.principal()
        await self._administration.ready()
        request = _request(model, messages, prompt, temperature, max_tokens, parameters)
        options = CallOptions(
            cache=cache or CacheControl(), idempotency_key=idempotency_key, timeout=timeout, tags=tags if tags is not None else {}
        )
        async with self._pipeline.stream(principal, request, options, self._mint_request_id()) as stream:
            yield stream

    async def stream_response(
        self,
        *,
        model: str = "",
        messages: Sequence[Message] = (),
        prompt: PromptRef | Mapping[str, Any] | None = None,
        format: Literal["openai", "native"] = "native",  # noqa: A002  # the public name
        temperature: float | None = None,
        max_tokens: int | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
        **parameters: Any,
    ) -> Response:
        """A response to return from a route. The call is let in before the headers go out: a refusal is its own status, not an empty
        200."""
        principal = await self.principal()
        await self._administration.ready()
        request = _request(model, messages, prompt, temperature, max_tokens, parameters)
        options = CallOptions(
            cache=cache or CacheControl(), idempotency_key=idempotency_key, timeout=timeout, tags=tags if tags is not None else {}
        )
        return stream_response(self._pipeline, principal, request, options, self._mint_request_id(), wire=format)

    async def quote(
        self,
        *,
        model: str = "",
        messages: Sequence[Message] = (),
        prompt: PromptRef | Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        stream: bool = False,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        tags: Mapping[str, str] | None = None,
        cache: CacheControl | None = None,
        **parameters: Any,
    ) -> Quote:
        """What this call would cost and which limit would refuse it now, as `AIGateway.quote` tells it: nothing is taken, held or
        booked, and no provider is asked."""
        principal = await self.principal()
        await self._administration.ready()
        request = _request(model, messages, prompt, temperature, max_tokens, parameters)
        options = CallOptions(
            cache=cache or CacheControl(), idempotency_key=idempotency_key, timeout=timeout, tags=tags if tags is not None else {}
        )
        return await self._pipeline.quotes.quote(principal, request, options, stream=stream)

    async def budgets(self) -> Sequence[Budget]:
        """Day, month and lifetime of this principal and of its tenant."""
        return await self._administration.budgets(await self.principal())

    async def usage(self, **filters: Any) -> UsageReport:
        """This principal's own usage; the filters of `AIGateway.usage` but for `principal`."""
        return await self._administration.usage(principal=(await self.principal()).id, **filters)


def _request(
    model: str,
    messages: Sequence[Message],
    prompt: PromptRef | Mapping[str, Any] | None,
    temperature: float | None,
    max_tokens: int | None,
    parameters: Mapping[str, Any],
) -> CompletionRequest:
    reference = PromptRef(**prompt) if isinstance(prompt, Mapping) else prompt
    n = parameters.get("n")
    return CompletionRequest(
        model=model,
        messages=messages,
        temperature=temperature,
        max_tokens=max_tokens,
        n=n,
        prompt=reference,
        params={name: value for name, value in parameters.items() if name != "n"},
    )
