"""Which answers may be kept, for whom, and when one is still good enough."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Raw, Struct

from ..accounts import GATEWAY_SCOPE, principal_scope, tenant_scope
from ..errors import InvalidArgument, InvalidRequest
from ..types import CacheControl, Completion, CompletionRequest, Native, Principal, Usage
from .estimate import Encoded, encoded, jsonable

Scope: TypeAlias = Literal["tenant", "principal", "gateway"]

KEY_VERSION = 1
ENTRY_VERSION = b"\x01"
MAX_TTL = 10 * 365 * 86_400
MAX_BYTES = 2**50
MAX_DELTA_SECONDS = 2**31
UNSUCCESSFUL = frozenset({"error"})
"""Finish reasons of an answer that failed half-way with a status of 200, as some aggregators send them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """How answers are kept.

    `ttl` is in seconds. `scope` says who shares them: the principals of a tenant (a principal without one keeps its own), each
    principal alone, or everyone behind the gateway. Answers above `max_entry_bytes` are not kept; the oldest ones make room when the
    cache reaches `size_limit_bytes` on disk. Raises `InvalidArgument`.
    """

    ttl: float = 3600
    scope: Scope = "tenant"
    enabled: bool = True
    max_entry_bytes: int = 2**20
    size_limit_bytes: int = 2**30

    def __post_init__(self) -> None:
        if isinstance(self.ttl, bool) or not isinstance(self.ttl, int | float):
            raise InvalidArgument(f"ttl must be a number of seconds, not {type(self.ttl).__name__}", param="ttl")
        if not 0 < self.ttl <= MAX_TTL:
            raise InvalidArgument(f"ttl must be above 0 and at most {MAX_TTL} seconds", param="ttl")
        if not isinstance(self.scope, str) or self.scope not in get_args(Scope):
            raise InvalidArgument("scope must be 'tenant', 'principal' or 'gateway'", param="scope")
        if not isinstance(self.enabled, bool):
            raise InvalidArgument("enabled must be True or False", param="enabled")
        _check_bytes(self.max_entry_bytes, "max_entry_bytes")
        _check_bytes(self.size_limit_bytes, "size_limit_bytes")
        if self.max_entry_bytes > self.size_limit_bytes:
            raise InvalidArgument("max_entry_bytes must not be above size_limit_bytes", param="max_entry_bytes")


def _check_bytes(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer, not {type(value).__name__}", param=name)
    if not 1 <= value <= MAX_BYTES:
        raise InvalidArgument(f"{name} must be between 1 and {MAX_BYTES}", param=name)


def shared_by(scope: Scope, principal: Principal) -> str:
    """Who an answer to `principal` is kept for, as `cache_key` takes it."""
    if scope == "gateway":
        return GATEWAY_SCOPE
    tenant = principal.tenant_id
    return tenant_scope(tenant) if scope == "tenant" and tenant is not None else principal_scope(principal.id)


_SHAPE = msgspec.json.Encoder(order="sorted", enc_hook=jsonable)


def cache_key(request: CompletionRequest, *, stream: bool, plan: str, scope: str, sent: Encoded | None = None) -> str | None:
    """The SHA-256 (hex) of everything that shapes the answer: the request as the caller sent it, the fingerprint of the `plan` and the
    `scope` that shares it. `sent` is `encoded(request)`, where that is known.

    Whether it is streamed does not shape it, save for several choices, which come interleaved. `1` and `1.0` are different requests.
    None: a parameter that no JSON can carry (an object in an in-process call), which has no identity that could be compared: such a call
    goes past the cache.
    """
    try:
        messages, params = sent or encoded(request)
        shape = (
            KEY_VERSION,
            scope,
            plan,
            request.model,
            Raw(messages),
            request.temperature,
            request.max_tokens,
            request.n,
            request.prompt,
            Raw(params),
            stream and (request.n or 1) > 1,
        )
        return sha256(_SHAPE.encode(shape)).hexdigest()
    except (InvalidRequest, TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None


_DIRECTIVE = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')
_ANY = CacheControl()


def parse_cache_control(header: str | None) -> CacheControl:
    """The request directives of RFC 9111, section 5.2.1, that matter here; others are ignored, as it asks for.

    `no-cache`: do not read, do store. `no-store`: neither. `max-age=N`: read what is not older than N seconds. Of several `max-age` the
    smallest holds. Raises `InvalidRequest` (`cache-control`) for a `max-age` that is not a whole number of seconds.
    """
    if not header:
        return _ANY
    read = store = True
    max_age: float | None = None
    for directive in _DIRECTIVE.findall(header):
        name, _, argument = directive.partition("=")
        match name.strip().lower():
            case "no-store":
                read = store = False
            case "no-cache":
                read = False
            case "max-age":
                seconds = _delta_seconds(argument)
                max_age = seconds if max_age is None else min(max_age, seconds)
    return CacheControl(read=read, store=store, max_age=max_age)


def _delta_seconds(argument: str) -> int:
    text = argument.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequest("max-age must be a whole number of seconds, as in 'max-age=60'", param="cache-control")
    return MAX_DELTA_SECONDS if len(text) > 10 else min(int(text), MAX_DELTA_SECONDS)  # RFC 9111, section 1.2.2


class CachedCompletion(Struct, frozen=True, kw_only=True, gc=False, tag="whole"):
    """A whole answer. With a `native` body the message is not kept a second time: it is decoded from that body when it is needed."""

    message: dict[str, Any] | None = None
    native: Native | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None
    id: str | None = None


class CachedEvents(Struct, frozen=True, kw_only=True, gc=False, tag="events"):
    """A complete stream: `data` are all its SSE events in the dialect `wire`."""

    wire: str
    data: bytes
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None
    id: str | None = None


class CachedAnswer(Struct, frozen=True, kw_only=True, gc=False):
    """What the cache keeps of a call: who gave the answer, when (Unix seconds), and the answer."""

    stored_at: float
    provider: str
    model: str
    content: CachedCompletion | CachedEvents

    @property
    def finish_reason(self) -> str | None:
        return self.content.finish_reason

    @property
    def usage(self) -> Usage | None:
        return self.content.usage


def kept(completion: Completion) -> CachedCompletion:
    """What is kept of a whole answer."""
    return CachedCompletion(
        message=dict(completion.message) if completion.native is None else None,
        native=completion.native,
        finish_reason=completion.finish_reason,
        usage=completion.usage,
        model=completion.model,
        id=completion.id,
    )


_ENCODER = msgspec.msgpack.Encoder(enc_hook=jsonable)
_DECODER = msgspec.msgpack.Decoder(CachedAnswer)


def encode(answer: CachedAnswer) -> bytes | None:
    """The bytes to keep. None: a message of a host's own provider holds something that is not data."""
    try:
        return ENTRY_VERSION + _ENCODER.encode(answer)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None


def decode(value: bytes) -> CachedAnswer | None:
    """The answer that was kept. None, which is a miss, for bytes of another version and for any that are not exactly one answer."""
    if value[:1] != ENTRY_VERSION:
        return None
    try:
        answer = _DECODER.decode(memoryview(value)[1:])
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
    content = answer.content
    if not math.isfinite(answer.stored_at) or (
        isinstance(content, CachedCompletion) and content.message is None and content.native is None
    ):
        return None
    return answer


def age(cached: CachedAnswer, now: float) -> float:
    """Seconds since it was stored; 0 where the clock was set back."""
    return max(0.0, now - cached.stored_at)


def fresh(cached: CachedAnswer, control: CacheControl, now: float, ttl: float) -> bool:
    """Whether a call with `control` may be answered by `cached` at `now` (Unix seconds)."""
    if not control.read:
        return False
    old = now - cached.stored_at  # below zero where the clock was set back
    return old < ttl and (control.max_age is None or old <= control.max_age)


def cut_short(finish_reason: str | None, *, bound_lowered: bool) -> bool:
    """Whether the answer ended at a bound that the gateway lowered to fit a budget: it is this caller's own, neither cached nor shared."""
    return bound_lowered and finish_reason == "length"


def storable(finish_reason: str | None, *, complete: bool, bound_lowered: bool, size: int, policy: CachePolicy) -> bool:
    """Whether an answer of `size` encoded bytes may be kept: only a complete, successful one that no lowered bound cut short."""
    return (
        policy.enabled
        and complete
        and finish_reason not in UNSUCCESSFUL
        and not cut_short(finish_reason, bound_lowered=bound_lowered)
        and size <= policy.max_entry_bytes
    )
