"""The whole error tree. It knows no HTTP; `http/errors.py` renders it, and a test walks all classes against that table.

AIGatewayError
├── RequestError                    the caller can mend it
│   ├── AuthenticationError         no credential, or one that is unknown, mistyped, expired or revoked
│   ├── PermissionDenied            known, but not allowed to do this
│   ├── InvalidRequest              a field has the wrong type, shape or size
│   │   ├── InvalidArgument         the same of an argument in the host's code: a ValueError and a TypeError too
│   │   ├── UnprocessableRequest    well-formed, but cannot be carried out (a missing prompt variable)
│   │   ├── RequestTooLarge
│   │   ├── RequestTimeout          the body did not come in time
│   │   └── UnsupportedMediaType
│   ├── NotFound                    no such model, prompt, key, tenant
│   ├── Conflict                    the same thing is running, or exists already
│   ├── RateLimitExceeded           a sliding window is full; `retry_after` is the true wait
│   │   └── TooManyParallelRequests
│   └── SpendCapExceeded            the worst case does not fit below a cap; final
│       ├── SpendCapHeld            it would fit if running calls cost less than held; a retry makes sense
│       └── CostUnbounded           a parameter whose cost has no bound, for a principal under a cap
├── ProviderError                   a provider failed; `billed` says what is known of the money
│   ├── ProviderTimeout
│   ├── ProviderRejected            the provider refused the request itself; another would as well
│   └── NoProviderAvailable         every target is failing or its circuit is open
├── StorageUnavailable              a store cannot be reached; nothing was let through
│   └── StorageDamaged              the host has to mend a file: what to do is told to the host, not to callers
├── PriceUnknown                    the host priced no model of that name, and a cap has to be held
└── ConfigurationError              the host's own code has to be mended; raised at construction or start
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from .types import Usage, WindowState


class AIGatewayError(Exception):
    """The root. `str(error)` is safe to show to a caller: it never holds a credential or a prompt.

    `code` is stable and machine-readable; `param` names the offending field (`messages[0].role`); `retry_after` is in seconds and
    None where a retry makes no sense; `details` are JSON-able facts for the caller; `request_id` is set by the gateway, and `replayed`
    where it is the outcome of an earlier call with the same idempotency key.
    """

    default_code: ClassVar[str] = "internal_error"
    replayed: bool = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        self.details = details
        self.request_id: str | None = None


class RequestError(AIGatewayError):
    default_code = "invalid_request"


class AuthenticationError(RequestError):
    default_code = "invalid_api_key"


class PermissionDenied(RequestError):
    default_code = "permission_denied"


class InvalidRequest(RequestError):
    default_code = "invalid_request"


class InvalidArgument(InvalidRequest, ValueError, TypeError):
    """An argument of a constructor or of a call in the host's own code; `param` names it."""


class UnprocessableRequest(InvalidRequest):
    default_code = "unprocessable_request"


class RequestTooLarge(InvalidRequest):
    default_code = "request_too_large"


class RequestTimeout(InvalidRequest):
    default_code = "request_timeout"


class UnsupportedMediaType(InvalidRequest):
    default_code = "unsupported_media_type"


class NotFound(RequestError):
    default_code = "not_found"


class Conflict(RequestError):
    default_code = "conflict"


class RateLimitExceeded(RequestError):
    """A sliding window is full. `scope` is whose (`principal`, `tenant`, `gateway`), `window` which (`requests`, `tokens`),
    `limit` its size; `retry_after` the seconds after which the same call would be let in; `states` are all windows that were asked."""

    default_code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None,
        scope: str,
        window: str,
        limit: int,
        code: str | None = None,
        states: Sequence[WindowState] = (),
    ) -> None:
        details = {"scope": scope, "window": window, "limit": limit}
        super().__init__(message, code=code, retry_after=retry_after, details=details)
        self.scope = scope
        self.window = window
        self.limit = limit
        self.states = states


class TooManyParallelRequests(RateLimitExceeded):
    default_code = "too_many_parallel_requests"


class SpendCapExceeded(RequestError):
    """A hold does not fit below a cap. `scope` is whose (`principal`, `tenant`, `gateway`), `window` which (`day`, `month`, `total`);
    `resets_at` is when the period ends, None for a lifetime cap."""

    default_code = "spend_cap_exceeded"

    def __init__(
        self,
        message: str,
        *,
        scope: str | None = None,
        window: str | None = None,
        resets_at: datetime | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        facts: dict[str, Any] = {}
        if scope is not None:
            facts["scope"] = scope
        if window is not None:
            facts["window"] = window
        if resets_at is not None:
            facts["resets_at"] = resets_at.isoformat().replace("+00:00", "Z")
        super().__init__(message, param=param, retry_after=retry_after, details={**facts, **(details or {})} or None)
        self.scope = scope
        self.window = window
        self.resets_at = resets_at


class SpendCapHeld(SpendCapExceeded):
    default_code = "spend_cap_held"


class CostUnbounded(SpendCapExceeded):
    default_code = "cost_unbounded"


class ProviderError(AIGatewayError):
    """A provider failed. Raised by providers, and by the gateway when no target is left.

    - `retryable`: another attempt, here or at another provider, may succeed;
    - `billed`: `"no"` where the provider certainly charged nothing (the hold is released), `"unknown"` (the default: the hold is booked in
      full), or the `Usage` that it reported before it failed;
    - `status`: the upstream's HTTP status, `None` where none came back; `retry_after`: seconds, from its header.

    The message is shown to callers: it must not repeat the upstream's error body, which may hold a credential.
    """

    default_code = "provider_error"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        billed: Literal["no", "unknown"] | Usage = "unknown",
        status: int | None = None,
        retry_after: float | None = None,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param, retry_after=retry_after, details=details)
        self.retryable = retryable
        self.billed = billed
        self.status = status


class ProviderTimeout(ProviderError):
    default_code = "provider_timeout"


class ProviderRejected(ProviderError):
    default_code = "provider_rejected"


class NoProviderAvailable(ProviderError):
    default_code = "no_provider_available"


class StorageUnavailable(AIGatewayError):
    default_code = "storage_unavailable"


class StorageDamaged(StorageUnavailable):
    """A file is damaged, gone or older than what was committed to it. The message says what to do, for the log and the start."""


class PriceUnknown(AIGatewayError):
    default_code = "price_unknown"


class ConfigurationError(AIGatewayError):
    default_code = "configuration_error"
