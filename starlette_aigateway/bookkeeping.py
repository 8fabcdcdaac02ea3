"""The books as the host sees them: usage, budgets, credits, and whether the ledger holds what it promises. The HTTP routes ask the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypedDict, TypeVar

from . import money
from .accounts import (
    GATEWAY_SCOPE,
    AdminAction,
    AuditQuery,
    Budget,
    Credit,
    Finding,
    UsageQuery,
    UsageReport,
    principal_scope,
    tenant_scope,
)
from .errors import InvalidArgument, NotFound
from .money import Money
from .policy import keys as key_policy
from .policy.budgets import check_credit
from .policy.defaults import with_defaults
from .policy.retention import SHORTEST
from .protocols import Clock, KeyStore, Ledger, PriceStore, PromptStore, TenantStore
from .trail import HOST, Trail
from .types import KEY_ID_PREFIX, Caps, Key, Limits, Principal, Tenant, check_id, utc
from .wires.json_values import is_encodable

T = TypeVar("T")
MAX_PAGE = 1000
MAX_NOTE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Where a gateway keeps what its host administers, and how time and randomness come in."""

    keys: KeyStore
    tenants: TenantStore
    prices: PriceStore
    prompts: PromptStore
    ledger: Ledger
    trail: Trail
    default_limits: Limits | None
    clock: Clock
    random: Callable[[int], bytes]


class UsageFilters(TypedDict, total=False):
    """The arguments of `Bookkeeping.usage`."""

    principal: str | None
    tenant: str | None
    key_id: str | None
    model: str | None
    since: datetime | None
    until: datetime | None
    group_by: Sequence[str]
    limit: int
    cursor: str | None
    totals: bool


class Bookkeeping:
    """Usage, budgets, credits. Raises `NotFound` for what does not exist and `InvalidArgument` for what cannot be."""

    def __init__(self, stores: Stores) -> None:
        self._keys = stores.keys
        self._ledger = stores.ledger
        self._trail = stores.trail
        self._default_limits = stores.default_limits
        self._clock = stores.clock
        self._random = stores.random

    async def ready(self) -> None:
        """Starts what has to be started before a store is used."""

    async def usage(
        self,
        *,
        principal: str | None = None,
        tenant: str | None = None,
        key_id: str | None = None,
        model: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        group_by: Sequence[str] = (),
        limit: int = 100,
        cursor: str | None = None,
        totals: bool = True,
    ) -> UsageReport:
        """Totals and groups over what the filters match (`totals=False`: only the page), and one page of records, newest first. The range
        is half-open. Where records were rolled up (`retention=`, `prune_usage`) the report says before which midnight: there a range
        counts by whole UTC days, each as at its midnight, and pages have no records."""
        for name, value in (("principal", principal), ("tenant", tenant), ("key_id", key_id), ("model", model), ("cursor", cursor)):
            if not isinstance(value, str | None):
                raise InvalidArgument(f"{name} must be a string, not {type(value).__name__}", param=name)
        if isinstance(group_by, str) or not isinstance(group_by, Sequence):
            raise InvalidArgument("group_by must be a list of names", param="group_by")
        query = UsageQuery(
            principal=principal,
            tenant=tenant,
            key_id=key_id,
            model=model,
            since=_seconds(since, "since"),
            until=_seconds(until, "until"),
            group_by=tuple(group_by),
            limit=page_size(limit),
            cursor=cursor,
            totals=totals,
        )
        await self.ready()
        return await self._ledger.usage(query)

    async def budgets(
        self, principal: Principal | Key | str | None = None, *, tenant: Tenant | str | None = None, gateway: bool = False
    ) -> Sequence[Budget]:
        """Day, month and lifetime of each scope that a call of `principal` counts in: its own, its tenant's, and with `gateway` that of
        the gateway as a whole. A key's id, a key or a principal; or a tenant alone."""
        await self.ready()
        scopes: dict[str, Caps | None] = {}
        if isinstance(principal, str):
            key = await self._keys.get(principal)
            principal = key.principal if key is not None else Principal(principal)
        if isinstance(principal, Key):
            principal = principal.principal
        if principal is not None:
            scopes[principal_scope(principal.id)] = with_defaults(principal, self._default_limits).caps
            tenant = principal.tenant if tenant is None else tenant
        if isinstance(tenant, Tenant):
            scopes[tenant_scope(tenant.id)] = tenant.caps
        elif tenant is not None:
            scopes[tenant_scope(tenant)] = None
        if gateway:
            scopes[GATEWAY_SCOPE] = None
        return await self._ledger.budgets(scopes, now=self._clock())

    async def budgets_of_keys(self, keys: Sequence[Key], *, gateway: bool = False) -> Sequence[Sequence[Budget]]:
        """`budgets` of each key, in one question to the ledger."""
        await self.ready()
        of_key: list[list[str]] = []
        caps: dict[str, Caps | None] = {GATEWAY_SCOPE: None} if gateway else {}
        for key in keys:
            scopes = [principal_scope(key.id)]
            caps[scopes[0]] = with_defaults(key, self._default_limits).caps
            if key.tenant is not None:
                scopes.append(tenant_scope(key.tenant))
                caps[scopes[1]] = None
            of_key.append([*scopes, GATEWAY_SCOPE] if gateway else scopes)
        return await self._budgets_by_scope(of_key, caps)

    async def budgets_of_tenants(self, tenants: Sequence[Tenant]) -> Sequence[Sequence[Budget]]:
        """`budgets` of each tenant, in one question to the ledger."""
        await self.ready()
        scopes = [tenant_scope(tenant.id) for tenant in tenants]
        return await self._budgets_by_scope(
            [[scope] for scope in scopes], dict(zip(scopes, (tenant.caps for tenant in tenants), strict=True))
        )

    async def _budgets_by_scope(self, wanted: Sequence[Sequence[str]], caps: Mapping[str, Caps | None]) -> Sequence[Sequence[Budget]]:
        by_scope: dict[str, list[Budget]] = {}
        for budget in await self._ledger.budgets(caps, now=self._clock()):
            by_scope.setdefault(budget.scope, []).append(budget)
        return [[budget for scope in scopes for budget in by_scope[scope]] for scopes in wanted]

    # -- credits -----------------------------------------------------------------------------------------------------

    async def add_credit(
        self,
        principal: Principal | Key | str | None = None,
        amount: Money = 0,
        *,
        expires: datetime | timedelta,
        note: str = "",
        tenant: Tenant | str | None = None,
        gateway: bool = False,
        actor: str = HOST,
    ) -> Credit:
        """A temporary top-up in US dollars: until `expires` (a moment, or how long from now) it adds `amount` to every cap of a principal
        or a key (or their ids), of a `tenant`, or of the `gateway` as a whole. What was spent of it by then stays spent. `actor` and
        `note` stay in the books."""
        nano = money.nano(money.usd(amount, "amount"))
        if nano == 0:
            raise InvalidArgument("amount must be above zero", param="amount")
        if not isinstance(note, str) or len(note) > MAX_NOTE or not is_encodable(note):
            raise InvalidArgument(f"note must be a text of at most {MAX_NOTE} characters", param="note")
        check_id(actor, "actor")
        await self.ready()
        scope = await self._scope_of(principal, tenant, gateway)
        now = self._clock()
        until = now + expires.total_seconds() if isinstance(expires, timedelta) else _seconds(expires, "expires")
        if until is None or until <= now:
            raise InvalidArgument("expires must be a moment in the future, or how long the credit is to last", param="expires")
        credit_id = key_policy.mint_id("crd_", now, self._random)
        credit = Credit(id=credit_id, scope=scope, amount=nano, created_at=now, expires_at=until, actor=actor, note=note)
        check_credit(credit)
        details = {"scope": scope, "amount_usd": credit.amount_usd, "expires_at": utc(until)}
        await self._trail.record(actor, "credit.add", credit_id, await self._tenant_of(scope), details | ({"note": note} if note else {}))
        return await self._ledger.add_credit(credit)

    async def get_credit(self, credit_id: str) -> Credit:
        check_id(credit_id, "credit_id")
        await self.ready()
        return existing(await self._ledger.credit(credit_id), "credit", credit_id)

    async def end_credit(self, credit_id: str, *, actor: str = HOST) -> Credit:
        """Ends a credit before its time; what was spent of it stays spent. Ending it again changes nothing."""
        credit = await self.get_credit(credit_id)
        if credit.ended_at is not None:
            return credit
        await self._trail.record(actor, "credit.end", credit_id, await self._tenant_of(credit.scope), {"scope": credit.scope})
        return existing(await self._ledger.end_credit(credit_id, now=self._clock()), "credit", credit_id)

    async def list_credits(
        self,
        principal: Principal | Key | str | None = None,
        *,
        tenant: Tenant | str | None = None,
        gateway: bool = False,
        limit: int = 100,
        before: str | None = None,
    ) -> Sequence[Credit]:
        """Credits of one scope, or all, newest first, those that have ended too; at most `limit`, those older than the id `before`."""
        await self.ready()
        everyone = principal is None and tenant is None and not gateway
        scope = None if everyone else await self._scope_of(principal, tenant, gateway)
        return await self._ledger.credits(scope, limit=page_size(limit), before=before)

    async def _scope_of(self, principal: Principal | Key | str | None, tenant: Tenant | str | None, gateway: bool) -> str:
        """The one scope that is named. Raises `InvalidArgument` for none or several, `NotFound` for a key that does not exist."""
        if (principal is not None) + (tenant is not None) + bool(gateway) != 1:
            raise InvalidArgument("name one of principal, tenant and gateway", param="principal")
        if gateway:
            return GATEWAY_SCOPE
        if tenant is not None:
            return tenant_scope(tenant.id if isinstance(tenant, Tenant) else check_id(tenant, "tenant"))
        if isinstance(principal, Principal | Key):
            return principal_scope(principal.id)
        name = check_id(principal, "principal")
        if name.startswith(KEY_ID_PREFIX):
            existing(await self._keys.get(name), "key", name)
        return principal_scope(name)

    async def _tenant_of(self, scope: str) -> str | None:
        """Whose a scope is: a tenant's own, or the one of a stored key."""
        kind, _, name = scope.partition(":")
        if kind == "tenant":
            return name
        key = await self._keys.get(name) if kind == "principal" and name.startswith(KEY_ID_PREFIX) else None
        return None if key is None else key.tenant

    # -- what administrators did -------------------------------------------------------------------------------------

    async def audit(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
        tenant: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> Sequence[AdminAction]:
        """What administrators and the host's own code did to keys, tenants, prices, prompts and credits, newest first; at most `limit`,
        those older than the id `before`. The range is half-open. Each was written down before it was done, so that nothing is missing: of
        what stands here, a store that failed at that very moment may have kept the last step from being taken."""
        query = AuditQuery(
            actor=actor,
            action=action,
            subject=subject,
            tenant=tenant,
            since=_seconds(since, "since"),
            until=_seconds(until, "until"),
            limit=page_size(limit),
            before=before,
        )
        await self.ready()
        return await self._trail.store.list(query)

    # -- the ledger itself -------------------------------------------------------------------------------------------

    async def check_ledger(self) -> Sequence[Finding]:
        """Verifies the invariants of the ledger over everything stored; empty when they hold."""
        await self.ready()
        return await self._ledger.check()

    async def prune_ledger(self, before: datetime) -> int:
        """Replaces the entries of calls that were settled for good before `before` by their sums, so that the audit of a long life stays
        short. Budgets and usage records stay as they are. Gives the number of entries that are gone. Runs beside calls, in turns of
        some milliseconds."""
        moment = _seconds(before, "before")
        if moment is None or moment > self._clock():
            raise InvalidArgument("before must be a moment in the past", param="before")
        await self.ready()
        return await self._ledger.prune(moment)

    async def prune_usage(self, before: datetime) -> int:
        """Replaces the usage records of the UTC days that ended by `before` by their sums, and prunes the ledger's entries that belong to
        them: what `retention=` does by itself. They stay in the totals and groups of `usage`, by whole days, and are gone from its pages.
        What may still be adjusted stays. Gives the number of records that are gone. Runs beside calls, in turns of some milliseconds."""
        moment = _seconds(before, "before")
        if moment is None or moment > self._clock() - SHORTEST.total_seconds():
            raise InvalidArgument("before must be a moment at least a day ago", param="before")
        await self.ready()
        return await self._ledger.roll_up(moment)


def page_size(limit: Any) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE:
        raise InvalidArgument(f"limit must be an integer between 1 and {MAX_PAGE}", param="limit")
    return limit


def existing(value: T | None, what: str, name: str) -> T:
    if value is None:
        raise NotFound(f"there is no {what} {name!r}", code=f"{what}_not_found")
    return value


def _seconds(moment: datetime | None, name: str) -> float | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidArgument(f"{name} must be an aware datetime", param=name)
    return moment.timestamp()
