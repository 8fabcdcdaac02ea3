"""Errors as the callers of HTTP see them: one table, one shape. A test walks all error classes against the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import errors
from ..errors import AIGatewayError, ProviderError, RateLimitExceeded, RequestError, SpendCapExceeded, SpendCapHeld
from ..types import WindowState
from .replies import Header, as_text

STATUS: dict[type[AIGatewayError], tuple[int, str]] = {
    errors.AIGatewayError: (500, "api_error"),
    errors.RequestError: (400, "invalid_request_error"),
    errors.AuthenticationError: (401, "authentication_error"),
    errors.PermissionDenied: (403, "permission_error"),
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.InvalidArgument: (400, "invalid_request_error"),
    errors.UnprocessableRequest: (422, "invalid_request_error"),
    errors.RequestTooLarge: (413, "invalid_request_error"),
    errors.RequestTimeout: (408, "invalid_request_error"),
    errors.UnsupportedMediaType: (415, "invalid_request_error"),
    errors.NotFound: (404, "not_found_error"),
    errors.Conflict: (409, "conflict_error"),
    errors.RateLimitExceeded: (429, "rate_limit_error"),
    errors.TooManyParallelRequests: (429, "rate_limit_error"),
    errors.SpendCapExceeded: (402, "insufficient_quota"),
    errors.SpendCapHeld: (402, "insufficient_quota"),
    errors.CostUnbounded: (402, "insufficient_quota"),
    errors.ProviderError: (502, "provider_error"),
    errors.ProviderTimeout: (504, "provider_error"),
    errors.ProviderRejected: (400, "invalid_request_error"),
    errors.NoProviderAvailable: (503, "provider_error"),
    errors.StorageUnavailable: (503, "api_error"),
    errors.StorageDamaged: (503, "api_error"),
    errors.PriceUnknown: (503, "api_error"),
    errors.ConfigurationError: (503, "api_error"),
}

UNCONFIGURED = "the gateway is not configured correctly; the host's log says what to mend"

DAMAGED = "the gateway's storage is unavailable; the host's log says what to do"
TO_THE_HOST: dict[type[AIGatewayError], str] = {errors.ConfigurationError: UNCONFIGURED, errors.StorageDamaged: DAMAGED}
"""What callers are told of errors whose own words are for the host."""


def status_of(error: AIGatewayError) -> tuple[int, str]:
    """The HTTP status and the `type` of an error, also of a subclass that a host made."""
    for ancestor in type(error).__mro__:
        if ancestor in STATUS:
            return STATUS[ancestor]
    raise AssertionError  # AIGatewayError itself is in the table


def error_object(error: AIGatewayError) -> dict[str, Any]:
    """`{"error": {...}}`: the OpenAI shape, with `request_id` and `details` more."""
    hidden = next((words for kind, words in TO_THE_HOST.items() if isinstance(error, kind)), None)
    return {
        "error": {
            "message": hidden or error.message,
            "type": status_of(error)[1],
            "code": error.code,
            "param": None if hidden else error.param,
            "request_id": error.request_id,
            "details": None if hidden else error.details,
        }
    }


def render_error(error: AIGatewayError) -> tuple[bytes, int, dict[str, str]]:
    """Body, status and headers, for a host whose framework handles errors itself: what `AIGatewayMiddleware` answers elsewhere."""
    status, _ = status_of(error)
    return msgspec.json.encode(error_object(error)), status, error_headers(error) | {"content-type": "application/json"}


def error_response(error: AIGatewayError) -> Response:
    return Response(*render_error(error))


def error_headers(error: AIGatewayError) -> dict[str, str]:
    headers = {"cache-control": "no-store"}
    if error.retry_after is not None and math.isfinite(error.retry_after):
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    if is_final(error):
        headers["x-should-retry"] = "false"
    if error.replayed:
        headers["idempotency-replayed"] = "true"
    if isinstance(error, RateLimitExceeded):
        headers |= as_text(window_headers(error.states))
    if isinstance(error, errors.AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return headers


def is_final(error: AIGatewayError) -> bool:
    """Whether the official clients must be told not to retry: they would for 409 and 5xx, and the gateway has retried already."""
    if error.replayed:
        return True
    if isinstance(error, SpendCapExceeded):
        return not isinstance(error, SpendCapHeld)
    return isinstance(error, ProviderError) and error.retry_after is None


def window_headers(states: Sequence[WindowState]) -> list[Header]:
    """`x-ratelimit-*` of the tightest window of each kind, in OpenAI's sense: what is left now, and when it is as good as unused."""
    requests: WindowState | None = None
    tokens: WindowState | None = None
    for state in states:
        if state.claim.kind == "requests":
            if requests is None or state.remaining < requests.remaining:
                requests = state
        elif tokens is None or state.remaining < tokens.remaining:
            tokens = state
    headers: list[Header] = []
    if requests is not None:
        headers += (
            (b"x-ratelimit-limit-requests", b"%d" % requests.claim.limit),
            (b"x-ratelimit-remaining-requests", b"%d" % requests.remaining),
            (b"x-ratelimit-reset-requests", _reset(requests)),
        )
    if tokens is not None:
        headers += (
            (b"x-ratelimit-limit-tokens", b"%d" % tokens.claim.limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % tokens.remaining),
            (b"x-ratelimit-reset-tokens", _reset(tokens)),
        )
    return headers


def _reset(state: WindowState) -> bytes:
    return b"%gs" % (math.ceil(state.reset_after * 1000) / 1000)


BODILESS = frozenset({204, 205, 304})
FRAMING = frozenset({"content-length", "content-type", "content-encoding", "transfer-encoding"})


def host_refusal(refusal: HTTPException, request_id: str) -> Response:
    """A refusal by the host's own login, with its status and headers, in our shape. `detail` may be any object."""
    headers = {name: value for name, value in (refusal.headers or {}).items() if name.lower() not in FRAMING}
    if refusal.status_code < 200 or refusal.status_code in BODILESS:
        return Response(status_code=refusal.status_code, headers=headers)
    detail: object = refusal.detail
    known = isinstance(detail, str)
    error = RequestError(
        str(detail) if known else "refused by this service", code="refused_by_host", details=None if known else {"detail": detail}
    )
    error.request_id = request_id
    try:
        body = msgspec.json.encode(error_object(error))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):  # an object of the host's that is no JSON
        error.details = None
        body = msgspec.json.encode(error_object(error))
    return Response(body, refusal.status_code, headers, "application/json")
