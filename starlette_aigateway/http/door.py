"""Who is at the door: the credential of a connection becomes a `Principal`, or an `Admin`, or an error."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from ..errors import AuthenticationError, NotFound, PermissionDenied
from ..limiter import Limiter
from ..policy import keys
from ..policy.windows import WindowClaim
from ..types import Principal, check_id
from .credentials import credential, misplaced_key
from .origins import Origins
from .questions import ask, check_function, login_unavailable

FAILED_LOGINS_PER_MINUTE = 60
UNAUTHENTICATED = 401
BEARER = b"Bearer "
PREFIX = keys.PREFIX.encode()
log = logging.getLogger("starlette_aigateway")


class Admin(Struct, frozen=True):
    """Who administers. With a `tenant`, only what belongs to that tenant. Raises `InvalidArgument`."""

    actor: str
    tenant: str | None = None

    def __post_init__(self) -> None:
        check_id(self.actor, "actor")
        if self.tenant is not None:
            check_id(self.tenant, "tenant")


ResolvePrincipal: TypeAlias = Callable[[HTTPConnection], Awaitable[Principal | None]]
AuthorizeAdmin: TypeAlias = Callable[[HTTPConnection], Awaitable[Admin | bool]]


class Door:
    """Is asked when the gateway is ready. Raises `ConfigurationError` for functions of the host that cannot be asked."""

    def __init__(
        self,
        *,
        authenticate: Callable[[str], Awaitable[Principal]],
        recognise: Callable[[bytes], Principal | None],
        resolve_principal: ResolvePrincipal | None,
        authorize_admin: AuthorizeAdmin | None,
        origins: Origins,
        limiter: Limiter,
    ) -> None:
        if resolve_principal is not None:
            check_function(resolve_principal, "resolve_principal")
        if authorize_admin is not None:
            check_function(authorize_admin, "authorize_admin")
        self._authenticate = authenticate
        self._recognise = recognise
        self._resolve_principal = resolve_principal
        self._authorize_admin = authorize_admin
        self.has_admins = authorize_admin is not None
        self._origins = origins
        self._limiter = limiter

    async def principal(self, connection: HTTPConnection) -> Principal:
        """Raises `AuthenticationError`; `RateLimitExceeded` in its place for an address that keeps failing. What the host's resolver
        refuses with an `HTTPException` below 500 is raised as it is; whatever else it does wrong lets nobody through."""
        given = credential(connection)
        try:
            if given is not None and keys.looks_like_key(given):
                return await self._authenticate(given)
            _refuse_misplaced(connection)
            if self._resolve_principal is not None:
                principal = await ask(self._resolve_principal, connection, "resolve_principal")
                if principal is not None:
                    return _expect(principal)
            raise _unknown(given)
        except AuthenticationError:
            await self._slow_down(connection)
            raise
        except HTTPException as refusal:
            if refusal.status_code == UNAUTHENTICATED:
                await self._slow_down(connection)
            raise

    def recognised(self, first: Mapping[bytes, bytes]) -> Principal | None:
        """The caller with these headers (`first_of`), where nothing has to be waited for and nothing looked at more closely: a stored key
        that is known already came alone. None for all else, which is for `caller` to say."""
        if b"cookie" in first:
            return None
        given = first.get(b"authorization")
        if given is None:
            key = first.get(b"x-api-key", b"")
        elif given.startswith(BEARER):
            key = given[len(BEARER) :]
        else:
            return None
        return self._recognise(key) if key.startswith(PREFIX) else None

    def caller(self, connection: HTTPConnection) -> Awaitable[Principal]:
        """`principal`, of a request to the gateway's own routes: a page of another site may not spend by its visitor's login. Raises
        `PermissionDenied`."""
        self._origins.check(connection)
        return self.principal(connection)

    async def _slow_down(self, connection: HTTPConnection) -> None:
        """Counts a failed login of this address. A valid credential never comes here, so none is ever refused for it."""
        address = connection.client.host if connection.client is not None else "unknown"
        await self._limiter.admit([WindowClaim(f"login:{address}", "requests", FAILED_LOGINS_PER_MINUTE)])

    async def admin_if_any(self, connection: HTTPConnection) -> Admin | None:
        """The administrator who sent this, None for anybody else."""
        if self._authorize_admin is None:
            return None
        try:
            return await self._admin_of(connection)
        except (AuthenticationError, PermissionDenied, HTTPException):
            return None

    async def admin(self, connection: HTTPConnection) -> Admin:
        """As `_admin_of`, and an address that keeps failing is slowed."""
        try:
            return await self._admin_of(connection)
        except (AuthenticationError, PermissionDenied):
            await self._slow_down(connection)
            raise

    async def _admin_of(self, connection: HTTPConnection) -> Admin:
        """Raises `NotFound` where the host has no admins, `PermissionDenied` for everybody else. A data key is never an admin key."""
        if self._authorize_admin is None:
            raise NotFound("there is no such route")
        given = credential(connection)
        if given is not None and keys.looks_like_key(given):
            raise PermissionDenied("an API key for calls is not an admin credential")
        _refuse_misplaced(connection)
        self._origins.check(connection)
        answer = await ask(self._authorize_admin, connection, "authorize_admin")
        if isinstance(answer, Admin):
            return answer
        if answer is True:
            return Admin("host")
        if answer is False or answer is None:
            raise PermissionDenied("this is for administrators")
        log.error("authorize_admin returned %s; it must return an Admin or a bool", type(answer).__name__)
        raise login_unavailable()


def _refuse_misplaced(connection: HTTPConnection) -> None:
    where = misplaced_key(connection)
    if where is not None:
        raise AuthenticationError(
            f"an API key of this gateway came in {where}: send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'"
        )


def _expect(principal: object) -> Principal:
    if not isinstance(principal, Principal):
        log.error("resolve_principal returned %s; it must return a Principal or None", type(principal).__name__)
        raise login_unavailable()
    return principal


def _unknown(given: str | None) -> AuthenticationError:
    if given is None:
        return AuthenticationError("no API key: send 'Authorization: Bearer <key>' or 'x-api-key: <key>'")
    return AuthenticationError(f"this credential is not known; API keys start with {keys.PREFIX!r}")
