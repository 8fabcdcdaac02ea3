"""What the host does around the calls: keys, tenants, prices, prompts, usage and budgets. The HTTP admin routes do the same things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias, TypeVar, Unpack

from .accounts import (
    GATEWAY_SCOPE,
    Budget,
    Finding,
    StoredPrompt,
    UsageQuery,
    UsageReport,
    principal_scope,
    tenant_scope,
)
from .errors import AuthenticationError, InvalidArgument, NotFound
from .policy import keys as key_policy
from .policy import prompts as prompt_policy
from .policy.defaults import with_defaults
from .protocols import Clock, KeyStore, Ledger, PriceStore, PromptStore, TenantStore
from .types import KEY_ID_PREFIX, Caps, Key, LimitFields, Limits, Message, Price, Principal, Tenant, check_id, utc

T = TypeVar("T")
MAX_PAGE = 1000
MAX_REMEMBERED = 8192
MAX_GRACE = 90 * 86_400
Grace: TypeAlias = "timedelta | float"


class Administration:
    """Keys, tenants, prices, prompts, usage. Raises `NotFound` for what does not exist and `InvalidArgument` for what cannot be."""

    def __init__(
        self,
        *,
        keys: KeyStore,
        tenants: TenantStore,
        stored_prices: PriceStore,
        prompts: PromptStore,
        ledger: Ledger,
        default_limits: Limits | None,
        clock: Clock,
        random: Callable[[int], bytes],
    ) -> None:
        self._keys = keys
        self._tenants = tenants
        self._stored_prices = stored_prices
        self._prompts = prompts
        self._ledger = ledger
        self._default_limits = default_limits
        self._clock = clock
        self._random = random
        self._renderer = prompt_policy.Renderer()
        self._well_formed: set[bytes] = set()

    async def ready(self) -> None:
        """Starts what has to be started before a store is used."""

    # -- keys --------------------------------------------------------------------------------------------------------

    async def create_key(
        self,
        name: str,
        *,
        tenant: str | None = None,
        allowed_models: Sequence[str] | None = None,
        expires_at: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
        **limits: Unpack[LimitFields],
    ) -> tuple[str, Key]:
        """A new key: the raw key, which is told this once and never again, and what is stored of it."""
        fields = key_policy.key_changes(
            {"name": name, "tenant": tenant, "allowed_models": allowed_models, "expires_at": expires_at, "metadata": metadata, **limits}
        )
        await self.ready()
        now = self._clock()
        if fields["expires_at"] is not None and fields["expires_at"] <= utc(now):
            raise InvalidArgument("expires_at must be in the future", param="expires_at")
        raw = key_policy.mint(self._random)
        key = Key(id=key_policy.mint_id(KEY_ID_PREFIX, now, self._random), hint=key_policy.hint(raw), created_at=utc(now), **fields)
        await self._keys.add(key, key_policy.digest(raw))
        return raw, key

    async def get_key(self, key_id: str) -> Key:
        await self.ready()
        return _found(await self._keys.get(check_id(key_id, "key_id")), "key", key_id)

    async def list_keys(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[Key]:
        """Keys in the order of their ids, at most `limit`, those after the id `after`."""
        await self.ready()
        return await self._keys.list(tenant=tenant, limit=page_size(limit), after=after)

    async def update_key(self, key_id: str, **changes: Any) -> Key:
        """Sets the fields that are named; a limit of None is no limit. Holds from the next call on, in every worker."""
        checked = key_policy.key_changes(changes)
        await self.ready()
        return _found(await self._keys.update(check_id(key_id, "key_id"), checked), "key", key_id)

    async def rotate_key(self, key_id: str, *, grace: Grace = 0) -> tuple[str, Key]:
        """A new raw key for the same id. The one until now opens for `grace` more (seconds or a timedelta)."""
        seconds = grace.total_seconds() if isinstance(grace, timedelta) else grace
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_GRACE:
            raise InvalidArgument(f"grace must be between 0 and {MAX_GRACE} seconds", param="grace")
        await self.ready()
        current = await self.get_key(key_id)
        if current.revoked_at is not None:
            raise InvalidArgument(f"the key {key_id} is revoked; create a new one", param="key_id")
        raw = key_policy.mint(self._random)
        key = await self._keys.rotate(key_id, key_policy.digest(raw), key_policy.hint(raw), previous_until=self._clock() + seconds)
        return raw, _found(key, "key", key_id)

    async def revoke_key(self, key_id: str) -> Key:
        """Closes the key from the next call on, in every worker. Revoking again changes nothing."""
        await self.ready()
        current = await self.get_key(key_id)
        if current.revoked_at is not None:
            return current
        return _found(await self._keys.update(key_id, {"revoked_at": utc(self._clock())}), "key", key_id)

    async def authenticate(self, raw_key: str) -> Principal:
        """Who a raw key belongs to. Raises `AuthenticationError` for one that is mistyped, unknown, expired or revoked."""
        digest = self._checked_digest(raw_key)
        await self.ready()
        now = self._clock()
        return key_policy.check(await self._keys.find(digest, now=now), now).principal

    def _checked_digest(self, raw_key: str) -> bytes:
        """The digest of a key that is well formed. Those that were seen are remembered by their digest, never by themselves."""
        if not isinstance(raw_key, str) or not raw_key.isascii():
            raise AuthenticationError("an API key is a string of ASCII characters")
        digest = key_policy.digest(raw_key)
        if digest not in self._well_formed:
            if not key_policy.well_formed(raw_key):
                raise AuthenticationError("this is not a well-formed API key: a character is wrong or missing")
            if len(self._well_formed) >= MAX_REMEMBERED:
                self._well_formed.clear()
            self._well_formed.add(digest)
        return digest

    # -- tenants -----------------------------------------------------------------------------------------------------

    async def save_tenant(self, tenant: Tenant) -> Tenant:
        """Creates the tenant or replaces all its limits; what it has spent stays."""
        if not isinstance(tenant, Tenant):
            raise InvalidArgument("tenant must be a Tenant", param="tenant")
        await self.ready()
        await self._ledger.set_caps(tenant_scope(tenant.id), tenant.caps)
        await self._tenants.put(tenant)
        return tenant

    async def get_tenant(self, tenant_id: str) -> Tenant:
        await self.ready()
        return _found(await self._tenants.get(check_id(tenant_id, "tenant_id")), "tenant", tenant_id)

    async def update_tenant(self, tenant_id: str, **changes: Any) -> Tenant:
        """Sets the limits that are named; None is no limit."""
        checked = key_policy.tenant_changes(changes)
        await self.ready()
        tenant = _found(await self._tenants.update(check_id(tenant_id, "tenant_id"), checked), "tenant", tenant_id)
        await self._ledger.set_caps(tenant_scope(tenant.id), tenant.caps)
        return tenant

    async def list_tenants(self, *, limit: int = 100, after: str | None = None) -> Sequence[Tenant]:
        await self.ready()
        return await self._tenants.list(limit=page_size(limit), after=after)

    # -- prices ------------------------------------------------------------------------------------------------------

    async def set_price(self, model: str, price: Price | None, *, provider: str | None = None) -> None:
        """Stores the price of `model` (at `provider` only, if named) for all workers; it goes before `prices=`. None removes it."""
        if price is not None and not isinstance(price, Price):
            raise InvalidArgument("price must be a Price or None", param="price")
        check_id(model, "model")
        if provider is not None:
            check_id(provider, "provider")
        await self.ready()
        await self._stored_prices.put(provider, model, price)

    async def list_prices(self) -> Mapping[tuple[str | None, str], Price]:
        """Every stored price by `(provider or None, model)`; those given as `prices=` are not among them."""
        await self.ready()
        return await self._stored_prices.all()

    # -- prompts -----------------------------------------------------------------------------------------------------

    async def save_prompt(
        self,
        name: str,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        settings: Mapping[str, Any] | None = None,
        labels: Sequence[str] = (),
        tenant: str | None = None,
    ) -> StoredPrompt:
        """Adds the next version: one text (a system message) or a list of role messages. `labels` move to it, `production` only if it
        is named or this is the first version."""
        draft = prompt_policy.check_prompt(name, messages, settings)
        moved = [prompt_policy.check_label(label) for label in labels]
        if tenant is not None:
            check_id(tenant, "tenant")
        await self.ready()
        return await self._prompts.add(
            draft.name,
            draft.messages,
            settings=draft.settings,
            tenant=tenant,
            labels=moved,
            text=draft.text,
            created_at=utc(self._clock()),
        )

    async def get_prompt(
        self, name: str, *, version: int | None = None, label: str | None = None, tenant: str | None = None
    ) -> StoredPrompt:
        """By `version`, else by `label`, else the one under `production`."""
        await self.ready()
        prompt = await self._prompts.get(name, version=version, label=label, tenant=tenant)
        return _found(prompt, "prompt", name if version is None else f"{name}@{version}")

    async def list_prompts(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[StoredPrompt]:
        """The highest version of each prompt that `tenant` can see."""
        await self.ready()
        return await self._prompts.list(tenant=tenant, limit=page_size(limit), after=after)

    async def prompt_versions(self, name: str, *, tenant: str | None = None) -> Sequence[StoredPrompt]:
        """All versions, newest first."""
        await self.ready()
        return _found(await self._prompts.versions(name, tenant=tenant) or None, "prompt", name)

    async def activate_prompt(
        self, name: str, version: int, *, label: str = prompt_policy.PRODUCTION, tenant: str | None = None
    ) -> StoredPrompt:
        """Points `label` at `version`, forward or back."""
        prompt_policy.check_label(label)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise InvalidArgument("version must be an integer of at least 1", param="version")
        await self.ready()
        return _found(await self._prompts.move_label(name, label, version, tenant=tenant), "prompt", f"{name}@{version}")

    async def render_prompt(
        self,
        name: str,
        variables: Mapping[str, Any],
        *,
        version: int | None = None,
        label: str | None = None,
        tenant: str | None = None,
    ) -> Sequence[Message]:
        """The messages that a call with this reference would send."""
        prompt = await self.get_prompt(name, version=version, label=label, tenant=tenant)
        return self._renderer.render(prompt, variables)

    # -- usage and budgets -------------------------------------------------------------------------------------------

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
    ) -> UsageReport:
        """Totals and groups over what the filters match, and one page of records, newest first. The range is half-open."""
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

    async def check_ledger(self) -> Sequence[Finding]:
        """Verifies the invariants of the ledger over everything stored; empty when they hold."""
        await self.ready()
        return await self._ledger.check()


def page_size(limit: Any) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE:
        raise InvalidArgument(f"limit must be an integer between 1 and {MAX_PAGE}", param="limit")
    return limit


def _found(value: T | None, what: str, name: str) -> T:
    if value is None:
        raise NotFound(f"there is no {what} {name!r}", code=f"{what}_not_found")
    return value


def _seconds(moment: datetime | None, name: str) -> float | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidArgument(f"{name} must be an aware datetime", param=name)
    return moment.timestamp()
