"""What the host does around the calls: keys, tenants, prices, prompts. The HTTP admin routes do the same things."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Protocol, TypeAlias, Unpack, runtime_checkable

from .accounts import StoredPrompt, tenant_scope
from .bookkeeping import Bookkeeping, Stores, existing, page_size
from .errors import AuthenticationError, InvalidArgument
from .policy import keys as key_policy
from .policy import prompts as prompt_policy
from .prices import price_texts
from .trail import HOST
from .types import KEY_ID_PREFIX, Caps, Key, LimitFields, Message, Price, Principal, Tenant, check_id, limit_fields, utc

MAX_REMEMBERED = 8192
MAX_GRACE = 90 * 86_400
Grace: TypeAlias = "timedelta | float"


@runtime_checkable
class RemembersKeys(Protocol):
    """What a `KeyStore` may offer besides."""

    def recall(self, digest: bytes, *, now: float) -> Key | None:
        """What `find` would give, if it was asked for this digest before and knows that nothing has changed since; else None."""


class Administration(Bookkeeping):
    """Keys, tenants, prices, prompts. Raises `NotFound` for what does not exist and `InvalidArgument` for what cannot be.

    Whatever changes something is recorded with its `actor` (`audit`), before it is done; without a record nothing is done."""

    def __init__(self, stores: Stores) -> None:
        super().__init__(stores)
        self._tenants = stores.tenants
        self._stored_prices = stores.prices
        self._prompts = stores.prompts
        self._renderer = prompt_policy.Renderer()
        self._well_formed: set[bytes] = set()
        self._recall = self._keys.recall if isinstance(self._keys, RemembersKeys) else None

    # -- keys --------------------------------------------------------------------------------------------------------

    async def create_key(
        self,
        name: str,
        *,
        tenant: str | None = None,
        allowed_models: Sequence[str] | None = None,
        expires_at: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
        actor: str = HOST,
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
        given = {field: value for field, value in fields.items() if value is not None and value != {}}
        await self._trail.record(actor, "key.create", key.id, key.tenant, given)
        await self._keys.add(key, key_policy.digest(raw))
        return raw, key

    async def get_key(self, key_id: str) -> Key:
        await self.ready()
        return existing(await self._keys.get(check_id(key_id, "key_id")), "key", key_id)

    async def list_keys(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[Key]:
        """Keys in the order of their ids, at most `limit`, those after the id `after`."""
        await self.ready()
        return await self._keys.list(tenant=tenant, limit=page_size(limit), after=after)

    async def update_key(self, key_id: str, *, actor: str = HOST, **changes: Any) -> Key:
        """Sets the fields that are named; a limit of None is no limit. Holds from the next call on, in every worker."""
        checked = key_policy.key_changes(changes)
        key = await self.get_key(key_id)
        if not checked:
            return key
        await self._trail.record(actor, "key.update", key_id, key.tenant, checked)
        return existing(await self._keys.update(check_id(key_id, "key_id"), checked), "key", key_id)

    async def rotate_key(self, key_id: str, *, grace: Grace = 0, actor: str = HOST) -> tuple[str, Key]:
        """A new raw key for the same id. The one until now opens for `grace` more (seconds or a timedelta)."""
        seconds = grace.total_seconds() if isinstance(grace, timedelta) else grace
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_GRACE:
            raise InvalidArgument(f"grace must be between 0 and {MAX_GRACE} seconds", param="grace")
        current = await self.get_key(key_id)
        if current.revoked_at is not None:
            raise InvalidArgument(f"the key {key_id} is revoked; create a new one", param="key_id")
        await self._trail.record(actor, "key.rotate", key_id, current.tenant, {"grace_seconds": seconds})
        raw = key_policy.mint(self._random)
        key = await self._keys.rotate(key_id, key_policy.digest(raw), key_policy.hint(raw), previous_until=self._clock() + seconds)
        return raw, existing(key, "key", key_id)

    async def revoke_key(self, key_id: str, *, actor: str = HOST) -> Key:
        """Closes the key from the next call on, in every worker. Revoking again changes nothing."""
        current = await self.get_key(key_id)
        if current.revoked_at is not None:
            return current
        await self._trail.record(actor, "key.revoke", key_id, current.tenant)
        return existing(await self._keys.update(key_id, {"revoked_at": utc(self._clock())}), "key", key_id)

    async def authenticate(self, raw_key: str) -> Principal:
        """Who a raw key belongs to. Raises `AuthenticationError` for one that is mistyped, unknown, expired or revoked."""
        digest = self._checked_digest(raw_key)
        await self.ready()
        return await self._holder(digest)

    def _authenticate_ready(self, raw_key: str) -> Awaitable[Principal]:
        """The same, for whoever has seen to it that the gateway is `ready`."""
        return self._holder(self._checked_digest(raw_key))

    def recognised(self, raw_key: bytes) -> Principal | None:
        """Who a raw key belongs to, where that is known without a wait: it was looked up before, and nothing has changed since. None for
        every other one, which is for `authenticate` to tell. Raises `StorageUnavailable`."""
        if self._recall is None:
            return None
        now = self._clock()
        key = self._recall(sha256(raw_key).digest(), now=now)
        return key.principal if key is not None and key.usable_at(now) else None

    async def _holder(self, digest: bytes) -> Principal:
        now = self._clock()
        return key_policy.check(await self._keys.find(digest, now=now), now).principal

    async def principal_of(self, key_id: str) -> Principal:
        """Who a stored key is, by its id. Raises `AuthenticationError` as `authenticate` does."""
        check_id(key_id, "key_id")
        await self.ready()
        return key_policy.check(await self._keys.get(key_id), self._clock()).principal

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

    async def save_tenant(self, tenant: Tenant, *, actor: str = HOST) -> Tenant:
        """Creates the tenant or replaces all its limits; what it has spent stays."""
        if not isinstance(tenant, Tenant):
            raise InvalidArgument("tenant must be a Tenant", param="tenant")
        await self.ready()
        limits: dict[str, Any] = {**limit_fields(tenant)}
        await self._trail.record(
            actor, "tenant.save", tenant.id, tenant.id, {name: limit for name, limit in limits.items() if limit is not None}
        )
        await self._tenants.put(tenant)
        await self._show_caps(tenant)
        return tenant

    async def get_tenant(self, tenant_id: str) -> Tenant:
        await self.ready()
        return existing(await self._tenants.get(check_id(tenant_id, "tenant_id")), "tenant", tenant_id)

    async def update_tenant(self, tenant_id: str, *, actor: str = HOST, **changes: Any) -> Tenant:
        """Sets the limits that are named; None is no limit."""
        checked = key_policy.tenant_changes(changes)
        tenant = await self.get_tenant(tenant_id)
        if not checked:
            return tenant
        await self._trail.record(actor, "tenant.update", tenant_id, tenant_id, checked)
        tenant = existing(await self._tenants.update(check_id(tenant_id, "tenant_id"), checked), "tenant", tenant_id)
        await self._show_caps(tenant)
        return tenant

    async def _show_caps(self, tenant: Tenant) -> None:
        """Budgets show the caps that the ledger knows: at last those of whoever changed the tenant last. A call is held under those
        of the tenant's record."""
        told: Caps | None = None
        while told != tenant.caps:
            told = tenant.caps
            await self._ledger.set_caps(tenant_scope(tenant.id), told)
            tenant = await self._tenants.get(tenant.id) or tenant

    async def list_tenants(self, *, limit: int = 100, after: str | None = None) -> Sequence[Tenant]:
        await self.ready()
        return await self._tenants.list(limit=page_size(limit), after=after)

    # -- prices ------------------------------------------------------------------------------------------------------

    async def set_price(self, model: str, price: Price | None, *, provider: str | None = None, actor: str = HOST) -> None:
        """Stores the price of `model` (at `provider` only, if named) for all workers; it goes before `prices=`. None removes it."""
        if price is not None and not isinstance(price, Price):
            raise InvalidArgument("price must be a Price or None", param="price")
        check_id(model, "model")
        if provider is not None:
            check_id(provider, "provider")
        await self.ready()
        subject = model if provider is None else f"{provider}/{model}"
        await self._trail.record(actor, "price.set", subject, details={"price": None if price is None else price_texts(price)})
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
        actor: str = HOST,
    ) -> StoredPrompt:
        """Adds the next version: one text (a system message) or a list of role messages. `labels` move to it, `production` only if it
        is named or this is the first version."""
        draft = prompt_policy.check_prompt(name, messages, settings)
        moved = [prompt_policy.check_label(label) for label in labels]
        if tenant is not None:
            check_id(tenant, "tenant")
        await self.ready()
        await self._trail.record(
            actor,
            "prompt.save",
            draft.name,
            tenant,
            {"labels": moved, "messages": draft.messages} | ({"settings": draft.settings} if draft.settings else {}),
        )
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
        return existing(prompt, "prompt", name if version is None else f"{name}@{version}")

    async def list_prompts(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[StoredPrompt]:
        """The highest version of each prompt that `tenant` can see."""
        await self.ready()
        return await self._prompts.list(tenant=tenant, limit=page_size(limit), after=after)

    async def prompt_versions(self, name: str, *, tenant: str | None = None) -> Sequence[StoredPrompt]:
        """All versions, newest first."""
        await self.ready()
        return existing(await self._prompts.versions(name, tenant=tenant) or None, "prompt", name)

    async def activate_prompt(
        self, name: str, version: int, *, label: str = prompt_policy.PRODUCTION, tenant: str | None = None, actor: str = HOST
    ) -> StoredPrompt:
        """Points `label` at `version`, forward or back."""
        prompt_policy.check_label(label)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise InvalidArgument("version must be an integer of at least 1", param="version")
        await self.get_prompt(name, version=version, tenant=tenant)
        await self._trail.record(actor, "prompt.activate", name, tenant, {"label": label, "version": version})
        return existing(await self._prompts.move_label(name, label, version, tenant=tenant), "prompt", f"{name}@{version}")

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
