"""The chunks of a stream, put together to the answer that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..types import Chunk, Completion, Message, Usage


class Assembly:
    """The whole answer of choice 0: texts joined, tool calls put together by their index, the last usage and finish reason.

    It keeps no `native`: several choices and log probabilities are lost.
    """

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._model: str | None = None
        self._id: str | None = None

    def add(self, chunk: Chunk) -> None:
        self._usage = chunk.usage or self._usage
        self._model = self._model or chunk.model
        self._id = self._id or chunk.id
        if chunk.index == 0:
            self._finish_reason = chunk.finish_reason or self._finish_reason
            _merge(self._message, chunk.delta)

    def completion(self) -> Completion:
        message = _joined(self._message)
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in calls if isinstance(call, Mapping)
            ]
        return Completion(
            message=cast("Message", message), finish_reason=self._finish_reason, usage=self._usage, model=self._model, id=self._id
        )


_NOT_JOINED = frozenset({"role", "id", "type", "name", "index"})


class _Text(list[str]):
    """A string that comes in pieces; joined once, at the end."""


class _Members(list[Any]):
    """A list whose objects come in pieces, each named by its index."""

    def __init__(self) -> None:
        super().__init__()
        self.by_index: dict[int, dict[str, Any]] = {}


def _merge(target: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Puts a delta on top of what came before: strings are joined, objects merged, lists of indexed objects merged by index."""
    for name, value in delta.items():
        if value is None:
            continue
        known = target.get(name)
        if isinstance(value, str) and name not in _NOT_JOINED:
            if not isinstance(known, _Text):
                known = target[name] = _Text()
            known.append(value)
        elif isinstance(value, Mapping):
            inner = target[name] = known if isinstance(known, dict) else {}
            _merge(inner, value)
        elif isinstance(value, list | tuple):
            members = target[name] = known if isinstance(known, _Members) else _Members()
            _merge_list(members, value)
        elif not (name in _NOT_JOINED and known and not value):
            target[name] = value


def _merge_list(members: _Members, delta: Sequence[Any]) -> None:
    for value in delta:
        if not isinstance(value, Mapping):
            members.append(value)
            continue
        index = value.get("index")
        same = members.by_index.get(index) if isinstance(index, int) else None
        if same is None:
            same = {}
            members.append(same)
            if isinstance(index, int):
                members.by_index[index] = same
        _merge(same, value)


def _joined(value: Any) -> Any:
    """What `_merge` has put together, as plain values."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _joined(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_joined(member) for member in value]
    return value
