"""Anthropic, and every API that speaks its Messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidArgument
from ..types import ProviderCall
from ..wires import anthropic_messages
from .http_adapter import HTTPAdapter, Wire, header_value, json_headers
from .http_adapter import base_url as checked_url

ANTHROPIC_URL = "https://api.anthropic.com"
ANTHROPIC_MODELS = "claude-"
ANSWERS_AT_ONCE = re.compile(r"claude-(instant|2|3|(opus|sonnet|haiku)-4)")
"""Families that think only when asked to; in later ones it is on by default
(https://platform.claude.com/docs/en/build-with-claude/thinking-troubleshooting)."""

ANTHROPIC_VERSION = "2023-06-01"
PATH = "/v1/messages"


class AnthropicProvider(HTTPAdapter):
    """An adapter for the Messages API at `base_url`: calls and answers are translated from and to the canonical (OpenAI) form.

    - `models`: what it serves, a list of names or `{public: upstream}`. Without it, Anthropic's own address serves `claude-*` and any
      other address every name.
    - `timeout`: seconds for one attempt, None for the gateway's.
    - `max_output_tokens`: what the models give at the most, and the bound that is sent where neither the caller nor the gateway sets one;
      4,096 then without it, because the API requires a bound.
    - `version` is sent as `anthropic-version`, `beta` (one name or several) as `anthropic-beta`; `headers` with each request.
    - `transport`: a `Transport`, an `httpx.AsyncClient` or an `httpx2.AsyncClient`; None chooses one.

    What the Messages API cannot say (`n` above 1, a temperature above 1, `seed`, …) is refused by name before anything is sent, and the
    next provider is tried. `thinking`, `top_k` and `cache_control` go through as Anthropic documents them; with `cache_control`, give the
    model's price a `cache_read`, a `cache_write` and a `cache_write_1h`. Thinking comes back as `reasoning_content`, without its
    signature, so it is not sent again in the next turn.

    `base_url` may be `http` for a server of your own: key and prompts are then readable on the way. Neither `repr` nor an error shows
    the key, and the object cannot be pickled. Raises `InvalidArgument`.
    """

    wire = Wire(
        answer="message",
        decode_completion=anthropic_messages.decode_completion,
        error_facts=anthropic_messages.error_facts,
        event_reader=anthropic_messages.EventReader,
    )

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str = ANTHROPIC_URL,
        *,
        name: str = "anthropic",
        models: Sequence[str] | Mapping[str, str] | None = None,
        timeout: float | None = None,
        max_output_tokens: int | None = None,
        version: str = ANTHROPIC_VERSION,
        beta: str | Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        transport: Any = None,
    ) -> None:
        url = checked_url(base_url, PATH, "/v1")
        self._preset = url == ANTHROPIC_URL
        sent = json_headers(headers or {})
        if api_key is not None:
            sent["x-api-key"] = header_value(api_key, "api_key")
        if self._preset and not {"x-api-key", "authorization"} & sent.keys():
            raise InvalidArgument("api_key is missing: Anthropic answers nobody without one", param="api_key")
        sent["anthropic-version"] = header_value(version, "version")
        if names := _names(beta):
            sent["anthropic-beta"] = ",".join(names)
        super().__init__(
            name=name,
            base_url=url,
            models=models,
            timeout=timeout,
            max_output_tokens=max_output_tokens,
            headers=sent,
            transport=transport,
        )

    def serves(self, model: str) -> bool:
        if self.models is not None:
            return model in self.models
        return not self._preset or model.startswith(ANTHROPIC_MODELS)

    def reasons(self, model: str) -> bool:
        """Whether a model of this name may think without being asked to."""
        return ANTHROPIC_MODELS in model and ANSWERS_AT_ONCE.search(model) is None

    def _encode(self, call: ProviderCall) -> tuple[str, bytes]:
        bound = self.max_output_tokens or anthropic_messages.DEFAULT_MAX_TOKENS
        return PATH, anthropic_messages.encode_request(call.request, stream=call.stream, default_max_tokens=bound)


def _names(beta: Any) -> Sequence[str]:
    names = (beta,) if isinstance(beta, str) else beta
    if not isinstance(names, list | tuple):
        raise InvalidArgument("beta must be a name or a list of names", param="beta")
    return [header_value(name, "beta") for name in names]
