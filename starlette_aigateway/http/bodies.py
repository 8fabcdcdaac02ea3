"""Reading a request's body: counted while it comes, decoded once, refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from starlette.types import Receive

from ..deadlines import deadline
from ..errors import InvalidRequest, RequestTimeout, RequestTooLarge, UnsupportedMediaType
from ..hints import did_you_mean
from ..patience import at_once

MAX_DIGITS = 18
MAX_VALUES = 100_000
"""Values in one body. A call of 10,000 messages has fewer; ten megabytes of tiny ones keep an event loop busy for seconds."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""Possessive, and the last quote may be missing: linear in whatever is sent."""


class ClientLeft(Exception):
    """The client went away before its request was whole; there is nobody to answer."""


async def read(receive: Receive, announced: bytes, limit: int, seconds: float) -> bytes:
    """The whole body, at most `limit` bytes, within `seconds`. Raises `RequestTooLarge`, also by the `announced` length alone (the header
    `content-length`), `RequestTimeout` and `ClientLeft`."""
    if announced.isdigit() and (len(announced) > MAX_DIGITS or int(announced) > limit):
        raise _too_large(limit)
    done, whole = at_once(_read(receive, limit))
    if done is not None:
        return done
    with deadline(seconds):
        return await whole
    raise RequestTimeout(f"the body did not come within {seconds:g} seconds")


async def _read(receive: Receive, limit: int) -> bytes:
    whole = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")
        if len(whole) + len(part) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return bytes(whole + part) if whole else part
        whole += part


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body must be at most {limit} bytes")


def require_json(content_type: bytes) -> None:
    """Bodies are `application/json`: a form that another site posts is never taken for one."""
    if content_type == b"application/json":
        return
    media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
        raise UnsupportedMediaType(
            f"the body must be JSON: send the header 'content-type: application/json', not {media_type[:80] or 'none'!r}",
            param="content-type",
        )


def decode_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises `InvalidRequest`, which says where the JSON is malformed and never repeats it, and
    `RequestTooLarge` for more than `MAX_VALUES` values, before any is made."""
    if len(body) > MAX_VALUES and _values(body) > MAX_VALUES:
        raise RequestTooLarge(f"the body must hold at most {MAX_VALUES} values")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest(_what_is_wrong(body, error), code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_json")
    return value


def _values(body: bytes) -> int:
    """At least as many as there are, where that is few; else exactly, up to the first beyond `MAX_VALUES`."""
    count = _separators(body, 0, len(body))
    if count <= MAX_VALUES:
        return count
    count = end = 0
    for string in _STRING.finditer(body):
        count += _separators(body, end, string.start())
        end = string.end()
        if count > MAX_VALUES:
            return count
    return count + _separators(body, end, len(body))


def _separators(body: bytes, start: int, end: int) -> int:
    return body.count(b",", start, end) + body.count(b"[", start, end) + body.count(b"{", start, end)


def _what_is_wrong(body: bytes, error: Exception) -> str:
    """In words that say how to mend it; the decoder's own where they do."""
    said = str(error)
    if not body.strip():
        return "the body is empty"
    if "utf-8" in said or isinstance(error, UnicodeDecodeError):
        return "the body is not valid UTF-8"
    if "out of range" in said:
        return "the body is not valid JSON: a number in it is out of the range of a double (IEEE 754)"
    if "\\ud" in body.decode("latin-1").lower() and ("truncated" in said or "surrogate" in said or "scape" in said):
        return "the body is not valid JSON: a \\u escape in it is half of a surrogate pair (RFC 8259, section 8.2)"
    return f"the body is not valid JSON: {said}"


def known_fields(body: Mapping[str, Any], known: Collection[str], within: str = "") -> None:
    """Raises `InvalidRequest`, naming the first field that is not `known` and those that are. `within` is `price.` for its fields."""
    for name in body:
        if name not in known:
            shown = name[:100]
            hint = did_you_mean(shown, known) or f"; there are {', '.join(sorted(known))}"
            raise InvalidRequest(f"there is no field {shown!r} here{hint}", param=f"{within}{shown}")
