"""The routes that cost money: `/complete` in our own dialect, `/v1/chat/completions` in OpenAI's; and `/quote`, which tells the price."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from .. import money
from ..calls import Served
from ..errors import InvalidRequest
from ..policy import caching
from ..types import CacheStatus, CallOptions
from ..wires import openai_chat
from . import shapes
from .bodies import decode_object
from .errors import window_headers
from .exchange import Exchange
from .replies import Header, Reply
from .sse import stream_response

CACHE: dict[CacheStatus, Header] = {"hit": (b"x-cache", b"hit"), "miss": (b"x-cache", b"miss"), "bypass": (b"x-cache", b"bypass")}
FREE: Header = (b"x-aigateway-cost-usd", b"0")


async def complete(exchange: Exchange) -> Response:
    """`model`, `messages` or `prompt`, and parameters; answers `{id, model, provider, message, finish_reason, usage, cost_usd, cached}`."""
    body = await exchange.body()
    repeat = exchange.repeat(body)
    if repeat is not None and repeat.request.n in (None, 1) and (again := await exchange.again(repeat)) is not None:
        return complete_reply(exchange, again, repeat.request.model)
    call = openai_chat.decode_request(decode_object(body))
    if call.request.n is not None and call.request.n != 1:
        raise InvalidRequest("n must be 1 here; v1/chat/completions gives several choices", param="n")
    options = call_options(exchange, "/complete")
    if call.stream:
        return stream_response(
            exchange.pipeline, exchange.principal, call.request, options, exchange.request_id,
            wire="native", id_headers=exchange.id_headers,
        )  # fmt: skip
    served = await exchange.complete(call.request, options)
    exchange.learn(body, served)
    return complete_reply(exchange, served, call.request.model)


def complete_reply(exchange: Exchange, served: Served, model: str) -> Response:
    return Reply(msgspec.json.encode(shapes.answer(served.answer, model)), served_headers(exchange, served))


async def chat_completions(exchange: Exchange) -> Response:
    """OpenAI's Chat Completions, streamed or not; `prompt` references work here too."""
    body = await exchange.body()
    repeat = exchange.repeat(body)
    if repeat is not None and (again := await exchange.again(repeat)) is not None:
        return chat_reply(exchange, again)
    call = openai_chat.decode_request(decode_object(body))
    options = call_options(exchange, "/v1/chat/completions")
    if call.stream:
        return stream_response(
            exchange.pipeline, exchange.principal, call.request, options, exchange.request_id,
            wire="openai", include_usage=call.include_usage, id_headers=exchange.id_headers,
        )  # fmt: skip
    served = await exchange.complete(call.request, options)
    exchange.learn(body, served)
    return chat_reply(exchange, served)


def chat_reply(exchange: Exchange, served: Served) -> Response:
    native = served.native
    if native is not None and native.wire == openai_chat.WIRE:
        body = native.body
    else:
        body = openai_chat.encode_completion(served.answer, created=served.created)
    return Reply(body, served_headers(exchange, served))


async def quote(exchange: Exchange) -> Response:
    """The body of either route, streamed or not; answers what the call would cost and which limit would refuse it. Makes no call."""
    call = openai_chat.decode_request(await exchange.json())
    options = call_options(exchange, "/quote")
    return exchange.answer(
        shapes.quote(await exchange.pipeline.quotes.quote(exchange.principal, call.request, options, stream=call.stream))
    )


def call_options(exchange: Exchange, route: str) -> CallOptions:
    return CallOptions(
        cache=caching.parse_cache_control(exchange.header(b"cache-control")),
        idempotency_key=exchange.header(b"idempotency-key"),
        route=route,
        present=None if exchange.pipeline.ends_with_its_caller else exchange.present,
    )


def served_headers(exchange: Exchange, served: Served) -> list[Header]:
    headers = exchange.id_headers
    headers += window_headers(served.windows)
    headers += (
        CACHE[served.cache],
        (b"x-aigateway-provider", served.provider.encode()),
        (b"x-aigateway-cost-usd", money.plain(served.cost).encode()) if served.cost else FREE,
    )
    if served.age is not None:
        headers.append((b"age", b"%d" % served.age))
    if served.lowered_to is not None:
        headers.append((b"x-aigateway-max-tokens", b"%d" % served.lowered_to))
    if served.replayed:
        headers.append((b"idempotency-replayed", b"true"))
    return headers
