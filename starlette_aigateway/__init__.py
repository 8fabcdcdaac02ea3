"""An AI gateway that lives inside your Starlette, FastAPI or Quart app."""

from .accounts import AdminAction, Budget, Credit, UsageRecord, UsageReport
from .caller import Caller
from .errors import (
    AIGatewayError,
    AuthenticationError,
    ConfigurationError,
    Conflict,
    CostUnbounded,
    InvalidArgument,
    InvalidRequest,
    NoProviderAvailable,
    NotFound,
    PermissionDenied,
    PriceUnknown,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    RateLimitExceeded,
    RequestError,
    SpendCapExceeded,
    SpendCapHeld,
    StorageUnavailable,
    TooManyParallelRequests,
    UnprocessableRequest,
)
from .gateway import AIGateway
from .http.door import Admin
from .http.errors import render_error
from .http.sse import EventStream, EventStreamResponse
from .middleware import AIGatewayMiddleware
from .policy.caching import CachePolicy
from .policy.idempotency import IdempotencyPolicy
from .policy.retention import Retention
from .policy.routing import RetryPolicy
from .quotes import Quote, QuotedTarget
from .streams import AnswerStream
from .types import (
    Answer,
    CacheControl,
    Chunk,
    Completion,
    CompletionRequest,
    ImageTokens,
    Key,
    Limits,
    Message,
    Price,
    PriceTier,
    Principal,
    PromptRef,
    Tenant,
    Timeouts,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "AIGateway",
    "AIGatewayError",
    "AIGatewayMiddleware",
    "Admin",
    "AdminAction",
    "Answer",
    "AnswerStream",
    "AuthenticationError",
    "Budget",
    "CacheControl",
    "CachePolicy",
    "Caller",
    "Chunk",
    "Completion",
    "CompletionRequest",
    "ConfigurationError",
    "Conflict",
    "CostUnbounded",
    "Credit",
    "EventStream",
    "EventStreamResponse",
    "IdempotencyPolicy",
    "ImageTokens",
    "InvalidArgument",
    "InvalidRequest",
    "Key",
    "Limits",
    "Message",
    "NoProviderAvailable",
    "NotFound",
    "PermissionDenied",
    "Price",
    "PriceTier",
    "PriceUnknown",
    "Principal",
    "PromptRef",
    "ProviderError",
    "ProviderRejected",
    "ProviderTimeout",
    "Quote",
    "QuotedTarget",
    "RateLimitExceeded",
    "RequestError",
    "Retention",
    "RetryPolicy",
    "SpendCapExceeded",
    "SpendCapHeld",
    "StorageUnavailable",
    "Tenant",
    "Timeouts",
    "TooManyParallelRequests",
    "UnprocessableRequest",
    "Usage",
    "UsageRecord",
    "UsageReport",
    "render_error",
]
