"""A call as the host's own code makes it: keyword arguments, typed here once, checked, and made into a request and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_args

from msgspec import Struct

from .errors import InvalidArgument, InvalidRequest
from .http.sse import Dialect
from .types import CacheControl, CallOptions, CompletionRequest, Message, PromptRef
from .wires import openai_chat


class OptionFields(TypedDict, total=False):
    """What comes with a call besides the request; None is the same as absent. `timeout` is seconds for the whole call, `tags` end up in
    the usage record, and under an `idempotency_key` the same call is carried out and billed once."""

    idempotency_key: str | None
    timeout: float | None
    tags: Mapping[str, str] | None
    cache: CacheControl | None


class CallFields(OptionFields, total=False):
    """A call. `prompt` refers to a stored prompt, also as a mapping `{name, version?, label?, variables?}`; its messages come before
    `messages`, and `model` may come from it. What is not named here goes into `params`: every parameter travels to the provider
    untouched."""

    model: str
    messages: Sequence[Message]
    prompt: PromptRef | Mapping[str, Any] | None
    temperature: float | None
    max_tokens: int | None
    max_completion_tokens: int | None
    n: int | None
    params: Mapping[str, Any]

    audio: Mapping[str, Any]
    cache_control: Mapping[str, Any]
    frequency_penalty: float
    function_call: str | Mapping[str, Any]
    functions: Sequence[Mapping[str, Any]]
    logit_bias: Mapping[str, float]
    logprobs: bool
    metadata: Mapping[str, str]
    modalities: Sequence[str]
    moderation: Mapping[str, Any]
    parallel_tool_calls: bool
    prediction: Mapping[str, Any]
    presence_penalty: float
    prompt_cache_key: str
    prompt_cache_options: Mapping[str, Any]
    prompt_cache_retention: str
    reasoning_effort: str
    response_format: Mapping[str, Any]
    safety_identifier: str
    seed: int
    service_tier: str
    stop: str | Sequence[str]
    store: bool
    stream_options: Mapping[str, Any]
    thinking: Mapping[str, Any]
    tool_choice: str | Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    top_k: int
    top_logprobs: int
    top_p: float
    user: str
    verbosity: str
    web_search_options: Mapping[str, Any]


class AskedCall(Struct, frozen=True, kw_only=True):
    """`include_usage`: the usage was asked for at the end of a stream in OpenAI's dialect (`stream_options`)."""

    request: CompletionRequest
    options: OptionFields
    include_usage: bool


def read_call(call: CallFields) -> AskedCall:
    """Raises `InvalidArgument`, naming the argument; what the request holds is looked at when it is admitted, as over HTTP."""
    body: dict[str, Any] = {name: value for name, value in call.items() if name not in _OPTIONS}
    if "stream" in body:
        raise InvalidArgument("there is no argument 'stream': stream(...) and stream_response(...) stream", param="stream")
    _spread(body)
    try:
        decoded = openai_chat.decode_request(body)
    except InvalidRequest as error:
        raise InvalidArgument(error.message, code=error.code, param=error.param) from None
    options = OptionFields(**{name: call[name] for name in _OPTIONS if name in call})  # type: ignore[literal-required,typeddict-item]  # a part of it
    return AskedCall(request=decoded.request, options=options, include_usage=decoded.include_usage)


def _spread(body: dict[str, Any]) -> None:
    """What `params` holds, among the others."""
    params = body.pop("params", None)
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise InvalidArgument(f"params must be a mapping of names to values, not {type(params).__name__}", param="params")
    for name, value in params.items():
        if name in body or name in openai_chat.DECIDED or name in _OPTIONS:
            raise InvalidArgument(f"{name!r} is an argument of its own, which params cannot give (again)", param="params")
        body[name] = value


def call_options(given: OptionFields) -> CallOptions:
    """Raises `InvalidArgument`, naming the argument."""
    unknown = given.keys() - _OPTIONS
    if unknown:
        name = min(unknown)
        raise InvalidArgument(f"there is no argument {name!r} here; there are {', '.join(sorted(_OPTIONS))}", param=name)
    key, tags, cache = given.get("idempotency_key"), given.get("tags"), given.get("cache")
    if not isinstance(key, str | None):
        raise InvalidArgument(f"idempotency_key must be a string, not {type(key).__name__}", param="idempotency_key")
    if cache is not None and not isinstance(cache, CacheControl):
        raise InvalidArgument(f"cache must be a CacheControl(...), not {type(cache).__name__}", param="cache")
    return CallOptions(
        idempotency_key=key, timeout=given.get("timeout"), tags=tags if tags is not None else {}, cache=cache or CacheControl()
    )


def check_request(request: Any) -> CompletionRequest:
    if not isinstance(request, CompletionRequest):
        raise InvalidArgument(f"request must be a CompletionRequest(...), not {type(request).__name__}", param="request")
    return request


def check_dialect(value: Any) -> Dialect:
    if value not in get_args(Dialect):
        raise InvalidArgument(f"format must be one of {', '.join(get_args(Dialect))}", param="format")
    return value  # type: ignore[no-any-return]  # one of them


_OPTIONS = OptionFields.__annotations__.keys()
