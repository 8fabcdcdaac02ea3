"""What a request weighs: everything that prices and windows need to know of its messages and parameters, found out once."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from msgspec import Struct

from .policy import estimate
from .policy.estimate import Encoded
from .types import CompletionRequest, ImageTokens
from .wires import openai_chat


class Weight(Struct, frozen=True, kw_only=True, gc=False):
    """`input_tokens` is the upper bound of the input, `window_tokens` what windows of tokens are charged at first. `thinks`: output is
    asked for that is billed and need not be sent. `unbounded`: the cost of something has no upper bound; `refused` is the first such
    parameter that the host does not allow."""

    input_tokens: int
    window_tokens: int
    thinks: bool
    unbounded: bool
    refused: str | None


def weigh(request: CompletionRequest, sent: Encoded, image_tokens: ImageTokens, allowed: AbstractSet[str], *, plain: bool) -> Weight:
    """`sent` is `request` encoded; `allowed` are the kinds of unbounded parameters that the host allows. `plain`: the messages are nothing
    but text, as `openai_chat.validate` says."""
    images = openai_chat.NO_IMAGES if plain else openai_chat.images(request, image_tokens)
    unbounded, refused = (False, None) if plain and not request.params else _unbounded(request, allowed)
    return Weight(
        input_tokens=estimate.input_bound(request, extra=images.tokens - images.bytes, sent=sent),
        window_tokens=estimate.tokens_for_window(request, request.max_tokens, images=images.number, image_bytes=images.bytes, sent=sent),
        thinks=openai_chat.asks_for_reasoning(request),
        unbounded=unbounded,
        refused=refused,
    )


def _unbounded(request: CompletionRequest, allowed: AbstractSet[str]) -> tuple[bool, str | None]:
    found = False
    for parameter in openai_chat.unbounded_parameters(request):
        found = True
        if openai_chat.kind_of(parameter) not in allowed:
            return True, parameter
    return found, None
