"""The domain: frozen, slotted, keyword-only. Tokens are counted in tokens, prices in US dollars per million tokens."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

from msgspec import Struct

from . import money
from .errors import InvalidArgument
from .hints import did_you_mean
from .money import Money
from .prices import Price as Price
from .prices import PriceTier as PriceTier

MAX_WINDOW = 10**12
MAX_IMAGE_TOKENS = 10**9
KEY_ID_PREFIX = "key_"


class Message(TypedDict, total=False):
    """One message in the OpenAI chat shape; fields that are not named here travel untouched."""

    role: str
    content: Any
    name: str
    tool_calls: Any
    tool_call_id: str
    refusal: str | None


class Usage(Struct, frozen=True, kw_only=True, gc=False):
    """Tokens of one answer, in the terms of the OpenTelemetry GenAI conventions: `input_tokens` include the cached ones and
    `output_tokens` include the reasoning ones. `cache_creation_1h_input_tokens` are those of `cache_creation_input_tokens` that the
    provider keeps for an hour."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_creation_1h_input_tokens: int = 0
    reasoning_output_tokens: int = 0


class Caps(NamedTuple):
    """Spend caps in nano-USD; None is no cap."""

    day: int | None = None
    month: int | None = None
    total: int | None = None


NO_CAPS = Caps()


class LimitFields(TypedDict, total=False):
    """The keyword arguments of whatever carries limits: `Limits`, `Principal`, `Tenant`, `create_key`."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_parallel_requests: int | None
    daily_cap_usd: Money | None
    monthly_cap_usd: Money | None
    hard_cap_usd: Money | None


def _count(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer or None, not {type(value).__name__}", param=name)
    if not 1 <= value <= MAX_WINDOW:
        raise InvalidArgument(f"{name} must be between 1 and {MAX_WINDOW}", param=name)
    return value


def _cap(value: Any, name: str) -> Decimal | None:
    return None if value is None else money.usd(value, name)


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Limits:
    """What a principal, a tenant or the gateway may use; None is no limit.

    `requests_per_minute` and `tokens_per_minute` are sliding windows of 60 seconds, `max_parallel_requests` counts calls that run at
    the same time, the caps are US dollars per UTC day, per UTC month and for a lifetime. Raises `InvalidArgument`.
    """

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_parallel_requests: int | None
    daily_cap_usd: Decimal | None
    monthly_cap_usd: Decimal | None
    hard_cap_usd: Decimal | None
    caps: Caps = field(init=False, repr=False, compare=False)

    def __init__(self, **limits: Unpack[LimitFields]) -> None:
        self._set_limits(limits)

    def _set_limits(self, given: LimitFields) -> None:
        unknown = given.keys() - LIMIT_NAMES
        if unknown:
            name = min(unknown)
            raise InvalidArgument(
                f"{type(self).__name__} takes no argument {name!r}"
                f"{did_you_mean(name, LIMIT_NAMES) or '; the limits are ' + ', '.join(sorted(LIMIT_NAMES))}",
                param=name,
            )
        put = object.__setattr__
        for name in COUNT_NAMES:
            put(self, name, _count(given.get(name), name))
        caps = []
        for name in CAP_NAMES:
            cap = _cap(given.get(name), name)
            put(self, name, cap)
            caps.append(None if cap is None else money.nano(cap))
        put(self, "caps", Caps(*caps))

    @property
    def capped(self) -> bool:
        return self.caps != NO_CAPS


COUNT_NAMES = ("requests_per_minute", "tokens_per_minute", "max_parallel_requests")
CAP_NAMES = ("daily_cap_usd", "monthly_cap_usd", "hard_cap_usd")
LIMIT_NAMES = frozenset(COUNT_NAMES + CAP_NAMES)


def limit_fields(limits: Limits) -> LimitFields:
    """The limits of anything that carries them, as keyword arguments for another."""
    return LimitFields(
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        max_parallel_requests=limits.max_parallel_requests,
        daily_cap_usd=limits.daily_cap_usd,
        monthly_cap_usd=limits.monthly_cap_usd,
        hard_cap_usd=limits.hard_cap_usd,
    )


def check_id(value: Any, name: str) -> str:
    """An identifier: 1 to 200 printable characters, no surrounding blanks. Raises `InvalidArgument`."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} must be a string, not {type(value).__name__}", param=name)
    if not 1 <= len(value) <= 200 or not value.isprintable() or value != value.strip():
        raise InvalidArgument(f"{name} must be 1 to 200 printable characters without surrounding blanks", param=name)
    return value


def model_names(value: Any, name: str = "allowed_models") -> tuple[str, ...] | None:
    """A list of model names, or None for every model. Raises `InvalidArgument`."""
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise InvalidArgument(f"{name} must be a list of model names or None", param=name)
    return tuple(dict.fromkeys(check_id(model, name) for model in value))


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Tenant(Limits):
    """Who several principals belong to; its limits hold for all of them together."""

    id: str

    def __init__(self, id: str, **limits: Unpack[LimitFields]) -> None:  # noqa: A002  # the field's name everywhere
        object.__setattr__(self, "id", check_id(id, "id"))
        self._set_limits(limits)


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Principal(Limits):
    """Who calls and who pays: a stored key, or a user of the host's own login.

    `tenant` is an id (its stored limits hold) or a `Tenant` with limits of its own. `allowed_models` of None allows every model.
    Ids that start with `key_` belong to stored keys and are refused here.
    """

    id: str
    tenant: str | Tenant | None
    allowed_models: tuple[str, ...] | None
    key_id: str | None = field(init=False)

    def __init__(
        self,
        id: str,  # noqa: A002  # the field's name everywhere
        *,
        tenant: str | Tenant | None = None,
        allowed_models: Sequence[str] | None = None,
        **limits: Unpack[LimitFields],
    ) -> None:
        if isinstance(id, str) and id.startswith(KEY_ID_PREFIX):
            raise InvalidArgument(f"a principal's id must not start with {KEY_ID_PREFIX!r}: those belong to stored keys", param="id")
        self._set(id, tenant, allowed_models, None, limits)

    def _set(self, id: str, tenant: Any, allowed_models: Any, key_id: str | None, limits: LimitFields) -> None:  # noqa: A002
        put = object.__setattr__
        put(self, "id", check_id(id, "id"))
        put(self, "tenant", tenant if tenant is None or isinstance(tenant, Tenant) else check_id(tenant, "tenant"))
        put(self, "allowed_models", model_names(allowed_models))
        put(self, "key_id", key_id)
        self._set_limits(limits)

    @property
    def tenant_id(self) -> str | None:
        return self.tenant.id if isinstance(self.tenant, Tenant) else self.tenant


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Key(Limits):
    """A stored key, without the key: `hint` is the last four characters. Times are aware datetimes in UTC."""

    id: str
    name: str
    hint: str
    tenant: str | None
    allowed_models: tuple[str, ...] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    metadata: Mapping[str, Any]
    principal: Principal = field(repr=False, compare=False)

    def __init__(
        self,
        *,
        id: str,  # noqa: A002  # the field's name everywhere
        name: str,
        hint: str,
        created_at: datetime,
        tenant: str | None = None,
        allowed_models: Sequence[str] | None = None,
        expires_at: datetime | None = None,
        revoked_at: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
        **limits: Unpack[LimitFields],
    ) -> None:
        put = object.__setattr__
        put(self, "id", check_id(id, "id"))
        put(self, "name", check_id(name, "name"))
        put(self, "hint", hint)
        put(self, "tenant", None if tenant is None else check_id(tenant, "tenant"))
        put(self, "allowed_models", model_names(allowed_models))
        put(self, "created_at", created_at)
        put(self, "expires_at", expires_at)
        put(self, "revoked_at", revoked_at)
        put(self, "metadata", dict(metadata or {}))
        self._set_limits(limits)
        principal = object.__new__(Principal)
        principal._set(id, tenant, allowed_models, id, limits)
        put(self, "principal", principal)

    def usable_at(self, now: float) -> bool:
        """Whether the key opens a door at `now` (Unix seconds)."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at.timestamp())


class PromptRef(Struct, frozen=True, kw_only=True):
    """A stored prompt by reference: an exact `version`, else the version under `label`, else the one under `production`."""

    name: str
    version: int | None = None
    label: str | None = None
    variables: Mapping[str, Any] = {}


class CompletionRequest(Struct, frozen=True, kw_only=True, gc=False):
    """A call as the caller sent it. Named are the fields that the gateway decides on; every other one travels in `params` untouched.

    `messages` are mappings in the OpenAI chat shape. With a `prompt`, its messages come first and `model` may come from it.
    """

    model: str = ""
    messages: Sequence[Message] = ()
    temperature: float | None = None
    max_tokens: int | None = None
    n: int | None = None
    prompt: PromptRef | None = None
    params: Mapping[str, Any] = {}


class Native(Struct, frozen=True, gc=False):
    """An answer's body as the provider sent it: `wire` names its dialect (`openai_chat`)."""

    wire: str
    body: bytes


class Completion(Struct, frozen=True, kw_only=True, gc=False):
    """A whole answer. `finish_reason` in OpenAI's terms: `stop`, `length`, `tool_calls`, `content_filter`.

    `usage` of None makes the gateway book an estimate. `native` is the provider's own body, which passes through to callers who
    speak the same wire; it may hold more choices than the one `message`.
    """

    message: Message
    finish_reason: str | None = "stop"
    usage: Usage | None = None
    model: str | None = None
    id: str | None = None
    native: Native | None = None


class Answer(Completion, frozen=True, kw_only=True):
    """What the gateway returns: the completion, who gave it and what it cost. `replayed`: it is the answer to an earlier call with the
    same idempotency key; that one's are the cost and the request id, and this one was not billed."""

    provider: str
    cost_usd: Decimal
    cached: bool
    request_id: str
    replayed: bool = False


class Chunk(Struct, frozen=True, kw_only=True, gc=False):
    """One piece of a stream. `delta` is a mapping in the OpenAI shape (`{"content": "Hel"}`), `index` the choice that it belongs to;
    the last chunks carry `finish_reason` and `usage`. `native` is the SSE event that it came as, if it came as one."""

    delta: Mapping[str, Any] = {}
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None
    id: str | None = None
    native: Native | None = None

    @property
    def text(self) -> str:
        """The text of the delta, empty if it carries none."""
        content = self.delta.get("content")
        return content if isinstance(content, str) else ""


class ProviderCall(Struct, frozen=True, kw_only=True, gc=False):
    """One attempt, as an adapter gets it.

    `request` has its `model` mapped to the upstream's name and `max_tokens` set to the bound that the hold was made for (None: no
    bound is needed). `timeout` is in seconds, for the whole attempt, and the pipeline cancels what takes longer; `connect` and `read`
    are those of `Timeouts`. `headers` are safe to send on; the caller's credential is not among them.
    """

    request: CompletionRequest
    stream: bool
    timeout: float
    request_id: str
    headers: Mapping[str, str] = {}
    connect: float = 5.0
    read: float = 120.0


class CacheControl(Struct, frozen=True, kw_only=True, gc=False):
    """What one call wants of the response cache (RFC 9111, section 5.2.1): `read` is off for `no-cache`, both are off for
    `no-store`; `max_age` is in seconds."""

    read: bool = True
    store: bool = True
    max_age: float | None = None


CacheStatus = Literal["hit", "miss", "bypass"]
Present: TypeAlias = Callable[[], Awaitable[bool]]
"""Whether the caller still waits."""


class CallOptions(Struct, frozen=True, kw_only=True, gc=False):
    """What comes with a call besides the request. `timeout` is seconds for the whole call; `tags` end up in the usage record. An
    `idempotency_key` counts within its `route`: the path over HTTP. `present` tells whether the caller still waits; it is asked before
    another attempt, where leaving may not have been noticed otherwise."""

    cache: CacheControl = CacheControl()
    idempotency_key: str | None = None
    route: str = "in_process"
    timeout: float | None = None
    tags: Mapping[str, str] = {}
    present: Present | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidArgument` for a timeout that is no positive number and for tags that cannot be recorded."""
        if self.timeout is not None:
            _check_timeout(self.timeout)
        if self.tags != {}:
            _check_tags(self.tags)


MAX_TAGS = 32
MAX_TAG_LENGTH = 200


def _check_timeout(timeout: Any) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InvalidArgument("timeout must be a positive number of seconds", param="timeout")


def _check_tags(tags: Any) -> None:
    if not isinstance(tags, Mapping) or len(tags) > MAX_TAGS or not all(map(_is_tag, [*tags.keys(), *tags.values()])):
        raise InvalidArgument(
            f"tags must be at most {MAX_TAGS} pairs of texts of at most {MAX_TAG_LENGTH} printable characters", param="tags"
        )


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TAG_LENGTH and value.isprintable()


class ImageTokens(Struct, frozen=True, kw_only=True):
    """The most input tokens that one image can cost, by the `detail` that is asked for: `low`, `high`, and `auto` for all else, no detail
    and unknown ones included. Without `auto`, the dearer of the two.

    The defaults cover what the vendors document; whoever serves a model that takes larger images gives its own.

    - `low`: Claude has no such level and takes up to 4,784 tokens for the largest image
      (https://platform.claude.com/docs/en/build-with-claude/vision: 28 pixels squared each, 2,576 pixels on the long edge); OpenAI's
      gpt-4o-mini takes 2,833 (https://platform.openai.com/docs/guides/images-vision#calculating-costs).
    - `high`: gpt-4o-mini takes 2,833 and 5,667 for each of up to 8 tiles, 48,169 in all; the level `original` of later models
      at most 10,000 patches of up to 2.46 tokens; Gemini 3 at most 2,240 (https://ai.google.dev/gemini-api/docs/media-resolution).

    Raises `InvalidArgument`.
    """

    low: int = 6_000
    high: int = 50_000
    auto: int | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            _image_count(getattr(self, name), name)
        if self.auto is not None and _image_count(self.auto, "auto") < max(self.low, self.high):
            raise InvalidArgument("auto must not be below low and high: it may be either", param="auto")

    def at(self, detail: Any) -> int:
        """The bound of an image with this `detail`."""
        if detail == "low":
            return self.low
        if detail == "high":
            return self.high
        return self.auto if self.auto is not None else max(self.low, self.high)


def _image_count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_IMAGE_TOKENS:
        raise InvalidArgument(f"{name} must be a number of tokens up to {MAX_IMAGE_TOKENS}", param=name)
    return value


WindowKind = Literal["requests", "tokens"]


class WindowClaim(Struct, frozen=True, gc=False):
    """What one call asks of one sliding window: `amount` requests or tokens, where at most `limit` may pass in `seconds`.

    `scope` is whose window it is: `principal:…`, `tenant:…`, `gateway`, `login:1.2.3.4`; never a raw key. The window is named without
    its limit, so a changed limit keeps what was used already.
    """

    scope: str
    kind: WindowKind
    limit: int
    amount: int = 1
    seconds: int = 60

    @property
    def key(self) -> str:
        return f"aigateway/{self.scope}/{self.kind}/{self.seconds}"

    @property
    def scope_kind(self) -> str:
        """`principal`, `tenant`, `gateway`: the scope without the id."""
        return self.scope.partition(":")[0]


class WindowState(Struct, frozen=True, gc=False):
    """A window after a claim: what `remaining` requests or tokens would be let in now, and the seconds after which it is as good as
    unused (`x-ratelimit-reset-requests` in OpenAI's sense)."""

    claim: WindowClaim
    remaining: int
    reset_after: float


def utc(timestamp: float) -> datetime:
    """Unix seconds as an aware datetime."""
    return datetime.fromtimestamp(timestamp, UTC)


def rfc3339(moment: datetime | None) -> str | None:
    """`2026-01-31T12:00:00.250000Z` (RFC 3339), always in UTC."""
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


class RawEvents(Struct, frozen=True, gc=False):
    """SSE events of a stream, forwarded as the bytes that came: whole events of `wire`, none of which carries usage, a finish reason
    or an error. `count` is how many."""

    wire: str
    data: bytes
    count: int


StreamItem: TypeAlias = Chunk | RawEvents


class Timeouts(Struct, frozen=True, kw_only=True):
    """Seconds. `connect` to a provider; `read` is the longest silence of a provider, also before its first byte; `call` is the whole
    call with its retries and fallbacks; `drain` is how long an answer is read on after its client left, and how long a shutdown waits for
    answers; `settle` is how long a caller waits for its settlement while the ledger is away (it is tried on after that), and a shutdown for
    those that are still to be written; `storage` the longest wait for a store. `receive` is how long a request's body may take to come,
    and `send` how long a client may take nothing of its stream: then the stream is ended and settled as one whose client has left."""

    connect: float = 5.0
    read: float = 120.0
    call: float = 600.0
    drain: float = 30.0
    settle: float = 10.0
    storage: float = 5.0
    receive: float = 60.0
    send: float = 60.0

    def __post_init__(self) -> None:
        """Raises `InvalidArgument`."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InvalidArgument(f"{name} must be a positive number of seconds, not {value!r}", param=name)
