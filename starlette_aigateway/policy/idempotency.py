"""`Idempotency-Key`: what a key may be, which calls are the same call, and what is kept of one that was carried out.

The header is that of draft-ietf-httpapi-idempotency-key-header, its value taken as it stands, as OpenAI's and Anthropic's clients send it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from ..errors import (
    AIGatewayError,
    Conflict,
    InvalidArgument,
    InvalidRequest,
    NoProviderAvailable,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    StorageUnavailable,
    UnprocessableRequest,
)
from ..types import CacheStatus, CallOptions, Chunk, CompletionRequest, Native, Principal, RawEvents, StreamItem, Usage
from .caching import CachedCompletion, CachedEvents
from .estimate import jsonable

PARAM = "idempotency-key"
MAX_KEY_LENGTH = 255
SLOT_VERSION = 1
OUTCOME_VERSION = b"\x01"
MAX_KEEP_SECONDS = 365 * 86_400
MAX_ANSWER_BYTES = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyPolicy:
    """How long, in seconds, and up to which size an answer is kept for a repeated `Idempotency-Key`, in whatever way the call uses the
    response cache. Of a larger one it is only kept that the call was carried out, so a size of 1 keeps no answer at all. Raises
    `InvalidArgument`."""

    keep_seconds: float = 86_400
    max_answer_bytes: int = 2**20

    def __post_init__(self) -> None:
        _check_number(self.keep_seconds, "keep_seconds", int | float, MAX_KEEP_SECONDS)
        _check_number(self.max_answer_bytes, "max_answer_bytes", int, MAX_ANSWER_BYTES)


def _check_number(value: Any, name: str, kind: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InvalidArgument(f"{name} must be a number, not {type(value).__name__}", param=name)
    if not 0 < value <= most:
        raise InvalidArgument(f"{name} must be above 0 and at most {most}", param=name)


# -- which call it is --------------------------------------------------------------------------------------------------


class Slot(Struct, frozen=True):
    """One call under an idempotency key, as a store sees it: both are SHA-256 in hex. `key` stands for the principal, the route and the
    key that the caller chose, `fingerprint` for what it asks."""

    key: str
    fingerprint: str


def slot(principal: Principal, request: CompletionRequest, options: CallOptions, *, stream: bool) -> Slot:
    """Raises `InvalidRequest` for a key that is none, and for a request that no JSON can carry, which cannot be compared."""
    key = check_key(options.idempotency_key)
    return Slot(_digest((SLOT_VERSION, principal.tenant_id, principal.id, options.route, key)), fingerprint(request, stream=stream))


def check_key(key: Any) -> str:
    if not (isinstance(key, str) and 1 <= len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"an idempotency key is 1 to {MAX_KEY_LENGTH} printable ASCII characters", param=PARAM)
    return key


def fingerprint(request: CompletionRequest, *, stream: bool) -> str:
    """Of everything that the caller asks for; the order of the names in it makes no difference."""
    try:
        return _digest((SLOT_VERSION, request, stream))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        raise InvalidRequest("an idempotency key needs a request that JSON can carry, so that it can be compared", param=PARAM) from None


_CANONICAL = msgspec.json.Encoder(order="sorted", enc_hook=jsonable)


def _digest(value: object) -> str:
    return hashlib.sha256(_CANONICAL.encode(value)).hexdigest()


# -- what is kept ------------------------------------------------------------------------------------------------------


class KeptChunk(Struct, frozen=True, array_like=True, tag="chunk"):
    delta: dict[str, Any]
    index: int
    finish_reason: str | None
    usage: Usage | None
    model: str | None
    id: str | None
    native: Native | None


class KeptEvents(Struct, frozen=True, array_like=True, tag="events"):
    wire: str
    data: bytes
    count: int


class KeptStream(Struct, frozen=True, kw_only=True, tag="stream"):
    """A stream, item by item as it was passed on."""

    items: tuple[KeptChunk | KeptEvents, ...]


class KeptAnswer(Struct, frozen=True, kw_only=True, tag="answer"):
    """A successful call: the answer and all that was said about it. `created` is Unix seconds, `cost` nano-USD."""

    request_id: str
    created: int
    provider: str
    cost: int
    cache: CacheStatus
    content: CachedCompletion | CachedEvents | KeptStream
    age: float | None = None
    lowered_to: int | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    model: str | None = None


class KeptFailure(Struct, frozen=True, kw_only=True, tag="failure"):
    """A call that failed and was, or may have been, billed."""

    kind: str
    message: str
    code: str
    param: str | None = None
    status: int | None = None
    details: Mapping[str, Any] | None = None


class NotKept(Struct, frozen=True, kw_only=True, tag="not_kept"):
    """The call was carried out; its answer was too large to keep, or broke off."""


Outcome: TypeAlias = KeptAnswer | KeptFailure | NotKept

FAILURES: Mapping[str, type[ProviderError | StorageUnavailable]] = {
    kind.__name__: kind for kind in (ProviderError, ProviderTimeout, ProviderRejected, NoProviderAvailable, StorageUnavailable)
}


def failure(error: BaseException, *, billed: bool) -> Outcome | None:
    """What is kept of a call that ended in `error`. None: nothing was billed, and the key is free again."""
    if not billed:
        return None
    kind = next((ancestor.__name__ for ancestor in type(error).__mro__ if FAILURES.get(ancestor.__name__) is ancestor), None)
    if kind is None or not isinstance(error, AIGatewayError):
        return NotKept()
    status = error.status if isinstance(error, ProviderError) else None
    return KeptFailure(kind=kind, message=error.message, code=error.code, param=error.param, status=status, details=error.details)


def kept_stream(items: Sequence[StreamItem]) -> KeptStream:
    return KeptStream(items=tuple(_kept_item(item) for item in items))


def _kept_item(item: StreamItem) -> KeptChunk | KeptEvents:
    if isinstance(item, RawEvents):
        return KeptEvents(item.wire, item.data, item.count)
    return KeptChunk(dict(item.delta), item.index, item.finish_reason, item.usage, item.model, item.id, item.native)


def stream_items(kept: KeptStream) -> Sequence[StreamItem]:
    return [_stream_item(item) for item in kept.items]


def _stream_item(item: KeptChunk | KeptEvents) -> StreamItem:
    if isinstance(item, KeptEvents):
        return RawEvents(item.wire, item.data, item.count)
    return Chunk(
        delta=item.delta,
        index=item.index,
        finish_reason=item.finish_reason,
        usage=item.usage,
        model=item.model,
        id=item.id,
        native=item.native,
    )


_ENCODER = msgspec.msgpack.Encoder(enc_hook=jsonable)
_DECODER: msgspec.msgpack.Decoder[Outcome] = msgspec.msgpack.Decoder(Outcome)
_NOTHING_KEPT = OUTCOME_VERSION + _ENCODER.encode(NotKept())


def encode(outcome: Outcome, *, max_bytes: int) -> bytes:
    """The bytes to store; `NotKept` in place of what is larger than `max_bytes` and of what no bytes can carry."""
    try:
        value = OUTCOME_VERSION + _ENCODER.encode(outcome)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return _NOTHING_KEPT
    return value if len(value) <= max_bytes else _NOTHING_KEPT


def decode(value: bytes) -> Outcome:
    """What was stored. Bytes that cannot be read (another version wrote them) still say that the call was carried out."""
    if value[:1] != OUTCOME_VERSION:
        return NotKept()
    try:
        return _DECODER.decode(memoryview(value)[1:])
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return NotKept()


# -- what a repeated key gets ------------------------------------------------------------------------------------------


def in_progress() -> AIGatewayError:
    return Conflict("a call with this idempotency key is still running", code="idempotency_in_progress", param=PARAM, retry_after=1.0)


def other_request() -> AIGatewayError:
    return UnprocessableRequest("this idempotency key was used for another request", code="idempotency_key_reused", param=PARAM)


def replayed(outcome: Outcome) -> KeptAnswer:
    """The answer. Raises the failure instead, where that is what was kept: final, since another try with this key gives the same."""
    if isinstance(outcome, KeptAnswer):
        return outcome
    error = _error(outcome)
    error.replayed = True
    raise error


def _error(outcome: KeptFailure | NotKept) -> AIGatewayError:
    if isinstance(outcome, NotKept):
        return Conflict(
            "the call with this idempotency key was carried out and billed, but its answer was not kept: it was too large, or it broke off",
            code="idempotency_answer_not_kept",
            param=PARAM,
        )
    kind = FAILURES.get(outcome.kind, ProviderError)
    if issubclass(kind, ProviderError):
        return kind(
            outcome.message, retryable=False, status=outcome.status, code=outcome.code, param=outcome.param, details=outcome.details
        )
    return kind(outcome.message, code=outcome.code, param=outcome.param, details=outcome.details)
