"""Whether a value can travel as JSON, unchanged. `msgspec.json.encode` would turn NaN into null and bytes into base64 without a word."""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct

MAX_DEPTH = 64
MAX_INTEGER_BITS = 1024


class JSONFault(Struct, frozen=True):
    """`path` is relative to the value that was looked at: `[0].name`, empty for the value itself."""

    path: str
    message: str


class _FaultError(Exception):
    def __init__(self, message: str) -> None:
        self.message = message
        self.steps: list[str] = []


def json_fault(value: Any, *, depth: int = MAX_DEPTH) -> JSONFault | None:
    """What keeps `value` from being sent as it is: a foreign type, NaN or infinity, a lone surrogate, a key that is not a string, or
    more than `depth` levels. None if nothing does."""
    try:
        _check(value, depth)
    except _FaultError as fault:
        return JSONFault("".join(reversed(fault.steps)), fault.message)
    return None


def is_encodable(text: str) -> bool:
    """Whether `text` has a UTF-8 form: a lone surrogate has none (RFC 3629, section 3)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        if not is_encodable(value):
            raise _FaultError("holds a lone surrogate, which has no UTF-8 form; remove it")
    elif isinstance(value, dict):
        _check_mapping(value, depth - 1)
    elif isinstance(value, list | tuple):
        _check_sequence(value, depth - 1)
    elif not (value is None or isinstance(value, bool)):
        _check_number(value)


def _check_mapping(value: dict[Any, Any], depth: int) -> None:
    if depth < 0:
        raise _FaultError(f"is nested deeper than {MAX_DEPTH} levels")
    for key, member in value.items():
        if not isinstance(key, str):
            raise _FaultError(f"has a key of type {type(key).__name__}; keys must be strings")
        if not is_encodable(key):
            raise _FaultError("has a key that holds a lone surrogate, which has no UTF-8 form; remove it")
        try:
            _check(member, depth)
        except _FaultError as fault:
            fault.steps.append(_step(key))
            raise


def _check_sequence(value: list[Any] | tuple[Any, ...], depth: int) -> None:
    if depth < 0:
        raise _FaultError(f"is nested deeper than {MAX_DEPTH} levels")
    for index, member in enumerate(value):
        try:
            _check(member, depth)
        except _FaultError as fault:
            fault.steps.append(f"[{index}]")
            raise


def _check_number(value: Any) -> None:
    if isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise _FaultError(f"is an integer of more than {MAX_INTEGER_BITS} bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _FaultError("must be finite; JSON has neither NaN nor Infinity")
    else:
        raise _FaultError(f"is of type {type(value).__name__}, which JSON does not know; use dict, list, str, int, float, bool or None")


def _step(key: str) -> str:
    return f".{key}" if len(key) <= 64 and key.isprintable() else ".…"
