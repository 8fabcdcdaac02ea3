"""Prompts: what may be saved, which version a reference means, and how templates become messages.

Templates are a safe part of minijinja's (`templates.py`), of which `{{ variable }}` is all that most need. Neither who saves a prompt
nor who gives variables can make a render slow or large: see `templates.WORK` and `MAX_VALUES`. Variables are only ever text and data: a
value that looks like a template is not rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import msgspec
from minijinja import Environment, TemplateError
from msgspec.structs import replace

from ..accounts import StoredPrompt
from ..errors import InvalidArgument, InvalidRequest, UnprocessableRequest
from ..types import CompletionRequest, Message, check_id
from . import plain, templates

PRODUCTION = "production"
LATEST = "latest"
LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ROLES = ("system", "developer", "user", "assistant")

MAX_PROMPT_BYTES = 256 * 1024
MAX_RENDERED = 4 * 1024 * 1024
"""Characters of all messages together, after rendering."""

MAX_VARIABLES = 8 * 1024 * 1024
"""Characters of all variables of a call together, names included."""

MAX_VALUES = 20_000
"""Values of all variables together, those in lists and objects included."""

PER_TEXT = 64 * templates.ACCESS
PER_TOKEN = 2 * templates.ACCESS
"""What preparing a template costs of `templates.WORK`."""

RESERVED = "self"
"""A name that minijinja's Python binding cannot pass to a template."""

_UNDEFINED = re.compile(r"`(?P<expression>[^`]+)` is undefined")
_NAMING_KINDS = frozenset({"UnknownFilter", "UnknownFunction", "UnknownMethod", "UnknownTest", "TemplateNotFound"})


class PromptDraft(NamedTuple):
    """A prompt that may be saved. `text`: it was given as one text, which is the single message's content."""

    name: str
    messages: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    text: bool


def check_prompt(name: Any, messages: Any, settings: Any = None) -> PromptDraft:
    """A prompt as it is given to be saved, checked.

    `messages` is one text, which becomes one `system` message, or a list of messages with `role` (`ROLES`), `content` (a text or a
    list of text parts) and perhaps `name`. `settings` are model settings (`SETTINGS`). Raises `InvalidRequest`, whose `param` names
    the place (`messages[1].content`), also for a template that does not compile; then it tells the line.
    """
    text = isinstance(messages, str)
    given = [{"role": "system", "content": messages}] if text else messages
    draft = PromptDraft(prompt_name(name), _messages(given), _settings(settings), text)
    if len(msgspec.json.encode((draft.messages, draft.settings))) > MAX_PROMPT_BYTES:
        raise InvalidRequest(f"a prompt must be at most {MAX_PROMPT_BYTES} bytes as JSON", param="messages")
    return draft


def prompt_name(name: Any) -> str:
    """An identifier without a slash, since it is a part of a path. Raises `InvalidArgument`."""
    checked = check_id(name, "name")
    if "/" in checked:
        raise InvalidArgument("name must not contain '/'", param="name")
    return checked


def check_label(label: Any) -> str:
    """A label that can be moved. Raises `InvalidRequest`, also for `latest`, which is always the highest version."""
    if label == LATEST:
        raise InvalidRequest(f"the label {LATEST!r} is always the highest version and cannot be moved", param="label")
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise InvalidRequest(
            "a label must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and must start with a letter or a digit", param="label"
        )
    return label


def labels_of_new_version(labels: Sequence[str], version: int) -> tuple[str, ...]:
    """The labels that move to a version that is being added: those asked for, and `production` to the first. Raises `InvalidRequest`."""
    moved = {check_label(label) for label in labels}
    if version == 1:
        moved.add(PRODUCTION)
    return tuple(sorted(moved))


def variables(prompt: StoredPrompt) -> set[str]:
    """The names that the templates of `prompt` read and do not set themselves."""
    environment = templates.environment(templates.Meter())
    names: set[str] = set()
    for source in _sources(prompt.messages):
        names |= _undeclared(environment, source)
    return names


def render(prompt: StoredPrompt, variables: Mapping[str, Any]) -> tuple[Message, ...]:
    """`Renderer().render(...)`, for once."""
    return Renderer().render(prompt, variables)


class Renderer:
    """Renders prompts. It keeps nothing between two of them, and no prompt can include another."""

    def render(self, prompt: StoredPrompt, variables: Mapping[str, Any]) -> tuple[Message, ...]:
        """The messages of `prompt`, each text rendered with `variables`: plain JSON values. Those that no template reads are ignored.

        Raises `UnprocessableRequest` with the code `missing_variable` for a name that a template reads and nobody gave (`param` is
        `prompt.variables.<name>`), and with `prompt_render_failed` when a template fails otherwise, costs too much, or uses what
        could not be saved today; `InvalidArgument` for variables that are not JSON or too large. No error repeats a variable's value.
        """
        _bound(variables)
        values = plain.plain_object(variables, "prompt.variables")
        if RESERVED in values:
            raise InvalidArgument(f"a variable cannot be named {RESERVED!r}", param=f"prompt.variables.{RESERVED}")
        rendering = _Rendering(prompt, values)
        return tuple(cast("Message", {**message, "content": rendering.content(message["content"])}) for message in prompt.messages)


class _Rendering:
    """One prompt with one set of variables."""

    def __init__(self, prompt: StoredPrompt, values: Mapping[str, Any]) -> None:
        self._name = prompt.name
        self._names = values.keys()
        self._meter = templates.Meter()
        self._values = {name: templates.held(value, self._meter) for name, value in values.items()}
        self._length = 0
        self._checked = {source: self._check(source) for source in _sources(prompt.messages) if _has_tags(source)}
        self._shares = sum(checked.loops for checked in self._checked.values())

    def _check(self, source: str) -> templates.Checked:
        try:
            return templates.check(source)
        except InvalidRequest as error:
            problem = self._failed(error.message)
        raise problem

    def content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._text(content)
        return [{**part, "text": self._text(part["text"])} for part in content]

    def _text(self, source: str) -> str:
        text = self._rendered(source) if _has_tags(source) else source
        self._length += len(text)
        if self._length > MAX_RENDERED:
            raise self._failed(f"it renders to more than {MAX_RENDERED} characters")
        return text

    def _rendered(self, source: str) -> str:
        checked = self._checked[source]
        parser = templates.environment(self._meter)
        try:
            undeclared = _undeclared(parser, source)
        except TemplateError as error:
            raise self._failed(f"{error.kind} in line {error.line}") from None
        missing = undeclared - self._names
        environment = templates.environment(self._meter, checked.fuel(self._shares), gaps=True) if missing else parser
        environment.fuel = checked.fuel(self._shares)
        try:
            self._meter.pay(PER_TEXT + PER_TOKEN * checked.tokens)
            text = environment.render_str(source, None, **self._values)
            self._meter.pay(0)
        except TemplateError as error:
            problem = self._explain(error, undeclared)
        except templates.NoValue as error:
            problem = self._given_nothing(source, error, missing)
        except InvalidArgument as error:
            problem = self._failed(error.message)
        else:
            return text
        raise problem  # outside of the handler: minijinja's error holds the variables' values

    def _given_nothing(self, source: str, error: templates.NoValue, missing: set[str]) -> UnprocessableRequest:
        for match in re.finditer(rf"\b(?P<name>[^\W\d]\w*)\s*\|\s*{error.filter}\b", source):
            if match["name"] in missing:
                return self._missing(match["name"], missing)
        return self._failed(error.message)

    def _explain(self, error: TemplateError, undeclared: set[str]) -> UnprocessableRequest:
        if self._meter.spent:
            return self._failed(self._meter.why)
        undefined = _UNDEFINED.search(error.detail or "")
        if undefined:
            return self._missing(undefined["expression"], undeclared)
        where = f" in line {error.line}" if error.line else ""
        if error.kind == "OutOfFuel":
            return self._failed(f"it runs for too long{where}")
        named = f", {error.detail}" if error.kind in _NAMING_KINDS and error.detail else ""
        return self._failed(f"{error.kind}{where}{named}")

    def _missing(self, expression: str, undeclared: set[str]) -> UnprocessableRequest:
        root = re.split(r"[.\[]", expression, maxsplit=1)[0]
        return UnprocessableRequest(
            f"the prompt {self._name!r} needs the variable {expression!r}",
            code="missing_variable",
            param=f"prompt.variables.{expression}" if root in undeclared else "prompt.variables",
        )

    def _failed(self, why: str) -> UnprocessableRequest:
        return UnprocessableRequest(f"the prompt {self._name!r} cannot be rendered: {why}", code="prompt_render_failed", param="prompt")


def _bound(variables: Any) -> None:
    """Raises `InvalidArgument` for variables that are too many or too long, before they are copied."""
    values = characters = 0
    waiting = [variables]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Mapping | list | tuple):
            values += len(value)
            if values <= MAX_VALUES:
                waiting.extend(value)
                waiting.extend(value.values() if isinstance(value, Mapping) else ())
        if values > MAX_VALUES or characters > MAX_VARIABLES:
            raise InvalidArgument(
                f"the variables of a prompt can have at most {MAX_VALUES} values and {MAX_VARIABLES} characters", param="prompt.variables"
            )


def _has_tags(source: str) -> bool:
    return "{{" in source or "{%" in source or "{#" in source


def _undeclared(environment: Environment, source: str) -> set[str]:
    return environment.undeclared_variables_in_str(source) - environment.globals.keys()


def _sources(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    sources: list[str] = []
    for message in messages:
        content = message["content"]
        sources += [content] if isinstance(content, str) else [part["text"] for part in content]
    return sources


def _messages(given: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, list | tuple) or not given:
        raise InvalidRequest("messages must be a text or a list of at least one message", param="messages")
    environment = templates.environment(templates.Meter())
    return tuple(_message(message, f"messages[{index}]", environment) for index, message in enumerate(given))


def _message(given: Any, where: str, environment: Environment) -> Mapping[str, Any]:
    message = plain.plain_object(given, where)
    unknown = sorted(message.keys() - {"role", "content", "name"})
    if unknown:
        raise InvalidRequest(
            f"a prompt's message has no field {unknown[0]!r}; there are content, name, role", param=f"{where}.{unknown[0]}"
        )
    if message.get("role") not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    if "name" in message:
        check_id(message["name"], f"{where}.name")
    content = message.get("content")
    if isinstance(content, str):
        _compile(content, f"{where}.content", environment)
    elif isinstance(content, list) and content:
        for index, part in enumerate(content):
            _part(part, f"{where}.content[{index}]", environment)
    else:
        raise InvalidRequest(f"{where}.content must be a text or a list of text parts", param=f"{where}.content")
    return message


def _part(part: Any, where: str, environment: Environment) -> None:
    """A text part; fields besides `type` and `text` (a provider's cache marks) travel untouched."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where} must be a text part: {{'type': 'text', 'text': ...}}", param=where)
    _compile(part["text"], f"{where}.text", environment)


def _compile(source: str, where: str, environment: Environment) -> None:
    try:
        templates.check(source)
        environment.add_template(where, source)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where} is not a template that can be used: {error.message}", param=where) from None
    except TemplateError as error:
        raise InvalidRequest(f"{where} is not a valid template: line {error.line}: {error.detail}", param=where) from None


Check: TypeAlias = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


SETTINGS: Mapping[str, tuple[Check, str]] = {
    "model": (_is_word, "a model name"),
    "temperature": (_is_number, "a number"),
    "max_tokens": (_is_count, "an integer of at least 1"),
    "n": (_is_count, "an integer of at least 1"),
    "top_p": (_is_number, "a number"),
    "stop": (_is_stop, "a text or a list of texts"),
    "seed": (_is_integer, "an integer"),
    "presence_penalty": (_is_number, "a number"),
    "frequency_penalty": (_is_number, "a number"),
    "logit_bias": (_is_object, "an object"),
    "logprobs": (_is_flag, "true or false"),
    "top_logprobs": (_is_integer, "an integer"),
    "response_format": (_is_object, "an object"),
    "reasoning_effort": (_is_word, "a word"),
    "verbosity": (_is_word, "a word"),
}
"""What a prompt may set: parameters in OpenAI's names, none of which makes a call's cost unbounded."""


def _settings(given: Any) -> Mapping[str, Any]:
    settings = plain.plain_object({} if given is None else given, "settings")
    for name, value in settings.items():
        known = SETTINGS.get(name)
        if known is None:
            raise InvalidRequest(f"a prompt cannot set {name!r}; it can set {', '.join(sorted(SETTINGS))}", param=f"settings.{name}")
        holds, expected = known
        if not holds(value):
            raise InvalidRequest(f"settings.{name} must be {expected}", param=f"settings.{name}")
    return settings


def applied(prompt: StoredPrompt, request: CompletionRequest, messages: Sequence[Message]) -> CompletionRequest:
    """`request` with the rendered `messages` and with the settings of `prompt`; what the caller set itself wins over a setting."""
    fields: dict[str, Any] = {"messages": messages, "prompt": None}
    params = dict(request.params)
    for name, value in prompt.settings.items():
        if name not in REQUEST_FIELDS:
            params.setdefault(name, value)
        elif getattr(request, name) in (None, ""):
            fields[name] = value
    return replace(request, params=params, **fields)


REQUEST_FIELDS = frozenset({"model", "temperature", "max_tokens", "n"})
"""The settings that are fields of a `CompletionRequest`; all others are parameters."""
