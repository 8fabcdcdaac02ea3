"""Messages of the canonical form as a system prompt and turns of the Messages wire.

https://platform.claude.com/docs/en/api/messages/create, https://platform.claude.com/docs/en/agents-and-tools/tool-use/overview
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

from ..errors import ProviderRejected
from ..types import Message

Block: TypeAlias = dict[str, Any]

IMAGE_TYPES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
CACHE_MARKS: tuple[Mapping[str, str], ...] = tuple({"type": "ephemeral", **ttl} for ttl in ({}, {"ttl": "5m"}, {"ttl": "1h"}))
_object_decoder = msgspec.json.Decoder(dict[str, Raw])


class Conversation(NamedTuple):
    """`system` is empty where nobody gave one."""

    system: str | Sequence[Block]
    turns: Sequence[Mapping[str, Any]]


def refusal(param: str, why: str) -> ProviderRejected:
    """What this wire cannot say, found before anything was sent: another provider may."""
    return ProviderRejected(f"{param} {why}", retryable=True, billed="no", param=param)


def converse(messages: Sequence[Message]) -> Conversation:
    """The conversation in `messages`, which must have passed `openai_chat.validate`. Raises `ProviderRejected`, naming the place.

    - System and developer messages, wherever they stand, become the one system prompt, joined by line feeds: so does Anthropic's own
      translation (https://platform.claude.com/docs/en/api/openai-sdk), and an instruction of the host never turns into text of the user.
    - Consecutive messages of one role become one turn; results of tools are blocks of the user's turn.
    - The API refuses blank text: blank parts and blank answers of the assistant are left out, a blank message of the user is refused.
    - Not sent, because the wire has no place for it: `name`, an image's `detail`, and `reasoning_content`, which lacks its signature.
    """
    system: list[Block] = []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        role = message.get("role")
        if role in ("system", "developer"):
            system += _blocks(message, param)
        elif role == "user":
            _add(turns, "user", _user(message, param))
        elif role == "assistant":
            _add(turns, "assistant", _assistant(message, param))
        elif role == "tool":
            _add(turns, "user", [_tool_result(message, param)])
        else:
            raise refusal(f"{param}.role", "is one that Claude models do not know; the role 'tool' has replaced 'function'")
    if not turns:
        raise refusal("messages", "must hold a message of the user for a Claude model")
    return Conversation(_system(system), turns)


def cache_mark(holder: Mapping[str, Any], param: str) -> Block:
    """The `cache_control` of `holder`, to be merged into its block: a write for five minutes or for an hour, each of which has a rate in
    a `Price` (https://platform.claude.com/docs/en/build-with-claude/prompt-caching)."""
    mark = holder.get("cache_control")
    if mark is None:
        return {}
    if mark not in CACHE_MARKS:
        raise refusal(f"{param}cache_control", "must be {'type': 'ephemeral'}, with a ttl of '5m' or '1h' if any")
    return {"cache_control": mark}


def _add(turns: list[dict[str, Any]], role: str, blocks: list[Block]) -> None:
    if not blocks:
        return
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += blocks
    else:
        turns.append({"role": role, "content": blocks})


def _system(blocks: Sequence[Block]) -> str | Sequence[Block]:
    if any("cache_control" in block for block in blocks):
        return blocks
    return "\n".join(block["text"] for block in blocks)


def _user(message: Message, param: str) -> list[Block]:
    blocks = _blocks(message, param, images=True)
    if not blocks:
        raise refusal(f"{param}.content", "must not be blank for a Claude model")
    return blocks


def _assistant(message: Message, param: str) -> list[Block]:
    for name in ("function_call", "audio"):
        if message.get(name):
            raise refusal(f"{param}.{name}", "has no counterpart for Claude models")
    blocks = _blocks(message, param)
    refused = message.get("refusal")
    if isinstance(refused, str):
        blocks += _text(refused)
    calls = message.get("tool_calls") or ()
    return [*blocks, *(_tool_use(call, f"{param}.tool_calls[{place}]") for place, call in enumerate(calls))]


def _tool_use(call: Mapping[str, Any], param: str) -> Block:
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise refusal(param, "must be the call of a function for a Claude model")
    identity, name = call.get("id"), function.get("name")
    if not isinstance(identity, str) or not isinstance(name, str):
        raise refusal(param, "must have an id and the name of a function")
    return {"type": "tool_use", "id": identity, "name": name, "input": _arguments(function.get("arguments"), f"{param}.function.arguments")}


def _arguments(arguments: Any, param: str) -> Raw:
    """The object in `arguments`, byte by byte as the caller wrote it."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return Raw(b"{}")
    if isinstance(arguments, str):
        try:
            _object_decoder.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            pass
        else:
            return Raw(arguments.encode())
    raise refusal(param, "must be the text of a JSON object for a Claude model")


def _tool_result(message: Message, param: str) -> Block:
    result: Block = {"type": "tool_result", "tool_use_id": message["tool_call_id"]}
    content = _blocks(message, param, images=True)
    return {**result, "content": content} if content else result


def _blocks(message: Message, param: str, *, images: bool = False) -> list[Block]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return _text(content or "")
    blocks: list[Block] = []
    for place, part in enumerate(content):
        where = f"{param}.content[{place}]"
        kind = part.get("type")
        if kind in ("text", "refusal"):
            if not isinstance(part.get(kind), str):
                raise refusal(f"{where}.{kind}", "must be a string")
            blocks += [{**block, **cache_mark(part, f"{where}.")} for block in _text(part[kind])]
        elif kind == "image_url" and images:
            blocks.append(
                {"type": "image", "source": _image_source(part.get("image_url"), f"{where}.image_url"), **cache_mark(part, f"{where}.")}
            )
        else:
            raise refusal(where, "is of a type that has no place here for a Claude model")
    return blocks


def _text(text: str) -> list[Block]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _image_source(image: Any, param: str) -> Block:
    url = image.get("url") if isinstance(image, Mapping) else image
    if isinstance(url, str):
        if url[:5].lower() == "data:":
            return _inlined(url[5:], param)
        if url.lower().startswith(("https://", "http://")):
            return {"type": "url", "url": url}
    raise refusal(param, "must be an http, https or data URL")


def _inlined(url: str, param: str) -> Block:
    """RFC 2397, without its `data:`."""
    head, _, data = url.partition(",")
    kind, *options = head.lower().split(";")
    if kind not in IMAGE_TYPES or options[-1:] != ["base64"] or not data:
        raise refusal(param, f"must be base64 of {', '.join(sorted(IMAGE_TYPES))} for a Claude model")
    return {"type": "base64", "media_type": kind, "data": data}
