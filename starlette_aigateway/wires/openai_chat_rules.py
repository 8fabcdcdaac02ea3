"""Which requests make sense, whoever sends them: over HTTP and in the host's process alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..errors import InvalidRequest
from ..types import CompletionRequest, Message, PromptRef
from .json_values import is_encodable, json_fault
from .openai_chat_request import DECIDED

MAX_NAME = 200
MAX_MESSAGES = 10_000
MAX_TOKENS = 10_000_000
MAX_CHOICES = 128
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KNOWN_ROLES = frozenset(ROLES)
_PLAIN_ROLES = frozenset({"system", "developer", "user", "assistant"})
_LIST = (list, tuple)  # `list | tuple` would be made anew at each look
_NUMBER = (int, float)
_INSTEAD_OF_CONTENT = ("tool_calls", "refusal", "function_call", "audio")


def validate(request: CompletionRequest) -> bool:
    """Whether the messages are nothing but text, which nobody has to look at more closely. Raises `InvalidRequest`, whose `param` names
    the field (`messages[0].role`) and whose message says how to mend it."""
    _check_model(request)
    if request.prompt is not None:
        _check_prompt(request.prompt)
    plain = _check_messages(request)
    if request.temperature is not None:
        _check_temperature(request.temperature)
    if request.max_tokens is not None:
        _check_count(request.max_tokens, "max_tokens", MAX_TOKENS)
    if request.n is not None:
        _check_count(request.n, "n", MAX_CHOICES)
    if request.params:
        _check_params(request.params)
    return plain


def _check_model(request: CompletionRequest) -> None:
    model = request.model
    if not isinstance(model, str):
        raise InvalidRequest("model must be a string", param="model")
    if not model and request.prompt is None:
        raise InvalidRequest("model is missing; name one", param="model")
    if len(model) > MAX_NAME or not _is_name(model):
        raise InvalidRequest(f"model must be at most {MAX_NAME} printable characters without surrounding blanks", param="model")


@lru_cache(maxsize=1024)
def _is_name(model: str) -> bool:
    return model.isprintable() and model == model.strip()


def _check_prompt(prompt: PromptRef | Any) -> None:
    if not isinstance(prompt, PromptRef):
        raise InvalidRequest(f"prompt must be a PromptRef(...), not {type(prompt).__name__}", param="prompt")
    _check_name(prompt.name, "prompt.name")
    if prompt.label is not None:
        _check_name(prompt.label, "prompt.label")
    if prompt.version is not None:
        _check_count(prompt.version, "prompt.version", 2**31)
    if not isinstance(prompt.variables, dict):
        raise InvalidRequest("prompt.variables must be an object", param="prompt.variables")
    _check_json(prompt.variables, "prompt.variables")


def _check_name(value: Any, param: str) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME or not value.isprintable():
        raise InvalidRequest(f"{param} must be a string of 1 to {MAX_NAME} printable characters", param=param)


def _check_messages(request: CompletionRequest) -> bool:
    messages = request.messages
    if not isinstance(messages, _LIST):
        raise InvalidRequest("messages must be a list of objects", param="messages")
    if not messages and request.prompt is None:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages must be at most {MAX_MESSAGES}", param="messages")
    plain = True
    for index, message in enumerate(messages):
        # The common message is told apart in a fraction of a microsecond; whatever is not known here gets the full look.
        if type(message) is dict and len(message) == 2:
            content, role = message.get("content"), message.get("role")
            if type(content) is str and type(role) is str and role in _PLAIN_ROLES and (content.isascii() or is_encodable(content)):
                continue
        plain = False
        _check_message(message, f"messages[{index}]")
    return plain


def _check_message(message: Message | Any, param: str) -> None:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{param} must be an object with a role and a content", param=param)
    role = message.get("role")
    if not isinstance(role, str) or role not in _KNOWN_ROLES:
        raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
    _check_content(message, role, param)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise InvalidRequest(f"{param}.tool_call_id must name the tool call that this message answers", param=f"{param}.tool_call_id")
    _check_tool_calls(message.get("tool_calls"), f"{param}.tool_calls")
    _check_json(message, param)


def _check_content(message: Mapping[str, Any], role: str, param: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    where = f"{param}.content"
    if content is None:
        replaced = role == "function" or (role == "assistant" and any(message.get(name) for name in _INSTEAD_OF_CONTENT))
        if not replaced:
            raise InvalidRequest(f"{where} must be a string or a list of parts", param=where)
    elif isinstance(content, list | tuple):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise InvalidRequest(f"{where}[{index}] must be an object with a type, such as 'text'", param=f"{where}[{index}]")
    else:
        raise InvalidRequest(f"{where} must be a string or a list of parts, not {type(content).__name__}", param=where)


def _check_tool_calls(calls: Any, param: str) -> None:
    if calls is not None and not (isinstance(calls, list | tuple) and all(isinstance(call, dict) for call in calls)):
        raise InvalidRequest(f"{param} must be a list of objects", param=param)


def _check_temperature(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not 0 <= value <= 2:
        raise InvalidRequest("temperature must be a number between 0 and 2", param="temperature")


def _check_count(value: Any, param: str, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise InvalidRequest(f"{param} must be an integer between 1 and {maximum}", param=param)


def _check_params(params: Any) -> None:
    if not isinstance(params, dict):
        raise InvalidRequest("params must be a mapping of parameter names to JSON values", param="params")
    for name, value in params.items():
        if not isinstance(name, str) or not name.isprintable():
            raise InvalidRequest("the name of a parameter must be a string of printable characters", param="params")
        if name in DECIDED:
            raise InvalidRequest(f"{name} is a field of its own; it must not be given again in params", param=name)
        _check_json(value, name)


def _check_json(value: Any, param: str) -> None:
    fault = json_fault(value)
    if fault is not None:
        path = param + fault.path
        raise InvalidRequest(f"{path} {fault.message}", param=path)
