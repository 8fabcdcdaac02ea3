"""Whose limits hold for a principal, and what follows from them for each of its calls."""

from __future__ import annotations

from msgspec import Struct

from .accounts import GATEWAY_SCOPE, ScopeClaim, principal_scope, tenant_scope
from .policy import caching
from .policy.caching import Scope
from .policy.defaults import with_defaults
from .policy.windows import WindowClaim
from .types import Limits, Principal

MAX_STANDINGS = 4096


class Standing(Struct, frozen=True, kw_only=True):
    """`scopes` are those that pay, `windows` those that each call has to pass, with the amount of one request or token, in the fixed
    order in which all of them are taken; `requests` are those that count requests alone. `capped`: there is a spend cap in any scope.
    `shared_by` is who else is given this principal's cached answers."""

    principal: Principal
    tenant: Limits
    scopes: tuple[ScopeClaim, ...]
    capped: bool
    windows: tuple[WindowClaim, ...]
    requests: tuple[WindowClaim, ...]
    shared_by: str

    @property
    def counts_tokens(self) -> bool:
        return len(self.windows) > len(self.requests)

    def claims(self, tokens: int) -> tuple[WindowClaim, ...]:
        """What a call of so many `tokens` has to pass."""
        return tuple(
            [
                claim if claim.kind == "requests" else WindowClaim(claim.scope, "tokens", claim.limit, tokens, claim.seconds)
                for claim in self.windows
            ]
        )


class Standings:
    """Worked out once for each principal, for as long as it and its tenant stay what they are. `gateway` are the limits of the gateway as
    a whole, `defaults` those of principals that bring none of a kind."""

    def __init__(self, gateway: Limits, defaults: Limits | None, cache_scope: Scope) -> None:
        self._gateway = gateway
        self._defaults = defaults
        self._cache_scope = cache_scope
        self._known: dict[str, Standing] = {}

    def of(self, principal: Principal, tenant: Limits) -> Standing:
        known = self._known.get(principal.id)
        if known is not None:
            if known.principal is principal and known.tenant is tenant:
                return known
            if known.principal == principal and known.tenant == tenant:
                return known
        if len(self._known) >= MAX_STANDINGS:
            self._known.clear()
        standing = self._known[principal.id] = self._made(principal, tenant)
        return standing

    def _made(self, principal: Principal, tenant: Limits) -> Standing:
        owners: list[tuple[str, Limits]] = [(principal_scope(principal.id), with_defaults(principal, self._defaults))]
        if principal.tenant_id is not None:
            owners.append((tenant_scope(principal.tenant_id), tenant))
        owners.append((GATEWAY_SCOPE, self._gateway))
        windows = tuple(claim for scope, limits in owners for claim in _windows(scope, limits))
        return Standing(
            principal=principal,
            tenant=tenant,
            scopes=tuple(_scope(scope, limits) for scope, limits in owners),
            capped=any(limits.capped for _, limits in owners),
            windows=windows,
            requests=tuple(claim for claim in windows if claim.kind == "requests"),
            shared_by=caching.shared_by(self._cache_scope, principal),
        )


def _windows(scope: str, limits: Limits) -> list[WindowClaim]:
    claims: list[WindowClaim] = []
    if limits.requests_per_minute is not None:
        claims.append(WindowClaim(scope, "requests", limits.requests_per_minute))
    if limits.tokens_per_minute is not None:
        claims.append(WindowClaim(scope, "tokens", limits.tokens_per_minute))
    return claims


def _scope(scope: str, limits: Limits) -> ScopeClaim:
    """The gateway's caps are None, which is the stored ones: all workers share them, also those with other settings. A tenant's are those
    that its record shows."""
    return ScopeClaim(scope, None if scope == GATEWAY_SCOPE else limits.caps, limits.max_parallel_requests)
