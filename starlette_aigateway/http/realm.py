"""What an administrator may reach: everything, or what belongs to one tenant. What is out of reach does not exist."""

from __future__ import annotations

from ..errors import NotFound
from ..types import Key
from .door import Admin
from .exchange import Exchange


def tenant_asked(admin: Admin, asked: str | None) -> str | None:
    """The tenant that a request is about: a tenant's administrator need not name its own. Raises `NotFound` for another."""
    if admin.tenant is None:
        return asked
    if asked is not None and asked != admin.tenant:
        raise no_tenant(asked)
    return admin.tenant


def whole_gateway(admin: Admin) -> None:
    """Raises `NotFound` for an administrator of a tenant: this is about all of them."""
    if admin.tenant is not None:
        raise NotFound("there is no such route")


async def reachable_key(exchange: Exchange) -> Key:
    """The key that the path names. Raises `NotFound` also for one of a foreign tenant."""
    return await own_key(exchange, exchange.path["id"])


async def own_key(exchange: Exchange, key_id: str) -> Key:
    """The key `key_id`, if the administrator may touch it. Raises `NotFound` otherwise."""
    key = await exchange.administration.get_key(key_id)
    tenant = exchange.administrator.tenant
    if tenant is not None and key.tenant != tenant:
        raise NotFound(f"there is no key {key.id!r}", code="key_not_found")
    return key


def no_tenant(tenant: str) -> NotFound:
    return NotFound(f"there is no tenant {tenant!r}", code="tenant_not_found", param="tenant")
