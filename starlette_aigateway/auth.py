"""Ready-made `authorize_admin` functions: by a bearer token, or by the scopes of Starlette's `AuthenticationMiddleware`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import HTTPConnection

from .errors import ConfigurationError
from .http.door import Admin
from .policy import keys

MIN_TOKEN_LENGTH = 32

AdminFunction = Callable[[HTTPConnection], Awaitable[Admin | bool]]


def bearer_admin(tokens: str | Mapping[str | Admin, str]) -> AdminFunction:
    """Administrators by `Authorization: Bearer <token>`: one token, whose actor is `admin`, or a mapping of actors to theirs. An
    actor is a name, or an `Admin` with a tenant.

    A token has at least 32 characters; `secrets.token_urlsafe(32)` makes one. Kept are digests only, which are compared in constant time.
    Raises `ConfigurationError` for a token that is empty, short, given twice or no ASCII, and for one that looks like a gateway's key.
    """
    named = {"admin": tokens} if isinstance(tokens, str) else tokens
    if not isinstance(named, Mapping) or not named:
        raise ConfigurationError("tokens must be a token, or a mapping of actors to tokens", param="tokens")
    admins = {_digest(token): _admin(actor) for actor, token in named.items()}
    if len(admins) != len(named):
        raise ConfigurationError("tokens: two actors have the same token, so nobody could tell who acted", param="tokens")

    async def authorize(connection: HTTPConnection) -> Admin | bool:
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode()).digest()
        found: Admin | bool = False
        for digest, admin in admins.items():
            if hmac.compare_digest(digest, given) and scheme.lower() == "bearer":
                found = admin
        return found

    return authorize


def scopes_admin(*scopes: str, tenant: Callable[[Any], str | None] | None = None) -> AdminFunction:
    """Administrators by the scopes that Starlette's `AuthenticationMiddleware` found: who has all of `scopes` is one. The actor is
    `request.user.display_name`; `tenant` tells from the user which tenant it administers, None for the whole gateway.

    Without the middleware around the gateway nobody gets in. Raises `ConfigurationError`, also for no scope at all.
    """
    if not scopes or not all(isinstance(scope, str) and scope for scope in scopes):
        raise ConfigurationError("scopes must be names of scopes, at least one", param="scopes")
    if tenant is not None and not callable(tenant):
        raise ConfigurationError("tenant must be a function of the user, which gives the id of a tenant or None", param="tenant")
    wanted = frozenset(scopes)

    async def authorize(connection: HTTPConnection) -> Admin | bool:
        if "auth" not in connection.scope or "user" not in connection.scope:
            raise ConfigurationError("scopes_admin needs Starlette's AuthenticationMiddleware around the gateway")
        user = connection.user
        if not user.is_authenticated or not wanted <= set(connection.auth.scopes):
            return False
        return Admin(user.display_name, None if tenant is None else tenant(user))

    return authorize


def _digest(token: object) -> bytes:
    if not isinstance(token, str) or len(token) < MIN_TOKEN_LENGTH:
        raise ConfigurationError(
            f"tokens must be texts of at least {MIN_TOKEN_LENGTH} characters; secrets.token_urlsafe(32) makes one", param="tokens"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError("tokens must be printable ASCII without blanks: a header carries them", param="tokens")
    if keys.looks_like_key(token):
        raise ConfigurationError(f"tokens must not start with {keys.PREFIX!r}: an API key is never an admin credential", param="tokens")
    return hashlib.sha256(token.encode()).digest()


def _admin(actor: object) -> Admin:
    return actor if isinstance(actor, Admin) else Admin(actor)  # type: ignore[arg-type]  # `Admin` checks what it is given
