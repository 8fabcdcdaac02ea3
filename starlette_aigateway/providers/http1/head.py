"""The head of a request, and where it goes: all of it that does not change from call to call."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from ...errors import ProviderError

PORTS = {"http": 80, "https": 443}
FRAMING = frozenset({"content-length", "transfer-encoding"})
_TARGET = re.compile(r"[!-~]*")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]*")


class Origin(NamedTuple):
    """Whom a connection leads to: requests of one origin share connections."""

    tls: bool
    host: str
    port: int


class Head(NamedTuple):
    """`start` ends where the length of the body is to follow."""

    origin: Origin
    start: bytes


def request_head(url: str, headers: Iterable[tuple[str, str]]) -> Head:
    """The head of a POST of `headers` to `url`, both as they were given. Raises a `ProviderError` for what HTTP cannot carry (a line break
    in a header would be a second header, or a second request)."""
    origin, host, target = _parsed(url)
    fields = {"host": host, "accept-encoding": "identity"}
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value) or name.lower() in FRAMING:
            raise _unsendable("has a header that cannot be sent")
        fields[name.lower()] = value
    lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "content-length: "]
    return Head(origin, "\r\n".join(lines).encode())


def _parsed(url: str) -> tuple[Origin, str, str]:
    """Origin, `host` header and request target."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _unsendable("has an address that is none") from None
    if not host or parts.scheme not in PORTS or "@" in parts.netloc or not _TARGET.fullmatch(url):
        raise _unsendable("has an address that is none")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    named = f"[{host}]" if ":" in host else host
    default = PORTS[parts.scheme]
    return Origin(parts.scheme == "https", host, port or default), named if port in (None, default) else f"{named}:{port}", target


def _unsendable(what: str) -> ProviderError:
    return ProviderError(f"the request to the provider {what}", retryable=False, billed="no")
