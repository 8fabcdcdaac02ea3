"""What a request brings to be let in by. A stored key opens by itself, and the host's own login never gets to see one."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from starlette.requests import HTTPConnection

from ..policy import keys
from .connection import first_values

CARRIERS = frozenset({b"authorization", b"proxy-authorization", b"x-api-key", b"api-key", b"x-goog-api-key"})
"""Headers that are there to carry credentials: what starts like a key in one of them is meant as one, mistyped or not."""

_PREFIX = keys.PREFIX.encode()
_START = rb"(?<![0-9A-Za-z_.-])" + _PREFIX
LIKE_A_KEY = re.compile(_START)
SURELY_A_KEY = re.compile(_START + rb"[0-9A-Za-z]{20}")


def credential(connection: HTTPConnection) -> str | None:
    """What came as `Authorization: Bearer …` or as `x-api-key`; of the two, a stored key goes first."""
    headers = first_values(connection)
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    if bearer and keys.looks_like_key(bearer):
        return bearer
    other = headers.get(b"x-api-key", b"").decode("latin-1").strip()
    return other if other and (not bearer or keys.looks_like_key(other)) else bearer or None


def misplaced_key(connection: HTTPConnection) -> str | None:
    """Where a stored key lies from where none is taken: another scheme (`Basic`), another header, a cookie, the query. None: nowhere."""
    for name, value in connection.headers.raw:
        name = name.lower()
        if _in_a_carrier(value) if name in CARRIERS else _PREFIX in value and SURELY_A_KEY.search(value):
            return f"the header {name.decode('latin-1')}"
    query: bytes = connection.scope.get("query_string", b"")
    return "the query string" if query and SURELY_A_KEY.search(unquote_to_bytes(query)) else None


def _in_a_carrier(value: bytes) -> bool:
    """In the value as it came, or in the user and password of `Basic` (RFC 7617)."""
    if LIKE_A_KEY.search(value):
        return True
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() != b"basic":
        return False
    try:
        return LIKE_A_KEY.search(base64.b64decode(rest.strip() + b"==")) is not None
    except binascii.Error:
        return False
