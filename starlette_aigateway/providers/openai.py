"""OpenAI, and every API that speaks its Chat Completions: vLLM, Ollama, Groq, OpenRouter, Azure's v1, …"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidArgument
from ..types import ProviderCall
from ..wires import openai_chat
from .http_adapter import HTTPAdapter, Wire, header_value, json_headers
from .http_adapter import base_url as checked_url

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_MODELS = re.compile(r"(ft:)?(gpt-|chatgpt-|codex-|o[1-9]\d*(-|:|$))")
REASONING_MODELS = re.compile(
    r"(^|[/:.])(o[1-9]\d*(-|:|$)|gpt-([5-9]|\d\d)|gpt-oss|codex-|deepseek-(r\d|reasoner)|gemini-(2\.5|[3-9])|grok-(3-mini|[4-9])|qwq|magistral)"
    r"|reasoning|thinking",
    re.IGNORECASE,
)
"""Models that think, and bill it as output, without being asked to; told to leave it, they do not always obey."""

PATH = "/chat/completions"


class OpenAIProvider(HTTPAdapter):
    """An adapter for the Chat Completions API at `base_url`.

    - `models`: what it serves, a list of names or `{public: upstream}`. Without it, OpenAI's own address serves OpenAI's names (`gpt-*`,
      `o3`, …) and any other address every name.
    - `timeout`: seconds for one attempt, None for the gateway's. `max_output_tokens`: what the models give at the most.
    - `max_tokens_field`: the field that bounds the output; by default `max_completion_tokens` at OpenAI, `max_tokens` elsewhere.
    - `headers`: sent with each request, such as `{"api-key": …}`; `organization` and `project` are OpenAI's.
    - `transport`: a `Transport`, an `httpx.AsyncClient` or an `httpx2.AsyncClient`; None chooses one.

    `base_url` may be `http` for a server of your own: key and prompts are then readable on the way. Neither `repr` nor an error shows
    the key, and the object cannot be pickled. Raises `InvalidArgument`.
    """

    wire = Wire(
        answer="chat completion",
        decode_completion=openai_chat.decode_completion,
        error_facts=openai_chat.error_facts,
        event_reader=openai_chat.EventReader,
    )

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str = OPENAI_URL,
        *,
        name: str = "openai",
        models: Sequence[str] | Mapping[str, str] | None = None,
        timeout: float | None = None,
        max_output_tokens: int | None = None,
        max_tokens_field: str | None = None,
        headers: Mapping[str, str] | None = None,
        organization: str | None = None,
        project: str | None = None,
        transport: Any = None,
    ) -> None:
        url = checked_url(base_url, PATH)
        self._preset = url == OPENAI_URL
        self._max_tokens_field = _max_tokens_field(max_tokens_field, self._preset)
        sent = _headers(api_key, organization, project, headers or {})
        if self._preset and "authorization" not in sent:
            raise InvalidArgument("api_key is missing: OpenAI answers nobody without one", param="api_key")
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
        return not self._preset or OPENAI_MODELS.match(model) is not None

    def reasons(self, model: str) -> bool:
        """Whether a model of this name may think without being asked to."""
        return REASONING_MODELS.search(model) is not None

    def _encode(self, call: ProviderCall) -> tuple[str, bytes]:
        return PATH, openai_chat.encode_request(call.request, stream=call.stream, max_tokens_field=self._max_tokens_field)


def _max_tokens_field(value: str | None, preset: bool) -> str:
    if value is None:
        return "max_completion_tokens" if preset else "max_tokens"
    if value not in ("max_tokens", "max_completion_tokens"):
        raise InvalidArgument("max_tokens_field must be 'max_tokens' or 'max_completion_tokens'", param="max_tokens_field")
    return value


def _headers(api_key: str | None, organization: str | None, project: str | None, extra: Mapping[str, str]) -> Mapping[str, str]:
    headers = json_headers(extra)
    if api_key is not None:
        headers["authorization"] = f"Bearer {header_value(api_key, 'api_key')}"
    if organization is not None:
        headers["openai-organization"] = header_value(organization, "organization")
    if project is not None:
        headers["openai-project"] = header_value(project, "project")
    return headers
