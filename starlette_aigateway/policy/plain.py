"""Plain JSON values: what metadata, prompt settings and prompt variables may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidArgument

MAX_DEPTH = 64
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1


def plain(value: Any, name: str) -> Any:
    """A copy of `value` made of None, bool, int, float, str, list and dict only; tuples become lists.

    Raises `InvalidArgument`, whose `param` is the path below `name` (`metadata.owner[2]`), for any other type, a key that is not a
    string, a number that is not finite or beyond 64 bits, text that is not Unicode, and nesting deeper than `MAX_DEPTH`.
    """
    return _copy(value, name, MAX_DEPTH)


def plain_object(value: Any, name: str) -> dict[str, Any]:
    """The same of a JSON object."""
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{name} must be an object, not {type(value).__name__}", param=name)
    copy: dict[str, Any] = _copy(value, name, MAX_DEPTH)
    return copy


def _copy(value: Any, name: str, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, name)
    if isinstance(value, int):
        return _integer(value, name)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidArgument(f"{name} must be a finite number", param=name)
        return value
    if depth == 0:
        raise InvalidArgument(f"{name} is nested deeper than {MAX_DEPTH} levels", param=name)
    if isinstance(value, Mapping):
        return {_key(key, name): _copy(item, f"{name}.{key}", depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, f"{name}[{index}]", depth - 1) for index, item in enumerate(value)]
    raise InvalidArgument(f"{name} must be a JSON value, not {type(value).__name__}", param=name)


def _integer(value: int, name: str) -> int:
    if not MIN_INTEGER <= value <= MAX_INTEGER:
        raise InvalidArgument(f"{name} must fit into 64 bits", param=name)
    return int(value)


def _key(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise InvalidArgument(f"{name} must have strings as keys, not {type(key).__name__}", param=name)
    return text(key, name)


def text(value: str, name: str) -> str:
    """`value`, if it can be encoded as UTF-8: JSON lets a lone surrogate in. Raises `InvalidArgument`."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{name} must be valid Unicode text", param=name) from None
    return str(value)
