"""Requests that a browser sends with the user's login because another site told it to (CSRF). Content types keep forms out; this keeps out
whatever else changes something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from ..errors import ConfigurationError, PermissionDenied
from .connection import first_values

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DEFAULT_PORTS = {"http": 80, "https": 443}
SENT_BY_ITSELF = frozenset({b"basic", b"digest", b"negotiate", b"ntlm"})
"""Schemes of `Authorization` that a browser fills in without being asked; any other one was put there by a script that may."""


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int | None


class Origins:
    """The host's own pages, and those of `trusted` origins such as `https://app.example.com`. Raises `ConfigurationError`."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        if isinstance(trusted, str) or not isinstance(trusted, Iterable):
            raise ConfigurationError("trusted_origins must be a list of origins such as 'https://app.example.com'", param="trusted_origins")
        self._trusted = frozenset(map(_trusted, trusted))

    def check(self, connection: HTTPConnection) -> None:
        """Raises `PermissionDenied` (`foreign_origin`) for a change that a page of another origin asks for by the login of its visitor.

        The browser's own word (`Sec-Fetch-Site`, https://www.w3.org/TR/fetch-metadata/) holds also where a proxy rewrites `Host`. Without
        it, `Origin` (RFC 6454) has to name the host that was asked; `null` names none. Whoever sends neither is no browser.
        `X-Forwarded-Host` is not read: not every proxy takes it from whoever sends it."""
        if connection.scope.get("method", "GET") in SAFE_METHODS or _by_a_script(first_values(connection)):
            return
        headers = connection.headers
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and parse(origin) in self._trusted:
            return
        own = site.lower() in ("same-origin", "none") if site is not None else origin is None or _names(origin, headers.get("host", ""))
        if not own:
            raise PermissionDenied("this request comes from another origin", code="foreign_origin")


def _by_a_script(headers: Mapping[bytes, bytes]) -> bool:
    """Whether nothing lets this request in but a credential that no browser attaches of itself: a foreign page would have to know it."""
    if b"cookie" in headers:
        return False
    scheme = headers.get(b"authorization", b"").partition(b" ")[0].lower()
    return scheme not in SENT_BY_ITSELF if scheme else b"x-api-key" in headers


def parse(text: str) -> Origin | None:
    """An origin with its port, a default one filled in; None for what is none (`null`)."""
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname or parts.username is not None or parts.path or parts.query or parts.fragment:
        return None
    scheme = parts.scheme.lower()
    return Origin(scheme, parts.hostname.lower(), port if port is not None else DEFAULT_PORTS.get(scheme))


def _names(origin: str, host: str) -> bool:
    """Whether `origin` is at `host`, as the header says it. The scheme is not compared: TLS may end at a proxy."""
    asked = parse(origin)
    return asked is not None and asked == parse(f"{asked.scheme}://{host}")


def _trusted(text: object) -> Origin:
    origin = parse(text) if isinstance(text, str) else None
    if origin is None:
        raise ConfigurationError(f"trusted_origins: {text!r} is not an origin such as 'https://app.example.com'", param="trusted_origins")
    return origin
