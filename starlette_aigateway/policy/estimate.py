"""What a call may cost at the most, before it is made; what it probably used, where nobody says.

The bound on tokens is the number of bytes. Byte-level BPE (GPT, Claude, Llama 3, Qwen, …) starts from one token for each UTF-8 byte and
only merges, so it never makes more tokens than bytes (https://arxiv.org/abs/1909.03341, section 3); SentencePiece with byte fallback
spends at most one token on a byte as well. Some tokenizers bring the text into a Unicode normal form first (Qwen: NFC, the default of
SentencePiece: NFKC), which can be up to eleven times as long: the bytes are those of the longest form. Around the text, a chat template
puts a few special tokens for each message; the constants below are far above those that are documented. They do not cover what is not
text: an image costs tokens by its size in pixels, not by its bytes; whoever knows the wire adds that as `extra`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

import msgspec
from msgspec import Struct

from ..errors import InvalidRequest
from ..prices import Price
from ..types import CompletionRequest, Usage
from . import pricing

TOKENS_PER_MESSAGE = 16
"""OpenAI documents 3 per message and 1 per name (https://cookbook.openai.com, "How to count tokens with tiktoken")."""

TOKENS_PER_TOOL = 64
"""The frame of one function definition, besides its own bytes."""

TOKENS_PER_REQUEST = 64
TOKENS_FOR_TOOLS = 1024
"""Anthropic documents a hidden system prompt of 159 to 530 tokens once there are tools (docs.anthropic.com, "Tool use", Pricing)."""

TOKENS_FOR_FORMAT = 1024
"""What a vendor may say about a `response_format` besides its schema; nobody documents how much that is."""

TOKENS_PER_CHOICE = 32
"""End marks and the frame of tool calls, which are billed and never shown."""

BYTES_PER_TOKEN = 4
"""A usual English text (https://help.openai.com, "What are tokens and how to count them")."""

USUAL_IMAGE = 1500
"""About a megapixel for Claude (https://platform.claude.com/docs/en/build-with-claude/vision)."""

DEFAULT_MAX_TOKENS = 4096
"""The output bound of a call where neither the caller, the host nor the model gives one."""

MIN_OUTPUT_TOKENS = 256
NORMAL_FORMS: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")
"""https://www.unicode.org/reports/tr15/"""


class Ask(Struct, frozen=True, kw_only=True, gc=False):
    """What one attempt asks of the ledger: nano-USD between `minimum` and `wanted`, for `output_wanted` tokens in each choice.
    `given`: the caller set that bound itself, so that it may not be lowered."""

    minimum: int
    wanted: int
    output_wanted: int
    given: bool


def jsonable(value: Any) -> Any:
    """Mappings and sequences of other types than `dict` and `list`, for msgspec."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError


_CANONICAL = msgspec.json.Encoder(order="sorted", enc_hook=jsonable)


class Encoded(NamedTuple):
    """The messages and the parameters of a request as canonical JSON: encoded once, measured and compared by these bytes."""

    messages: bytes
    params: bytes

    @property
    def size(self) -> int:
        """Bytes of both in one list, which is at least the UTF-8 bytes of every text in them."""
        return len(self.messages) + len(self.params) + len("[,]")

    @property
    def longest(self) -> int:
        """The same of the text, as it is or in a normal form."""
        if self.messages.isascii() and self.params.isascii():
            return self.size
        return max(self.size, self._normalized())

    def _normalized(self) -> int:
        text = (b"[%b,%b]" % self).decode()
        return max(len(normalize(form, text).encode()) for form in NORMAL_FORMS)


def encoded(request: CompletionRequest) -> Encoded:
    """Raises `InvalidRequest` for what JSON cannot carry."""
    try:
        return Encoded(_CANONICAL.encode(request.messages), _CANONICAL.encode(request.params))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        raise InvalidRequest("messages and parameters must be JSON values") from None  # the cause may quote a prompt


def size(request: CompletionRequest) -> int:
    """`Encoded.size` of `request`. Raises `InvalidRequest` as `encoded` does."""
    return encoded(request).size


def input_bound(request: CompletionRequest, *, extra: int = 0, sent: Encoded | None = None) -> int:
    """The most input tokens that `request` can be, once its prompt is rendered. `extra` are tokens of what is not text, less the bytes
    that are only theirs; `sent` is `encoded(request)`, where that is known. Raises `InvalidRequest` as `encoded` does."""
    longest = (sent or encoded(request)).longest
    bound = longest + TOKENS_PER_REQUEST + TOKENS_PER_MESSAGE * len(request.messages) + extra
    return bound + _frames(request.params) if request.params else bound


def _frames(params: Mapping[str, Any]) -> int:
    """Tokens that some parameters bring with them, besides their own bytes."""
    tokens = 0
    tools = [offered for name in ("tools", "functions") if isinstance(offered := params.get(name), Sequence)]
    if tools:
        tokens += TOKENS_FOR_TOOLS + TOKENS_PER_TOOL * sum(map(len, tools))
    if params.get("response_format") is not None:
        tokens += TOKENS_FOR_FORMAT
    return tokens


def amount(input_tokens: int, output_tokens: int, n: int | None, price: Price | None) -> int:
    """Nano-USD that a call can cost at the most, with at most `input_tokens` and `output_tokens` in each of `n` choices. Without a
    price, 0."""
    return pricing.most(input_tokens, output_tokens * (n or 1), price)


def ask(
    request: CompletionRequest,
    input_tokens: int,
    *,
    price: Price | None,
    default_max_tokens: int | None = None,
    model_maximum: int | None = None,
    obeyed: bool = True,
    min_output_tokens: int = MIN_OUTPUT_TOKENS,
) -> Ask:
    """What to reserve for one attempt.

    The caller's own `max_tokens` fits or does not. Without one, the bound is `default_max_tokens`, never above `model_maximum`, else
    that, else `DEFAULT_MAX_TOKENS`; and the budget may lower it down to `min_output_tokens`. Where a bound is not `obeyed`, all of
    `model_maximum` may come, whatever is asked for.
    """
    given = request.max_tokens
    if not obeyed and model_maximum is not None:
        output = least = model_maximum
    elif given is not None:
        output = least = given
    else:
        default = DEFAULT_MAX_TOKENS if model_maximum is None else model_maximum
        output = default if default_max_tokens is None else default_max_tokens
        if model_maximum is not None and model_maximum < output:
            output = model_maximum
        least = min_output_tokens if min_output_tokens < output else output
    wanted = amount(input_tokens, output, request.n, price)
    minimum = wanted if least == output else amount(input_tokens, least, request.n, price)
    return Ask(minimum=minimum, wanted=wanted, output_wanted=output, given=given is not None)


def affordable(granted: int, input_tokens: int, n: int | None, price: Price | None, wanted: int) -> int:
    """Output tokens in each choice, at most `wanted`, that `granted` nano-USD pay for: `amount` of them is never above `granted`. 0 where
    not even the input is paid for; `wanted` where output costs nothing, or nobody knows what it costs."""
    if price is None:
        return wanted
    request, tiers, _ = price.tariff
    for longest, rates in pricing.reached(tiers, input_tokens):
        left = (granted - request) * pricing.MILLION - longest * rates.dearest_input
        if left < 0:
            return 0
        if rates.dearest_output:
            wanted = min(wanted, left // ((n or 1) * rates.dearest_output))
    return wanted


def received(text_bytes: int, *, input_tokens: int, bound: int | None = None, n: int | None = None, unseen: int = 0) -> Usage:
    """What was used, where the provider did not say: never less than it was, for any tokenisation that makes no more tokens than bytes.

    `text_bytes` are the bytes of every delta that came (text, refusals, arguments of tool calls); `input_tokens` is the input bound.
    `bound` is the output bound in each of the `n` choices, which the provider keeps. `unseen`: the model also makes tokens that it does
    not send (reasoning), and may have made so many in each choice by then, whatever came. What a provider had made but not sent when the
    connection was closed is not in it.
    """
    choices = n or 1
    output = text_bytes + TOKENS_PER_CHOICE * choices
    if bound is not None:
        output = min(output, bound * choices)
    return Usage(input_tokens=input_tokens, output_tokens=max(output, unseen * choices))


def tokens_for_window(
    request: CompletionRequest, output_bound: int | None, *, images: int = 0, image_bytes: int = 0, sent: Encoded | None = None
) -> int:
    """What a token window is charged when a call is let in, corrected when it is settled; at least 1.

    A realistic figure: bytes / 4 for the input, as much as is usual for each of the `images`, whose `image_bytes` are not text, and
    `output_bound` in each choice only where the caller gave one. The window paces calls and costs nobody money; charging it with the worst
    case would turn away calls that fit several times over. `sent` as in `input_bound`.
    """
    text = (sent or encoded(request)).size - image_bytes
    output = (output_bound or 0) * (request.n or 1)
    tokens = -(-text // BYTES_PER_TOKEN) + images * USUAL_IMAGE + output
    return tokens if tokens > 0 else 1
